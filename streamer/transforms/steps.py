"""The steps that transforms are made of, and the presets that name whole chains of them."""

import functools
import math
import statistics
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar

import numpy as np
from numpy.typing import NDArray

from streamer.transforms.draws import Draws, uniform, whole
from streamer.transforms.parameters import Choice, Number, PerChannel, Spread, Spreads, Takes, Whole
from streamer.transforms.resampling import CHUNK_PIXELS, MAX_DISPLACEMENT, AffineMaps, Bend

Shape = tuple[int, ...]
Words = NDArray[np.uint32]
Floats = NDArray[np.float64]

MAX_SIDE = 2048
"""Largest height or width of an image that goes into a step or comes out of it, in pixels."""


_SHIFT = Spreads(-1024, 1024, "pixels")
_ROTATE = Spreads(-180, 180, "degrees")
_SCALE = Spreads(-90, 900, "percent")
_SHEAR = Spreads(-60, 60, "degrees")
_TEN, _FIVE, _TWO = Spread(-10.0, 10.0), Spread(-5.0, 5.0), Spread(-2.0, 2.0)


class Term(ABC):
    """
    What a name in a transform stands for; a subclass is a frozen dataclass that says of each field what it ``Takes``.

    Its docstring is what users read of it. Bytes that were once sent under a name stay: whoever changes what a step or
    a preset makes of a sample gives it another name.
    """

    name: ClassVar[str]


class Step(Term):
    """One thing done to every sample."""

    cost_nanoseconds: ClassVar[float]
    """For each pixel that comes out, on one core; measured by ``benchmarks/transforming.py``."""

    @property
    def is_neutral(self) -> bool:
        """Whether it leaves every sample as it is."""
        return False

    def output_shape(self, shape: Shape) -> Shape:
        """Return the shape of what comes out of images of ``shape``; raise ValueError when it does not go with them."""
        return shape

    def output_dtype(self) -> np.dtype[np.generic]:
        """Return the type of what comes out; a step that makes other than uint8 is the last one."""
        return np.dtype(np.uint8)


class GeometricStep(Step):
    """A step that moves pixels along an affine map; those that follow each other become one map."""

    cost_nanoseconds = 8.0

    @abstractmethod
    def maps(self, words: Words, shape: Shape) -> AffineMaps:
        """
        Return the map of each sample.

        Args:
            words: Random, shape (N, 4).
            shape: Of the images that go in.
        """


class PixelStep(Step):
    """A step that works on the pixels as they lie."""

    @abstractmethod
    def apply(self, images: NDArray[np.uint8], draws: Draws, place: int) -> NDArray[np.generic]:
        """
        Return new images; the given ones are left as they are.

        Args:
            images: uint8, shape (N, height, width) or (N, height, width, channels).
            draws: Of these N samples.
            place: Of this step.
        """


class Preset(Term):
    """A name for a chain of steps; its version is in its name."""

    @abstractmethod
    def steps(self) -> tuple[Step, ...]:
        """Return the steps: as many, and of the same kinds, whatever the parameters."""


@dataclass(frozen=True)
class Crop(GeometricStep):
    """Cut a window out of the image: at a random place, whole pixels from the edges, or in the middle."""

    name = "crop"
    height: Annotated[int, Takes(Whole(1, MAX_SIDE, "pixels"), "of the window")]
    width: Annotated[int, Takes(Whole(1, MAX_SIDE, "pixels"), "of the window")]
    at: Annotated[str, Takes(Choice("random", "centre"), "where the window lies")] = "random"

    def output_shape(self, shape: Shape) -> Shape:
        """Return the window's."""
        if self.height > shape[0] or self.width > shape[1]:
            raise ValueError(f"{self.height} x {self.width} do not fit into images of {shape[0]} x {shape[1]}")
        return (self.height, self.width, *shape[2:])

    def maps(self, words: Words, shape: Shape) -> AffineMaps:
        """Return the maps."""
        room_x, room_y = shape[1] - self.width, shape[0] - self.height
        if self.at == "centre":
            left, top = np.full(len(words), room_x // 2), np.full(len(words), room_y // 2)
        else:
            left, top = whole(words[:, 0], room_x + 1), whole(words[:, 1], room_y + 1)
        return AffineMaps.shifts(-left.astype(np.float64), -top.astype(np.float64))


@dataclass(frozen=True)
class Pad(GeometricStep):
    """Put a frame of zeros around the image."""

    name = "pad"
    pixels: Annotated[int, Takes(Whole(0, 1024, "pixels"), "width of the frame, on each side")]

    @property
    def is_neutral(self) -> bool:
        """Whether there is no frame."""
        return self.pixels == 0

    def output_shape(self, shape: Shape) -> Shape:
        """Return it with the frame."""
        return (shape[0] + 2 * self.pixels, shape[1] + 2 * self.pixels, *shape[2:])

    def maps(self, words: Words, shape: Shape) -> AffineMaps:
        """Return the maps."""
        moved = np.full(len(words), float(self.pixels))
        return AffineMaps.shifts(moved, moved)


@dataclass(frozen=True)
class Shift(GeometricStep):
    """Move the image, by fractions of a pixel too; what comes in is 0."""

    name = "shift"
    pixels: Annotated[Spread, Takes(_SHIFT, "to the right and, drawn on its own, down; negative: left, up")]

    @property
    def is_neutral(self) -> bool:
        """Whether nothing moves."""
        return self.pixels.is_zero

    def maps(self, words: Words, shape: Shape) -> AffineMaps:
        """Return the maps."""
        return AffineMaps.shifts(self.pixels.at(uniform(words[:, 0])), self.pixels.at(uniform(words[:, 1])))


@dataclass(frozen=True)
class Rotate(GeometricStep):
    """Turn the image about its centre."""

    name = "rotate"
    degrees: Annotated[Spread, Takes(_ROTATE, "counter-clockwise")]

    @property
    def is_neutral(self) -> bool:
        """Whether nothing turns."""
        return self.degrees.is_zero

    def maps(self, words: Words, shape: Shape) -> AffineMaps:
        """Return the maps."""
        sine, cosine = sine_cosine(self.degrees.at(uniform(words[:, 0])))
        return AffineMaps.about_centre(shape, cosine, -sine, sine, cosine)


@dataclass(frozen=True)
class Scale(GeometricStep):
    """Make what is in the image larger or smaller, about its centre; the image keeps its shape."""

    name = "scale"
    percent: Annotated[Spread, Takes(_SCALE, "larger by so much; negative: smaller")]

    @property
    def is_neutral(self) -> bool:
        """Whether the size stays."""
        return self.percent.is_zero

    def maps(self, words: Words, shape: Shape) -> AffineMaps:
        """Return the maps."""
        shrunk = 100 / (100 + self.percent.at(uniform(words[:, 0])))
        zero = np.zeros_like(shrunk)
        return AffineMaps.about_centre(shape, shrunk, zero, zero, shrunk)


@dataclass(frozen=True)
class Shear(GeometricStep):
    """Lean the image sideways, as handwriting does; its middle row stays."""

    name = "shear"
    degrees: Annotated[Spread, Takes(_SHEAR, "of upright lines from the vertical, the top to the right")]

    @property
    def is_neutral(self) -> bool:
        """Whether nothing leans."""
        return self.degrees.is_zero

    def maps(self, words: Words, shape: Shape) -> AffineMaps:
        """Return the maps."""
        sine, cosine = sine_cosine(self.degrees.at(uniform(words[:, 0])))
        zero, one = np.zeros_like(sine), np.ones_like(sine)
        return AffineMaps.about_centre(shape, one, sine / cosine, zero, one)


@dataclass(frozen=True)
class Mirror(GeometricStep):
    """Swap left and right; for clothes and the like, of which a mirrored one is one too, and not for characters."""

    name = "mirror"
    probability: Annotated[float, Takes(Number(0, 1), "of a sample to be mirrored")] = 0.5

    @property
    def is_neutral(self) -> bool:
        """Whether nothing is ever mirrored."""
        return self.probability == 0

    def maps(self, words: Words, shape: Shape) -> AffineMaps:
        """Return the maps."""
        side = np.where(uniform(words[:, 0]) < self.probability, -1.0, 1.0)
        zero, one = np.zeros_like(side), np.ones_like(side)
        return AffineMaps.about_centre(shape, side, zero, zero, one)


@dataclass(frozen=True)
class Elastic(Step):
    """Bend the image: points of a grid move at random, and what lies between follows smoothly (cubic B-splines)."""

    name = "elastic"
    cost_nanoseconds = 15.0
    pixels: Annotated[float, Takes(Number(0, MAX_DISPLACEMENT, "pixels"), "the furthest a point moves, in x and in y")]
    spacing: Annotated[int, Takes(Whole(2, 1024, "pixels"), "between points of the grid")] = 7

    @property
    def is_neutral(self) -> bool:
        """Whether nothing moves."""
        return self.pixels == 0

    def bend(self, draws: Draws, place: int, shape: Shape) -> Bend:
        """
        Return the bend of each sample.

        Source: the idea, with fields of random numbers smoothed in another way, is P. Y. Simard, D. Steinkraus, J. C.
        Platt, "Best Practices for Convolutional Neural Networks Applied to Visual Document Analysis", ICDAR 2003,
        section 2.
        """
        rows, columns = Bend.grid(shape[0], shape[1], self.spacing)
        words = draws.words(place, 2 * rows * columns).reshape(len(draws), 2, rows, columns)
        return Bend.of(uniform(words), pixels=self.pixels, spacing=self.spacing)


@dataclass(frozen=True)
class Cutout(PixelStep):
    """
    Paint a square over with one value; its middle is any pixel of the image, so that some of it may lie outside.

    Source: T. DeVries, G. W. Taylor, "Improved Regularization of Convolutional Neural Networks with Cutout", 2017,
    arXiv 1708.04552, section 3.2.
    """

    name = "cutout"
    cost_nanoseconds = 1.0
    pixels: Annotated[int, Takes(Whole(0, MAX_SIDE, "pixels"), "side of the square")]
    fill: Annotated[int, Takes(Whole(0, 255, "grey levels"), "what it is painted with")] = 0
    probability: Annotated[float, Takes(Number(0, 1), "of a sample to get a square")] = 1.0

    @property
    def is_neutral(self) -> bool:
        """Whether there is never a square."""
        return self.pixels == 0 or self.probability == 0

    def apply(self, images: NDArray[np.uint8], draws: Draws, place: int) -> NDArray[np.generic]:
        """Return the painted images."""
        words = draws.words(place, 3)
        rows = self._covered(words[:, 0], images.shape[1]) & (uniform(words[:, 2]) < self.probability)[:, None]
        square = rows[:, :, None] & self._covered(words[:, 1], images.shape[2])[:, None, :]
        painted = images.copy()
        np.copyto(painted, np.uint8(self.fill), where=square if images.ndim == 3 else square[..., None])
        return painted

    def _covered(self, words: Words, length: int) -> NDArray[np.bool_]:
        first = whole(words, length)[:, None] - self.pixels // 2
        along = np.arange(length)
        covered: NDArray[np.bool_] = (along >= first) & (along < first + self.pixels)
        return covered


@dataclass(frozen=True)
class Noise(PixelStep):
    """Add normally distributed noise to each value on its own, and cut off at 0 and 255."""

    name = "noise"
    cost_nanoseconds = 8.0
    std: Annotated[float, Takes(Number(0, 128, "grey levels"), "standard deviation")]

    @property
    def is_neutral(self) -> bool:
        """Whether none is added."""
        return self.std == 0

    def apply(self, images: NDArray[np.uint8], draws: Draws, place: int) -> NDArray[np.generic]:
        """Return the noisy images."""
        noisy = np.empty_like(images)
        scale, values = np.int32(round(self.std * _STD_ONE)), images[:1].size
        chunk = max(1, CHUNK_PIXELS // values)
        for first in range(0, len(images), chunk):
            part = slice(first, first + chunk)
            words = draws[part].words(place, -(-values // 2))
            # Two values a word, the upper half first: said by shifts, as the order of a word's bytes differs.
            halves = np.stack([words >> np.uint32(16), words & np.uint32(0xFFFF)], axis=-1).reshape(len(words), -1)
            noise = np.take(_normal_quantiles(), halves[:, :values]) * scale
            noise += _ROUNDING
            noise >>= _QUANTILE_BITS + _STD_BITS
            noise += images[part].reshape(len(words), -1)
            noisy[part] = np.clip(noise, 0, 255, out=noise).reshape(images[part].shape)
        return noisy


_QUANTILE_BITS = 11
_STD_BITS = 8
_STD_ONE = 1 << _STD_BITS
_ROUNDING = np.int32(1 << (_QUANTILE_BITS + _STD_BITS - 1))


@functools.cache
def _normal_quantiles() -> NDArray[np.int32]:
    """Return the normal distribution's quantiles at the middles of 65,536 equal parts, in 2048ths: up to 4.3."""
    normal = statistics.NormalDist()
    # A C library's logarithm goes in, right to 1e-15 or so: no quantile is nearer than 1e-6 to where rounding turns.
    upper = [
        round(normal.inv_cdf((1 << 15 | half) / 65536 + 2**-17) * (1 << _QUANTILE_BITS)) for half in range(1 << 15)
    ]
    return np.array([-value for value in reversed(upper)] + upper, np.int32)


@dataclass(frozen=True)
class Normalise(PixelStep):
    """Make floating-point numbers: (value / 255 - mean) / std. The last step, always."""

    name = "normalise"
    cost_nanoseconds = 1.0
    mean: Annotated[tuple[float, ...], Takes(PerChannel(-10, 10), "of values from 0 to 1")] = (0.0,)
    std: Annotated[tuple[float, ...], Takes(PerChannel(0.001, 100), "of values from 0 to 1")] = (1.0,)
    dtype: Annotated[str, Takes(Choice("float32", "float16"), "type of the numbers")] = "float32"

    def output_shape(self, shape: Shape) -> Shape:
        """Return the same, if there are as many numbers as channels."""
        channels = shape[2] if len(shape) == 3 else 1
        for name, numbers in (("mean", self.mean), ("std", self.std)):
            if len(numbers) not in (1, channels):
                raise ValueError(f"{name} has {len(numbers)} numbers for {channels} channel{'s'[: channels > 1]}")
        return shape

    def output_dtype(self) -> np.dtype[np.generic]:
        """Return it as it goes over the wire."""
        return np.dtype(self.dtype).newbyteorder("<")

    def apply(self, images: NDArray[np.uint8], draws: Draws, place: int) -> NDArray[np.generic]:
        """Return the numbers."""
        # There are 256 values: a table of what each becomes, in a row for each channel that differs.
        values = np.arange(256) / 255
        mean, std = np.array(self.mean)[:, None], np.array(self.std)[:, None]
        table = ((values - mean) / std).astype(self.output_dtype())
        if len(table) == 1:
            return np.take(table[0], images)
        return np.take(table.reshape(-1), images + np.arange(len(table)) * 256)


@dataclass(frozen=True)
class AugmentV1(Preset):
    """rotate, shift, scale, shear, elastic (spacing 7), cutout, in this order: for handwriting and the like."""

    name = "augment-v1"
    rotate: Annotated[Spread, Takes(_ROTATE, "degrees of rotate")] = _TEN
    shift: Annotated[Spread, Takes(_SHIFT, "pixels of shift")] = _TWO
    scale: Annotated[Spread, Takes(_SCALE, "percent of scale")] = _TEN
    shear: Annotated[Spread, Takes(_SHEAR, "degrees of shear")] = _FIVE
    elastic: Annotated[float, Takes(Number(0, MAX_DISPLACEMENT, "pixels"), "pixels of elastic")] = 0.0
    cutout: Annotated[int, Takes(Whole(0, MAX_SIDE, "pixels"), "pixels of cutout")] = 0

    def steps(self) -> tuple[Step, ...]:
        """Return the six of them."""
        return (
            Rotate(self.rotate),
            Shift(self.shift),
            Scale(self.scale),
            Shear(self.shear),
            Elastic(self.elastic),
            Cutout(self.cutout),
        )


_BUILT_IN: tuple[type[Term], ...] = (
    Crop, Pad, Shift, Rotate, Scale, Shear, Mirror, Elastic, Cutout, Noise, Normalise, AugmentV1,
)  # fmt: skip
_known: dict[str, type[Term]] = {term.name: term for term in _BUILT_IN}


def known() -> Mapping[str, type[Term]]:
    """Return every step and preset by its name."""
    return _known


def register(term: type[Term]) -> None:
    """
    Make a step or preset of one's own known by its ``name``, as a module named to the streamer does when imported.

    Raises:
        ValueError: The name is another's.
    """
    if _known.setdefault(term.name, term) is not term:
        raise ValueError(f"there already is a transform named {term.name!r}")


# Taylor series in the square of an angle of at most a quarter of pi, highest power first: the next term is below 1e-12.
_SINE = tuple((-1) ** term / math.factorial(2 * term + 1) for term in reversed(range(7)))
_COSINE = tuple((-1) ** term / math.factorial(2 * term) for term in reversed(range(8)))


def sine_cosine(degrees: Floats) -> tuple[Floats, Floats]:
    """
    Return sine and cosine, right to 1e-12, exact at multiples of 90 degrees, and the same on every machine.

    The functions of the C library and of NumPy may differ in the last place from one processor to the next.
    """
    quarters = np.rint(degrees / 90)
    angle = (degrees - quarters * 90) * (math.pi / 180)
    square = angle * angle
    sine, cosine = _series(_SINE, square) * angle, _series(_COSINE, square)
    turns = quarters.astype(np.int64) & 3
    is_sideways, is_sine_negative = (turns & 1).astype(np.bool_), turns >= 2
    is_cosine_negative = is_sideways ^ is_sine_negative
    turned_sine, turned_cosine = np.where(is_sideways, cosine, sine), np.where(is_sideways, sine, cosine)
    return (
        np.where(is_sine_negative, -turned_sine, turned_sine),
        np.where(is_cosine_negative, -turned_cosine, turned_cosine),
    )


def _series(coefficients: tuple[float, ...], variable: Floats) -> Floats:
    total = np.full_like(variable, coefficients[0])
    for coefficient in coefficients[1:]:
        total *= variable
        total += coefficient
    return total
