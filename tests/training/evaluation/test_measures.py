"""Measures against values worked out by hand, or by other means."""

import math

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from training.evaluation import measures

SHARES = arrays.arrays(np.float64, (40, 4), elements=st.floats(0.01, 1))
LABELS = arrays.arrays(np.int64, 40, elements=st.integers(0, 3))


def normalised(share_NK: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    total_N1: npt.NDArray[np.float64] = share_NK.sum(axis=1, keepdims=True)
    return share_NK / total_N1


def test_interval_is_that_of_the_literature() -> None:
    """Newcombe, "Two-sided confidence intervals for the single proportion" (1998), table I: 81 of 263."""
    assert measures.wilson_interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert measures.wilson_interval(0, 20) == pytest.approx((0, 0.1611), abs=5e-5)


@settings(deadline=None)
@given(st.integers(1, 10_000).flatmap(lambda total: st.tuples(st.integers(0, total), st.just(total))))
def test_interval_holds_the_share_and_mirrors(counts: tuple[int, int]) -> None:
    right, total = counts
    low, high = measures.wilson_interval(right, total)

    assert 0 <= low <= right / total <= high <= 1
    assert measures.wilson_interval(total - right, total) == pytest.approx((1 - high, 1 - low))


def test_confusion_has_true_classes_as_rows() -> None:
    confusion = measures.confusion_matrix(np.array([0, 0, 2]), np.array([0, 1, 1]), num_classes=3)

    assert confusion.tolist() == [[1, 1, 0], [0, 0, 0], [0, 1, 0]]


def test_class_measures_by_hand() -> None:
    result = measures.class_measures(np.array([[6, 2, 0], [1, 9, 0], [0, 0, 0]]))

    np.testing.assert_allclose(result.recall_K, [6 / 8, 9 / 10, np.nan])
    np.testing.assert_allclose(result.precision_K, [6 / 7, 9 / 11, np.nan])
    np.testing.assert_allclose(result.f1_K, [2 * 6 / (8 + 7), 2 * 9 / (10 + 11), np.nan])
    assert result.support_K.tolist() == [8, 10, 0]


def test_log_softmax_of_huge_logits_is_finite() -> None:
    log_probability_NK = measures.log_softmax(np.array([[1e4, 0.0], [0.0, -1e4]]))

    np.testing.assert_array_equal(log_probability_NK, [[0, -1e4], [0, -1e4]])


@settings(deadline=None)
@given(LABELS)
def test_guessing_costs_what_it_has_to(label_N: npt.NDArray[np.int64]) -> None:
    even_NK = np.full((40, 4), 0.25)

    assert measures.negative_log_likelihood(np.log(even_NK), label_N) == pytest.approx(math.log(4))
    assert measures.brier(even_NK, label_N) == pytest.approx(0.75**2 + 3 * 0.25**2)


def test_brier_goes_from_0_to_2() -> None:
    certain_NK = np.eye(2)

    assert measures.brier(certain_NK, np.array([0, 1])) == 0
    assert measures.brier(certain_NK, np.array([1, 0])) == 2


def test_calibration_error_by_hand() -> None:
    """Two bins: confidence 0.6 with half of them right, and 0.9 with all of them right."""
    probability_NK = np.array([[0.6, 0.4], [0.6, 0.4], [0.9, 0.1], [0.9, 0.1]])
    result = measures.reliability(probability_NK, np.array([0, 1, 0, 0]), num_bins=2)

    np.testing.assert_allclose(result.confidence_B, [0.6, 0.9])
    np.testing.assert_allclose(result.accuracy_B, [0.5, 1])
    assert result.error == pytest.approx((0.1 + 0.1) / 2)


@settings(deadline=None)
@given(SHARES, LABELS, st.integers(1, 60), st.permutations(range(40)))
def test_bins_hold_every_sample_in_any_order(
    share_NK: npt.NDArray[np.float64], label_N: npt.NDArray[np.int64], num_bins: int, order: list[int]
) -> None:
    probability_NK = normalised(np.round(share_NK, 1) + 0.1)  # rounded, so that confidences repeat
    result = measures.reliability(probability_NK, label_N, num_bins=num_bins)
    shuffled = measures.reliability(probability_NK[order], label_N[order], num_bins=num_bins)
    accuracy = (probability_NK.argmax(axis=1) == label_N).mean()

    assert result.count_B.sum() == 40
    assert np.ptp(result.count_B) <= 1
    assert np.average(result.accuracy_B, weights=result.count_B) == pytest.approx(accuracy)
    assert result.error >= abs(probability_NK.max(axis=1).mean() - accuracy) - 1e-9
    np.testing.assert_allclose(shuffled.accuracy_B, result.accuracy_B)
    np.testing.assert_array_equal(np.sort(result.confidence_B), result.confidence_B)


def test_probabilities_that_hold_have_next_to_no_error() -> None:
    draws = np.random.default_rng(0)
    probability_NK = normalised(draws.dirichlet(np.ones(4), 50_000))
    label_N = (probability_NK.cumsum(axis=1) > draws.random((50_000, 1))).argmax(axis=1)

    assert measures.reliability(probability_NK, label_N).error < 0.01
