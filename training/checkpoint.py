"""A run's state on disk: weights as safetensors, the rest as JSON; no pickle, never half-written."""

import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from training.config import TrainConfig
from training.errors import CheckpointError
from training.model import Network

_WEIGHTS = "weights.safetensors"
_STATE = "state.json"


class State(BaseModel):
    """What a checkpoint says besides the weights."""

    model_config = ConfigDict(frozen=True)

    config: TrainConfig
    num_classes: int
    step: int
    """Optimizer steps taken."""
    epoch: int
    """Epoch of the last step, from 0."""
    position: int
    """The streamer's cursor: position in that epoch's order after the last step."""
    fingerprint: str
    """Hex digest of the training data, as the streamer gives it."""
    data: dict[str, Any] = Field(default_factory=dict)
    """What ``StreamedDataset.load_state`` takes to go on behind the last step."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A network with the state of the run that made it."""

    network: Network
    state: State


def save(folder: Path, network: Network, state: State) -> None:
    """
    Write a checkpoint to ``folder``, replacing what is there only once all of it is on disk.

    Raises:
        OSError: Disk full or not writable; what was there before still is.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        weights = {name: tensor.contiguous().cpu() for name, tensor in network.state_dict().items()}
        save_file(weights, temporary / _WEIGHTS)
        (temporary / _STATE).write_text(state.model_dump_json(indent=2))
        for name in (_WEIGHTS, _STATE):
            _sync(temporary / name)
        temporary.chmod(0o755)  # mkdtemp makes it private
        before = temporary.with_suffix(".before")
        if folder.exists():
            folder.rename(before)  # a folder cannot replace another one in one step; killed here, both are on disk
        temporary.rename(folder)
        _sync(folder.parent)
        shutil.rmtree(before, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def load(folder: Path) -> Checkpoint:
    """
    Read a checkpoint that :func:`save` wrote, onto the CPU.

    Raises:
        CheckpointError: Names the file and what is wrong with it.
    """
    try:
        state = State.model_validate_json((folder / _STATE).read_bytes())
        weights = load_file(folder / _WEIGHTS)
    except FileNotFoundError as error:
        raise CheckpointError(f"{folder}: no checkpoint here; {error.filename or error} is missing") from error
    except (ValidationError, SafetensorError) as error:
        raise CheckpointError(f"{folder}: not readable: {error}") from error
    network = Network(state.num_classes, dropout=state.config.dropout)
    try:
        network.load_state_dict(weights)
    except RuntimeError as error:
        raise CheckpointError(f"{folder}: made for another network: {error}") from error
    return Checkpoint(network, state)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
