"""What a run says of itself as it goes: ``metrics.jsonl`` for programs and TensorBoard's files for eyes."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

from tensorboardX import SummaryWriter  # type: ignore[import-untyped]  # it has no stubs

from training.loop import Step

FILE = "metrics.jsonl"


class Journal:
    """
    The figures of a run, in its folder; every line is handed to the kernel at once.

    Args:
        folder: Of the run.
        step: Step that the run goes on from; what the journal has of later ones, which are done again, is dropped.
    """

    def __init__(self, folder: Path, *, step: int = 0) -> None:
        path = folder / FILE
        if path.exists():
            _cut(path, step)
        self._file = path.open("a", buffering=1)
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1 if step else None)

    def stepped(self, step: Step) -> None:
        """Note a step."""
        self._write(
            {
                "step": step.number,
                "epoch": step.epoch,
                "samples": step.samples,
                "loss": step.loss,
                "accuracy": step.accuracy,
                "lr": step.lr,
                "samples_per_second": step.samples_per_second,
            },
            "training",
        )

    def validated(self, step: Step, *, loss: float, accuracy: float) -> None:
        """Note what an epoch came to on the validation split."""
        self._write(
            {
                "step": step.number,
                "epoch": step.epoch,
                "samples": step.samples,
                "validation_loss": loss,
                "validation_accuracy": accuracy,
            },
            "validation",
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        self._board.close()

    def _write(self, line: Mapping[str, float], group: str) -> None:
        # NaN, which a GPU's first steps have for what is not read yet, is no JSON.
        figures = {name: value for name, value in line.items() if math.isfinite(value)}
        self._file.write(json.dumps(figures) + "\n")
        for name, value in figures.items():
            if name not in ("step", "samples"):
                self._board.add_scalar(f"{group}/{name.removeprefix('validation_')}", value, line["step"])


def _cut(path: Path, step: int) -> None:
    """Keep the lines up to a step; the last one may be torn."""
    kept = []
    for line in path.read_text().splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (ValueError, KeyError):
            continue
    path.write_text("".join(kept))
