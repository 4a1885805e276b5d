"""Which samples stand in each of a rank's batches: the streamer reads them, the reader knows what is to come."""

import itertools
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from streamer import wire
from streamer.order import Order, Share
from streamer.plan import Plan

# Positions turned into indices at once: a call costs the same for 100 as for 1,000.
_BLOCK_POSITIONS = 8192


class Found(NamedTuple):
    """A share with the indices of its samples."""

    share: Share
    indices: NDArray[np.int64]
    packed: bytes | None
    """The indices by :func:`streamer.wire.pack_indices`."""


def look_up(plan: Plan, shares: Iterable[Share], *, num_samples: int, fingerprint: bytes) -> Iterator[Found]:
    """
    Yield each share with its samples.

    Args:
        plan: Names the order.
        shares: Of the plan, in order.
        num_samples: Of the split.
        fingerprint: Of the split.
    """
    order = Order(num_samples, fingerprint=fingerprint, seed=plan.seed, epoch=plan.epoch)
    shares = iter(shares)
    block_length = max(1, _BLOCK_POSITIONS // plan.batch_size)
    while block := list(itertools.islice(shares, block_length)):
        indices = order.indices(_positions(block))
        packed = wire.pack_indices(indices)
        first = 0
        for share in block:
            last = first + share.last - share.first
            yield Found(share, indices[first:last], packed and packed[wire.WIDTH * first : wire.WIDTH * last])
            first = last


def _positions(block: list[Share]) -> NDArray[np.int64]:
    first, last = block[0].first, block[-1].last
    if last - first == sum(share.last - share.first for share in block):
        # One after another, as of a rank that reads alone.
        return np.arange(first, last)
    return np.concatenate([np.arange(share.first, share.last) for share in block])
