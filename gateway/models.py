"""Which models and versions can be asked for now, and what their cards say about them."""

import asyncio
import random
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Literal, Protocol

import structlog
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from gateway.errors import GatewayError, UnknownModelError, UnknownVersionError, UpstreamUnavailableError
from gateway.routing import Routes, Split, split

log = structlog.get_logger(__name__)

# Least time from one look to the next: callers of what is not there cause as many as this, and no more.
_LOOK_SECONDS = 0.1
_TRAIN = "train one with `sluice train`, in containers with `docker compose run --rm train`"


class DatasetCard(BaseModel):
    """What a version was trained on."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    name: str = ""
    num_train: int = 0
    """Samples in the training split."""
    fingerprint: str = ""
    """Hex digest of the data."""


class Card(BaseModel):
    """``card.json`` of one version: what Triton cannot tell. Everything has a default; unknown fields are ignored."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    schema_number: int = Field(1, alias="schema")
    model: str = ""
    version: int = 0
    created: datetime | None = None
    class_names: tuple[str, ...] = ()
    """By class index; empty: the index as text."""
    image_shape: tuple[int, ...] = (28, 28)
    """Height and width, in pixels."""
    polarity: Literal["auto", "light_on_dark", "dark_on_light"] = "auto"
    """What a request that leaves it open gets."""
    framing: Literal["auto", "center", "stretch"] = "auto"
    """What a request that leaves it open gets."""
    device: str = "any"
    precision: str = "float32"
    digest: str = ""
    """``sha256:...`` of the weights."""
    metrics: Mapping[str, float] = {}
    dataset: DatasetCard = DatasetCard()


class LoadedVersion(Protocol):
    """What the catalog has to know of a version that Triton has ready."""

    @property
    def name(self) -> str: ...  # noqa: D102 - the class says it
    @property
    def version(self) -> int: ...  # noqa: D102 - the class says it
    @property
    def num_classes(self) -> int: ...  # noqa: D102 - the class says it
    @property
    def embedding_width(self) -> int: ...  # noqa: D102 - the class says it
    @property
    def max_batch_size(self) -> int: ...  # noqa: D102 - the class says it
    @property
    def num_instances(self) -> int: ...  # noqa: D102 - the class says it


class Source(Protocol):
    """Who knows what is ready: the Triton adapter."""

    async def ready_versions(self) -> Sequence[LoadedVersion]:
        """
        Return every ready version that keeps the gateway's contract.

        Raises:
            GatewayError: It could not be found out.
        """
        ...


@dataclass(frozen=True, slots=True)
class ServedVersion:
    """One version of a model that answers now."""

    name: str
    version: int
    class_names: tuple[str, ...]
    """By class index, as many as there are classes."""
    embedding_width: int
    """Numbers in an embedding; 0 where the model gives none."""
    max_batch_size: int
    """Most images Triton takes in one request."""
    card: Card
    num_instances: int = 1
    """How many requests run at once, over all Tritons that work."""


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A model and its versions that answer now."""

    name: str
    versions: tuple[ServedVersion, ...]
    """Highest first; never empty."""
    is_default: bool
    split: Split
    """How those who name no version are divided among them."""

    @property
    def default(self) -> ServedVersion:
        """What a request without a version gets, canaries aside."""
        return self._numbered(self.split.default)

    @property
    def routed(self) -> tuple[ServedVersion, ...]:
        """What requests without a version may get, the default first."""
        return tuple(self._numbered(version) for version in self.split.versions)

    def chosen(self, draw: float) -> ServedVersion:
        """Return what a request without a version gets, for a number that is equally likely anywhere in 0..1."""
        return self._numbered(self.split.choose(draw))

    def _numbered(self, version: int) -> ServedVersion:
        return next(one for one in self.versions if one.version == version)


class Catalog:
    """
    Every model and version that can be asked for, as of the last refresh.

    Args:
        source: Asked at every refresh.
        repository: Holds ``<model>/<version>/card.json`` and the routes; only read.
        default_model: What a request without a name gets.
        draw: Returns numbers equally likely anywhere in 0..1, by which canaries get their share.
        may_list: Whether the caller may know which models and versions there are, which errors then name.
        on_refresh: Told what can be asked for after each refresh.
    """

    def __init__(
        self,
        source: Source,
        *,
        repository: Path,
        default_model: str,
        draw: Callable[[], float] = random.random,
        may_list: Callable[[], bool] = lambda: True,
        on_refresh: Callable[[Sequence[ServedModel]], None] = lambda models: None,
    ) -> None:
        self._source = source
        self._repository = repository
        self._default_model = default_model
        self._draw = draw
        self._may_list = may_list
        self._on_refresh = on_refresh
        self._routes = Routes(repository)
        self._models: dict[str, ServedModel] = {}
        self._proven: Collection[tuple[str, int]] = ()
        self._complaints: set[tuple[str, str]] = set()
        self._looking: asyncio.Task[None] | None = None
        self._looked_at = -_LOOK_SECONDS
        # Waits for that look to end.
        self._next: asyncio.Task[None] | None = None

    @property
    def default_model(self) -> str:
        """Name of the default model, loaded or not."""
        return self._default_model

    async def refresh(self) -> None:
        """
        Learn anew what is ready, by a look that begins after the call.

        Calls at the same time share one, which a cancelled caller does not end. Looks begin 0.1 s after each other at
        the soonest, whoever asks for them.

        Raises:
            GatewayError: It could not be found out; the last answer stays.
        """
        if self._next is None:
            self._next = asyncio.create_task(self._refresh_in_turn())
            self._next.add_done_callback(_see)
        await asyncio.shield(self._next)

    async def find(self, name: str, version: int) -> ServedVersion:
        """
        Return the version a request asks for, with a look at what was loaded just now where it is not known yet.

        Args:
            name: Empty for the default model.
            version: 0 for the one that the model's route says.

        Raises:
            UnknownModelError: No such model is loaded.
            UnknownVersionError: The model has no such version.
            UpstreamUnavailableError: Triton does not answer, or the default model is wanted and not loaded yet.
        """
        try:
            return self.known(name, version)
        except GatewayError:
            await self.refresh()
            return self.known(name, version)

    def known(self, name: str, version: int) -> ServedVersion:
        """Return what :meth:`find` does, as of the last refresh and without another; raises the same."""
        model = self._models.get(name or self._default_model)
        if model is None:
            raise self._unknown_model(name)
        if version == 0:
            return self._routed(model)
        for served in model.versions:
            if served.version == version:
                return served
        there = ", ".join(str(served.version) for served in model.versions)
        known = f"; served are {there}" if self._may_list() else ""
        raise UnknownVersionError(f"model_version: {model.name} has no version {version}{known}")

    def routed(self, name: str) -> int:
        """Return the version that a request to a model gets if it names none; 0 where there is no such model."""
        model = self._models.get(name)
        return self._routed(model).version if model is not None else 0

    def listing(self) -> list[ServedModel]:
        """Return what can be asked for, by name."""
        return [self._models[name] for name in sorted(self._models)]

    def prove(self, versions: Collection[tuple[str, int]]) -> None:
        """Take in by which models and versions the latest inference worked: no other canary gets anybody."""
        self._proven = versions

    def _routed(self, model: ServedModel) -> ServedVersion:
        if not model.split.bounds:
            return model.default
        chosen = model.chosen(self._draw())
        return chosen if (chosen.name, chosen.version) in self._proven else model.default

    def _unknown_model(self, name: str) -> GatewayError:
        if not name and not self._models:
            return UpstreamUnavailableError(f"no model is loaded yet; {_TRAIN}")
        if not name:
            loaded = f"; loaded are {', '.join(sorted(self._models))}" if self._may_list() else ""
            return UpstreamUnavailableError(f"the default model {self._default_model} is not loaded{loaded}")
        known = f"; none is loaded; {_TRAIN}"
        if self._models:
            known = f"; loaded are {', '.join(sorted(self._models))}" if self._may_list() else ""
        return UnknownModelError(f"model: no model {name[:64]!a}{known}")

    async def _refresh_in_turn(self) -> None:
        if self._looking is not None:
            await asyncio.wait((self._looking,))
        loop = asyncio.get_running_loop()
        await asyncio.sleep(max(self._looked_at + _LOOK_SECONDS - loop.time(), 0))
        self._looked_at = loop.time()
        # Who comes from here on may know of what this look does not see.
        self._looking, self._next = self._next, None
        await self._refresh()

    async def _refresh(self) -> None:
        loaded = await self._source.ready_versions()
        cards = await asyncio.to_thread(self._read, loaded)
        complaints: set[tuple[str, str]] = set()
        versions: dict[str, list[ServedVersion]] = {}
        for one, card in zip(loaded, cards, strict=True):
            if card is None:
                card = self._card_before(one.name, one.version)
            if isinstance(card, str):
                complaints.add(("card ignored", card))
                card = Card()
            if card.class_names and len(card.class_names) != one.num_classes:
                complaints.add(
                    (
                        "card ignored",
                        f"card of {one.name} version {one.version}: {len(card.class_names)} class names for "
                        f"{one.num_classes} classes",
                    )
                )
            versions.setdefault(one.name, []).append(_served(one, card))
        models = {name: self._model(name, ones) for name, ones in versions.items()}
        for name, model in models.items():
            problems = self._routes.problem(name), model.split.problem and f"{name}: {model.split.problem}"
            complaints.update(("route not followed", problem) for problem in problems if problem)
        # Once, and not at every refresh.
        for event, reason in complaints - self._complaints:
            log.warning(event, reason=reason)
        self._complaints = complaints
        self._models = models
        self._on_refresh(list(models.values()))

    def _read(self, loaded: Sequence[LoadedVersion]) -> list[Card | str | None]:
        self._routes.look({version.name for version in loaded})
        return [_read_card(self._repository, version.name, version.version) for version in loaded]

    def _model(self, name: str, versions: Sequence[ServedVersion]) -> ServedModel:
        route = self._routes.of(name)
        return ServedModel(
            name,
            tuple(sorted(versions, key=lambda one: -one.version)),
            name == self._default_model,
            split(route, [one.version for one in versions]),
        )

    def _card_before(self, name: str, version: int) -> Card:
        """Return what was known of a version without a card: one that is withdrawn answers as before to its end."""
        model = self._models.get(name)
        known = (served.card for served in model.versions if served.version == version) if model else iter(())
        return next(known, Card())


def _served(loaded: LoadedVersion, card: Card) -> ServedVersion:
    names = card.class_names
    if len(names) != loaded.num_classes:
        names = tuple(str(index) for index in range(loaded.num_classes))
    return ServedVersion(
        loaded.name,
        loaded.version,
        names,
        loaded.embedding_width,
        loaded.max_batch_size,
        card,
        num_instances=loaded.num_instances,
    )


def _see(look: asyncio.Task[None]) -> None:
    # Marks the error as seen: every caller who wanted it may have gone.
    if not look.cancelled():
        look.exception()


def _read_card(repository: Path, name: str, version: int) -> Card | str | None:
    """Return the card, none where there is none, or what is wrong with it."""
    path = repository / name / str(version) / "card.json"
    try:
        return Card.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except OSError as error:
        return str(error)
    except ValidationError as error:
        problem = error.errors()[0]
        return f"{path}: {'.'.join(map(str, problem['loc']))}: {problem['msg']}"
