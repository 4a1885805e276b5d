"""
``python -m benchmarks.step``: a training step of a recipe beside the same step in a plain float32 loop.

Both have the recipe's network with its training aids, batch size and optimizer; images are made up and in memory. The
plain loop is what one would write without further thought: float32, torch's own memory layout and optimizer defaults.
"""

import argparse
import itertools
import time
from collections.abc import Callable

import numpy as np
import torch
from torch.nn import functional as F

from benchmarks.interleaved import Spread
from benchmarks.report import RATES, RESULTS, figures, met, publish, surroundings, table
from streamer.client import Plan
from streamer.loading import Origin, TensorBatch
from training.config import TrainConfig
from training.devices import device_of_choice
from training.loop import Loop
from training.model import IMAGE_SIZE, Network
from training.overrides import recipe
from training.recipes import DEFAULT_RECIPE
from training.release.precision import device_name

ROUNDS = 7
STEPS = 8
ASKED = 1.8
NUM_CLASSES = 10


def main() -> None:
    """Measure, print and write ``benchmarks/results/step.md``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recipe", default=DEFAULT_RECIPE, help=f"[{DEFAULT_RECIPE}]")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"turns of each [{ROUNDS}]")
    options = parser.parse_args()
    config, device = recipe(options.recipe), device_of_choice()
    torch.manual_seed(0)
    batch = made_up(config.data.batch_size).to(device)
    contenders = {"plain": plain(config, batch), "ours": ours(config, batch)}
    rates = measure(contenders, batch, rounds=options.rounds)
    publish(report(rates, config, options.recipe), RESULTS / "step.md")


def made_up(size: int) -> TensorBatch:
    """Return a batch of noise; speed does not depend on what is in it."""
    chance = torch.Generator().manual_seed(0)
    return TensorBatch(
        images=torch.randint(256, (size, IMAGE_SIZE, IMAGE_SIZE), dtype=torch.uint8, generator=chance),
        labels=torch.randint(NUM_CLASSES, (size,), generator=chance),
        indices=np.arange(size),
        position=0,
        next_position=size,
        end_of_epoch=False,
        origin=Origin(plan=Plan(dataset="noise"), num_samples=size, start_position=0),
    )


def network_of(config: TrainConfig, batch: TensorBatch) -> Network:
    """Return the recipe's network, untrained."""
    model = config.model
    network = Network(NUM_CLASSES, dropout=model.dropout, batch_norm=model.batch_norm)
    return network.to(batch.images.device).train()


def plain(config: TrainConfig, batch: TensorBatch) -> Callable[[], None]:
    """Return the step of a loop as one would write it without further thought."""
    network, optim = network_of(config, batch), config.optim
    optimizer = (
        torch.optim.SGD(
            network.parameters(), lr=optim.lr, momentum=optim.momentum, weight_decay=optim.weight_decay, nesterov=True
        )
        if optim.name == "sgd"
        else torch.optim.AdamW(network.parameters(), lr=optim.lr, weight_decay=optim.weight_decay)
    )

    def step() -> None:
        optimizer.zero_grad()
        logits_NK = network(batch.images.unsqueeze(1).float() / 255.0)
        loss = F.cross_entropy(logits_NK, batch.labels, label_smoothing=optim.label_smoothing)
        loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        optimizer.step()
        loss.item()

    return step


def ours(config: TrainConfig, batch: TensorBatch) -> Callable[[], None]:
    """Return the step of :class:`training.loop.Loop`, with the schedule, the average and the meters it comes with."""
    loop = Loop(network_of(config, batch), config, num_samples=60_000)
    steps = loop.steps(itertools.repeat(batch))

    def step() -> None:
        next(steps)

    return step


def measure(contenders: dict[str, Callable[[], None]], batch: TensorBatch, *, rounds: int) -> dict[str, list[float]]:
    """Give each its turn, again and again; return samples a second. The first round does not count."""
    rates: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(rounds + 1):
        for name, step in contenders.items():
            started = time.perf_counter()
            for _ in range(STEPS):
                step()
            if batch.images.is_cuda:
                torch.cuda.synchronize()
            if number:
                rates[name].append(STEPS * len(batch.labels) / (time.perf_counter() - started))
    return rates


def report(rates: dict[str, list[float]], config: TrainConfig, name: str) -> str:
    """Return the table."""
    factor = Spread.of([ours / plain for ours, plain in zip(rates["ours"], rates["plain"], strict=True)])
    return "\n".join(
        [
            "# A training step",
            "",
            surroundings("python -m benchmarks.step", ("torch",)),
            f"Recipe {name}, batches of {config.data.batch_size}; device {device_name(device_of_choice())}, "
            f"{torch.get_num_threads()} threads; {len(rates['ours'])} turns of {STEPS} steps each, in a circle. "
            "`plain` is the same network, batch and optimizer in float32.",
            "",
            table(
                ("samples", *RATES, "factor, median", "lowest", "highest", "asked"),
                (
                    ["plain", *figures(Spread.of(rates["plain"])), *["1.00"] * 3, ""],
                    ["ours", *figures(Spread.of(rates["ours"])), *figures(factor, 2), met(factor.median, least=ASKED)],
                ),
            ),
            "",
        ]
    )


if __name__ == "__main__":
    main()
