"""The folder of a run: its name, what is written into it, and finding one again."""

import fcntl
import json
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from training import checkpoint
from training.config import TrainConfig
from training.errors import CheckpointError, TrainingError

CHECKPOINTS = "checkpoints"
CONFIG = "config.json"
ENVIRONMENT = "environment.json"
RESULT = "result.json"
"""Written when a run's version is published: there is nothing left to resume."""

_LOCK = ".lock"


def new_folder(runs: Path, config: TrainConfig) -> Path:
    """
    Make a folder for a run, named by time, model and seed.

    Raises:
        TrainingError: It cannot be made.
    """
    stamp = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
    number = 1
    while True:
        again = "" if number == 1 else f"-{number}"
        folder = runs / f"{stamp}-{config.name}-seed{config.seed}{again}"
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            number += 1  # begun in the same second
        except OSError as error:
            raise TrainingError(f"{folder}: cannot write: {error.strerror}") from error
        else:
            return folder


def config_of(folder: Path) -> TrainConfig:
    """
    Return the config of a run.

    Raises:
        CheckpointError: There is no run in this folder, or another version of sluice made it.
    """
    try:
        return TrainConfig.model_validate_json((folder / CONFIG).read_bytes())
    except OSError as error:
        raise CheckpointError(f"{folder}: no run here: {CONFIG} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise CheckpointError(f"{folder / CONFIG}: not a config of this version of sluice: {error}") from error


def unfinished(runs: Path, config: TrainConfig) -> Path | None:
    """Return the newest run with this config that can go on; the streamer may have moved in between."""
    for path in sorted(runs.glob(f"*/{CONFIG}"), reverse=True):
        folder = path.parent
        if (folder / RESULT).exists() or not checkpoint.is_any(folder / CHECKPOINTS):
            continue
        try:
            saved = config_of(folder)
        except CheckpointError:
            continue
        moved = saved.data.model_copy(update={"streamer": config.data.streamer})
        if saved.model_copy(update={"data": moved}) == config:
            return folder
    return None


def describe(folder: Path, config: TrainConfig, environment: dict[str, Any]) -> None:
    """Keep what it takes to make the run again."""
    (folder / CONFIG).write_text(config.model_dump_json(indent=2) + "\n")
    (folder / ENVIRONMENT).write_text(json.dumps(environment, indent=2) + "\n")


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """
    Hold a run's folder, made if missing, for this process; its death gives it back.

    Raises:
        TrainingError: Another process trains in it, or it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / _LOCK).open("a")
    except OSError as error:
        raise TrainingError(f"{folder}: cannot write: {error.strerror}") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise TrainingError(f"{folder}: another process is training there") from error
        yield
