"""Batches: the samples of a rank's shares, read and transformed, with checksum and times."""

import asyncio
import time
from collections.abc import AsyncGenerator, Iterable, Iterator
from contextlib import aclosing
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from streamer.checksum import batch_checksum
from streamer.errors import StorageError
from streamer.lookup import Found, look_up
from streamer.order import Share
from streamer.plan import Plan
from streamer.sources.readahead import read_ahead
from streamer.sources.shards import ShardedSplit
from streamer.sources.split import MemorySplit, Samples, Split
from streamer.transforms.pool import TransformPool
from streamer.transforms.transform import Transform

Item = TypeVar("Item")

# Of an encoded message: an index below 2**32 is a varint of at most 5 bytes, and all fields that do not
# grow with the samples stay far below this.
_INDEX_BYTES = 5
_FIXED_BYTES = 256

# What a read that is begun early holds beside its samples: a task, and for each sample who waits for which row.
_READ_BYTES = 8 * 1024
_WANTED_BYTES = 1024


class AssembledBatch(NamedTuple):
    """A batch ready to be sent; arrays are C-contiguous and of the same length, which is 0 in a closing batch."""

    share: Share
    indices: NDArray[np.int64]
    packed_indices: bytes | None
    """By :func:`streamer.wire.pack_indices`."""
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
    split: Split,
    plan: Plan,
    shares: Iterable[Share],
    transform: Transform,
    pool: TransformPool | None,
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
    started = time.perf_counter()
    async with aclosing(_read(split, _looked_up(split, plan, shares))) as reads:
        async for found, (stored, labels) in reads:
            images: NDArray[Any] = stored
            was_read = time.perf_counter()
            if pool is not None and found.indices.size:
                images = await pool.apply(transform, stored, found.indices, seed=plan.seed, epoch=plan.epoch)
            transform_seconds = 0.0 if pool is None else time.perf_counter() - was_read
            yield _finished(plan, found, images, labels, was_read - started, transform_seconds)
            started = time.perf_counter()


async def gather(split: MemorySplit, plan: Plan, shares: Iterable[Share]) -> AsyncGenerator[AssembledBatch, None]:
    """
    Do what :func:`assemble` does for a split in memory whose images go out as they are, all of them at once.

    The images of a batch are valid until the next one is asked for: they are gathered in the same memory every time,
    as fresh memory costs more than the samples that are copied into it.
    """
    gathered = np.empty((min(plan.batch_size, split.num_samples), *split.image_shape), np.uint8)
    started = time.perf_counter()
    for found in _looked_up(split, plan, shares):
        images, labels = split.gather(found.indices, gathered)
        yield _finished(plan, found, images, labels, time.perf_counter() - started, 0.0)
        started = time.perf_counter()


def closing(plan: Plan, position: int) -> AssembledBatch:
    """Make the empty batch that tells a reader to go on at ``position`` elsewhere."""
    share = Share(position, position, position, position, end_of_epoch=False)
    nothing = np.empty(0, np.uint8)
    return _finished(plan, Found(share, np.empty(0, np.int64), None), nothing, nothing, 0.0, 0.0)


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


async def _read(split: Split, looked_up: Iterator[Found]) -> AsyncGenerator[tuple[Found, Samples], None]:
    """Yield each share with its samples; where reading takes more than memory, those after it are on their way."""
    empty = np.empty((0, *split.image_shape), np.uint8), np.empty(0, np.uint8)
    if not isinstance(split, ShardedSplit) or split.allowance is None:
        for found in looked_up:
            # Readers are not asked for nothing.
            yield found, await split.read(found.indices) if found.indices.size else empty
        return

    async def read(found: Found, ahead_bytes: int) -> Samples:
        return await split.read(found.indices, ahead_bytes=ahead_bytes) if found.indices.size else empty

    def size_of(found: Found) -> int:
        return _READ_BYTES + found.indices.size * (split.sample_bytes + _WANTED_BYTES)

    reads = read_ahead(looked_up, read, size_of=size_of, allowance=split.allowance)
    async with aclosing(reads):
        async for read_one in reads:
            yield read_one


def _looked_up(split: Split, plan: Plan, shares: Iterable[Share]) -> Iterator[Found]:
    return look_up(plan, shares, num_samples=split.num_samples, fingerprint=split.fingerprint)


def _finished(
    plan: Plan,
    found: Found,
    images: NDArray[Any],
    labels: NDArray[Any],
    read_seconds: float,
    transform_seconds: float,
) -> AssembledBatch:
    share, indices, packed = found
    crc = batch_checksum(
        plan,
        position=share.position,
        next_position=share.next_position,
        indices=indices,
        images=images,
        labels=labels,
    )
    return AssembledBatch(
        share,
        indices,
        packed,
        images,
        labels,
        crc,
        read_seconds,
        transform_seconds,
        time.perf_counter(),
    )
