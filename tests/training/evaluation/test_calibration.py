"""The temperature against one that is known, and against a search by brute force."""

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from training.evaluation.calibration import COLDEST, HOTTEST, fit_temperature
from training.evaluation.measures import log_softmax, negative_log_likelihood, reliability


def drawn(temperature: float, *, seed: int = 0) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]:
    """Return logits that are right about their labels once divided by ``temperature``."""
    draws = np.random.default_rng(seed)
    honest_NK = draws.normal(size=(20_000, 5)) * 2
    label_N = (honest_NK + draws.gumbel(size=honest_NK.shape)).argmax(axis=1)
    return honest_NK * temperature, label_N


@pytest.mark.parametrize("temperature", [0.3, 1.0, 4.0])
def test_temperature_that_was_put_in_is_found(temperature: float) -> None:
    logits_NK, label_N = drawn(temperature)
    fitted = fit_temperature(logits_NK, label_N)

    assert fitted == pytest.approx(temperature, rel=0.03)
    assert reliability(np.exp(log_softmax(logits_NK / fitted)), label_N).error < 0.015


@settings(deadline=None)
@given(st.integers(0, 1000), st.floats(0.2, 5))
def test_no_other_temperature_is_likelier(seed: int, factor: float) -> None:
    draws = np.random.default_rng(seed)
    logits_NK, label_N = draws.normal(size=(50, 3)), draws.integers(0, 3, 50)
    fitted = fit_temperature(logits_NK, label_N)
    other = float(np.clip(fitted * factor, COLDEST, HOTTEST))

    def loss(temperature: float) -> float:
        return negative_log_likelihood(log_softmax(logits_NK / temperature), label_N)

    assert loss(fitted) <= loss(other) + 1e-12


def test_temperature_is_1_where_all_are_right() -> None:
    assert fit_temperature(np.eye(4) * 3, np.arange(4)) == 1


def test_temperature_stops_at_its_bounds_where_the_network_is_worse_than_guessing() -> None:
    assert fit_temperature(np.eye(2) * 5, np.array([1, 0])) == pytest.approx(HOTTEST)


def test_logits_that_are_not_finite_are_refused() -> None:
    with pytest.raises(ValueError, match="logits: one of them is not finite"):
        fit_temperature(np.array([[np.nan, 0.0]]), np.array([0]))
