"""A packed split in a real S3 server, read through a real cache."""

import asyncio
import fcntl
import hashlib
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from streamer.errors import DataLossError, NoObjectError
from streamer.order import Order
from streamer.sources import remote
from streamer.sources.cache import BlockCache, Reservation
from streamer.sources.objects import ObjectStore
from streamer.sources.packing import StoreTarget
from streamer.sources.remote import RemoteRecords
from streamer.sources.shards import PackedSplit
from streamer.sources.split import MemorySplit
from streamer.sources.tally import Counts, Tally
from tests.streamer.packed import flip, random_split, write_packed
from tests.streamer.sources.test_cache import size_of
from tests.streamer.storage import S3Server

BLOCK = 16 * 25
NUM_BLOCKS = 63


async def become(is_so: Callable[[], bool]) -> None:
    """Give way until something is so."""
    while not is_so():  # noqa: ASYNC110 - what is waited for sets no event
        await asyncio.sleep(0)


class Remote:
    """The split in object storage and the same in memory; :meth:`open` begins as a new process would."""

    def __init__(self, url: str, memory: MemorySplit, split: PackedSplit, folder: Path, s3: S3Server) -> None:
        self.url = url
        self.memory = memory
        self.split = split
        self.folder = folder
        self.s3 = s3
        self.tally = Tally()
        self.threads = ThreadPoolExecutor(4)
        self.caches: list[BlockCache] = []

    def open(self, *, max_bytes: int = 1 << 20, max_downloads: int = 8) -> RemoteRecords:
        self.tally = Tally()
        store = ObjectStore(self.url, deadline_seconds=40, tally=self.tally)
        self.caches.append(BlockCache(self.folder, max_bytes=max_bytes, tally=self.tally))
        return RemoteRecords(
            store,
            self.split,
            self.caches[-1],
            threads=self.threads,
            tally=self.tally,
            max_downloads=max_downloads,
        )

    @property
    def counts(self) -> Counts:
        return self.tally.counts()

    def files(self) -> list[str]:
        return sorted(path.name for path in self.folder.iterdir() if path.name != ".usage")

    def damage_object(self, shard: int, byte: int) -> str:
        url = f"{self.url}/{self.split.shards[shard].file}"
        self.s3.put(url, flip(self.s3.get(url), 8 * byte))
        return url

    async def matches(self, records: RemoteRecords, indices: NDArray[np.int64]) -> bool:
        images, labels = await records.read(indices)
        expected = self.memory.images[indices], self.memory.labels[indices]
        return bool((images == expected[0]).all() and (labels == expected[1]).all())

    def epoch(self, batch: int = 50) -> list[NDArray[np.int64]]:
        order = Order(1000, fingerprint=self.memory.fingerprint, seed=3, epoch=0)
        return [order.indices(np.arange(first, first + batch)) for first in range(0, 1000, batch)]


@pytest.fixture
async def there(s3: S3Server, tmp_path: Path) -> AsyncIterator[Remote]:
    """1,000 samples in 63 blocks of 400 bytes, in 13 shards, no two tests' alike."""
    url = f"s3://remote/{tmp_path.name}"
    memory = random_split(seed=time.monotonic_ns())
    index = await write_packed(StoreTarget(ObjectStore(url, tally=Tally())), memory)
    there = Remote(url, memory, index.splits["train"], tmp_path / "blocks", s3)
    yield there
    there.threads.shutdown()
    for cache in there.caches:
        cache.close()


async def test_epoch_downloads_each_block_once_and_the_next_none(there: Remote) -> None:
    records = there.open()

    assert all([await there.matches(records, batch) for batch in there.epoch()])
    assert there.counts.fetched_objects == NUM_BLOCKS
    assert there.counts.fetched_bytes == 1000 * 25
    assert all([await there.matches(records, batch) for batch in there.epoch()])
    assert there.counts.fetched_objects == NUM_BLOCKS


async def test_full_cache_serves_after_a_restart_with_the_server_forgotten(
    there: Remote, monkeypatch: pytest.MonkeyPatch
) -> None:
    await there.open().read(np.arange(1000))
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    records = there.open()

    assert all([await there.matches(records, batch) for batch in there.epoch()])
    assert there.counts == Counts(cache_hits=there.counts.cache_hits)


@pytest.mark.parametrize("limit", [0, BLOCK - 1, BLOCK + 9, 8 * BLOCK + 9, NUM_BLOCKS * BLOCK // 2])
async def test_cache_smaller_than_the_data_keeps_what_fits_and_fetches_only_what_is_wanted(
    there: Remote, limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Its own blocks stay for another reason.
    monkeypatch.setattr(remote, "_FRESH_SECONDS", 0.0)
    monkeypatch.setattr(remote, "_FULL_SECONDS", 0.0)
    records = there.open(max_bytes=limit)
    for number in range(2):
        assert all([await there.matches(records, batch) for batch in there.epoch(batch=5)])
        assert size_of(there.folder) <= max(limit, 9)
        if number == 0:
            kept, first_bytes = there.files(), there.counts.fetched_bytes

    assert there.files() == kept
    assert there.counts.evictions == 0
    # Some wanted together lie in one block, and what lies between them comes along.
    missing = 1000 * 25 - len(kept) * BLOCK
    assert missing <= there.counts.fetched_bytes - first_bytes <= 1.5 * missing


async def test_blocks_of_other_data_make_room_unless_in_use(there: Remote, monkeypatch: pytest.MonkeyPatch) -> None:
    records = there.open(max_bytes=2 * BLOCK + 9)
    other = hashlib.sha256(b"other").hexdigest()
    path = there.folder / other
    path.write_bytes(bytes(BLOCK))
    with there.caches[0]._changing() as usage:
        usage.bytes = there.caches[0]._scan()
    await records.read(np.arange(64))
    assert path.exists()

    monkeypatch.setattr(remote, "_FRESH_SECONDS", 0.0)
    records = there.open(max_bytes=2 * BLOCK + 9)
    assert await there.matches(records, np.arange(64))
    assert not path.exists()
    assert there.counts.evictions == 1


async def test_limit_is_never_passed_by_concurrent_readers(there: Remote) -> None:
    limit = 10 * BLOCK + 9
    records, seen = there.open(max_bytes=limit, max_downloads=16), [0]

    async def watching() -> None:
        while True:
            seen[0] = max(seen[0], await asyncio.to_thread(size_of, there.folder))

    watcher = asyncio.create_task(watching())
    matched = await asyncio.gather(*(there.matches(records, batch) for batch in there.epoch()))
    watcher.cancel()

    assert all(matched)
    assert 0 < seen[0] <= limit
    assert there.caches[0].used_bytes == size_of(there.folder) <= limit


async def test_twenty_readers_of_a_block_download_it_once(there: Remote) -> None:
    records = there.open()

    matched = await asyncio.gather(*(there.matches(records, np.arange(at % 16, 16)) for at in range(20)))
    assert all(matched)
    assert there.counts.fetched_objects == 1


async def test_two_processes_download_a_block_once(there: Remote) -> None:
    """Two caches on one folder know as little of each other as two processes."""
    first = there.open()
    counts = there.tally
    second = there.open()

    both = await asyncio.gather(there.matches(first, np.arange(1000)), there.matches(second, np.arange(1000)))
    assert all(both)
    assert counts.counts().fetched_objects + there.counts.fetched_objects == NUM_BLOCKS


async def test_process_that_hangs_in_a_download_is_waited_for_only_so_long(
    there: Remote, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "_WAIT_SECONDS", 0.2)
    records = there.open()
    block = there.split.block(0)
    hung = Reservation(there.caches[0], block.sha256, block.size)
    hung.take()

    assert await there.matches(records, np.arange(16))
    assert there.counts.uncached == 1
    hung.release()


async def test_bit_flipped_in_an_object_is_named_after_a_second_try(there: Remote) -> None:
    url = there.damage_object(2, byte=2 * BLOCK + 5)
    records = there.open()

    with pytest.raises(DataLossError, match=f"^{url}, bytes 800-1199: expected content with SHA-256 ") as caught:
        await records.read(np.arange(1000))
    assert (caught.value.first_byte, caught.value.last_byte) == (800, 1199)
    assert there.counts.checksum_failures == 2
    assert all(".part" not in name for name in there.files())
    assert await there.matches(records, np.arange(192))


async def test_bit_flipped_in_an_answer_costs_a_second_one(there: Remote, monkeypatch: pytest.MonkeyPatch) -> None:
    records, honest = there.open(), ObjectStore.read_range
    asked: list[int] = []

    async def spoil_first(store: ObjectStore, key: str, first_byte: int, size: int) -> memoryview:
        content = await honest(store, key, first_byte, size)
        asked.append(first_byte)
        return memoryview(flip(bytes(content), 77)) if len(asked) == 1 else content

    monkeypatch.setattr(ObjectStore, "read_range", spoil_first)
    assert await there.matches(records, np.arange(16))
    assert (len(asked), there.counts.checksum_failures) == (2, 1)


@pytest.mark.parametrize("is_restarted", [True, False])
async def test_bit_flipped_in_the_cache_is_found_and_fetched_anew(there: Remote, is_restarted: bool) -> None:
    records = there.open()
    await records.read(np.arange(1000))
    path = there.folder / there.split.block(7).sha256
    path.write_bytes(flip(path.read_bytes(), 8 * BLOCK - 1))
    if is_restarted:
        records = there.open()
    before = there.counts

    assert all([await there.matches(records, batch) for batch in there.epoch()])
    assert there.counts.checksum_failures == 1
    assert there.counts.fetched_objects == before.fetched_objects + 1
    assert hashlib.sha256(path.read_bytes()).hexdigest() == path.name


async def test_file_of_the_cache_that_is_cut_short_or_gone_is_fetched_anew(there: Remote) -> None:
    records = there.open()
    await records.read(np.arange(1000))
    (there.folder / there.split.block(3).sha256).write_bytes(b"")
    (there.folder / there.split.block(4).sha256).unlink()

    assert await there.matches(records, np.arange(1000))


async def test_missing_object_is_named(there: Remote) -> None:
    shards = tuple(replace(shard, file=f"elsewhere-{number}") for number, shard in enumerate(there.split.shards))
    there.split = replace(there.split, shards=shards)
    records = there.open()

    with pytest.raises(NoObjectError, match=rf"^{there.url}/elsewhere-\d+: no such object$"):
        await records.read(np.arange(1000))
    assert there.files() == []


async def test_cancelled_readers_leave_no_file_and_no_room_taken(there: Remote) -> None:
    records = there.open(max_downloads=4)
    for turns in range(0, 60, 3):
        reading = asyncio.create_task(records.read(np.arange(1000)))
        for _ in range(turns):
            await asyncio.sleep(0)
        reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading

        assert not records._flights
        assert all(".part" not in name for name in there.files())
        assert there.caches[0].used_bytes == size_of(there.folder)
    assert await there.matches(records, np.arange(1000))


async def test_one_reader_that_gives_up_takes_nobody_with_him(there: Remote) -> None:
    records = there.open()
    leaving = asyncio.create_task(records.read(np.arange(16)))
    staying = asyncio.create_task(there.matches(records, np.arange(16)))
    await become(lambda: any(len(flight.passengers) == 2 for flight in records._flights.values()))
    leaving.cancel()

    assert await staying
    assert leaving.cancelled()
    assert there.counts.fetched_objects == 1


async def test_request_for_part_of_a_block_is_shared_by_those_it_is_enough_for(there: Remote) -> None:
    records = there.open(max_bytes=0)
    first = asyncio.create_task(there.matches(records, np.array([3, 5])))
    await become(lambda: any(flight._rows is not None for flight in records._flights.values()))

    later = [there.matches(records, np.array(wanted)) for wanted in ([4], [5, 3], [6], [2, 4])]
    assert all(await asyncio.gather(first, *later))
    # The last two go out together.
    assert there.counts.fetched_objects <= 3
    assert there.counts.fetched_bytes <= (3 + 5 + 5) * 25


async def test_samples_wanted_now_go_before_those_read_ahead(there: Remote) -> None:
    records = there.open(max_downloads=1)
    early = [asyncio.create_task(records.read(batch, ahead_bytes=10_000)) for batch in there.epoch()[:4]]
    await become(lambda: there.counts.fetched_objects > 0)

    assert await there.matches(records, np.arange(16))
    assert not any(task.done() for task in early)
    await asyncio.gather(*early)
    assert there.counts.fetched_objects <= NUM_BLOCKS


async def test_reads_that_are_given_up_before_their_turn_are_never_begun(there: Remote) -> None:
    records = there.open(max_downloads=2)
    task = asyncio.create_task(records.read(np.arange(1000)))
    await become(lambda: there.counts.fetched_objects > 0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task

    assert not records._flights
    assert there.counts.fetched_objects < NUM_BLOCKS
    assert await there.matches(records, np.arange(1000))


async def test_cached_block_that_cannot_be_opened_is_done_without(
    there: Remote, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "_WAIT_SECONDS", 1000.0)
    await there.open().read(np.arange(16))
    with (there.folder / there.split.block(0).sha256).open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        records = there.open()

        assert await asyncio.wait_for(there.matches(records, np.arange(16)), 60)
    assert there.counts.uncached == 1


@pytest.mark.parametrize("max_bytes", [1 << 20, 0])
async def test_object_that_is_cut_short_is_named(there: Remote, max_bytes: int) -> None:
    url = f"{there.url}/{there.split.shards[1].file}"
    there.s3.put(url, there.s3.get(url)[: 2 * BLOCK + 100])
    records = there.open(max_bytes=max_bytes)

    for first_byte in (2 * BLOCK, 3 * BLOCK):
        at = 80 + first_byte // 25
        with pytest.raises(DataLossError, match=f"^{url}, bytes {first_byte}-{first_byte + BLOCK - 1}: "):
            await records.read(np.arange(at + 8, at + 10))


async def test_bit_flipped_in_a_record_that_comes_alone_is_named(there: Remote) -> None:
    url = there.damage_object(2, byte=2 * BLOCK + 5)
    records = there.open(max_bytes=0)

    with pytest.raises(DataLossError, match=f"^{url}, bytes 800-1199: expected content with SHA-256 "):
        await records.read(np.arange(192, 193))
    assert await there.matches(records, np.arange(193, 208))


async def test_cache_that_cannot_be_written_costs_speed_and_nothing_else(
    there: Remote, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    records = there.open()
    monkeypatch.setattr("os.rename", full)

    assert await there.matches(records, np.arange(1000))
    assert there.counts.uncached == NUM_BLOCKS
    assert there.files() == []


@pytest.mark.slow
async def test_server_killed_in_an_epoch_and_back_five_seconds_later_costs_time_only(there: Remote) -> None:
    records = there.open(max_downloads=2)
    batches = there.epoch(batch=20)
    reading = asyncio.create_task(_read_all(there, records, batches))
    await become(lambda: there.counts.fetched_objects >= NUM_BLOCKS // 4)
    there.s3.kill()
    try:
        await asyncio.sleep(5)
    finally:
        there.s3.start(wait=False)

    assert not reading.done()
    assert await asyncio.wait_for(reading, 40)
    assert there.counts.fetched_objects == NUM_BLOCKS
    assert there.counts.retries > 0
    assert there.counts.checksum_failures == 0


async def _read_all(there: Remote, records: RemoteRecords, batches: list[NDArray[np.int64]]) -> bool:
    return all([await there.matches(records, batch) for batch in batches])
