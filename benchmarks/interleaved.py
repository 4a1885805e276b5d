"""Rates of several contenders, measured in turns within one run: machines are shared and noisy."""

import statistics
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Self

Contender = Callable[[float], Awaitable[int]]
"""Works for about that many seconds and returns how many items it did."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Spread:
    """A figure over several turns."""

    median: float
    lowest: float
    highest: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Self:
        """Return that of one or more values."""
        return cls(median=statistics.median(values), lowest=min(values), highest=max(values))


async def compare(contenders: Mapping[str, Contender], *, rounds: int, seconds: float) -> dict[str, Spread]:
    """
    Let each contender have its turn, again and again: A B C A B C. Return items a second.

    Args:
        contenders: By name.
        rounds: Turns for each that count, after one that does not.
        seconds: Length of a turn.
    """
    rates: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(rounds + 1):
        for name, work in contenders.items():
            started = time.perf_counter()
            done = await work(seconds if number else seconds / 3)
            if number:
                rates[name].append(done / (time.perf_counter() - started))
    return {name: Spread.of(seen) for name, seen in rates.items()}
