"""
A streamer that is broken on purpose: ``python -m tests.faults.broken_streamer FAULT streamer ...``.

What it sends is damaged in the order, before checksums are made: a reader finds nothing wrong with any batch.
"""

import sys
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

import sluice.__main__
from streamer import lookup, servicer
from streamer.order import Order, Share, shares
from streamer.plan import Plan

ONE_IN = 10_000


class _DroppingOrder(Order):
    """Leaves one sample in 10,000 out, and takes the one after it in its place."""

    def indices(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        return super().indices(np.where(positions % ONE_IN == 1234, positions + 1, positions))


def _shortened(plan: Plan, num_samples: int, *, start_position: int = 0, end_position: int = 0) -> Iterator[Share]:
    """Leave one sample in 10,000 out: its batch is smaller."""
    for share in shares(plan, num_samples, start_position=start_position, end_position=end_position):
        is_hit = share.first // ONE_IN != share.last // ONE_IN
        yield replace(share, last=share.last - 1) if is_hit else share


def _repeating(plan: Plan, num_samples: int, *, start_position: int = 0, end_position: int = 0) -> Iterator[Share]:
    """Send the batch before once more after a resume, as if it were the next."""
    proper = shares(plan, num_samples, start_position=start_position, end_position=end_position)
    if start_position:
        share = next(proper)
        size = share.last - share.first
        yield replace(share, first=start_position - size, last=start_position)
    yield from proper


def _swapping(plan: Plan, num_samples: int, *, start_position: int = 0, end_position: int = 0) -> Iterator[Share]:
    """Give ranks 0 and 1 each the other's share: all ranks together still get each sample once."""
    rank = plan.rank ^ 1 if plan.world_size > 1 else plan.rank
    return shares(replace(plan, rank=rank), num_samples, start_position=start_position, end_position=end_position)


def _patch(module: object, name: str, broken: object) -> Callable[[], None]:
    def patch() -> None:
        assert hasattr(module, name)
        setattr(module, name, broken)

    return patch


FAULTS = {
    "drops": _patch(lookup, "Order", _DroppingOrder),
    "shortens": _patch(servicer, "shares", _shortened),
    "repeats": _patch(servicer, "shares", _repeating),
    "swaps": _patch(servicer, "shares", _swapping),
}


if __name__ == "__main__":
    FAULTS[sys.argv.pop(1)]()
    sluice.__main__.main()
