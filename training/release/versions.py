"""The versions of a model on disk: those that are served, those that were withdrawn, and the way between."""

import json
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from training.errors import PublishError
from training.release import manifest

_VERSION = re.compile(r"[1-9][0-9]*")
# The leading dot keeps Triton from seeing it.
_WITHDRAWN = re.compile(r"\.withdrawn-([1-9][0-9]*)")


def published(model: Path) -> list[int]:
    """Return the versions that Triton can see, ascending; empty where there is no such folder."""
    return sorted(int(name) for name in _names(model) if _VERSION.fullmatch(name))


def withdrawn(model: Path) -> list[int]:
    """Return the versions that were taken out of sight, ascending."""
    return sorted(int(match[1]) for name in _names(model) if (match := _WITHDRAWN.fullmatch(name)))


def routed(model: Path) -> list[int]:
    """
    Return the versions that a route sends callers to, the default first; empty where there is none that can be read.

    The route lies beside the model's folder, in ``<model>.route.json``: Triton loads every version anew where a file in
    the folder has changed. Who follows it, and says what is wrong with it, is the gateway.
    """
    try:
        route = json.loads(model.with_name(f"{model.name}.route.json").read_bytes())
        return [int(route["default"]), *map(int, route.get("canary", ()))]
    except (OSError, ValueError, TypeError, LookupError, AttributeError):
        return []


def next_version(model: Path) -> int:
    """Return the number after the highest version there ever was, 1 when there was none."""
    return max((*published(model), *withdrawn(model)), default=0) + 1


def withdraw(model: Path, version: int) -> None:
    """Take a version out of Triton's sight; one that runs goes on until Triton is told to load the model."""
    _rename(model, [(str(version), _hidden(version))])


@dataclass(frozen=True, slots=True)
class Rollback:
    """A version made the newest in sight."""

    model: Path
    version: int
    withdrawn: tuple[int, ...]
    """Versions above it, which are out of sight now."""
    restored: bool
    """Whether it was out of sight before."""

    def undo(self) -> None:
        """Put every folder back to where it was."""
        moves = [(_hidden(version), str(version)) for version in self.withdrawn]
        _rename(self.model, moves + ([(str(self.version), _hidden(self.version))] if self.restored else []))


def roll_back(model: Path, to: int | None = None) -> Rollback:
    """
    Make an earlier version the newest in sight: those above it are withdrawn, and it is brought back if it was.

    Nothing is deleted: rolling back to a withdrawn version undoes a rollback. Triton has to be told afterwards.

    Args:
        model: The model's folder in the repository.
        to: The version; none takes the one below the newest.

    Raises:
        PublishError: There is no such version, or callers are routed to one that would be withdrawn.
        ManifestError: It is not what was published.
    """
    seen, hidden = published(model), withdrawn(model)
    if to is None:
        if len(seen) < 2:
            raise PublishError(f"{model}: nothing to roll back to; in sight: {_list(seen)}, withdrawn: {_list(hidden)}")
        to = seen[-2]
    if to not in seen and to not in hidden:
        raise PublishError(f"{model}: no version {to}; in sight: {_list(seen)}, withdrawn: {_list(hidden)}")
    above = tuple(version for version in seen if version > to)
    if lost := [version for version in routed(model) if version in above]:
        raise PublishError(
            f"{model}: callers are routed to version {_list(lost)}, which this would withdraw; "
            f"`sluice route {model.name} --default {to}` sends them to {to} at once, and lets you withdraw it then"
        )
    restored = to not in seen
    manifest.verify(model / (_hidden(to) if restored else str(to)), model=model.name, version=to)
    # First what is brought back, so that there is a version at every moment.
    moves = [(_hidden(to), str(to))] if restored else []
    _rename(model, moves + [(str(version), _hidden(version)) for version in above])
    return Rollback(model, to, above, restored)


def sync(*paths: Path) -> None:
    """Wait until files, or the names in folders, are on disk."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _names(model: Path) -> list[str]:
    return [entry.name for entry in model.iterdir()] if model.is_dir() else []


def _hidden(version: int) -> str:
    return f".withdrawn-{version}"


def _rename(model: Path, moves: Iterable[tuple[str, str]]) -> None:
    try:
        for old, new in moves:
            (model / old).rename(model / new)
        sync(model)
    except OSError as error:
        raise PublishError(f"{model}: cannot rename {old} to {new}: {error.strerror}") from error


def _list(versions: Iterable[int]) -> str:
    return ", ".join(map(str, versions)) or "none"
