"""
Telling images of the known classes from anything else, by how a network answers.

A score is high for what the network knows. Axes: N known samples, M others, K classes, D embedding, R references.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from training.evaluation.measures import Floats

_KEPT_PERCENT = 95
_BLOCK = 1024  # rows of the similarity matrix held at once


@dataclass(frozen=True, slots=True)
class Separation:
    """How well a score tells known images from others."""

    auroc: float
    """Chance that a known image scores above another, 0..1; 0.5 is no better than guessing."""
    fpr_at_95: float
    """Share of the others that pass where 95 % of the known images do, 0..1."""


def max_log_probability(log_probability_NK: Floats) -> npt.NDArray[np.float64]:
    """
    Return the log probability of the predicted class, [N].

    Source: D. Hendrycks and K. Gimpel, "A Baseline for Detecting Misclassified and Out-of-Distribution Examples in
    Neural Networks", 2017 (arXiv 1610.02136). The logarithm orders samples alike.
    """
    top_N: npt.NDArray[np.float64] = np.asarray(log_probability_NK, np.float64).max(axis=1)
    return top_N


def negative_energy(logits_NK: Floats) -> npt.NDArray[np.float64]:
    """
    Return the logarithm of the sum of the exponentiated logits, [N].

    Source: W. Liu et al., "Energy-based Out-of-distribution Detection", 2020 (arXiv 2010.03759), at temperature 1.
    """
    logits_NK = np.asarray(logits_NK, np.float64)
    top_N: npt.NDArray[np.float64] = logits_NK.max(axis=1)
    sum_N: npt.NDArray[np.float64] = np.exp(logits_NK - top_N[:, None]).sum(axis=1)
    return top_N + np.log(sum_N)


def neighbour_similarity(embedding_ND: Floats, reference_RD: Floats, *, rank: int = 10) -> npt.NDArray[np.float64]:
    """
    Return the cosine to the ``rank``-th nearest of the references, [N], -1..1.

    Source: Y. Sun et al., "Out-of-Distribution Detection with Deep Nearest Neighbors", 2022 (arXiv 2204.06507); on
    unit length, the distance used there orders samples like the cosine.

    Args:
        embedding_ND: Of unit length.
        reference_RD: Embeddings of known images other than those to be judged, of unit length; at least one.
        rank: From 1; taken as R where there are fewer references.
    """
    place = max(len(reference_RD) - rank, 0)
    blocks = [
        np.partition(embedding_ND[start : start + _BLOCK] @ reference_RD.T, place, axis=1)[:, place]
        for start in range(0, len(embedding_ND), _BLOCK)
    ]
    return np.concatenate(blocks).astype(np.float64) if blocks else np.empty(0)


def separation(known_N: Floats, other_M: Floats) -> Separation:
    """
    Return how well scores tell known images from others.

    The area under the curve is that of ranks, ties counting half (Mann and Whitney, 1947).

    Args:
        known_N: Scores of known images, at least one.
        other_M: Scores of others, at least one.
    """
    others = np.sort(other_M)
    below_N = np.searchsorted(others, known_N, side="left") + np.searchsorted(others, known_N, side="right")
    # The highest threshold that still lets 95 % of the known images pass.
    kept = -(-_KEPT_PERCENT * len(known_N) // 100)
    threshold = np.sort(known_N)[len(known_N) - kept]
    passed = len(others) - np.searchsorted(others, threshold, side="left")
    return Separation(auroc=float(below_N.mean() / (2 * len(others))), fpr_at_95=float(passed / len(others)))
