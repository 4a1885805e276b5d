"""
A packed split in object storage, read block by block through the local cache.

A random order touches another block with nearly every sample. With room for all blocks each is downloaded once.
With room for a part p of them, a sample finds its block in the cache with probability p, and else costs a whole
block, which it shares with those read together with it: an epoch moves up to ``(1 - p) * num_samples`` blocks, and
fewer the more samples are read at once. Hence blocks and not shards are what is fetched and kept. Give the cache the
size of the packed data set where the disk allows; where it does not, pack with small blocks.
"""

import asyncio
import hashlib
import os
import random
from collections.abc import Coroutine, Iterable
from concurrent.futures import Executor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streamer.cache import BlockCache, Reservation, Room
from streamer.errors import DataLossError
from streamer.objects import ObjectStore
from streamer.shards import Block, PackedSplit, Records, damaged, groups, in_thread, samples_of
from streamer.split import Samples
from streamer.tally import Tally

# What another process downloads is looked for again this often, and no longer waited for after so long.
_LOOK_SECONDS = 0.02
_WAIT_SECONDS = 10.0


class RemoteRecords:
    """
    The shards of one split in object storage.

    A block that several readers miss at once is downloaded once. Blocks come in the order in which the samples
    that need them were asked for.

    Args:
        store: Holds the shards.
        split: From the index there.
        cache: Keeps blocks; any number of splits may share it.
        threads: Does what blocks.
        tally: Counts hits, misses and damage.
        max_downloads: At the same time; each holds a block in memory.
    """

    def __init__(
        self,
        store: ObjectStore,
        split: PackedSplit,
        cache: BlockCache,
        *,
        threads: Executor,
        tally: Tally,
        max_downloads: int = 16,
    ) -> None:
        self._store = store
        self._split = split
        self._cache = cache
        self._threads = threads
        self._tally = tally
        self._downloads = asyncio.Semaphore(max_downloads)
        # Half, so that those who wait for samples do not queue behind those who will.
        self._prefetches = asyncio.Semaphore(max(1, max_downloads // 2))
        self._flights: dict[int, _Flight] = {}
        self._keys = [key for shard in split.shards for key in shard.blocks]
        # Blocks compared with their checksum since this process began.
        self._compared = bytearray(len(self._keys))

    async def read(self, indices: NDArray[np.int64]) -> Samples:
        """Do as :meth:`streamer.split.Split.read` does."""
        numbers, rows = self._blocks_of(indices)
        wanted = [_Wanted(number, chosen, rows[chosen]) for number, chosen in groups(numbers)]
        records = np.empty((len(indices), self._split.record_bytes), np.uint8)
        missing = await in_thread(self._threads, lambda: self._read_cached(wanted, indices, records))

        async def fill(one: _Wanted) -> None:
            block = np.frombuffer(await self._fetch(one.number), np.uint8).reshape(-1, records.shape[1])
            records[one.positions] = block[one.rows]

        await _all(fill(one) for one in missing)
        return await in_thread(self._threads, lambda: self._take_apart(records, indices, missing))

    async def prefetch(self, indices: NDArray[np.int64]) -> None:
        """Bring blocks into the cache in the order given, as far as they fill no more than half of it."""
        numbers, _ = self._blocks_of(indices)
        wanted = [number for number, _ in groups(numbers)]
        wanted = wanted[: self._cache.max_bytes // 2 // self._split.block_bytes]

        def absent() -> list[int]:
            return [number for number in wanted if not self._cache.has(self._keys[number])]

        async def bring(number: int) -> None:
            async with self._prefetches:
                await self._fetch(number)

        await _all(bring(number) for number in await in_thread(self._threads, absent))

    def _blocks_of(self, indices: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return for each sample the number of its block and its row there."""
        shards, in_shard = np.divmod(indices, self._split.shard_samples)
        in_blocks, rows = np.divmod(in_shard, self._split.block_samples)
        return shards * self._split.shard_blocks + in_blocks, rows

    def _read_cached(self, wanted: list["_Wanted"], indices: NDArray[np.int64], records: Records) -> list["_Wanted"]:
        """Fill in the records whose blocks are in the cache; return what is missing still."""
        copied = [one for one in wanted if self._copy(one, records)]
        # Each block was whole when this process first used it; a disk may forget later.
        wrong = self._wrong(copied, records, indices)
        missing, is_copied = [], {one.number for one in copied}
        for one in wanted:
            if len(wrong) and one.number in is_copied and np.isin(one.positions, wrong).any():
                self._tally.add(checksum_failures=1)
                self._cache.remove(self._keys[one.number])
                missing.append(one)
            elif one.number not in is_copied:
                missing.append(one)
        self._tally.add(cache_hits=len(wanted) - len(missing), cache_misses=len(missing))
        return missing

    def _copy(self, wanted: "_Wanted", records: Records) -> bool:
        """Read some records of a block; return False where it is not here, cut short, or the disk refuses."""
        number, size = wanted.number, records.shape[1]
        with suppress(OSError), self._cache.reading(self._keys[number], check=not self._compared[number]) as descriptor:
            if descriptor is None:
                return False
            for row, position in zip(wanted.rows.tolist(), wanted.positions.tolist(), strict=True):
                if os.preadv(descriptor, [records[position].data], row * size) != size:
                    return False
            self._compared[number] = True
            return True
        return False

    def _take_apart(self, records: Records, indices: NDArray[np.int64], fetched: list["_Wanted"]) -> Samples:
        # A block with the right checksum can hold a wrong record only if it was packed that way.
        wrong = self._wrong(fetched, records, indices)
        if len(wrong):
            self._tally.add(checksum_failures=len(wrong))
            raise self._split.damage(self._store.url, int(indices[wrong[0]]))
        return samples_of(self._split, records)

    def _wrong(self, among: list["_Wanted"], records: Records, indices: NDArray[np.int64]) -> NDArray[np.intp]:
        """Return the positions in the batch, among those given, where another sample stands or a damaged one."""
        if not among:
            return np.empty(0, np.intp)
        positions = np.concatenate([one.positions for one in among])
        return positions[damaged(self._split, records[positions], indices[positions])]

    async def _fetch(self, number: int) -> memoryview:
        """Return a block, together with all who want it now; the last one to give up ends the download."""
        flight = self._flights.get(number)
        if flight is None:
            flight = self._flights[number] = _Flight(asyncio.create_task(self._download(number)))
            flight.task.add_done_callback(lambda task: self._landed(number, task))
        flight.passengers += 1
        try:
            return await asyncio.shield(flight.task)
        finally:
            flight.passengers -= 1
            if not flight.passengers and not flight.task.done():
                # Nobody may join it from here on.
                del self._flights[number]
                flight.task.cancel()
                await asyncio.wait([flight.task])

    def _landed(self, number: int, task: asyncio.Task[memoryview]) -> None:
        flight = self._flights.get(number)
        if flight is not None and flight.task is task:
            del self._flights[number]
        if not task.cancelled():
            task.exception()

    async def _download(self, number: int) -> memoryview:
        block = self._split.block(number)
        async with self._downloads:
            room = Reservation(self._cache, block.sha256, block.size)
            try:
                content = await self._take_room(room, block)
                if content is None:
                    content = await self._get(block)
                    await self._publish(room, content)
            finally:
                await in_thread(self._threads, room.release)
        self._compared[number] = True
        return content

    async def _take_room(self, room: Reservation, block: Block) -> memoryview | None:
        """Take room where there is some; return the block where another process has brought it by now."""
        loop = asyncio.get_running_loop()
        ends_at = loop.time() + _WAIT_SECONDS
        answer = Room.BUSY
        # A disk that is full or broken costs speed and nothing else.
        with suppress(OSError):
            while answer in (Room.BUSY, Room.PRESENT) and loop.time() < ends_at:
                answer = await in_thread(self._threads, room.take)
                if answer is Room.BUSY:
                    # No event crosses from process to process.
                    await asyncio.sleep(random.uniform(0, 2 * _LOOK_SECONDS))
                elif answer is Room.PRESENT:
                    content = await in_thread(self._threads, partial(self._load, block))
                    if content is not None:
                        return content
        return None

    def _load(self, block: Block) -> memoryview | None:
        with self._cache.reading(block.sha256, check=True) as descriptor:
            return None if descriptor is None else memoryview(os.pread(descriptor, block.size, 0))

    async def _publish(self, room: Reservation, content: memoryview) -> None:
        is_kept = False
        with suppress(OSError):
            is_kept = await in_thread(self._threads, partial(room.publish, content))
        if not is_kept:
            self._tally.add(uncached=1)

    async def _get(self, block: Block) -> memoryview:
        """Download a block; once more where it does not have its checksum."""
        found = ""
        for _ in range(2):
            content = await self._store.read_range(block.file, block.first_byte, block.size)
            found = await in_thread(self._threads, partial(_sha256, content))
            if found == block.sha256:
                return content
            self._tally.add(checksum_failures=1)
        raise DataLossError(
            self._store.url_of(block.file),
            block.first_byte,
            block.first_byte + block.size - 1,
            expected=f"content with SHA-256 {block.sha256}",
            found=found,
        )


@dataclass(frozen=True, eq=False, slots=True)
class _Wanted:
    """Samples of one block: their positions in the batch and their rows in the block."""

    number: int
    positions: NDArray[np.intp]
    rows: NDArray[np.int64]


class _Flight:
    """A download and how many wait for it."""

    def __init__(self, task: asyncio.Task[memoryview]) -> None:
        self.task = task
        self.passengers = 0


def _sha256(content: memoryview) -> str:
    return hashlib.sha256(content).hexdigest()


async def _all(work: Iterable[Coroutine[Any, Any, None]]) -> None:
    """Run coroutines together; the first error ends the others and is raised."""
    try:
        async with asyncio.TaskGroup() as group:
            for one in work:
                group.create_task(one)
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None
