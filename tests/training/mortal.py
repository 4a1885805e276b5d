"""
A run in a process of its own that is killed after a step: ``mortal.py STREAMER FOLDER STEP SECONDS``.

It goes on from what is in the folder; the seconds are those between checkpoints.
"""

import os
import signal
import sys
from pathlib import Path

import torch

from streamer.client import SplitInfo
from training.config import TrainConfig
from training.evaluation.evaluate import Evaluation
from training.loop import Step
from training.overrides import overridden
from training.recipes import smoke
from training.run import Stopping, learn

LEDGER = "run.ledger"


def config_of_test(streamer: str, seconds: float) -> TrainConfig:
    """All that has a state, on a data set of three steps an epoch."""
    return overridden(
        smoke(),
        {
            "data.streamer": streamer,
            "data.train_split": "train",
            "data.validation_split": "test",
            "data.batch_size": 16,
            "model.batch_norm": True,
            "optim.name": "sgd",
            "optim.lr": 0.01,
            "optim.clip_norm": 1.0,
            "ema.decay": 0.9,
            "ema.every": 2,
            "augmentation": "augment-v1",
            "budget.max_epochs": 2,
            "checkpoint.seconds": seconds,
            "checkpoint.epochs": 1,
            "deterministic": True,
            "log_steps": 1,
        },
    )


class Mortal:
    """An observer that dies after a step."""

    def __init__(self, step: int) -> None:
        self._step = step

    def started(self, config: TrainConfig, split: SplitInfo, device: torch.device, folder: Path) -> None: ...

    def stepped(self, step: Step, num_samples: int) -> None:
        if step.number == self._step:
            os.kill(os.getpid(), signal.SIGKILL)

    def validated(self, step: Step, evaluation: Evaluation) -> None: ...

    def evaluated(self, evaluation: Evaluation, split: SplitInfo) -> None: ...


def run(streamer: str, folder: Path, *, observer: Mortal, seconds: float, stopping: Stopping | None = None) -> None:
    """Train, with a ledger in the folder."""
    folder.mkdir(exist_ok=True)
    config = config_of_test(streamer, seconds)
    learn(config, folder, observer=observer, ledger=folder / LEDGER, stopping=stopping)


if __name__ == "__main__":
    _streamer, _folder, _step, _seconds = sys.argv[1:]
    run(_streamer, Path(_folder), observer=Mortal(int(_step)), seconds=float(_seconds))
