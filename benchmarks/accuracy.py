"""
``python -m benchmarks.accuracy RUN RUN RUN``: what finished runs of one config came to, with their spread over seeds.

    for seed in 0 1 2; do sluice train --seed $seed --force; done
    python -m benchmarks.accuracy runs/*

Each run chose its epoch on its validation split and read the test split once, when training was over.
"""

import argparse
import json
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.report import RESULTS, table
from training import checkpoint
from training.config import TrainConfig
from training.errors import TrainingError
from training.evaluation import record
from training.evaluation.record import Record
from training.folders import config_of
from training.recipes import RECIPES

# What may differ between runs that are compared, and from a recipe.
_OWN: dict[str, Any] = {
    "seed": True,
    "data": {"streamer", "dataset"},
    "name": True,
    "log_steps": True,
    "checkpoint": True,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """One finished run."""

    config: TrainConfig
    record: Record
    epoch: int
    """Epochs that the published network had been trained for."""
    validation_error: float | None
    """0..1; None without a validation split."""
    commit: str
    device: str

    @property
    def test_error(self) -> float:
        """Share of the test split that was wrong, 0..1."""
        return 1 - self.record.accuracy

    @property
    def settings(self) -> str:
        """What runs have to have in common."""
        return self.config.model_dump_json(exclude=_OWN)


def main() -> None:
    """Print the table, and write it with ``--output``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="folder of a finished run")
    parser.add_argument("--output", type=Path, help=f"file to write, such as {RESULTS.name}/accuracy-mnist.md")
    options = parser.parse_args()
    try:
        told = report(sorted((read(folder) for folder in options.runs), key=lambda run: run.config.seed))
    except (TrainingError, ValueError) as error:
        parser.error(str(error))
    print(told, end="")
    if options.output is not None:
        options.output.write_text(told)


def read(folder: Path) -> Run:
    """
    Return what a run came to.

    Raises:
        TrainingError: It is not finished, or no run.
    """
    state = checkpoint.load(folder).state
    if not (folder / record.FILE).exists():
        raise TrainingError(f"{folder}: has no {record.FILE}; the run is not finished")
    environment = json.loads((folder / "environment.json").read_text())
    accuracy = state.validation.get("accuracy")
    return Run(
        config=config_of(folder),
        record=record.read(folder / record.FILE),
        epoch=state.epoch,
        validation_error=None if accuracy is None else 1 - accuracy,
        commit=(environment["commit"] or "unknown")[:7],
        device=environment["device"],
    )


def report(runs: Sequence[Run]) -> str:
    """
    Return the table.

    Raises:
        ValueError: The runs differ in more than their seeds.
    """
    first = runs[0]
    if len({run.settings for run in runs}) > 1:
        raise ValueError("runs of several configs: their mean would mean nothing")
    if len({(run.record.dataset, run.record.split, run.record.fingerprint) for run in runs}) > 1:
        raise ValueError("runs were tested on different data")
    errors = [100 * run.test_error for run in runs]
    spread = f", standard deviation {statistics.stdev(errors):.3f}" if len(errors) > 1 else ""
    columns = ("seed", "test error, %", "95 % interval", "validation error, %", "epoch", "NLL", "ECE", "commit", "on")
    data = first.config.data
    return "\n".join(
        [
            f"# Accuracy on {first.record.dataset}",
            "",
            f"Test error: **{statistics.mean(errors):.3f} %** of {first.record.num_samples:,} images, "
            f"mean of {len(runs)} seeds{spread}. Recipe {_recipe_of(first)}, {first.config.budget.max_epochs} epochs "
            f"of {data.train_split}, the epoch chosen on {data.validation_split or 'nothing: the last one'}; single "
            "networks of the given architecture, no test-time augmentation. By `python -m benchmarks.accuracy`.",
            "",
            table(columns, (_row(run) for run in runs)),
            "",
        ]
    )


def _row(run: Run) -> list[str]:
    low, high = run.record.accuracy_interval
    return [
        str(run.config.seed),
        f"{100 * run.test_error:.2f}",
        f"{100 * (1 - high):.2f} to {100 * (1 - low):.2f}",
        "-" if run.validation_error is None else f"{100 * run.validation_error:.2f}",
        str(run.epoch),
        f"{run.record.served.nll:.4f}",
        f"{run.record.served.ece:.4f}",
        run.commit,
        run.device,
    ]


def _recipe_of(run: Run) -> str:
    """Return the name of the nearest recipe, and what is unlike it as far as runs may not differ in that."""
    own = dict(_fields(run.config))
    unlike = {
        name: [f"{field} = {own[field]}" for field, value in _fields(recipe()) if own[field] != value]
        for name, recipe in RECIPES.items()
    }
    nearest = min(unlike, key=lambda name: len(unlike[name]))
    return nearest + (f" but for {', '.join(unlike[nearest])}" if unlike[nearest] else "")


def _fields(config: TrainConfig) -> Iterator[tuple[str, object]]:
    """Give the fields that runs have to have in common, by dotted name."""
    for name, value in config.model_dump(exclude=_OWN).items():
        if isinstance(value, dict):
            yield from ((f"{name}.{field}", inner) for field, inner in value.items())
        else:
            yield name, value


if __name__ == "__main__":
    main()
