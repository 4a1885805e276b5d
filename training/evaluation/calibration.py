"""
Temperature scaling: one number that makes a network's probabilities as often right as they say.

Axes: N samples, K classes.

Source: C. Guo et al., "On Calibration of Modern Neural Networks", 2017 (arXiv 1706.04599), section 4.2.
"""

import math

import numpy as np

from training.evaluation.measures import Floats, Labels, log_softmax

COLDEST, HOTTEST = 0.05, 20.0
"""Least and largest temperature; beyond these the logits are broken, not uncalibrated."""

_HALVINGS = 60  # leaves nothing of float64's digits to find


def fit_temperature(logits_NK: Floats, label_N: Labels) -> float:
    """
    Return the temperature that makes the labels likeliest: divide logits by it before the softmax.

    Above 1 where the network is too sure of itself, below 1 where it is not sure enough. No prediction changes.
    In 1 / temperature the loss is convex, so that its slope has one zero, which bisection finds whatever the logits.

    Args:
        logits_NK: Of samples that the network was not trained on, and that are not those of the final test.
        label_N: Their true classes, 0 to K - 1.

    Returns:
        :data:`COLDEST` to :data:`HOTTEST`; 1 where every sample is classified right, or there is none: no
        temperature would then be too low, and nothing says how sure the network may be.

    Raises:
        ValueError: A logit is not finite.
    """
    logits_NK = np.asarray(logits_NK, np.float64)
    if not np.isfinite(logits_NK).all():
        raise ValueError("logits: one of them is not finite; no temperature can be fitted to that")
    if bool((logits_NK.argmax(axis=1) == label_N).all()):
        return 1.0
    true_N = logits_NK[np.arange(len(label_N)), label_N]

    def slope(sharpness: float) -> float:
        """Return the derivative of the mean loss by 1 / temperature."""
        probability_NK = np.exp(log_softmax(sharpness * logits_NK))
        return float(((probability_NK * logits_NK).sum(axis=1) - true_N).mean())

    low, high = math.log(1 / HOTTEST), math.log(1 / COLDEST)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (low, middle) if slope(math.exp(middle)) > 0 else (middle, high)
    return math.exp(-(low + high) / 2)
