"""
``python -m benchmarks.epoch``: what an epoch of training takes from a streamer, and what the same takes from memory.

The streamer runs beside the training, on the same cores. Epochs take turns, from memory and streamed, with the same
network from the same weights; what the reader says it waited for is held against what the clock says.
"""

import asyncio
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.interleaved import Spread
from benchmarks.report import RESULTS, figures, publish, surroundings, table
from benchmarks.stage import stage
from streamer.client import Plan
from streamer.loading import StreamedDataset, TensorBatch
from streamer.reading.stalls import StallReport
from training.config import BudgetConfig, DataConfig, TrainConfig
from training.loop import fit
from training.model import Network

ROUNDS = 5
BATCH_SIZE = 256
STEPS = 100
"""Of an epoch, where the data is made up."""
ASKED_RATIO = 1.03
ASKED_POINTS = 2.0

PLAN = Plan(dataset="mnist", seed=7, batch_size=BATCH_SIZE)


@dataclass(frozen=True, kw_only=True, slots=True)
class Round:
    """An epoch from memory and the same from the streamer, one after the other."""

    memory_seconds: float
    streamed_seconds: float
    report: StallReport

    @property
    def ratio(self) -> float:
        """Streamed over memory."""
        return self.streamed_seconds / self.memory_seconds

    @property
    def clocked_share(self) -> float:
        """Of the streamed epoch, what it takes longer by."""
        return 1 - self.memory_seconds / self.streamed_seconds


class Memory:
    """All samples of an epoch in memory, gathered by the order of each pass as ``TensorDataset`` would be."""

    def __init__(self, batches: Iterable[TensorBatch]) -> None:
        read = list(batches)
        self._images = torch.cat([batch.images for batch in read])
        self._labels = torch.cat([batch.labels for batch in read])
        self._origin = read[0].origin

    def __len__(self) -> int:
        return len(self._labels)

    def __iter__(self) -> Iterator[TensorBatch]:
        """Yield the batches of a pass in a new order."""
        order = torch.randperm(len(self))
        for first in range(0, len(self), BATCH_SIZE):
            indices = order[first : first + BATCH_SIZE]
            last = first + len(indices)
            yield TensorBatch(
                images=self._images[indices],
                labels=self._labels[indices],
                indices=indices.numpy(),
                position=first,
                next_position=last,
                end_of_epoch=last == len(self),
                origin=self._origin,
            )


async def main() -> None:
    """Measure, print and write ``benchmarks/results/epoch.md``."""
    with tempfile.TemporaryDirectory() as folder:
        async with stage(Path(folder), num_train=STEPS * BATCH_SIZE, num_test=BATCH_SIZE) as scene:
            rounds = await asyncio.to_thread(measure, scene.streamer)
            told = report(rounds, scene.data_name, scene.num_train)
    publish(told, RESULTS / "epoch.md")


def measure(streamer: str) -> list[Round]:
    """Train epochs in turn; the first of each does not count."""
    with StreamedDataset(streamer, PLAN) as dataset:
        memory = Memory(dataset)
    rounds = []
    for number in range(ROUNDS + 1):
        with StreamedDataset(streamer, PLAN) as streamed:
            streamed.set_epoch(number)
            # Whoever is second finds the machine as the first left it.
            turns: dict[str, Iterable[TensorBatch]] = {"memory": memory, "streamed": streamed}
            seconds = {name: train(turns[name], len(memory)) for name in sorted(turns, reverse=number % 2 == 1)}
        if number:
            rounds.append(
                Round(memory_seconds=seconds["memory"], streamed_seconds=seconds["streamed"], report=streamed.report())
            )
    return rounds


def train(batches: Iterable[TensorBatch], num_samples: int) -> float:
    """Train the network anew for one epoch, and return the seconds."""
    torch.manual_seed(0)
    network = Network(10)
    config = TrainConfig(data=DataConfig(batch_size=BATCH_SIZE), budget=BudgetConfig(seconds=None, max_epochs=1))
    started = time.perf_counter()
    fit(network, config, lambda epoch: batches, num_samples=num_samples, on_step=lambda step: None)
    return time.perf_counter() - started


def report(rounds: list[Round], data: str, num_samples: int) -> str:
    """Return the table."""

    def row(name: str, of: Callable[[Round], float], asked: str = "") -> list[str]:
        return [name, *figures(Spread.of([of(each) for each in rounds]), 3), asked]

    rows = [
        row("epoch from memory, s", lambda each: each.memory_seconds),
        row("epoch from the streamer, s", lambda each: each.streamed_seconds),
        row("streamer / memory", lambda each: each.ratio, f"at most {ASKED_RATIO:g}"),
        row("longer by, % of the epoch", lambda each: 100 * each.clocked_share),
        row("waited by the reader's report, %", lambda each: 100 * each.report.waited_share),
        row(
            "report beside clock, points",
            lambda each: abs(100 * (each.clocked_share - each.report.waited_share)),
            f"at most {ASKED_POINTS:g}",
        ),
    ]
    middle = sorted(rounds, key=lambda each: each.ratio)[len(rounds) // 2]
    lines = [
        "# An epoch of training, streamed and from memory",
        "",
        surroundings("python -m benchmarks.epoch", ("grpcio", "torch", "numpy")),
        f"{data}; {-(-num_samples // BATCH_SIZE)} steps of {BATCH_SIZE}, {ROUNDS} epochs each, in turns; the streamer "
        "shares the cores with the training.",
        "",
        table(("", "median", "lowest", "highest", "asked"), rows),
        "",
        f"The middle epoch's own report: {middle.report}.",
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    asyncio.run(main())
