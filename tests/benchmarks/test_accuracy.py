"""The table over seeds, from runs that were really trained."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks import accuracy
from benchmarks.accuracy import Run
from training.config import TrainConfig
from training.errors import TrainingError
from training.evaluation.record import Calibration, Record
from training.overrides import overridden, recipe


@pytest.fixture
def run() -> Callable[..., Run]:
    # Without what the table does not show.
    some_record: Any = Record.model_construct
    some_calibration: Any = Calibration.model_construct

    def made(seed: int, num_wrong: int, **values: object) -> Run:
        measured = some_record(
            dataset="mnist", split="test", fingerprint="ab", num_samples=1000, accuracy=1 - num_wrong / 1000,
            accuracy_interval=(0.9, 1.0), served=some_calibration(nll=0.01, ece=0.001),
        )  # fmt: skip
        config: TrainConfig = overridden(recipe("mnist"), {"seed": seed, **values})
        return Run(config=config, record=measured, epoch=20, validation_error=0.005, commit="abc", device="cpu")

    return made


def test_table_has_the_mean_and_the_spread_of_its_seeds(run: Callable[..., Run]) -> None:
    told = accuracy.report([run(0, 3), run(1, 5), run(2, 4)])

    assert "**0.400 %** of 1,000 images, mean of 3 seeds, standard deviation 0.100. Recipe mnist," in told
    assert "| 1 | 0.50 | 0.00 to 10.00 | 0.50 | 20 | 0.0100 | 0.0010 | abc | cpu |" in told


def test_runs_that_differ_in_more_than_the_seed_are_refused(run: Callable[..., Run]) -> None:
    with pytest.raises(ValueError, match="several configs"):
        accuracy.report([run(0, 3), run(1, 5, **{"model.dropout": 0.1})])


def test_folder_without_a_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=str(tmp_path)):
        accuracy.read(tmp_path)
