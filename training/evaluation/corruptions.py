"""
Named ways in which images go bad, each in five severities, to see how far a classifier can be trusted.

In the manner of N. Mu and J. Gilmer, "MNIST-C: A Robustness Benchmark for Computer Vision", 2019 (arXiv 1906.02337),
with severities as in D. Hendrycks and T. Dietterich, 2019 (arXiv 1903.12261). The amounts are our own: numbers are
comparable with each other, not with published ones.

Every draw is a hash of seed, corruption and the sample's index: the same sample is spoilt alike in any batch, in any
order and on any machine, and its five severities are five amounts of the same accident.

Axes: N images, H height, W width, G draws for an image.
"""

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Corruption = Callable[[Floats, "Draws", int], Floats]

SEVERITIES = (1, 2, 3, 4, 5)

_BLOCK = 512  # images worked on at once: what a core's cache holds, more or less


def corrupt(
    image_NHW: npt.NDArray[np.uint8],
    name: str,
    severity: int,
    *,
    indices: npt.NDArray[np.int64] | None = None,
    seed: int = 0,
) -> npt.NDArray[np.uint8]:
    """
    Return spoilt copies of images.

    Args:
        image_NHW: uint8, ink bright on dark, H and W at least 8.
        name: A key of :data:`CORRUPTIONS`.
        severity: One of :data:`SEVERITIES`.
        indices: What tells the images' draws apart, int64 [N], such as their places in the split; by default 0 to N-1.
        seed: Any other one gives other draws, 0 or more.

    Raises:
        ValueError: There is no such corruption or severity.
    """
    if name not in CORRUPTIONS:
        raise ValueError(f"corruption {name!r}: there is none; known are {', '.join(CORRUPTIONS)}")
    if severity not in SEVERITIES:
        raise ValueError(f"severity {severity!r}: 1 to {SEVERITIES[-1]} are allowed")
    if indices is None:
        indices = np.arange(len(image_NHW))
    spoilt_NHW = np.empty_like(image_NHW)
    for start in range(0, len(image_NHW), _BLOCK):
        block = slice(start, start + _BLOCK)
        draws = Draws(f"{seed}/{name}", indices[block])
        values_NHW = CORRUPTIONS[name](image_NHW[block] / 255, draws, severity - 1)
        spoilt_NHW[block] = np.rint(np.clip(values_NHW, 0, 1) * 255)
    return spoilt_NHW


class Draws:
    """Random numbers that depend on a key and each image's index alone; every call gives fresh ones."""

    def __init__(self, key: str, indices: npt.NDArray[np.int64]) -> None:
        digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
        self._state_N = _mixed(np.uint64(int.from_bytes(digest, "big")) + _mixed(indices.astype(np.uint64)))
        self._taken = 0

    def uniform(self, *shape: int) -> Floats:
        """Return numbers above 0 and below 1, [N, *shape]."""
        count = math.prod(shape)
        counter_G = np.arange(self._taken + 1, self._taken + count + 1, dtype=np.uint64) * _GOLDEN
        self._taken += count
        bits_NG = _mixed(self._state_N[:, None] + counter_G) >> np.uint64(12)
        # Half a step above the 2**52 evenly spaced numbers from 0 on: exact in float64, and never 0 or 1.
        return ((bits_NG + 0.5) / (1 << 52)).reshape(-1, *shape)

    def between(self, low: float, high: float, *shape: int) -> Floats:
        """Return numbers between two, [N, *shape]."""
        return low + (high - low) * self.uniform(*shape)

    def signs(self) -> Floats:
        """Return -1 or 1 for each image, [N]."""
        return np.where(self.uniform() < 0.5, -1.0, 1.0)

    def directions(self) -> Floats:
        """Return unit vectors (y, x), [N, 2]."""
        angle_N = self.between(0, 2 * math.pi)
        return np.stack((np.sin(angle_N), np.cos(angle_N)), axis=1)

    def normal(self, *shape: int) -> Floats:
        """Return standard normal numbers, [N, *shape] (Box and Muller, 1958)."""
        radius: Floats = np.sqrt(np.log(self.uniform(*shape)) * -2)
        return radius * np.cos(self.between(0, 2 * math.pi, *shape))


_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _mixed(value: npt.NDArray[np.uint64] | np.uint64) -> npt.NDArray[np.uint64]:
    """Return SplitMix64's output for a state (Steele, Lea and Flood, 2014): every bit depends on all."""
    value = np.atleast_1d(value)
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


# Where the image lies


def _shift(image_NHW: Floats, draws: Draws, level: int) -> Floats:
    distance = (1.5, 2.5, 3.5, 4.5, 5.5)[level]
    return _moved(image_NHW, draws.directions() * distance)


def _rotation(image_NHW: Floats, draws: Draws, level: int) -> Floats:
    angle_N = draws.signs() * math.radians((10, 20, 30, 40, 50)[level])
    cos_N, sin_N = np.cos(angle_N), np.sin(angle_N)
    return _mapped(image_NHW, np.stack((cos_N, -sin_N, sin_N, cos_N), axis=1).reshape(-1, 2, 2))


def _scale(image_NHW: Floats, draws: Draws, level: int) -> Floats:
    return _mapped(image_NHW, np.eye(2)[None] / (0.85, 0.75, 0.65, 0.55, 0.45)[level])


def _shear(image_NHW: Floats, draws: Draws, level: int) -> Floats:
    matrix_N22 = np.tile(np.eye(2), (len(image_NHW), 1, 1))
    matrix_N22[:, 1, 0] = draws.signs() * (0.2, 0.35, 0.5, 0.65, 0.8)[level]
    return _mapped(image_NHW, matrix_N22)


# Noise


def _gaussian_noise(image_NHW: Floats, draws: Draws, level: int) -> Floats:
    return image_NHW + (0.1, 0.2, 0.3, 0.4, 0.5)[level] * draws.normal(*image_NHW.shape[1:])


def _shot_noise(image_NHW: Floats, draws: Draws, level: int) -> Floats:
    """Count photons: Poisson draws, by inversion of the distribution of each of the 256 grey levels."""
    photons = (30, 12, 6, 3, 1.5)[level]
    grey = np.arange(256)[:, None]
    counts = np.arange(1, int(photons + 8 * math.sqrt(photons) + 8))
    log_factorial = np.concatenate(([0.0], np.cumsum(np.log(counts))))
    mean = np.maximum(grey / 255 * photons, 1e-9)
    mass = np.exp(np.concatenate(([0], counts)) * np.log(mean) - mean - log_factorial)
    # Each level's distribution lies in a stretch [level, level + 1] of one rising table.
    table = (np.minimum(np.cumsum(mass, axis=1), 1) + grey).ravel()
    level_NHW = np.rint(image_NHW * 255).astype(np.int64)
    place_NHW = np.searchsorted(table, level_NHW + draws.uniform(*image_NHW.shape[1:]).astype(np.float64))
    shot_NHW: Floats = (place_NHW - level_NHW * mass.shape[1]) / photons
    return shot_NHW


def _impulse_noise(image_NHW: Floats, draws: Draws, level: int) -> Floats:
    share = (0.03, 0.07, 0.12, 0.2, 0.3)[level]
    drawn_NHW = draws.uniform(*image_NHW.shape[1:])
    return np.where(drawn_NHW < share, drawn_NHW < share / 2, image_NHW)


# Blur


def _gaussian_blur(image_NHW: Floats, draws: Draws, level: int) -> Floats:
    return _blurred(image_NHW, (0.7, 1.1, 1.5, 2.0, 2.6)[level])


def _motion_blur(image_NHW: Floats, draws: Draws, level: int) -> Floats:
    length = (3, 5, 7, 9, 11)[level]
    direction_N2 = draws.directions()
    frames = [_moved(image_NHW, direction_N2 * (step - (length - 1) / 2)) for step in range(length)]
    smeared_NHW: Floats = np.mean(frames, axis=0)
    return smeared_NHW


def _glass_blur(image_NHW: Floats, draws: Draws, level: int) -> Floats:
    reach = (0.7, 1.1, 1.5, 2.0, 2.6)[level]
    y_NHW, x_NHW = (draws.between(-reach, reach, *image_NHW.shape[1:]) for _ in "yx")
    y_HW, x_HW = np.indices(image_NHW.shape[1:], dtype=np.float64)
    return _blurred(_sampled(image_NHW, y_HW + y_NHW, x_HW + x_NHW), 0.5)


def _pixelate(image_NHW: Floats, draws: Draws, level: int) -> Floats:
    height, width = image_NHW.shape[1:]
    share = (0.6, 0.45, 0.35, 0.28, 0.22)[level]
    rows, columns = _cells(height, max(2, round(share * height))), _cells(width, max(2, round(share * width)))
    averaged: Floats = rows @ image_NHW @ columns.T
    return averaged


# Light


def _brightness(image_NHW: Floats, draws: Draws, level: int) -> Floats:
    return image_NHW + (0.15, 0.3, 0.45, 0.6, 0.75)[level]


def _contrast(image_NHW: Floats, draws: Draws, level: int) -> Floats:
    mean_N: Floats = image_NHW.mean(axis=(1, 2), keepdims=True)
    return mean_N + (image_NHW - mean_N) * (0.6, 0.4, 0.25, 0.15, 0.08)[level]


def _fog(image_NHW: Floats, draws: Draws, level: int) -> Floats:
    density = (0.3, 0.45, 0.6, 0.75, 0.9)[level]
    haze_NHW = _clouds(draws, image_NHW.shape[1:], (3, 5, 9))
    return image_NHW * (1 - density / 2) + density * haze_NHW


def _stripe(image_NHW: Floats, draws: Draws, level: int) -> Floats:
    """Turn the grey values of a band around, as under a strip of film."""
    half = (1, 2, 3, 4.5, 6)[level]
    distance_NHW = np.abs(_along(draws.directions(), image_NHW.shape[1:]) - draws.between(-4, 4)[:, None, None])
    return np.where(distance_NHW < half, 1 - image_NHW, image_NHW)


# Things in front of it


def _occlusion(image_NHW: Floats, draws: Draws, level: int) -> Floats:
    side = (5, 7, 9, 11, 13)[level]
    visible_NHW = np.ones(image_NHW.shape, bool)
    for axis, size in enumerate(image_NHW.shape[1:]):
        # Within the middle, where there is something to hide.
        start_N = np.floor(draws.between(3, size - 2 - side))[:, None]
        hidden = (np.arange(size) >= start_N) & (np.arange(size) < start_N + side)
        shown = np.expand_dims(hidden, 2 - axis)
        visible_NHW = shown if axis == 0 else ~(visible_NHW & shown)
    return image_NHW * visible_NHW


def _spatter(image_NHW: Floats, draws: Draws, level: int) -> Floats:
    share = (0.06, 0.11, 0.17, 0.24, 0.32)[level]
    drops_NHW = _clouds(draws, image_NHW.shape[1:], (10, 14))
    edge_N = np.quantile(drops_NHW, 1 - share, axis=(1, 2), keepdims=True)
    wet_NHW = np.clip((drops_NHW - edge_N) * 12, 0, 1)
    return np.maximum(image_NHW, 0.85 * wet_NHW)


def _zigzag(image_NHW: Floats, draws: Draws, level: int) -> Floats:
    ink = (0.4, 0.6, 0.8, 1, 1)[level]
    along_NHW, across_NHW = _axes(draws, image_NHW.shape[1:])
    period, height = 7.0, (2, 2.5, 3, 3.5, 5)[level]
    # A triangular wave, -1..1.
    phase_NHW = along_NHW / period + draws.uniform()[:, None, None]
    wave_NHW = 4 * np.abs(phase_NHW - np.floor(phase_NHW + 0.5)) - 1
    # Across the slope a line is thinner than along the axis.
    steepness = math.hypot(1, 4 * height / period)
    cover_NHW = np.clip(1.2 - np.abs(across_NHW - height * wave_NHW) / steepness, 0, 1)
    return np.maximum(image_NHW, ink * cover_NHW)


def _dotted_line(image_NHW: Floats, draws: Draws, level: int) -> Floats:
    radius = (0.7, 0.9, 1.15, 1.4, 1.7)[level]
    along_NHW, across_NHW = _axes(draws, image_NHW.shape[1:])
    period = 4.0
    phase_NHW = along_NHW / period + draws.uniform()[:, None, None]
    aside_NHW = (phase_NHW - np.floor(phase_NHW + 0.5)) * period
    cover_NHW = np.clip(radius + 0.5 - np.hypot(aside_NHW, across_NHW), 0, 1)
    return np.maximum(image_NHW, cover_NHW)


# Strokes


def _thinning(image_NHW: Floats, draws: Draws, level: int) -> Floats:
    return 1 - _grown(1 - image_NHW, (0.3, 0.6, 0.9, 1.2, 1.5)[level])


def _thickening(image_NHW: Floats, draws: Draws, level: int) -> Floats:
    return _grown(image_NHW, (0.6, 1.2, 1.8, 2.4, 3.0)[level])


def _edges(image_NHW: Floats, draws: Draws, level: int) -> Floats:
    """Fade from the image to its outlines."""
    share = (0.3, 0.5, 0.7, 0.85, 1)[level]
    down_NHW, right_NHW = np.gradient(_blurred(image_NHW, 0.6), axis=(1, 2))
    outline_NHW = np.clip(2.5 * np.hypot(down_NHW, right_NHW), 0, 1)
    faded_NHW: Floats = image_NHW * (1 - share) + outline_NHW * share
    return faded_NHW


CORRUPTIONS: Mapping[str, Corruption] = {
    "shift": _shift,
    "rotation": _rotation,
    "scale": _scale,
    "shear": _shear,
    "gaussian-noise": _gaussian_noise,
    "shot-noise": _shot_noise,
    "impulse-noise": _impulse_noise,
    "gaussian-blur": _gaussian_blur,
    "motion-blur": _motion_blur,
    "glass-blur": _glass_blur,
    "pixelate": _pixelate,
    "brightness": _brightness,
    "contrast": _contrast,
    "fog": _fog,
    "stripe": _stripe,
    "occlusion": _occlusion,
    "spatter": _spatter,
    "zigzag": _zigzag,
    "dotted-line": _dotted_line,
    "thinning": _thinning,
    "thickening": _thickening,
    "edges": _edges,
}
"""What :func:`corrupt` can do, by name, like things side by side."""


# Geometry


def _sampled(image_NHW: Floats, y_NHW: Floats, x_NHW: Floats) -> Floats:
    """Return bilinear samples at places in pixels; outside is dark."""
    num, height, width = image_NHW.shape
    # Two dark pixels around it: places that are clipped to them are dark, as are all of their neighbours outside.
    framed = np.zeros((num, height + 4, width + 4))
    framed[:, 2:-2, 2:-2] = image_NHW
    y_NHW, x_NHW = np.clip(y_NHW, -2, height) + 2, np.clip(x_NHW, -2, width) + 2
    top_NHW, left_NHW = np.floor(y_NHW).astype(np.int64), np.floor(x_NHW).astype(np.int64)
    down_NHW, right_NHW = y_NHW - top_NHW, x_NHW - left_NHW
    first = np.arange(num)[:, None, None] * framed[0].size + top_NHW * (width + 4) + left_NHW
    flat = framed.ravel()
    upper_NHW = flat[first] * (1 - right_NHW) + flat[first + 1] * right_NHW
    first += width + 4
    lower_NHW = flat[first] * (1 - right_NHW) + flat[first + 1] * right_NHW
    between_NHW: Floats = upper_NHW * (1 - down_NHW) + lower_NHW * down_NHW
    return between_NHW


def _mapped(image_NHW: Floats, matrix_N22: Floats) -> Floats:
    """Return images seen through linear maps about their middle, from places in the result to places in the image."""
    y_HW, x_HW = _centred(image_NHW.shape[1:])
    middle_y, middle_x = ((size - 1) / 2 for size in image_NHW.shape[1:])
    entry = matrix_N22[:, :, :, None, None]
    y_NHW = entry[:, 0, 0] * y_HW + entry[:, 0, 1] * x_HW + middle_y
    x_NHW = entry[:, 1, 0] * y_HW + entry[:, 1, 1] * x_HW + middle_x
    shape = image_NHW.shape
    return _sampled(image_NHW, np.broadcast_to(y_NHW, shape), np.broadcast_to(x_NHW, shape))


def _moved(image_NHW: Floats, offset_N2: Floats) -> Floats:
    y_HW, x_HW = np.indices(image_NHW.shape[1:], dtype=np.float64)
    return _sampled(image_NHW, y_HW - offset_N2[:, 0, None, None], x_HW - offset_N2[:, 1, None, None])


def _centred(shape: Sequence[int]) -> tuple[Floats, Floats]:
    y_HW, x_HW = np.indices(shape, dtype=np.float64)
    return y_HW - (shape[0] - 1) / 2, x_HW - (shape[1] - 1) / 2


def _along(direction_N2: Floats, shape: Sequence[int]) -> Floats:
    """Return how far each pixel lies in a direction from the middle, [N, H, W]."""
    y_HW, x_HW = _centred(shape)
    return direction_N2[:, 0, None, None] * y_HW + direction_N2[:, 1, None, None] * x_HW


def _axes(draws: Draws, shape: Sequence[int]) -> tuple[Floats, Floats]:
    """Return how far each pixel lies along a line drawn near the middle, and beside it."""
    direction_N2 = draws.directions()
    normal_N2 = direction_N2[:, ::-1] * np.array((1, -1))
    return _along(direction_N2, shape), _along(normal_N2, shape) - draws.between(-5, 5)[:, None, None]


# Filters, as matrices from left and right: they work on rows and columns apart


def _blurred(image_NHW: Floats, sigma: float) -> Floats:
    rows, columns = (_gaussian(size, sigma) for size in image_NHW.shape[1:])
    blurred: Floats = rows @ image_NHW @ columns.T
    return blurred


def _gaussian(size: int, sigma: float) -> Floats:
    """Return the matrix [size, size] of a Gaussian filter; what lies outside is dark."""
    place = np.arange(size)
    reach = math.ceil(4 * sigma)
    total = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2).sum()
    weights: Floats = np.exp(-0.5 * ((place[:, None] - place) / sigma) ** 2) / total
    return weights


def _cells(size: int, count: int) -> Floats:
    """Return the matrix [size, size] that gives each pixel the mean of its cell, of ``count`` cells."""
    cell = np.arange(size) * count // size
    together = cell[:, None] == cell
    shares: Floats = together / together.sum(axis=1, keepdims=True)
    return shares


def _clouds(draws: Draws, shape: Sequence[int], grids: Sequence[int]) -> Floats:
    """Return smooth noise, 0..1, the mean of coarse and fine random grids, coarser ones weighing more."""
    height, width = shape
    weights = np.array([1 / grid for grid in grids])
    layers = [_stretch(height, grid) @ draws.uniform(grid, grid) @ _stretch(width, grid).T for grid in grids]
    clouds: Floats = np.tensordot(weights / weights.sum(), np.stack(layers), axes=1)
    return clouds


def _stretch(size: int, count: int) -> Floats:
    """Return the matrix [size, count] that draws ``count`` values out to ``size``, linearly in between."""
    place = np.linspace(0, count - 1, size)[:, None]
    weights: Floats = np.maximum(0, 1 - np.abs(place - np.arange(count)))
    return weights


def _grown(image_NHW: Floats, steps: float) -> Floats:
    """Return images whose bright parts have grown by ``steps`` pixels; part of a step is part of the way."""
    for taken in range(math.ceil(steps)):
        bigger_NHW = image_NHW.copy()
        for axis in (1, 2):
            for offset in (-1, 1):
                # The frame takes no part: what rolls over it comes from the other side.
                neighbour_NHW = np.roll(image_NHW, offset, axis)
                edge = [slice(None)] * 3
                edge[axis] = slice(0, 1) if offset == 1 else slice(-1, None)
                neighbour_NHW[tuple(edge)] = 0
                np.maximum(bigger_NHW, neighbour_NHW, out=bigger_NHW)
        share = min(1.0, steps - taken)
        image_NHW = (1 - share) * image_NHW + share * bigger_NHW
    return image_NHW
