"""Batches: the samples of a rank's shares, read and transformed, with checksum and times."""

import asyncio
import itertools
import time
from collections.abc import AsyncGenerator, Iterable, Iterator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from streamer.checksum import batch_checksum
from streamer.errors import StorageError
from streamer.order import Order, Share
from streamer.plan import Plan
from streamer.split import Split
from streamer.transforms.pool import TransformPool
from streamer.transforms.transform import Transform

Item = TypeVar("Item")

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
    images: NDArray[Any]
    """Shape (N, ...), as the transform leaves them."""
    labels: NDArray[Any]
    crc32c: int
    read_seconds: float
    """Spent on finding and reading the samples."""
    transform_seconds: float
    ready_at: float
    """``time.perf_counter()`` when it was done."""

    @property
    def payload_bytes(self) -> int:
        """What the batch takes off a reader's credit."""
        return int(self.images.nbytes + self.labels.nbytes)


async def assemble(
    split: Split, plan: Plan, shares: Iterable[Share], transform: Transform, pool: TransformPool | None
) -> AsyncGenerator[AssembledBatch, None]:
    """
    Gather the samples of each share, one batch at a time, when the next is asked for.

    Args:
        split: The samples.
        plan: Gives the order, and goes into the checksum.
        shares: Of one rank, in order.
        transform: Of the split's images.
        pool: Where it is applied; None only where there is nothing to apply.

    Raises:
        StreamerError: A sample cannot be read or transformed.
    """
    empty = np.empty((0, *split.image_shape), np.uint8), np.empty(0, np.uint8)
    for share, indices, lookup_seconds in _looked_up(split, plan, shares):
        started = time.perf_counter()
        # Readers are not asked for nothing.
        stored, labels = await split.read(indices) if indices.size else empty
        images: NDArray[Any] = stored
        was_read = time.perf_counter()
        if pool is not None and indices.size:
            images = await pool.apply(transform, stored, indices, seed=plan.seed, epoch=plan.epoch)
        read_seconds, transform_seconds = lookup_seconds + was_read - started, time.perf_counter() - was_read
        yield _finished(plan, share, indices, images, labels, read_seconds, transform_seconds)


def closing(plan: Plan, position: int) -> AssembledBatch:
    """Make the empty batch that tells a reader to go on at ``position`` elsewhere."""
    share = Share(position, position, position, position, end_of_epoch=False)
    nothing = np.empty(0, np.uint8)
    return _finished(plan, share, np.empty(0, np.int64), nothing, nothing, 0.0, 0.0)


def max_samples(split: Split, transform: Transform, max_message_bytes: int) -> int:
    """Return how many samples of ``split`` fit into a message for certain, once transformed; can be 0."""
    sample_bytes = transform.sample_bytes + split.label_bytes + _INDEX_BYTES
    return max(0, (max_message_bytes - _FIXED_BYTES) // sample_bytes)


async def ahead(items: AsyncGenerator[Item, None], count: int) -> AsyncGenerator[Item, None]:
    """
    Yield what ``items`` does, of which up to ``count`` are made before they are asked for, in a task of their own.

    Closing this closes ``items``; an error of ``items`` comes up in its place.
    """
    made: asyncio.Queue[tuple[Item] | Exception | None] = asyncio.Queue(count)

    async def make() -> None:
        try:
            async with aclosing(items):
                async for item in items:
                    await made.put((item,))
        except asyncio.CancelledError:
            if making.cancelling():
                raise
            # Not the reader's doing: what the items are read from was closed.
            await made.put(StorageError("the data set", "was closed while it was read"))
        except Exception as error:
            await made.put(error)
        else:
            await made.put(None)

    making = asyncio.create_task(make())
    try:
        while (found := await made.get()) is not None:
            if isinstance(found, Exception):
                raise found
            yield found[0]
    finally:
        making.cancel()
        await asyncio.wait((making,))


def _looked_up(split: Split, plan: Plan, shares: Iterable[Share]) -> Iterator[tuple[Share, NDArray[np.int64], float]]:
    """Yield each share with the indices of its samples and the seconds it took to find them."""
    order = Order(split.num_samples, fingerprint=split.fingerprint, seed=plan.seed, epoch=plan.epoch)
    shares = iter(shares)
    block_length = max(1, _BLOCK_POSITIONS // plan.batch_size)
    while block := list(itertools.islice(shares, block_length)):
        started = time.perf_counter()
        positions = np.concatenate([np.arange(share.first, share.last) for share in block])
        indices = order.indices(positions)
        seconds = (time.perf_counter() - started) / len(block)
        taken = 0
        for share in block:
            size = share.last - share.first
            yield share, indices[taken : taken + size], seconds
            taken += size


def _finished(
    plan: Plan,
    share: Share,
    indices: NDArray[np.int64],
    images: NDArray[Any],
    labels: NDArray[Any],
    read_seconds: float,
    transform_seconds: float,
) -> AssembledBatch:
    unsigned = indices.astype(np.uint64)
    crc = batch_checksum(
        plan,
        position=share.position,
        next_position=share.next_position,
        indices=unsigned,
        images=images,
        labels=labels,
    )
    ready_at = time.perf_counter()
    return AssembledBatch(share, unsigned, images, labels, crc, read_seconds, transform_seconds, ready_at)
