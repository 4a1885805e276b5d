import asyncio
import json
import os
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streamer.errors import DataError, DataLossError
from streamer.sources.shards import (
    INDEX_NAME,
    FolderRecords,
    PackedIndex,
    PackedSplit,
    ShardedSplit,
    damaged,
    format_index,
    groups,
    in_thread,
    make_records,
    parse_index,
    samples_of,
)
from streamer.sources.split import MemorySplit
from streamer.sources.tally import Tally
from tests.streamer.packed import flip, random_split, write_packed


class Packed:
    """A packed split in a folder, and the same in memory."""

    def __init__(self, folder: Path, memory: MemorySplit, index: PackedIndex, threads: ThreadPoolExecutor) -> None:
        self.folder = folder
        self.memory = memory
        self.index = index
        self.tally = Tally()
        self.records = FolderRecords(folder, index.splits["train"], threads=threads, tally=self.tally)
        self.split = ShardedSplit(index.splits["train"], self.records)

    def shard(self, number: int) -> Path:
        return self.folder / self.index.splits["train"].shards[number].file


@pytest.fixture
async def packed(tmp_path: Path) -> AsyncIterator[Packed]:
    """1,000 samples in 13 shards of 5 blocks of 16, the last ones cut short."""
    memory = random_split()
    index = await write_packed(tmp_path / "packed", memory)
    with ThreadPoolExecutor(2) as threads:
        yield Packed(tmp_path / "packed", memory, index, threads)


async def test_shards_hold_the_samples_of_memory_in_any_order(packed: Packed) -> None:
    indices = np.random.default_rng(0).permutation(1000)

    images, labels = await packed.split.read(indices)
    assert (images == packed.memory.images[indices]).all()
    assert (labels == packed.memory.labels[indices]).all()
    assert images.flags.c_contiguous
    assert packed.split.fingerprint == packed.memory.fingerprint


async def test_labels_of_many_classes_come_back_as_they_were(tmp_path: Path) -> None:
    memory = random_split(num_classes=70_000)
    split = (await write_packed(tmp_path / "packed", memory)).splits["train"]

    with ThreadPoolExecutor(1) as threads:
        _, labels = await FolderRecords(tmp_path / "packed", split, threads=threads, tally=Tally()).read(
            np.arange(1000)
        )
    assert labels.dtype == np.dtype("<u4")
    assert (labels == memory.labels).all()


async def test_no_samples_asked_for_are_none(packed: Packed) -> None:
    images, labels = await packed.split.read(np.empty(0, np.int64))

    assert (images.shape, labels.shape) == ((0, 4, 5), (0,))


async def test_numpy_reads_a_shard_as_its_documentation_says(packed: Packed) -> None:
    record = np.dtype([("image", "u1", (4, 5)), ("label", "<u1"), ("crc32c", "<u4")])

    samples = np.memmap(packed.shard(1), record)
    assert (samples["image"] == packed.memory.images[80:160]).all()
    assert (samples["label"] == packed.memory.labels[80:160]).all()


@settings(max_examples=50, deadline=None)
@given(bit=st.integers(0, 25 * 8 - 1), row=st.integers(0, 9))
def test_any_flipped_bit_of_a_record_is_found(bit: int, row: int) -> None:
    memory = random_split(size=10)
    split = _sizes_of(memory)
    records = make_records(split, memory.images, memory.labels, first_index=100)
    records[row] = np.frombuffer(flip(records[row].tobytes(), bit), np.uint8)

    assert damaged(split, records, np.arange(100, 110)).tolist() == [row]


def test_record_in_the_place_of_another_is_found() -> None:
    memory = random_split(size=10)
    records = make_records(_sizes_of(memory), memory.images, memory.labels, first_index=0)

    assert damaged(_sizes_of(memory), records[[1, 0, 2]], np.array([0, 1, 2])).tolist() == [0, 1]
    assert (samples_of(_sizes_of(memory), records)[0] == memory.images).all()


async def test_flipped_bit_in_a_shard_names_file_place_and_sample(packed: Packed) -> None:
    path = packed.shard(2)
    path.write_bytes(flip(path.read_bytes(), 8 * (25 * 7 + 3)))

    with pytest.raises(DataLossError, match=f"{path}, bytes 175-199: expected sample 167 of train") as caught:
        await packed.split.read(np.arange(1000))
    assert (caught.value.first_byte, caught.value.last_byte) == (175, 199)
    assert packed.tally.counts().checksum_failures == 1
    assert len((await packed.split.read(np.arange(160)))[0]) == 160


async def test_bit_flipped_after_it_was_read_once_is_found(packed: Packed) -> None:
    await packed.split.read(np.arange(1000))
    path = packed.shard(0)
    path.write_bytes(flip(path.read_bytes(), 0))

    with pytest.raises(DataLossError, match="sample 0 of train"):
        await packed.split.read(np.arange(10))


async def test_shard_cut_short_while_it_is_in_use_is_named(packed: Packed) -> None:
    await packed.split.read(np.arange(1000))
    os.truncate(packed.shard(3), 100)

    with pytest.raises(DataError, match=f"{packed.shard(3)}: expected 2000 bytes, found 100"):
        await packed.split.read(np.arange(1000))


async def test_missing_shard_is_named_before_anything_is_read(packed: Packed) -> None:
    packed.shard(5).unlink()

    with pytest.raises(DataError, match=f"{packed.shard(5)}: expected a readable file, found No such file"):
        packed.records.check_sizes()


async def test_more_shards_than_may_be_open_are_read(packed: Packed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("streamer.sources.shards._MAX_OPEN_SHARDS", 2)

    images, _ = await packed.split.read(np.arange(1000)[::-1])
    assert (images == packed.memory.images[::-1]).all()
    assert len(packed.records._mapped) == 2


async def test_index_survives_being_written_and_read(packed: Packed) -> None:
    content = (packed.folder / INDEX_NAME).read_bytes()

    assert parse_index(content, file="x") == packed.index
    assert format_index(packed.index) == content


async def test_any_change_to_the_index_is_found(packed: Packed) -> None:
    content = (packed.folder / INDEX_NAME).read_bytes()
    changed = [flip(content, bit) for bit in range(0, 8 * len(content), 37)]

    # One to the white space between its parts is none to what it says.
    assert {_parsed(one) for one in changed} <= {"the-index", str(packed.index)}
    assert sum(_parsed(one) == "the-index" for one in changed) > len(changed) / 2


@pytest.mark.parametrize("content", [b"", b"[1]", b"{}", b'{"format": "x", "sha256": ""}', b"\xff"])
def test_file_that_is_no_index_is_refused(content: bytes) -> None:
    with pytest.raises(DataError, match=r"^there: expected"):
        parse_index(content, file="there")


async def test_index_of_a_later_version_is_refused(packed: Packed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("streamer.sources.shards._VERSION", 2)
    content = format_index(packed.index)
    monkeypatch.undo()

    assert json.loads(content)["version"] == 2
    with pytest.raises(DataError, match=r"expected 'sluice packed data set', version 1, found .* version 2"):
        parse_index(content, file="there")


@given(keys=st.lists(st.integers(0, 9), max_size=40))
def test_groups_are_in_order_of_first_appearance_and_complete(keys: list[int]) -> None:
    found = list(groups(np.array(keys, np.int64)))

    assert [key for key, _ in found] == list(dict.fromkeys(keys))
    for key, positions in found:
        assert positions.tolist() == [at for at, one in enumerate(keys) if one == key]


async def test_cancelling_waits_for_what_a_thread_has_begun() -> None:
    loop, begun = asyncio.get_running_loop(), asyncio.Event()
    ended: list[bool] = []
    release = asyncio.Event()

    def work() -> None:
        loop.call_soon_threadsafe(begun.set)
        asyncio.run_coroutine_threadsafe(release.wait(), loop).result()
        ended.append(True)

    with ThreadPoolExecutor(1) as threads:
        task = asyncio.create_task(in_thread(threads, work))
        await begun.wait()
        task.cancel()
        await asyncio.sleep(0)
        release.set()
        with pytest.raises(asyncio.CancelledError):
            await task
    assert ended == [True]


def _parsed(content: bytes) -> str:
    try:
        return str(parse_index(content, file="the-index"))
    except DataError as error:
        return str(error.file)


def _sizes_of(memory: MemorySplit) -> PackedSplit:
    return PackedSplit(
        name="train",
        num_samples=memory.num_samples,
        image_shape=memory.image_shape,
        num_classes=memory.num_classes,
        fingerprint=memory.fingerprint,
        block_samples=4,
        shards=(),
    )
