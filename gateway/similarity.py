"""
How alike two images are; pure, and symmetric in its arguments to the last bit.

Pixels are what the network sees: uint8, shape (28, 28), framed, ink bright on a dark ground.
"""

import math
from collections.abc import Callable
from functools import cache
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Method = Literal["embedding_cosine", "pixel_cosine", "ssim"]
Pixels = NDArray[np.uint8]

# Wang, Bovik, Sheikh, Simoncelli: Image Quality Assessment: From Error Visibility to Structural Similarity, 2004:
# a Gaussian window of 11x11 with sigma 1.5, and these two constants for a range of 255.
_RADIUS, _SIGMA = 5, 1.5
_C1, _C2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2


def cosine(first: NDArray[Any], second: NDArray[Any]) -> float:
    """
    Return the cosine of the angle between two arrays of the same shape, taken as vectors, -1..1.

    Equal vectors give 1, two of zeros too; a vector of zeros has no angle to any other, which gives 0.
    """
    x, y = first.ravel().astype(np.float64), second.ravel().astype(np.float64)
    squares = float(x @ x) * float(y @ y)
    if squares == 0.0:
        return float(not x.any() and not y.any())
    return min(max(float(x @ y) / math.sqrt(squares), -1.0), 1.0)


def ssim(first: Pixels, second: Pixels) -> float:
    """Return the mean structural similarity over all windows inside the image, -1..1; equal images give 1."""
    x, y = first.astype(np.float64), second.astype(np.float64)
    window = _window(len(x))

    def blurred(values: NDArray[np.float64]) -> NDArray[np.float64]:
        return window @ values @ window.T

    mean_x, mean_y = blurred(x), blurred(y)
    variances = blurred(x * x) - mean_x**2 + (blurred(y * y) - mean_y**2)
    covariance = blurred(x * y) - mean_x * mean_y
    luminance = (2 * mean_x * mean_y + _C1) / (mean_x**2 + mean_y**2 + _C1)
    structure = (2 * covariance + _C2) / (variances + _C2)
    return min(max(float((luminance * structure).mean()), -1.0), 1.0)


PIXEL_METHODS: dict[Method, Callable[[Pixels, Pixels], float]] = {"pixel_cosine": cosine, "ssim": ssim}
"""Methods that need no model."""


@cache
def _window(side: int) -> NDArray[np.float64]:
    """Return the blur along one axis as a matrix, shape (side - 10, side): a window that starts in each row."""
    offsets = np.arange(-_RADIUS, _RADIUS + 1)
    weights = np.exp(-(offsets**2) / (2 * _SIGMA**2))
    window = np.zeros((side - 2 * _RADIUS, side))
    for row in range(len(window)):
        window[row, row : row + len(weights)] = weights / weights.sum()
    return window
