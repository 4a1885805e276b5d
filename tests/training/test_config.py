import pytest
from pydantic import ValidationError

from training.config import BudgetConfig, OptimConfig, TrainConfig


@pytest.mark.parametrize(
    ("num_samples", "rate", "epochs"),
    [
        pytest.param(4_000, 500, 22, id="fills the time"),
        pytest.param(4_000, 1e6, 25, id="fast machine stops at the most"),
        pytest.param(4_000, 1, 10, id="slow machine trains the least samples"),
        pytest.param(60_000, 1, 1, id="full set needs one epoch"),
        pytest.param(60_000, 900, 2, id="full set takes as many as fit"),
    ],
)
def test_epochs_fit_the_budget(num_samples: int, rate: float, epochs: int) -> None:
    budget = BudgetConfig(seconds=180, min_samples=40_000, max_epochs=25)

    assert budget.epochs(num_samples, done=0, elapsed_seconds=0, samples_per_second=rate) == epochs


def test_epochs_done_are_never_taken_back() -> None:
    budget = BudgetConfig(seconds=10, min_samples=1, max_epochs=25)

    assert budget.epochs(4_000, done=7, elapsed_seconds=1_000, samples_per_second=1) == 7


def test_without_a_time_every_epoch_is_trained() -> None:
    budget = BudgetConfig(seconds=None, max_epochs=3)

    assert budget.epochs(4_000, done=0, elapsed_seconds=1e9, samples_per_second=1) == 3


def test_unknown_field_is_refused() -> None:
    with pytest.raises(ValidationError, match="learning_rate"):
        OptimConfig.model_validate({"learning_rate": 1})


def test_deterministic_run_by_the_clock_is_refused() -> None:
    with pytest.raises(ValidationError, match="deterministic needs budget"):
        TrainConfig(deterministic=True)
