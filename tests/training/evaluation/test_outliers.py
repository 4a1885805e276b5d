"""Scores and their separation, by hand and by counting pairs."""

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from training.evaluation import outliers
from training.evaluation.measures import Floats, log_softmax

SCORES = st.lists(st.integers(0, 9).map(float), min_size=1, max_size=30).map(np.array)


@settings(deadline=None)
@given(SCORES, SCORES)
def test_auroc_is_the_share_of_pairs_in_order(known_N: Floats, other_M: Floats) -> None:
    pairs = np.sign(known_N[:, None] - other_M) / 2 + 0.5

    assert outliers.separation(known_N, other_M).auroc == pytest.approx(pairs.mean())


def test_separation_of_scores_that_never_meet() -> None:
    known, others = np.arange(10.0, 20), np.arange(10.0)

    assert outliers.separation(known, others) == outliers.Separation(auroc=1, fpr_at_95=0)
    assert outliers.separation(others, known) == outliers.Separation(auroc=0, fpr_at_95=1)


@settings(deadline=None)
@given(SCORES, SCORES)
@example(known=np.array([0.0, *[1.0] * 19]), others=np.array([0.0]))
def test_false_positives_are_counted_where_95_percent_pass(known: Floats, others: Floats) -> None:
    thresholds = [one for one in np.unique(known) if (known >= one).mean() >= 0.95]

    assert outliers.separation(known, others).fpr_at_95 == pytest.approx((others >= max(thresholds)).mean())


def test_energy_is_the_soft_maximum() -> None:
    assert outliers.negative_energy(np.array([[1e4, 1e4], [0, 0]])) == pytest.approx([1e4 + np.log(2), np.log(2)])


def test_energy_knows_the_scale_that_probabilities_lose() -> None:
    logits_NK = np.array([[9.0, 1.0], [3.0, -5.0]])
    first, second = outliers.negative_energy(logits_NK)
    log_probability_NK = log_softmax(logits_NK)

    assert first - second == pytest.approx(6)
    assert np.ptp(outliers.max_log_probability(log_probability_NK)) == pytest.approx(0)


def test_neighbour_is_the_one_of_the_rank() -> None:
    references = np.array([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0]])
    image = np.array([[1.0, 0.0]])

    assert outliers.neighbour_similarity(image, references, rank=2) == pytest.approx([0.8])
    assert outliers.neighbour_similarity(image, references, rank=99) == pytest.approx([0.0])
