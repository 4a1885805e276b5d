"""
Slices of a split, such as ``train[:90%]``: pure arithmetic that streamers and readers do alike.

A slice is a range of a fixed pseudo-random order of the split, not of its file, so that data sorted by class has every
class on both sides of a cut. ``train[:p]`` and ``train[p:]`` have each sample of ``train`` once between them.

A slice is a split in its own right, with a count, a fingerprint and indices of its own: ``range(num_samples)``. So
orders, checksums, ledgers and the randomness of transforms, all made from (fingerprint, seed, epoch, index), mean the
same for it as for any split, and nobody but who reads the samples needs to know that it is one. Where its samples lie
in the split it is cut from, :meth:`Slice.base_indices` tells.

Source of the notation: TensorFlow Datasets, https://www.tensorflow.org/datasets/splits (there over the file's order).
"""

import hashlib
import math
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from streamer.errors import InvalidPlanError
from streamer.order import Order

# Changing either changes what slices hold, and with it what saved cursors mean.
_VERSION = b"sluice slice 1"
_ORDER_VERSION = b"sluice slice order 1"

_BOUND = r"-?[0-9]{1,10}|-?[0-9]{1,3}(?:\.[0-9]{1,6})?%|"
_BOUNDS = re.compile(rf"\[({_BOUND}):({_BOUND})\]")

_BLOCK_POSITIONS = 8192
_NAMED_LENGTH = 64


class Base(Protocol):
    """What slices are cut from."""

    @property
    def num_samples(self) -> int:
        """At least 1."""

    @property
    def fingerprint(self) -> bytes:
        """Of its samples."""


AnyBase = TypeVar("AnyBase", bound=Base)


@dataclass(frozen=True)
class Slice:
    """
    A part of a split, with at least one sample and not all of them.

    Args:
        base_fingerprint: Of the split it is cut from.
        base_samples: Of that split.
        start: Where it begins in the fixed order of that split.
        stop: Behind its last sample there.
    """

    base_fingerprint: bytes
    base_samples: int
    start: int
    stop: int

    @property
    def num_samples(self) -> int:
        """At least 1."""
        return self.stop - self.start

    @cached_property
    def fingerprint(self) -> bytes:
        """SHA-256 of the fingerprint of the base and of the bounds as numbers: however they were written."""
        bounds = struct.pack("<QQ", self.start, self.stop)
        return hashlib.sha256(_VERSION + self.base_fingerprint + bounds).digest()

    def base_indices(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        """
        Return which samples of the base these are; some nanoseconds for each in blocks of some thousands.

        Args:
            indices: Shape (N,), each in ``range(num_samples)``.
        """
        return self._order.indices(indices + self.start)

    def table(self) -> NDArray[np.signedinteger[Any]]:
        """Return what :meth:`base_indices` does for all of them, as int32 or int64; about 50 ms for a million."""
        table: NDArray[np.signedinteger[Any]] = np.empty(
            self.num_samples, np.int32 if self.base_samples <= 1 << 31 else np.int64
        )
        for first in range(0, len(table), _BLOCK_POSITIONS):
            block = table[first : first + _BLOCK_POSITIONS]
            block[:] = self.base_indices(np.arange(first, first + len(block)))
        return table

    @cached_property
    def _order(self) -> Order:
        return Order(self.base_samples, fingerprint=_ORDER_VERSION + self.base_fingerprint, seed=0, epoch=0)


def find(split: str, splits: Mapping[str, AnyBase], *, field: str = "plan.split") -> tuple[AnyBase, Slice | None]:
    """
    Return the split that a plan names, or the one it names a slice of, and the slice; None means all of it.

    Bounds are numbers of samples or percentages, counted from the end where negative; one that is left out is that end.
    A percentage becomes the nearest number of samples, the larger one of two.

    Args:
        split: ``train``, ``train[:90%]``, ``train[90%:]``, ``train[10%:20%]``, ``train[:55000]``, ``train[-5000:]``.
        splits: What there is, by name.
        field: What errors call the first.

    Raises:
        InvalidPlanError: No such split, no such notation, out of range, or nothing in it.
    """
    name, bracket, _ = split.partition("[")
    named = repr(split[:_NAMED_LENGTH])
    if name not in splits:
        example = f", and slices like {next(iter(splits))}[:90%]" if splits else ""
        raise InvalidPlanError(field, f"{named} is no split; allowed are {' and '.join(splits)}{example}")
    base = splits[name]
    if not bracket:
        return base, None
    bounds = _BOUNDS.fullmatch(split, len(name))
    if bounds is None:
        raise InvalidPlanError(
            field, f"{named} is no slice; allowed are {name}[:90%], {name}[90%:], {name}[-5000:] and the like"
        )
    size = base.num_samples
    try:
        start, stop = _position(bounds[1] or "0", size), _position(bounds[2] or str(size), size)
    except ValueError as error:
        raise InvalidPlanError(field, f"{named}: {error}") from error
    if start >= stop:
        raise InvalidPlanError(
            field, f"{named} is empty: it goes from {start} to {stop} of {size}; at least one sample is needed"
        )
    if stop - start == size:
        return base, None
    return base, Slice(base.fingerprint, size, start, stop)


def _position(bound: str, size: int) -> int:
    """Return where a bound cuts a split of ``size`` samples."""
    number, percent, _ = bound.partition("%")
    value, limit = Fraction(number), 100 if percent else size
    if abs(value) > limit:
        raise ValueError(f"{bound} lies outside; -{limit}{percent} to {limit}{percent} are allowed")
    if value < 0:
        value += limit
    return math.floor(value * size / 100 + Fraction(1, 2)) if percent else int(value)
