"""How many streams are open, in one process or in several that serve together."""

import mmap
import os
from typing import Self

import numpy as np
from numpy.typing import NDArray

_SLOT = np.dtype(np.int64)


class Occupancy:
    """
    A count that each process adds its own part to, and everyone sees the sum of.

    Each has a place in shared memory that nobody else writes to, so there is no lock, and none that a process could
    die with. Two that look at the same moment can both find the last place free.

    Args:
        counts: Of each process.
        number: Of this one among them.
    """

    def __init__(self, counts: NDArray[np.int64], number: int) -> None:
        self._counts = counts
        self._number = number
        # What one before this left there is over.
        self._own = counts[number] = 0

    @classmethod
    def alone(cls) -> Self:
        """Return the count of a process that serves by itself."""
        return cls(np.zeros(1, _SLOT), 0)

    @classmethod
    def among(cls, descriptor: int, number: int, count: int) -> Self:
        """Return the count of one of several processes; the descriptor is of what :func:`reserve` made."""
        memory = mmap.mmap(descriptor, count * _SLOT.itemsize)
        return cls(np.frombuffer(memory, _SLOT), number)

    @property
    def own(self) -> int:
        """Of this process."""
        return self._own

    @property
    def total(self) -> int:
        """Of all processes."""
        return int(self._counts.sum())

    def add(self, difference: int) -> None:
        """Count this process' streams up or down; from one thread."""
        self._own += difference
        self._counts[self._number] = self._own


def give_back(descriptor: int, number: int) -> None:
    """Count nothing more for a process that is dead, where another one has not taken its place yet."""
    os.pwrite(descriptor, bytes(_SLOT.itemsize), number * _SLOT.itemsize)


def reserve(count: int) -> int:
    """Return a descriptor of shared memory for the counts of so many processes; the caller's to close, Linux only."""
    descriptor = os.memfd_create("sluice-occupancy")
    os.ftruncate(descriptor, count * _SLOT.itemsize)
    return descriptor
