"""
How good predictions are, and how far their probabilities can be believed; plain NumPy, float64 inside.

Axes: N samples, K classes, B bins.
"""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.floating]
Labels = npt.NDArray[np.integer]

_Z_95 = 1.959963984540054
"""97.5th percentile of the standard normal distribution: a two-sided interval of 95 %."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ClassMeasures:
    """Measures of each class against all others; NaN where a class gives nothing to divide by."""

    precision_K: npt.NDArray[np.float64]
    """Of the samples predicted to be of the class, the share that are; NaN where none was."""
    recall_K: npt.NDArray[np.float64]
    """Of the samples of the class, the share predicted to be; NaN where the split has none."""
    f1_K: npt.NDArray[np.float64]
    """Harmonic mean of both; NaN where the class is neither there nor predicted."""
    support_K: npt.NDArray[np.int64]
    """Samples of the class."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Reliability:
    """Confidence against accuracy, in bins that hold the same number of samples, by rising confidence."""

    confidence_B: npt.NDArray[np.float64]
    """Mean probability of the predicted class."""
    accuracy_B: npt.NDArray[np.float64]
    """Share of samples classified right."""
    count_B: npt.NDArray[np.int64]
    """Samples in the bin, at least 1."""

    @property
    def error(self) -> float:
        """Expected calibration error: the mean distance of confidence from accuracy, 0..1."""
        gap_B = np.abs(self.confidence_B - self.accuracy_B)
        return float(np.average(gap_B, weights=self.count_B))


def wilson_interval(num_right: int, num_samples: int) -> tuple[float, float]:
    """
    Return the 95 % confidence interval of a share, within 0..1.

    Unlike the normal approximation it holds near 0 and 1, which is where good classifiers are.
    Source: E. B. Wilson, "Probable inference, the law of succession, and statistical inference", JASA 22 (1927).

    Args:
        num_right: 0 to ``num_samples``.
        num_samples: At least 1.
    """
    share = num_right / num_samples
    weight = _Z_95**2 / num_samples
    centre = (share + weight / 2) / (1 + weight)
    half = _Z_95 / (1 + weight) * math.sqrt(share * (1 - share) / num_samples + weight / (4 * num_samples))
    # At its ends the interval reaches 0 or 1 exactly; rounding would leave it a hair off.
    low = 0.0 if num_right == 0 else centre - half
    return low, 1.0 if num_right == num_samples else centre + half


def confusion_matrix(label_N: Labels, predicted_N: Labels, *, num_classes: int) -> npt.NDArray[np.int64]:
    """Return [K, K] counts: rows are true classes, columns predicted ones, both 0 to K - 1."""
    cell_N = np.asarray(label_N, np.int64) * num_classes + np.asarray(predicted_N, np.int64)
    return np.bincount(cell_N, minlength=num_classes**2).reshape(num_classes, num_classes).astype(np.int64)


def class_measures(confusion: npt.NDArray[np.int64]) -> ClassMeasures:
    """Return precision, recall and F1 of each class, from a confusion matrix with true classes as rows."""
    right_K = np.diagonal(confusion)
    support_K, predicted_K = confusion.sum(axis=1), confusion.sum(axis=0)
    return ClassMeasures(
        precision_K=_ratio(right_K, predicted_K),
        recall_K=_ratio(right_K, support_K),
        f1_K=_ratio(2 * right_K, support_K + predicted_K),
        support_K=support_K,
    )


def _ratio(part_K: npt.NDArray[np.int64], whole_K: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    ratio_K = np.full(len(whole_K), np.nan)
    np.divide(part_K, whole_K, out=ratio_K, where=whole_K > 0)
    return ratio_K


def log_softmax(logits_NK: Floats) -> npt.NDArray[np.float64]:
    """Return log probabilities; finite for all finite logits, where the logarithm of a softmax is not."""
    logits_NK = np.asarray(logits_NK, np.float64)
    shifted_NK: npt.NDArray[np.float64] = logits_NK - logits_NK.max(axis=1, keepdims=True)
    sum_N1: npt.NDArray[np.float64] = np.exp(shifted_NK).sum(axis=1, keepdims=True)
    return shifted_NK - np.log(sum_N1)


def negative_log_likelihood(log_probability_NK: Floats, label_N: Labels) -> float:
    """Return the mean of minus the log probability of the true class, in nats."""
    return -float(np.mean(log_probability_NK[np.arange(len(label_N)), label_N], dtype=np.float64))


def brier(probability_NK: Floats, label_N: Labels) -> float:
    """
    Return the mean squared distance of the probabilities from the truth, summed over classes: 0..2.

    Source: G. W. Brier, "Verification of forecasts expressed in terms of probability", 1950.
    """
    distance_NK = np.array(probability_NK, np.float64)
    distance_NK[np.arange(len(label_N)), label_N] -= 1
    return float(np.square(distance_NK).sum(axis=1).mean())


def reliability(probability_NK: Floats, label_N: Labels, *, num_bins: int = 15) -> Reliability:
    """
    Return confidence against accuracy of the predicted class, in at most ``num_bins`` bins of equal mass.

    Bins of equal width would put nearly all samples of a good classifier into the last one. Samples of equal
    confidence are told apart by nothing, so each counts as right to the share that all of them are: the order of the
    samples does not matter.
    Source: C. Guo et al., "On Calibration of Modern Neural Networks", 2017 (arXiv 1706.04599), with the adaptive bins
    of J. Nixon et al., "Measuring Calibration in Deep Learning", 2019 (arXiv 1904.01685).

    Args:
        probability_NK: Sums to 1 over the classes; at least one sample.
        label_N: True classes.
        num_bins: At least 1; fewer are made of fewer samples.
    """
    probability_NK = np.asarray(probability_NK, np.float64)
    right_N = probability_NK.argmax(axis=1) == label_N
    level_L, level_N, size_L = np.unique(probability_NK.max(axis=1), return_inverse=True, return_counts=True)
    share_L = np.bincount(level_N, weights=right_N) / size_L
    confidence_N, share_N = np.repeat(level_L, size_L), np.repeat(share_L, size_L)
    edges = np.linspace(0, len(label_N), min(num_bins, len(label_N)) + 1).astype(np.int64)
    count_B = np.diff(edges)
    return Reliability(
        confidence_B=np.add.reduceat(confidence_N, edges[:-1]) / count_B,
        accuracy_B=np.add.reduceat(share_N, edges[:-1]) / count_B,
        count_B=count_B,
    )
