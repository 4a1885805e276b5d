"""
Which version of a model answers requests that name none: its default, and canaries that get a share of them.

An operator says so in a small file in the model repository, which is read again whenever it has changed. Without one,
the highest version that is ready answers.
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from gateway.errors import RouteError

Number = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(gt=0, lt=1)]


def path_of(repository: Path, model: str) -> Path:
    """Return where a model's route is."""
    return repository / f"{model}.route.json"


class Route(BaseModel):
    """What an operator wants for one model."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    default: Number
    """The version that answers."""
    canary: Mapping[Number, Share] = {}
    """
    By version, the share of requests that it answers instead, 0..1; together less than all of them.

    Each request is drawn anew, so one caller, or one stream, gets answers of several versions.
    """

    @model_validator(mode="after")
    def _leave_the_default_something(self) -> Self:
        if self.default in self.canary:
            raise ValueError(f"canary: version {self.default} is the default already")
        if (total := sum(self.canary.values())) >= 1:
            raise ValueError(f"canary: {total:.0%} together; the default has to keep something")
        return self

    @classmethod
    def of(cls, default: int, canary: Mapping[int, float]) -> Self:
        """
        Return a route that makes sense.

        Raises:
            RouteError: It does not; names the field and what is allowed.
        """
        try:
            return cls(default=default, canary=canary)
        except ValidationError as error:
            raise RouteError(_first(error)) from error

    @classmethod
    def parse(cls, content: bytes) -> Self:
        """
        Read what a file holds.

        Raises:
            RouteError: It is no route; names the field and what is allowed.
        """
        try:
            return cls.model_validate_json(content, strict=True)
        except ValidationError as error:
            raise RouteError(_first(error)) from error

    @property
    def versions(self) -> tuple[int, ...]:
        """Every version that it names, the default first."""
        return self.default, *self.canary

    def __str__(self) -> str:
        return ", ".join((str(self.default), *(f"{one} for {share:.3g}" for one, share in self.canary.items())))


@dataclass(frozen=True, slots=True)
class Split:
    """What becomes of a route, given the versions that are ready."""

    default: int
    bounds: tuple[tuple[int, float], ...] = ()
    """Canaries, each with the end of its part of 0..1; the first begins at 0, and the default has what is left."""
    problem: str = ""
    """What keeps the route from being followed; empty where nothing does."""

    def choose(self, draw: float) -> int:
        """Return the version for a number that is equally likely to be anywhere in 0..1."""
        for version, bound in self.bounds:
            if draw < bound:
                return version
        return self.default

    @property
    def versions(self) -> tuple[int, ...]:
        """Every version that it sends callers to, the default first."""
        return self.default, *(version for version, _ in self.bounds)


def split(route: Route | None, ready: Collection[int]) -> Split:
    """
    Divide callers among the versions that are ready, of which there is one at least.

    A canary that is not ready leaves its share to the default. In place of a default that is not ready the highest
    version answers, all callers: what the shares were meant to protect is not there.
    """
    if route is None:
        return Split(max(ready))
    if route.default not in ready:
        return Split(max(ready), problem=f"version {route.default} is not ready; {max(ready)}, the highest, answers")
    bounds, end = [], 0.0
    for version, share in route.canary.items():
        if version in ready:
            end += share
            bounds.append((version, end))
    absent = ", ".join(str(version) for version in route.canary if version not in ready)
    problem = f"canary {absent} is not ready; {route.default} answers instead" if absent else ""
    return Split(route.default, tuple(bounds), problem)


@dataclass(frozen=True, slots=True)
class _Kept:
    """What was read last."""

    stamp: tuple[int, ...] = ()
    route: Route | None = None
    problem: str = ""


class Routes:
    """
    The routes of a repository, each read again when its file has changed.

    Args:
        repository: Only read.
    """

    def __init__(self, repository: Path) -> None:
        self._repository = repository
        self._kept: dict[str, _Kept] = {}

    def look(self, models: Iterable[str]) -> None:
        """Read what has changed for these models, and forget the others."""
        self._kept = {model: self._look_at(model) for model in models}

    def of(self, model: str) -> Route | None:
        """Return a model's route as of the last look; the one before, where its file is damaged."""
        return self._kept.get(model, _Kept()).route

    def problem(self, model: str) -> str:
        """Return what is wrong with its file, empty where nothing is."""
        return self._kept.get(model, _Kept()).problem

    def _look_at(self, model: str) -> _Kept:
        path, kept = path_of(self._repository, model), self._kept.get(model, _Kept())
        try:
            found = path.stat()
            stamp = found.st_mtime_ns, found.st_ino, found.st_size
            return kept if stamp == kept.stamp else _Kept(stamp, Route.parse(path.read_bytes()))
        except FileNotFoundError:
            return _Kept()
        except (OSError, RouteError) as error:
            # Without its stamp: it is read again until it is whole.
            reason = error.strerror if isinstance(error, OSError) else error
            return _Kept((), kept.route, f"{path}: {reason}; followed is {kept.route or 'no route'}")


def _first(error: ValidationError) -> str:
    problem = error.errors()[0]
    place = ".".join(str(part) for part in problem["loc"] if part != "[key]")
    words = problem["msg"].removeprefix("Value error, ")
    return f"{place}: {words}" if place else words
