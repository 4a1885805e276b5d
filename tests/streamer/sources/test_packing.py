import asyncio
import hashlib
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from streamer.errors import DataError, StorageError
from streamer.sources.objects import ObjectStore
from streamer.sources.packing import FolderTarget, Readable, StoreTarget, pack
from streamer.sources.shards import INDEX_NAME, PackedIndex, parse_index
from streamer.sources.split import MemorySplit, Samples
from streamer.sources.tally import Tally
from tests.streamer.packed import random_split, write_packed
from tests.streamer.storage import S3Server


class Source:
    """Samples that end in an error, or never, from some index on."""

    def __init__(self, memory: MemorySplit, *, until: int, error: Exception | None) -> None:
        self.num_samples, self.image_shape, self.num_classes = memory.num_samples, memory.image_shape, 10
        self._memory = memory
        self._until = until
        self._error = error
        self.stuck = asyncio.Event()

    async def read(self, indices: NDArray[np.int64]) -> Samples:
        if indices[-1] >= self._until:
            if self._error is not None:
                raise self._error
            self.stuck.set()
            await asyncio.Event().wait()
        return await self._memory.read(indices)


async def pack_into(folder: Path, splits: Mapping[str, Readable]) -> PackedIndex:
    with ThreadPoolExecutor(2) as threads:
        return await pack(
            "x", (), splits, FolderTarget(folder), threads=threads, shard_bytes=1, block_bytes=1000, report=print
        )


@settings(max_examples=40, deadline=None)
@given(size=st.integers(1, 200), block_samples=st.integers(1, 40), shard_blocks=st.integers(1, 6))
async def test_sizes_add_up_whatever_is_asked_for(
    tmp_path_factory: pytest.TempPathFactory, size: int, block_samples: int, shard_blocks: int
) -> None:
    folder, memory = tmp_path_factory.mktemp("packed"), random_split(size=size)
    index = await write_packed(folder, memory, block_samples=block_samples, shard_blocks=shard_blocks)
    split = index.splits["train"]

    assert split.fingerprint == memory.fingerprint
    assert sum(shard.num_samples for shard in split.shards) == size
    assert all(shard.num_samples == block_samples * shard_blocks for shard in split.shards[:-1])
    number = 0
    for shard in split.shards:
        content = (folder / shard.file).read_bytes()
        assert hashlib.sha256(content).hexdigest() == shard.sha256
        for key in shard.blocks:
            block = split.block(number)
            piece = content[block.first_byte : block.first_byte + block.size]
            assert (block.file, block.sha256) == (shard.file, key)
            assert hashlib.sha256(piece).hexdigest() == key
            number += 1
    assert parse_index((folder / INDEX_NAME).read_bytes(), file="x") == index


async def test_packing_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        await write_packed(tmp_path / name, random_split())

    one, two = ({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("one", "two"))
    assert one == two


async def test_format_is_that_of_data_sets_packed_before(tmp_path: Path) -> None:
    """Whoever changes it raises the version, and reads this one still."""
    index = await write_packed(tmp_path / "packed", random_split(num_classes=300), block_samples=100, shard_blocks=20)

    (shard,) = index.splits["train"].shards
    assert shard.sha256 == "29051c4eaaeeeef94a8454aded5a608a3ca92acff60080591ac9287ca4b22c3c"
    assert len(shard.blocks) == 10


async def test_folder_that_holds_something_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()

    with pytest.raises(DataError, match=f"{tmp_path}/mine: expected a new or an empty folder"):
        await write_packed(tmp_path / "mine", random_split())
    assert os.listdir(tmp_path) == ["mine"]


async def test_error_in_the_middle_leaves_nothing(tmp_path: Path) -> None:
    source = Source(random_split(), until=500, error=DataError("file", expected="this", found="that"))

    with pytest.raises(DataError, match="file: expected this"):
        await pack_into(tmp_path / "packed", {"train": source})
    assert os.listdir(tmp_path) == []


async def test_cancelling_in_the_middle_leaves_nothing(tmp_path: Path) -> None:
    source = Source(random_split(), until=500, error=None)
    packing = asyncio.create_task(pack_into(tmp_path / "packed", {"train": source}))
    await source.stuck.wait()
    packing.cancel()

    with pytest.raises(asyncio.CancelledError):
        await packing
    assert os.listdir(tmp_path) == []


async def test_label_that_is_no_class_is_named(tmp_path: Path) -> None:
    memory = random_split()
    labels = memory.labels.copy()
    labels[321] = 10

    with pytest.raises(DataError, match="train: expected labels from 0 to 9, found 10 at index 321"):
        await pack_into(tmp_path / "packed", {"train": MemorySplit("train", memory.images.copy(), labels, 10)})


async def test_source_that_changes_while_it_is_packed_is_refused(tmp_path: Path) -> None:
    memory, other = random_split(), random_split(seed=6)
    object.__setattr__(memory, "fingerprint", other.fingerprint)

    with pytest.raises(DataError, match="they changed meanwhile"):
        await pack_into(tmp_path / "packed", {"train": memory})
    assert os.listdir(tmp_path) == []


async def test_full_disk_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(DataError, match="expected a folder with room to write to, found No space left on device"):
        await write_packed(tmp_path / "packed", random_split())


async def test_object_storage_gets_the_same_bytes_and_the_index_last(s3: S3Server, tmp_path: Path) -> None:
    store = ObjectStore(f"s3://packing/{tmp_path.name}", tally=Tally())
    index = await write_packed(StoreTarget(store), random_split())
    await write_packed(tmp_path / "packed", random_split())

    for path in (tmp_path / "packed").iterdir():
        assert s3.get(store.url_of(path.name)) == path.read_bytes()
    assert len(list((tmp_path / "packed").iterdir())) == 1 + len(index.splits["train"].shards)


async def test_upload_that_fails_leaves_no_index(s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = ObjectStore(f"s3://packing/{tmp_path.name}", tally=Tally())
    target, honest, written = StoreTarget(store), ObjectStore.write, list[str]()

    async def fail_third(self: ObjectStore, key: str, content: bytes | Path) -> None:
        written.append(key)
        if len(written) == 3:
            raise StorageError(key, "out of reach")
        await honest(self, key, content)

    monkeypatch.setattr(ObjectStore, "write", fail_third)
    with pytest.raises(StorageError, match="out of reach"):
        await write_packed(target, random_split())
    assert INDEX_NAME not in written
    assert not target.work.exists()


async def test_shards_of_other_content_have_other_names(tmp_path: Path) -> None:
    """So that packing anew into a bucket cannot change what an index in use points to."""
    one = await write_packed(tmp_path / "one", random_split())
    two = await write_packed(tmp_path / "two", random_split(seed=6))

    names = [{shard.file for shard in index.splits["train"].shards} for index in (one, two)]
    assert not names[0] & names[1]
    assert replace(one, splits={}) == replace(two, splits={})
