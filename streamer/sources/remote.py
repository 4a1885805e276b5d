"""
A packed split in object storage, read through the local cache.

A random order touches another block with nearly every sample. A block that finds room in the cache is fetched as a
whole, as all its samples are wanted sooner or later, and stays: blocks of other data sets make room for it, its own
never do. Where nothing more fits, of each block is fetched what is wanted just now and what lies between; to evict
another block of the same data set would only mean to fetch that one again. So an epoch that has room for a part p of
the blocks makes up to (1 - p) * num_samples requests, and fewer the more is read ahead.

Each block that is missing is one request, shared by all who want it before it is sent. Many go out at once, those
first that are wanted first: a stream that begins is not kept waiting by what others read ahead.
"""

import asyncio
import hashlib
import heapq
import itertools
import os
import random
from collections.abc import Set
from concurrent.futures import Executor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from streamer.errors import DataLossError
from streamer.sources.cache import BlockCache, Reservation, Room
from streamer.sources.objects import ObjectStore
from streamer.sources.shards import Block, PackedSplit, Records, damaged, groups, in_thread, samples_of
from streamer.sources.split import Samples
from streamer.sources.tally import Tally

# What another process downloads is looked for again this often, and no longer waited for after so long.
_LOOK_SECONDS = 0.02
_WAIT_SECONDS = 10.0
# A cache without room is not asked again for so long: it looks through the whole folder before it says no.
_FULL_SECONDS = 10.0
# Blocks of other data sets used within this time are in use.
_FRESH_SECONDS = 60.0


class RemoteRecords:
    """
    The shards of one split in object storage.

    Args:
        store: Holds the shards.
        split: From the index there.
        cache: Keeps blocks; any number of splits may share it.
        threads: Does what blocks.
        tally: Counts hits, misses and damage.
        max_downloads: At the same time; each holds a block in memory.
        spared: SHA-256 of blocks that are not to make room for this split's, beside its own.
    """

    def __init__(
        self,
        store: ObjectStore,
        split: PackedSplit,
        cache: BlockCache,
        *,
        threads: Executor,
        tally: Tally,
        max_downloads: int = 64,
        spared: Set[str] = frozenset(),
    ) -> None:
        self._store = store
        self._split = split
        self._cache = cache
        self._threads = threads
        self._tally = tally
        self._keys = [key for shard in split.shards for key in shard.blocks]
        self._spared = spared | set(self._keys)
        # Blocks compared with their checksum since this process began.
        self._compared = bytearray(len(self._keys))
        self._flights: dict[int, _Flight] = {}
        # Those not begun, by turn; one may stand here twice, or be wanted by nobody any more.
        self._waiting: list[tuple[int, int, _Flight]] = []
        self._arrivals = itertools.count()
        self._free_downloads = max_downloads
        # Bytes handed out so far. What is wanted now has its turn now, what will be wanted after n bytes n later.
        self._clock = 0
        self._full_until = 0.0

    async def read(self, indices: NDArray[np.int64], *, ahead_bytes: int = 0) -> Samples:
        """
        Do as :meth:`streamer.sources.split.Split.read` does.

        Args:
            indices: As there.
            ahead_bytes: What the same reader wants before these samples; those of others go first by as much.
        """
        records = np.empty((len(indices), self._split.record_bytes), np.uint8)
        missing = await in_thread(self._threads, lambda: self._read_cached(indices, records))
        if missing:
            await self._bring(missing, records, self._clock + ahead_bytes)
        return await in_thread(self._threads, lambda: self._take_apart(records, indices, missing))

    def _blocks_of(self, indices: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return for each sample the number of its block and its row there."""
        shards, in_shard = np.divmod(indices, self._split.shard_samples)
        in_blocks, rows = np.divmod(in_shard, self._split.block_samples)
        return shards * self._split.shard_blocks + in_blocks, rows

    def _read_cached(self, indices: NDArray[np.int64], records: Records) -> list["_Wanted"]:
        """Fill in the records whose blocks are in the cache; return what is missing still."""
        numbers, rows = self._blocks_of(indices)
        wanted = [_Wanted(number, chosen, rows[chosen]) for number, chosen in groups(numbers)]
        copied = [one for one in wanted if self._copy(one, records)]
        # Each block was whole when this process first used it; a disk may forget later.
        wrong = self._wrong(copied, records, indices)
        missing, is_copied = [], {one.number for one in copied}
        for one in wanted:
            if len(wrong) and one.number in is_copied and np.isin(one.positions, wrong).any():
                self._tally.add(checksum_failures=1)
                # A disk that refuses to write may well be the one that forgets.
                with suppress(OSError):
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

    async def _bring(self, missing: list["_Wanted"], records: Records, turn: int) -> None:
        """Fill in the records of blocks that have to be fetched; the first error ends it."""
        landing = _Landing(records, len(missing), asyncio.get_running_loop().create_future())
        joined = [(self._join(one, landing, turn), one) for one in missing]
        self._begin()
        try:
            await landing.done
        finally:
            ended = [flight.task for flight, one in joined if self._leave(flight, one) and flight.task is not None]
            if ended:
                await asyncio.wait(ended)

    def _join(self, one: "_Wanted", landing: "_Landing", turn: int) -> "_Flight":
        flight = self._flights.get(one.number)
        if flight is None or not flight.brings(one.rows):
            flight = self._flights[one.number] = _Flight(one.number, turn)
            heapq.heappush(self._waiting, (turn, next(self._arrivals), flight))
        elif flight.task is None and turn < flight.turn:
            flight.turn = turn
            heapq.heappush(self._waiting, (turn, next(self._arrivals), flight))
        flight.passengers[one] = landing
        return flight

    def _leave(self, flight: "_Flight", one: "_Wanted") -> bool:
        """Give up a place, if it is still held; return whether the flight was ended by it."""
        if flight.passengers.pop(one, None) is None or flight.passengers:
            return False
        # Nobody may join it from here on.
        self._forget(flight)
        if flight.task is not None:
            return flight.task.cancel()
        if len(self._waiting) > 64 + 2 * len(self._flights):
            self._waiting = [entry for entry in self._waiting if entry[2].passengers]
            heapq.heapify(self._waiting)
        return False

    def _forget(self, flight: "_Flight") -> None:
        if self._flights.get(flight.number) is flight:
            del self._flights[flight.number]

    def _begin(self) -> None:
        while self._free_downloads and self._waiting:
            _, _, flight = heapq.heappop(self._waiting)
            if flight.task is None and flight.passengers:
                self._free_downloads -= 1
                flight.task = asyncio.create_task(self._download(flight))
                flight.task.add_done_callback(partial(self._landed, flight))

    def _landed(self, flight: "_Flight", task: asyncio.Task[None]) -> None:
        self._free_downloads += 1
        self._forget(flight)
        error = asyncio.CancelledError() if task.cancelled() else task.exception()
        for landing in flight.passengers.values():
            landing.fail(error)
        flight.passengers.clear()
        self._begin()

    async def _download(self, flight: "_Flight") -> None:
        block = self._split.block(flight.number)
        room = Reservation(self._cache, block.sha256, block.size, spared=self._spared, fresh_seconds=_FRESH_SECONDS)
        try:
            is_granted, content = await self._take_room(room, block)
            if content is None and not is_granted:
                return await self._download_rows(flight, block)
            if content is None:
                content = await self._get(block)
                await self._publish(room, content)
            self._compared[flight.number] = True
            self._hand_out(flight, content, first_row=0)
        finally:
            await in_thread(self._threads, room.release)

    async def _download_rows(self, flight: "_Flight", block: Block) -> None:
        """Fetch no more of a block than is wanted of it, as it cannot be kept."""
        first, last = flight.set_off()
        size = self._split.record_bytes
        content = await self._store.read_range(block.file, block.first_byte + first * size, (last - first) * size)
        rows = np.arange(first, last)
        if await in_thread(self._threads, partial(self._is_damaged, flight.number, rows, content)):
            self._tally.add(checksum_failures=1)
            content, first = await self._get(block), 0
        self._tally.add(uncached=1)
        self._hand_out(flight, content, first_row=first)

    def _is_damaged(self, number: int, rows: NDArray[np.int64], content: memoryview) -> bool:
        records = np.frombuffer(content, np.uint8)
        if len(records) != len(rows) * self._split.record_bytes:
            return True
        indices = self._split.first_index(number) + rows
        return len(damaged(self._split, records.reshape(len(rows), -1), indices)) > 0

    def _hand_out(self, flight: "_Flight", content: memoryview, *, first_row: int) -> None:
        self._forget(flight)
        block = np.frombuffer(content, np.uint8).reshape(-1, self._split.record_bytes)
        for one, landing in flight.passengers.items():
            landing.records[one.positions] = block[one.rows - first_row]
            landing.count()
            self._clock += len(one.rows) * self._split.record_bytes
        flight.passengers.clear()

    async def _take_room(self, room: Reservation, block: Block) -> tuple[bool, memoryview | None]:
        """Return whether there is room, and the block where it is here by now, brought by another process."""
        loop = asyncio.get_running_loop()
        if loop.time() < self._full_until and not self._cache.has(block.sha256):
            return False, None
        ends_at, was_present = loop.time() + _WAIT_SECONDS, False
        # A disk that is full or broken costs speed and nothing else.
        with suppress(OSError):
            while loop.time() < ends_at:
                answer = await in_thread(self._threads, room.take)
                if answer is Room.GRANTED:
                    return True, None
                if answer is Room.NONE:
                    self._full_until = loop.time() + _FULL_SECONDS
                    break
                if answer is Room.BUSY:
                    # No event crosses from process to process.
                    await asyncio.sleep(random.uniform(0, 2 * _LOOK_SECONDS))
                    continue
                content = await in_thread(self._threads, partial(self._load, block))
                if content is not None or was_present:
                    return False, content
                # A damaged one was removed just now; one that is still here the next time cannot be opened.
                was_present = True
        return False, None

    def _load(self, block: Block) -> memoryview | None:
        with self._cache.reading(block.sha256, check=True) as descriptor:
            return None if descriptor is None else memoryview(os.pread(descriptor, block.size, 0))

    async def _publish(self, room: Reservation, content: memoryview) -> None:
        is_kept = False
        try:
            is_kept = await in_thread(self._threads, partial(room.publish, content))
        except OSError:
            # The disk is full though the limit leaves room: for a while only what is wanted is fetched.
            self._full_until = asyncio.get_running_loop().time() + _FULL_SECONDS
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


class _Landing:
    """Where the records of a batch are awaited."""

    def __init__(self, records: Records, num_missing: int, done: asyncio.Future[None]) -> None:
        self.records = records
        self.done = done
        self._num_missing = num_missing

    def count(self) -> None:
        """Note that one block more has been copied."""
        self._num_missing -= 1
        if not self._num_missing and not self.done.done():
            self.done.set_result(None)

    def fail(self, error: BaseException | None) -> None:
        if self.done.done():
            return
        if error is None or isinstance(error, asyncio.CancelledError):
            self.done.cancel()
        else:
            self.done.set_exception(error)


class _Flight:
    """The fetching of one block, begun or not, and who waits for what of it."""

    def __init__(self, number: int, turn: int) -> None:
        self.number = number
        self.turn = turn
        self.task: asyncio.Task[None] | None = None
        self.passengers: dict[_Wanted, _Landing] = {}
        # None as long as it will bring, or may bring, the whole block.
        self._rows: tuple[int, int] | None = None

    def brings(self, rows: NDArray[np.int64]) -> bool:
        """Return whether somebody who wants these rows may join."""
        return self._rows is None or (self._rows[0] <= int(rows.min()) and int(rows.max()) < self._rows[1])

    def set_off(self) -> tuple[int, int]:
        """Return the first row that is wanted and the one after the last; from now on others cannot be had."""
        first = min(int(one.rows.min()) for one in self.passengers)
        last = 1 + max(int(one.rows.max()) for one in self.passengers)
        self._rows = (first, last)
        return first, last


def _sha256(content: memoryview) -> str:
    return hashlib.sha256(content).hexdigest()
