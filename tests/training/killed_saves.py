"""
Save a checkpoint after another, again and again, each time killed one system call later: ``killed_saves.py FOLDER``.

Prints for each kill the step of the newest checkpoint found afterwards, and at the end what else lies there.
"""

import os
import signal
import sys
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import torch

from training import checkpoint
from training.checkpoint import State
from training.config import TrainConfig


def save(checkpoints: Path, step: int) -> None:
    state = State(config=TrainConfig(), num_classes=10, step=step, epoch=0, fingerprint="")
    checkpoint.keep(checkpoints, {"weights": {"a": torch.full((100,), float(step))}}, state, is_best=False)


def die_at(number: int) -> None:
    """Be killed instead of the numbered one of the calls that make a checkpoint last."""
    calls = count(1)

    def mortal(call: Callable[..., Any]) -> Callable[..., Any]:
        def called(*arguments: Any) -> Any:
            if next(calls) == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*arguments)

        return called

    os.fsync = mortal(os.fsync)
    os.rename = mortal(os.rename)
    checkpoint.save_file = mortal(checkpoint.save_file)  # type: ignore[attr-defined]  # where it is called from


def main(checkpoints: Path) -> None:
    save(checkpoints, 1)
    for number in count(1):
        child = os.fork()
        if child == 0:
            die_at(number)
            save(checkpoints, number + 1)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        saved = checkpoint.newest(checkpoints)
        assert saved.parts["weights"]["a"][0] == saved.state.step
        assert checkpoint.read(checkpoints / "last").state.step in (saved.state.step, saved.state.step - 1, 1)
        print(saved.state.step, len(saved.complaints), flush=True)
        if status == 0:
            break
    print(*sorted(path.name for path in checkpoints.iterdir()))


main(Path(sys.argv[1]))
