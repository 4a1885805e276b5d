"""
A run's state on disk: tensors as safetensors, the rest as JSON; no pickle, and never half-written.

A checkpoint is a folder ``step-00001234`` with a manifest of SHA-256 digests. It gets that name when all of it is on
disk, and is never changed after. What was learnt at the best epoch, without what it takes to go on from there, is
``best-00001200`` where the newest checkpoint is another. ``last`` and ``best`` beside them are links; a run that goes
on takes the newest that holds what its manifest says. Of a run that is finished only ``best`` stays.
"""

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from training.config import TrainConfig
from training.errors import CheckpointError
from training.model import Network

Parts = Mapping[str, Mapping[str, Tensor]]
"""Tensors by part and name; ``weights`` are those in training, ``average`` is their average where there is one."""

_STATE = "state.json"
_MANIFEST = "manifest.json"
_SUFFIX = ".safetensors"
_NAME = re.compile(r"step-([0-9]{8,})")
_BEST, _LAST = "best", "last"
_KEPT = 2
"""Newest checkpoints that stay: one more than needed, should the newest be damaged."""


class State(BaseModel):
    """What a checkpoint says besides its tensors."""

    model_config = ConfigDict(frozen=True)

    config: TrainConfig
    num_classes: int
    step: int
    """Optimizer steps taken."""
    epoch: int
    """Epochs finished."""
    fingerprint: str
    """Hex digest of the training data, as the streamer gives it."""
    data: dict[str, Any] = Field(default_factory=dict)
    """What ``StreamedDataset.load_state`` takes to go on behind the last step."""
    loop: dict[str, Any] = Field(default_factory=dict)
    """What ``Loop.resume`` takes: schedule, budget and running means."""
    random: dict[str, Any] = Field(default_factory=dict)
    """What ``randomness.restore`` takes besides tensors."""
    validation: dict[str, float] = Field(default_factory=dict)
    """Accuracy and loss on the validation split at the end of this epoch; empty within one."""
    best_accuracy: float | None = None
    """Highest accuracy on the validation split so far."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What a run had learnt: the average of its weights where it keeps one, else the weights."""

    network: Network
    state: State


@dataclass(frozen=True, slots=True)
class Saved:
    """A checkpoint as it is on disk, and which newer ones are damaged."""

    folder: Path
    state: State
    parts: dict[str, dict[str, Tensor]]
    complaints: list[str] = field(default_factory=list)


def save(folder: Path, parts: Parts, state: State) -> None:
    """
    Write a checkpoint to ``folder``, which holds all of it or is not there; a kill at any moment leaves litter at most.

    Raises:
        OSError: Disk full or not writable; what was there before still is.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        for name, tensors in parts.items():
            save_file({key: tensor.contiguous().cpu() for key, tensor in tensors.items()}, temporary / (name + _SUFFIX))
        (temporary / _STATE).write_text(state.model_dump_json(indent=2))
        digests = {path.name: _digest(path) for path in sorted(temporary.iterdir())}
        (temporary / _MANIFEST).write_text(json.dumps(digests, indent=2))
        for path in (*temporary.iterdir(), temporary):
            _sync(path)
        temporary.chmod(0o755)  # mkdtemp makes it private
        if folder.exists():  # damaged, or from a run that went on from an older one
            os.rename(folder, temporary.with_suffix(".before"))
        os.rename(temporary, folder)
        _sync(folder.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(temporary.with_suffix(".before"), ignore_errors=True)


def read(folder: Path) -> Saved:
    """
    Read what :func:`save` wrote, onto the CPU, once its digests are found right.

    Raises:
        CheckpointError: Names the file and what is wrong with it.
    """
    try:
        digests = json.loads((folder / _MANIFEST).read_bytes())
        for name, digest in digests.items():
            if _digest(folder / name) != digest:
                raise CheckpointError(f"{folder / name}: damaged: its SHA-256 is not that of {_MANIFEST}")
        state = State.model_validate_json((folder / _STATE).read_bytes())
        parts = {path.stem: load_file(path) for path in folder.glob(f"*{_SUFFIX}") if path.name in digests}
    except FileNotFoundError as error:
        raise CheckpointError(f"{folder}: no checkpoint here; {error.filename or error} is missing") from error
    except (ValidationError, SafetensorError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{folder}: not readable: {error}") from error
    return Saved(folder, state, parts)


def load(folder: Path) -> Checkpoint:
    """
    Return what a run had learnt, on the CPU.

    Args:
        folder: A checkpoint, or a run's folder, of which it is the best checkpoint, else the newest.

    Raises:
        CheckpointError: Names the file and what is wrong with it.
    """
    if (folder / "checkpoints").is_dir():
        best = folder / "checkpoints" / _BEST
        return load(best) if best.exists() else _learnt(newest(folder / "checkpoints"))
    return _learnt(read(folder))


def is_any(checkpoints: Path) -> bool:
    """Return whether a run has come as far as its first checkpoint, damaged or not."""
    return bool(_all(checkpoints))


def newest(checkpoints: Path) -> Saved:
    """
    Return the newest checkpoint of a run that is not damaged, and what was wrong with newer ones.

    Raises:
        CheckpointError: There is none.
    """
    complaints: list[str] = []
    for folder in reversed(_all(checkpoints)):
        try:
            saved = read(folder)
        except CheckpointError as error:
            complaints.append(str(error))
        else:
            return Saved(folder, saved.state, saved.parts, complaints)
    raise CheckpointError("; ".join(complaints) or f"{checkpoints}: no checkpoint here")


def keep(checkpoints: Path, parts: Parts, state: State, *, is_best: bool) -> Path:
    """
    Save a run's checkpoint as the newest, and as the best if it is; remove those that are neither, and litter.

    Raises:
        OSError: Disk full or not writable; the checkpoints before it still are there.
    """
    folder = checkpoints / f"step-{state.step:08}"
    save(folder, parts, state)
    for name in (_LAST, _BEST) if is_best else (_LAST,):
        _point(checkpoints / name, folder)
    _clear(checkpoints, num_kept=_KEPT)
    return folder


def keep_best(checkpoints: Path, weights: Mapping[str, Tensor], state: State) -> Path:
    """
    Save what a run had learnt at its best epoch, before :func:`keep` saves where it stands.

    Raises:
        OSError: Disk full or not writable; the best before it still is there.
    """
    folder = checkpoints / f"{_BEST}-{state.step:08}"
    save(folder, {"weights": weights}, state)
    _point(checkpoints / _BEST, folder)
    return folder


def keep_learnt(checkpoints: Path) -> None:
    """
    Leave what a run had learnt at its best epoch, else its last, and nothing of what it takes to go on.

    Raises:
        CheckpointError: There is nothing, or it is damaged; all that was there still is.
        OSError: Disk full or not writable; what was learnt is there in any case.
    """
    best = checkpoints / _BEST
    learnt = read(best) if best.exists() else newest(checkpoints)
    keep_best(checkpoints, _weights_of(learnt), learnt.state)
    (checkpoints / _LAST).unlink(missing_ok=True)
    _clear(checkpoints, num_kept=0)


def _clear(checkpoints: Path, *, num_kept: int) -> None:
    """Remove litter, and checkpoints but for the best and so many of the newest."""
    best, steps = _best_of(checkpoints), _all(checkpoints)
    for old in (*steps[: max(len(steps) - num_kept, 0)], *checkpoints.glob(f"{_BEST}-*")):
        if old.resolve() != best:
            shutil.rmtree(old, ignore_errors=True)
    for litter in checkpoints.glob(".*"):
        shutil.rmtree(litter, ignore_errors=True)


def _weights_of(saved: Saved) -> dict[str, Tensor]:
    """Return what is to be used of a checkpoint: the average where it has one."""
    return saved.parts["average" if "average" in saved.parts else "weights"]


def _best_of(checkpoints: Path) -> Path:
    return (checkpoints / _BEST).resolve()


def _all(checkpoints: Path) -> list[Path]:
    """Return all checkpoints by age, the oldest first."""
    found = {int(match[1]): path for path in _entries(checkpoints) if (match := _NAME.fullmatch(path.name))}
    return [found[step] for step in sorted(found)]


def _entries(folder: Path) -> Iterator[Path]:
    return folder.iterdir() if folder.is_dir() else iter(())


def _learnt(saved: Saved) -> Checkpoint:
    model = saved.state.config.model
    network = Network(saved.state.num_classes, dropout=model.dropout, batch_norm=model.batch_norm)
    try:
        network.load_state_dict(_weights_of(saved))
    except (RuntimeError, KeyError) as error:
        raise CheckpointError(f"{saved.folder}: made for another network: {error}") from error
    return Checkpoint(network, saved.state)


def _point(link: Path, folder: Path) -> None:
    """Let a link name another folder, in one step."""
    temporary = link.with_name(f".{link.name}")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(folder.name)
    os.rename(temporary, link)
    _sync(link.parent)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
