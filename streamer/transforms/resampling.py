"""
Images sampled anew along affine maps and smooth displacements: bilinear, zero outside, in whole numbers.

Bilinear sampling of a batch is gathers and a few passes of arithmetic. What makes it fast in NumPy: the four
neighbours of a pixel lie in one 32-bit word, so that one gather fetches them; two of them are weighted in one
multiplication; and a chunk's arrays stay in the second-level cache, in memory that is used again.
"""

import copy
import functools
import threading
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int32]

# Coordinates count 256ths of a pixel.
_FRACTION_BITS = 8
_ONE = 1 << _FRACTION_BITS

# Far outside of any image, and two of them still fit into 32 bits.
_FAR = float(1 << 29)

# Linear parts that displacements are multiplied by; bounded so that the sum of two products fits into 32 bits.
_LINEAR_BITS = 12
_MAX_LINEAR = float((1 << 16) - 1)

MAX_DISPLACEMENT = 31
"""Pixels; in 256ths they take 13 bits."""

# B-spline weights, and the control points they weigh.
_WEIGHT_BITS = 10
_CONTROL_BITS = 12

CHUNK_PIXELS = 1 << 16
"""What is worked on at once: its arrays of 32 bits, five of them, fit into a second-level cache of 1 MiB."""


@dataclass(frozen=True, eq=False, slots=True)
class AffineMaps:
    """
    Where each pixel of N images comes from: ``(xx * x + xy * y + x0, yx * x + yy * y + y0)``.

    Coordinates are pixels, (0, 0) the centre of the first, y pointing down. Each array has shape (N,).
    """

    xx: Floats
    xy: Floats
    x0: Floats
    yx: Floats
    yy: Floats
    y0: Floats

    @classmethod
    def shifts(cls, x: Floats, y: Floats) -> "AffineMaps":
        """Make the maps that move images by (x, y) pixels."""
        one, zero = np.ones_like(x), np.zeros_like(x)
        return cls(one, zero, -x, zero, one, -y)

    @classmethod
    def about_centre(cls, shape: tuple[int, ...], xx: Floats, xy: Floats, yx: Floats, yy: Floats) -> "AffineMaps":
        """Make the maps of these linear parts that leave the centre of an image of ``shape`` where it is."""
        x, y = (shape[1] - 1) / 2, (shape[0] - 1) / 2
        return cls(xx, xy, x - xx * x - xy * y, yx, yy, y - yx * x - yy * y)

    def then(self, following: "AffineMaps") -> "AffineMaps":
        """Return the maps of doing ``following`` to what these make."""
        # Written out: a matrix product may be rounded in other ways on other machines.
        f = following
        return AffineMaps(
            self.xx * f.xx + self.xy * f.yx,
            self.xx * f.xy + self.xy * f.yy,
            self.xx * f.x0 + self.xy * f.y0 + self.x0,
            self.yx * f.xx + self.yy * f.yx,
            self.yx * f.xy + self.yy * f.yy,
            self.yx * f.x0 + self.yy * f.y0 + self.y0,
        )

    def __getitem__(self, part: slice) -> "AffineMaps":
        return AffineMaps(*(getattr(self, name)[part] for name in ("xx", "xy", "x0", "yx", "yy", "y0")))


@dataclass(frozen=True, eq=False, slots=True)
class Bend:
    """
    How far from its own place each pixel of N images is fetched: uniform cubic B-splines through a grid of points.

    Source: D. Rueckert et al., "Nonrigid registration using free-form deformations: application to breast MR images",
    IEEE Transactions on Medical Imaging 18(8), 1999, section II.B.
    """

    controls: Ints
    """In x and in y at each point, in 4096ths of a pixel; shape (N, 2, rows, columns), see :meth:`grid`."""
    spacing: int
    """Pixels between points."""

    @staticmethod
    def grid(height: int, width: int, spacing: int) -> tuple[int, int]:
        """Return how many rows and columns of points an image needs."""
        return (height - 1) // spacing + 4, (width - 1) // spacing + 4

    @classmethod
    def of(cls, uniform: Floats, *, pixels: float, spacing: int) -> "Bend":
        """
        Make one that moves points by up to ``pixels``.

        Args:
            uniform: In [0, 1), shape (N, 2, rows, columns).
            pixels: At most ``MAX_DISPLACEMENT``.
            spacing: Pixels between points.
        """
        moved = np.rint((uniform * 2 - 1) * (pixels * (1 << _CONTROL_BITS))).astype(np.int32)
        return cls(moved, spacing)


@functools.lru_cache(maxsize=64)
def _splines(length: int, spacing: int, times: int | None = None) -> tuple[NDArray[np.intp], Ints]:
    """
    Return the first of the four points that each pixel depends on, and their weights, in 1024ths that add up to 1.

    The weights have shape (4, length), or (4, length, times): each as many times over.
    """
    first, phase = np.divmod(np.arange(length), spacing)
    t = phase / spacing
    u = 1 - t
    sixths = np.stack([u * u * u, 3 * t * t * t - 6 * t * t + 4, 3 * u * u * u - 6 * u * u + 4, t * t * t])
    weights = np.rint(sixths * ((1 << _WEIGHT_BITS) / 6)).astype(np.int32)
    weights[1] += (1 << _WEIGHT_BITS) - weights.sum(axis=0, dtype=np.int32)
    return first, weights if times is None else np.repeat(weights, times).reshape(4, length, times)


class Sampler:
    """
    Samples images of one shape to images of another.

    Args:
        source: Height, width, and channels where there are more than one.
        target: Height, width, and the same channels.
    """

    def __init__(self, source: tuple[int, ...], target: tuple[int, ...]) -> None:
        self._source, self._target = source, target
        fitting = max(1, CHUNK_PIXELS // max(source[0] * source[1], target[0] * target[1]))
        # A power of two, as batches mostly are: no small rest.
        self.chunk = 1 << (fitting.bit_length() - 1)

    def sample(
        self,
        images: NDArray[np.uint8],
        maps: AffineMaps,
        bend: Bend | None,
        out: NDArray[np.uint8],
    ) -> None:
        """
        Fetch each pixel from where its map says; with a bend, from where it says for the place the bend moves it to.

        Args:
            images: uint8, shape (n, *source), n at most ``chunk``.
            maps: Of these n images.
            bend: Of these n images; None for none.
            out: uint8, shape (n, *target); written to.
        """
        scratch = _scratch(self.chunk, self._source[:2], self._target[:2]).for_images(len(images))
        _coordinates(scratch, maps, bend)
        planes = [...] if images.ndim == 3 else [(..., channel) for channel in range(images.shape[3])]
        for plane in planes:
            _pack(scratch, images[plane])
            # A mode other than "raise" lets NumPy write to ``out`` at once, here and below.
            np.take(scratch.table.reshape(-1), scratch.wide_places, mode="clip", out=scratch.neighbours)
            _interpolate(scratch)
            np.copyto(out[plane], scratch.mixed, casting="unsafe")


class _Scratch:
    """Arrays for up to ``count`` images; fresh memory for each chunk would cost as much as the arithmetic."""

    def __init__(self, count: int, source: tuple[int, ...], target: tuple[int, ...]) -> None:
        (height, width), shape = source, (count, *target)
        # A frame of zeros: one before, two after, for the neighbours of the frame itself.
        self.framed = np.zeros((count, height + 3, width + 3), np.uint8)
        self.pairs = np.empty((count, height + 3, width + 2), np.uint16)
        self.table = np.empty((count, height + 2, width + 2), np.uint32)
        self.first = (np.arange(count, dtype=np.int32) * np.int32(self.table[0].size))[:, None, None]
        # As an array: NumPy takes the smaller of two arrays twice as fast as that of an array and a number.
        self.last_x = np.full(shape, (width + 1) * _ONE, np.uint32)
        self.last_y = np.full(shape, (height + 1) * _ONE, np.uint32)
        self.x, self.y, self.places = (np.empty(shape, np.int32) for _ in range(3))
        self.wide_places = np.empty(shape, np.intp)
        self.neighbours, self.mixed = (np.empty(shape, np.uint32) for _ in range(2))
        self.key = (count, source, target)

    @functools.cached_property
    def moved(self) -> Ints:
        """Displacements of each pixel in x and in y; for bends alone, as is ``product``."""
        return np.empty((len(self.x), 2, *self.x.shape[1:]), np.int32)

    @functools.cached_property
    def product(self) -> Ints:
        """Room to make ``moved``."""
        return np.empty_like(self.moved)

    def for_images(self, count: int) -> "_Scratch":
        """Return the same memory as arrays for ``count`` images."""
        if count == len(self.x):
            return self
        part = copy.copy(self)
        vars(part).update((name, array[:count]) for name, array in vars(self).items() if isinstance(array, np.ndarray))
        return part


_kept = threading.local()


def _scratch(count: int, source: tuple[int, ...], target: tuple[int, ...]) -> _Scratch:
    kept: _Scratch | None = getattr(_kept, "scratch", None)
    if kept is None or kept.key != (count, source, target):
        kept = _kept.scratch = _Scratch(count, source, target)
    return kept


def _coordinates(scratch: _Scratch, maps: AffineMaps, bend: Bend | None) -> None:
    """Write where each pixel's neighbours lie in the table to ``places``, and the fractions to ``x`` and ``y``."""
    _, (_, source_width), (height, width) = scratch.key
    columns, rows = np.arange(width), np.arange(height)
    x, y, places = scratch.x, scratch.y, scratch.places
    # One more: the frame's first row and column are 0.
    _outer_sum(maps.xx[:, None] * columns, maps.xy[:, None] * rows + (maps.x0 + 1)[:, None], x)
    _outer_sum(maps.yx[:, None] * columns, maps.yy[:, None] * rows + (maps.y0 + 1)[:, None], y)
    if bend is not None:
        moved = _displacements(scratch, bend)
        across, down = moved[:, 0], moved[:, 1]
        _add_mapped(x, maps.xx, maps.xy, across, down, scratch)
        _add_mapped(y, maps.yx, maps.yy, across, down, scratch)
    # Below zero is beyond the end when unsigned: one comparison sends both to the frame's last row, all zeros.
    np.minimum(x.view(np.uint32), scratch.last_x, out=x.view(np.uint32))
    np.minimum(y.view(np.uint32), scratch.last_y, out=y.view(np.uint32))
    np.right_shift(y, _FRACTION_BITS, out=places)
    places *= source_width + 2
    places += scratch.first
    whole_x = scratch.mixed.view(np.int32)
    np.right_shift(x, _FRACTION_BITS, out=whole_x)
    places += whole_x
    np.copyto(scratch.wide_places, places)
    x &= _ONE - 1
    y &= _ONE - 1


def _outer_sum(columns: Floats, rows: Floats, out: Ints) -> None:
    np.add(_fixed(columns)[:, None, :], _fixed(rows)[:, :, None], out=out)


def _fixed(coordinates: Floats) -> Ints:
    return np.clip(np.rint(coordinates * _ONE), -_FAR, _FAR).astype(np.int32)


def _displacements(scratch: _Scratch, bend: Bend) -> Ints:
    """Return how far each pixel moves in x and in y, in 256ths of a pixel; shape (n, 2, height, width)."""
    _, _, (height, width) = scratch.key
    first, weights = _splines(width, bend.spacing)
    across = np.full((*bend.controls.shape[:3], width), 1 << (_WEIGHT_BITS - 1), np.int32)
    for tap in range(4):
        across += np.take(bend.controls, first + tap, axis=3) * weights[tap]
    across >>= _WEIGHT_BITS
    # Weights in full: many short rows, each times one number, would take three times as long.
    first, weights = _splines(height, bend.spacing, width)
    moved, product = scratch.moved, scratch.product
    dropped = _WEIGHT_BITS + _CONTROL_BITS - _FRACTION_BITS
    moved[...] = 1 << (dropped - 1)
    for tap in range(4):
        np.take(across, first + tap, axis=2, mode="clip", out=product)
        product *= weights[tap]
        moved += product
    moved >>= dropped
    return moved


def _add_mapped(
    coordinates: Ints, along_x: Floats, along_y: Floats, across: Ints, down: Ints, scratch: _Scratch
) -> None:
    """Add what the linear part of a map makes of displacements."""
    total, product = scratch.places, scratch.mixed.view(np.int32)
    np.multiply(across, _linear(along_x), out=total)
    np.multiply(down, _linear(along_y), out=product)
    total += product
    total += 1 << (_LINEAR_BITS - 1)
    total >>= _LINEAR_BITS
    coordinates += total


def _linear(factors: Floats) -> Ints:
    fixed = np.clip(np.rint(factors * (1 << _LINEAR_BITS)), -_MAX_LINEAR, _MAX_LINEAR)
    return fixed.astype(np.int32)[:, None, None]


def _pack(scratch: _Scratch, images: NDArray[np.uint8]) -> None:
    """Fill the table: each pixel, and those to its right, below, and below to the right, from the lowest byte up."""
    framed, pairs, table = scratch.framed, scratch.pairs, scratch.table
    framed[:, 1:-2, 1:-2] = images
    np.left_shift(framed[:, :, 1:], 8, out=pairs, dtype=np.uint16)
    pairs |= framed[:, :, :-1]
    np.left_shift(pairs[:, 1:], 16, out=table, dtype=np.uint32)
    table |= pairs[:, :-1]


def _interpolate(scratch: _Scratch) -> None:
    """
    Weigh the four neighbours of each pixel, rounding half up; the result is in ``mixed``.

    Upper and lower neighbours are the two 16-bit lanes of a word: 255 * 256 is the most that a lane gets, so that none
    runs over into the other. Differences may be negative in between: modulo 2**32 the sums come out right.
    """
    left, right = scratch.neighbours, scratch.mixed
    across, down = scratch.x.view(np.uint32), scratch.y.view(np.uint32)
    np.right_shift(left, 8, out=right)
    right &= 0x00FF00FF
    left &= 0x00FF00FF
    right -= left
    right *= across
    left <<= _FRACTION_BITS
    right += left
    lanes, upper = right, left
    np.bitwise_and(lanes, 0xFFFF, out=upper)
    lanes >>= 16
    lanes -= upper
    lanes *= down
    upper <<= _FRACTION_BITS
    lanes += upper
    lanes += 1 << (2 * _FRACTION_BITS - 1)
    lanes >>= 2 * _FRACTION_BITS
