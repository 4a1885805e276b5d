"""Batches: the samples of a rank's shares, gathered from memory, with checksum and times."""

import itertools
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from streamer.checksum import batch_checksum
from streamer.order import Order, Share
from streamer.plan import Plan
from streamer.source import Split

# Of an encoded message: an index below 2**32 is a varint of at most 5 bytes, and all fields that do not
# grow with the samples stay far below this.
_INDEX_BYTES = 5
_FIXED_BYTES = 256

# Positions turned into indices at once: a call costs the same for 100 as for 1,000.
_BLOCK_POSITIONS = 8192


@dataclass(frozen=True, eq=False, slots=True)
class AssembledBatch:
    """A batch ready to be sent; arrays are C-contiguous and of the same length, which is 0 in a closing batch."""

    share: Share
    indices: NDArray[np.uint64]
    images: NDArray[np.uint8]
    """Shape (N, height, width)."""
    labels: NDArray[np.uint8]
    crc32c: int
    read_seconds: float
    """Spent on finding and copying the samples."""
    ready_at: float
    """``time.perf_counter()`` when it was done."""


def assemble(split: Split, plan: Plan, shares: Iterable[Share]) -> Iterator[AssembledBatch]:
    """
    Gather the samples of each share, one batch at a time, when the next is asked for.

    Args:
        split: The samples.
        plan: Gives the order, and goes into the checksum.
        shares: Of one rank, in order.
    """
    order = Order(split.num_samples, fingerprint=split.fingerprint, seed=plan.seed, epoch=plan.epoch)
    shares = iter(shares)
    block_length = max(1, _BLOCK_POSITIONS // plan.batch_size)
    while block := list(itertools.islice(shares, block_length)):
        started = time.perf_counter()
        positions = np.concatenate([np.arange(share.first, share.last) for share in block])
        indices = order.indices(positions)
        lookup_seconds = (time.perf_counter() - started) / len(block)
        taken = 0
        for share in block:
            size = share.last - share.first
            yield _gather(split, plan, share, indices[taken : taken + size], lookup_seconds)
            taken += size


def closing(plan: Plan, split: Split, position: int) -> AssembledBatch:
    """Make the empty batch that tells a reader to go on at ``position`` elsewhere."""
    share = Share(position, position, position, position, end_of_epoch=False)
    return _gather(split, plan, share, np.empty(0, np.int64), 0.0)


def max_samples(split: Split, max_message_bytes: int) -> int:
    """Return how many samples of ``split`` fit into a message for certain; can be 0."""
    return max(0, (max_message_bytes - _FIXED_BYTES) // (split.sample_bytes + _INDEX_BYTES))


def _gather(
    split: Split, plan: Plan, share: Share, indices: NDArray[np.int64], lookup_seconds: float
) -> AssembledBatch:
    started = time.perf_counter()
    images = np.take(split.images, indices, axis=0)
    labels = np.take(split.labels, indices)
    read_seconds = lookup_seconds + time.perf_counter() - started
    unsigned = indices.astype(np.uint64)
    crc = batch_checksum(
        plan,
        position=share.position,
        next_position=share.next_position,
        indices=unsigned,
        images=images,
        labels=labels,
    )
    return AssembledBatch(share, unsigned, images, labels, crc, read_seconds, time.perf_counter())
