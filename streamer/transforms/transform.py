"""A transform: read from its text, applied to batches."""

import functools
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from streamer.errors import InvalidPlanError, TransformError
from streamer.transforms.draws import Draws
from streamer.transforms.parameters import Parameter, parameters_of
from streamer.transforms.resampling import AffineMaps, Bend, Sampler
from streamer.transforms.steps import (
    MAX_SIDE,
    Crop,
    Elastic,
    GeometricStep,
    Pad,
    PixelStep,
    Preset,
    Shape,
    Step,
    Term,
    known,
)

MAX_LENGTH = 512
"""Characters of a transform's text."""

MAX_STEPS = 32
"""Steps of a transform, those of its presets counted."""

_FIELD = "plan.transform"
_TERM = re.compile(r"([a-z][a-z0-9_-]{0,63})\s*(?:\(([^()]*)\))?", re.ASCII)


def parse(spec: str, *, image_shape: Shape) -> "Transform":
    """
    Read a transform: ``name(parameter=value,...)``, several joined by ``|``; an empty one does nothing.

    Args:
        spec: As in ``Plan.transform``.
        image_shape: Of the stored images: height, width, and channels when more than one.

    Raises:
        InvalidPlanError: Names what is unknown, missing or out of range, and what is known or allowed.
    """
    if len(spec) > MAX_LENGTH:
        raise _invalid(f"{len(spec)} characters; {MAX_LENGTH} are allowed")
    texts = [text.strip() for text in spec.split("|")] if spec.strip() else []
    return Transform(tuple(_parse_term(text, number) for number, text in enumerate(texts, 1)), tuple(image_shape))


def _parse_term(text: str, number: int) -> Term:
    match = _TERM.fullmatch(text)
    if match is None:
        raise _invalid(f"step {number} is {text[:64]!r}; a step is written name(parameter=value,...), joined by |")
    name, arguments = match[1], match[2] or ""
    term = known().get(name)
    if term is None:
        raise _invalid(f"there is no {name!r}; known are {', '.join(known())}")
    declared = parameters_of(term)
    values: dict[str, object] = {}
    for argument in arguments.split(",") if arguments.strip() else []:
        key, equals, value = (part.strip() for part in argument.partition("="))
        if not equals or key not in declared:
            raise _invalid(f"{name}: there is no parameter {key[:64]!r}; known are {_described(declared.values())}")
        if key in values:
            raise _invalid(f"{name}: {key} is given twice")
        values[key] = _parse_value(name, declared[key], value)
    for parameter in declared.values():
        if parameter.is_required and parameter.name not in values:
            raise _invalid(f"{name}: {parameter.name} is missing; allowed is {parameter.kind.allowed}")
    return term(**values)


def _parse_value(name: str, parameter: Parameter, text: str) -> object:
    try:
        return parameter.kind.parse(text)
    except ValueError as error:
        allowed = parameter.kind.allowed
        raise _invalid(f"{name}: {parameter.name} is {text[:64]!r}; allowed is {allowed}") from error


def _described(parameters: Iterable[Parameter]) -> str:
    return "; ".join(f"{parameter.name} ({parameter.kind.allowed})" for parameter in parameters) or "none"


def _invalid(problem: str) -> InvalidPlanError:
    return InvalidPlanError(_FIELD, problem)


@dataclass(frozen=True)
class Transform:
    """
    A chain of steps for images of one shape; safe to use from several threads.

    Raises:
        InvalidPlanError: The steps do not go together, or not with the images.
    """

    terms: tuple[Term, ...]
    """Steps and presets, in order."""
    input_shape: Shape
    """Of the stored images: height, width, and channels when more than one."""

    def __post_init__(self) -> None:
        if len(self.steps) > MAX_STEPS:
            raise _invalid(f"{len(self.steps)} steps; {MAX_STEPS} are allowed")
        _ = self._shapes  # what does not go together comes up here, not with the first batch

    @functools.cached_property
    def steps(self) -> tuple[Step, ...]:
        """The steps, those of presets in their places; a step's number here says which random numbers are its own."""
        return tuple(step for term in self.terms for step in _steps_of(term))

    @functools.cached_property
    def canonical(self) -> str:
        """Its normal form: the same for all ways to write it; parsed, it gives this transform again."""
        return "|".join(map(_format, self.terms))

    @property
    def image_shape(self) -> Shape:
        """Shape of one image that comes out."""
        return self._shapes[-1]

    @functools.cached_property
    def dtype(self) -> np.dtype[np.generic]:
        """Type of the pixels that come out: uint8, or float16 or float32, little-endian."""
        return self.steps[-1].output_dtype() if self.steps else np.dtype(np.uint8)

    @property
    def is_identity(self) -> bool:
        """Whether it leaves every sample as it is."""
        return not self._stages

    @functools.cached_property
    def seconds_per_sample(self) -> float:
        """About how long one core takes for a sample, in a batch of some hundred; 0 when there is nothing to do."""
        return sum(stage.cost_nanoseconds for stage in self._stages) * 1e-9

    @property
    def sample_bytes(self) -> int:
        """Bytes of one image that comes out."""
        return math.prod(self.image_shape) * self.dtype.itemsize

    def apply(
        self, images: NDArray[np.uint8], indices: NDArray[np.integer], *, seed: int | None, epoch: int
    ) -> NDArray[np.generic]:
        """
        Transform a batch.

        The bytes of a sample depend on its own pixels, its index, ``seed`` and ``epoch`` alone.

        Args:
            images: uint8, shape (N, *input_shape); not written to.
            indices: Of the samples in their split, shape (N,), each below 2**64.
            seed: 0 to 2**64 - 1; None counts as 0.
            epoch: 0 to 2**32 - 1.

        Returns:
            C-contiguous, shape (N, *image_shape), of ``dtype``; may be ``images`` itself where there is nothing to do.

        Raises:
            TransformError: A sample failed; the error has its index.
            ValueError: ``images`` are not of that type and shape.
        """
        expected = (len(indices), *self.input_shape)
        if images.dtype != np.uint8 or images.shape != expected:
            raise ValueError(f"images: {images.dtype} of shape {images.shape}; expected uint8 of shape {expected}")
        draws = Draws(indices, seed=seed, epoch=epoch)
        try:
            return self._run(images, draws)
        except Exception as error:
            raise self._blamed(images, indices, draws, error) from error

    def _run(self, images: NDArray[np.uint8], draws: Draws) -> NDArray[np.generic]:
        expected = (len(draws), *self.image_shape)
        if not len(draws):
            return np.empty(expected, self.dtype)
        result: NDArray[np.generic] = images
        for stage in self._stages:
            # Only the last stage makes other than uint8: _shapes saw to it.
            result = stage.apply(np.asarray(result, np.uint8), draws)
        if result.shape != expected or result.dtype != self.dtype:
            raise ValueError(f"made {result.dtype} of shape {result.shape}, not {self.dtype} of shape {expected}")
        return np.ascontiguousarray(result)

    def _blamed(
        self, images: NDArray[np.uint8], indices: NDArray[np.integer], draws: Draws, error: Exception
    ) -> TransformError:
        """Return the error of the first sample that fails on its own; if none does, of the whole batch."""
        for number, index in enumerate(indices):
            alone = slice(number, number + 1)
            try:
                self._run(images[alone], draws[alone])
            except Exception as its_own:
                return TransformError(int(index), f"{self.canonical} failed: {_text(its_own)}")
        return TransformError(
            int(indices[0]), f"{self.canonical} failed for a batch that begins with it: {_text(error)}"
        )

    @functools.cached_property
    def _shapes(self) -> tuple[Shape, ...]:
        """Shapes of the images before the first step, and after each."""
        shapes, before = [self.input_shape], None
        for step in self.steps:
            if before is not None and before.output_dtype() != np.uint8:
                raise _invalid(f"{step.name} follows {before.name}, which must be the last step")
            try:
                shapes.append(step.output_shape(shapes[-1]))
            except ValueError as error:
                raise _invalid(f"{step.name}: {error}") from error
            if max(*shapes[-2][:2], *shapes[-1][:2]) > MAX_SIDE:
                sizes = " to ".join(f"{shape[0]} x {shape[1]}" for shape in shapes[-2:])
                raise _invalid(f"{step.name}: images go from {sizes}; {MAX_SIDE} pixels are allowed for a side")
            before = step
        return tuple(shapes)

    @functools.cached_property
    def _stages(self) -> "tuple[_Resampling | _Pixels, ...]":
        stages: list[_Resampling | _Pixels] = []
        moves: list[_Placed] = []
        for place, (step, shape) in enumerate(zip(self.steps, self._shapes, strict=False)):
            if step.is_neutral:
                continue
            placed = _Placed(place, step, shape)
            if isinstance(step, Pad) and moves and not isinstance(moves[-1].step, Pad):
                # The frame is zeros, and not what was moved out of the image before.
                stages.append(_Resampling(moves))
                moves = []
            if isinstance(step, GeometricStep | Elastic):
                moves.append(placed)
            if moves and (isinstance(step, Crop) or not isinstance(step, GeometricStep)):
                # What follows a bend cannot join it: where its pixels come from is no longer known at whole places.
                # And what was cut off is gone.
                stages.append(_Resampling(moves))
                moves = []
            if isinstance(step, PixelStep):
                stages.append(_Pixels(placed))
        return (*stages, _Resampling(moves)) if moves else tuple(stages)


@dataclass(frozen=True, slots=True)
class _Placed:
    """A step that does something, with its number among all steps and the shape of what goes in."""

    place: int
    step: Step
    input_shape: Shape


class _Resampling:
    """Geometric steps that follow each other, and at most one bend at their end, as one pass over the pixels."""

    def __init__(self, moves: list[_Placed]) -> None:
        self._affine = [placed for placed in moves if isinstance(placed.step, GeometricStep)]
        self._bend = moves[-1] if isinstance(moves[-1].step, Elastic) else None
        self._target = moves[-1].step.output_shape(moves[-1].input_shape)
        self._sampler = Sampler(moves[0].input_shape, self._target)
        per_pixel = GeometricStep.cost_nanoseconds + (Elastic.cost_nanoseconds if self._bend else 0)
        self.cost_nanoseconds = per_pixel * math.prod(self._target)

    def apply(self, images: NDArray[np.uint8], draws: Draws) -> NDArray[np.generic]:
        """Sample the images once."""
        out = np.empty((len(images), *self._target), np.uint8)
        maps = self._maps(draws)
        for first in range(0, len(images), self._sampler.chunk):
            part = slice(first, first + self._sampler.chunk)
            self._sampler.sample(images[part], maps[part], self._bend_of(draws[part]), out[part])
        return out

    def _maps(self, draws: Draws) -> AffineMaps:
        zeros = np.zeros(len(draws))
        maps = AffineMaps.shifts(zeros, zeros)
        words = draws.first_words(np.array([placed.place for placed in self._affine], np.int64))
        for number, placed in enumerate(self._affine):
            assert isinstance(placed.step, GeometricStep)
            maps = maps.then(placed.step.maps(words[:, number], placed.input_shape))
        return maps

    def _bend_of(self, draws: Draws) -> Bend | None:
        if self._bend is None:
            return None
        assert isinstance(self._bend.step, Elastic)
        return self._bend.step.bend(draws, self._bend.place, self._bend.input_shape)


class _Pixels:
    """A step that works on the pixels as they lie."""

    def __init__(self, placed: _Placed) -> None:
        assert isinstance(placed.step, PixelStep)
        self._step, self._place = placed.step, placed.place
        self.cost_nanoseconds = placed.step.cost_nanoseconds * math.prod(placed.input_shape)

    def apply(self, images: NDArray[np.uint8], draws: Draws) -> NDArray[np.generic]:
        """Let the step do its work."""
        return self._step.apply(images, draws, self._place)


def _steps_of(term: Term) -> tuple[Step, ...]:
    if isinstance(term, Preset):
        return term.steps()
    assert isinstance(term, Step)
    return (term,)


def _format(term: Term) -> str:
    """Return the normal form: parameters in the order declared, and only those that are not at their defaults."""
    written = [
        f"{name}={parameter.kind.format(getattr(term, name))}"
        for name, parameter in parameters_of(type(term)).items()
        if parameter.is_required or getattr(term, name) != parameter.default
    ]
    return f"{term.name}({','.join(written)})" if written else term.name


def _text(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
