"""Data sets by name, by folder and from object storage, opened as the streamer will."""

import asyncio
import os
import threading
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from streamer.errors import DataError, StorageError, UnknownDatasetError
from streamer.sources import idx
from streamer.sources.declarations import DECLARATIONS
from streamer.sources.objects import ObjectStore
from streamer.sources.packing import StoreTarget
from streamer.sources.places import Reading, open_dataset
from streamer.sources.shards import INDEX_NAME, ShardedSplit, format_index
from streamer.sources.split import Dataset, MemorySplit
from streamer.sources.tally import Tally
from tests.streamer.packed import flip, random_split, write_packed
from tests.streamer.storage import S3Server

HERE = Path("/usr/share/datasets/fashion-mnist")


async def open_place(place: object, cache: Path, *, name: str = "set", memory_bytes: int = 1 << 30) -> Dataset:
    reading = Reading(cache=cache, memory_bytes=memory_bytes)
    return await open_dataset(name, str(place), reading, report=print)


def open_files() -> list[str]:
    """Return the paths of all descriptors of this process."""
    paths = []
    for number in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):
            paths.append(os.readlink(f"/proc/self/fd/{number}"))
    return paths


def write_idx(folder: Path, *, split: str = "train", size: int = 30, height: int = 5) -> None:
    rng = np.random.default_rng(1)
    folder.mkdir(exist_ok=True)
    images, labels = rng.integers(0, 256, (size, height, 4), np.uint8), (np.arange(size) % 3).astype(np.uint8)
    (folder / f"{split}-images-idx3-ubyte.gz").write_bytes(idx.pack(idx.format_images(images)))
    (folder / f"{split}-labels.idx1-ubyte").write_bytes(idx.format_labels(labels))


def write_images(folder: Path, *, count: int = 20) -> None:
    for number in range(count):
        path = folder / f"class {number % 2}" / f"{number:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), number).save(path)


async def test_idx_files_of_any_size_are_a_data_set(tmp_path: Path) -> None:
    write_idx(tmp_path / "idx")
    write_idx(tmp_path / "idx", split="t10k", size=9)

    splits = (await open_place(tmp_path / "idx", tmp_path)).splits
    assert {name: split.num_samples for name, split in splits.items()} == {"train": 30, "test": 9}
    assert (splits["train"].image_shape, splits["train"].num_classes) == ((5, 4), 3)


async def test_idx_files_to_train_on_are_enough(tmp_path: Path) -> None:
    write_idx(tmp_path / "idx")

    assert list((await open_place(tmp_path / "idx", tmp_path)).splits) == ["train"]


async def test_test_images_of_another_size_are_named(tmp_path: Path) -> None:
    write_idx(tmp_path / "idx")
    write_idx(tmp_path / "idx", split="t10k", height=6)

    with pytest.raises(DataError, match=r"t10k-images-idx3-ubyte\.gz: expected images of 5x4, found 6x4"):
        await open_place(tmp_path / "idx", tmp_path)


async def test_known_name_finds_its_folder_beside_others(mnist_folder: Path, tmp_path: Path) -> None:
    assert mnist_folder.name == "mnist"

    dataset = await open_place(mnist_folder.parent, tmp_path, name="mnist")
    assert dataset.splits["train"].num_samples == 1000


async def test_known_name_with_a_file_missing_names_it(mnist_folder: Path, tmp_path: Path) -> None:
    (mnist_folder / "train-images-idx3-ubyte.gz").unlink()

    with pytest.raises(DataError, match="train-images-idx3-ubyte: expected an IDX file of this name"):
        await open_place(mnist_folder, tmp_path, name="mnist")


async def test_folder_of_images_goes_into_memory(tmp_path: Path) -> None:
    write_images(tmp_path / "pictures")
    dataset = await open_place(tmp_path / "pictures", tmp_path)

    assert dataset.class_names == ("class 0", "class 1")
    assert {name: split.num_samples for name, split in dataset.splits.items()} == {"train": 18, "test": 2}
    assert isinstance(dataset.splits["train"], MemorySplit)


async def test_folder_of_images_that_does_not_fit_says_to_pack_it(tmp_path: Path) -> None:
    write_images(tmp_path / "pictures")

    with pytest.raises(DataError, match=r"found 1,300 bytes; pack them: `sluice data pack .*/pictures FOLDER`"):
        await open_place(tmp_path / "pictures", tmp_path, memory_bytes=1000)


@pytest.mark.parametrize(("memory_bytes", "kind"), [(21_000, MemorySplit), (20_999, ShardedSplit)])
async def test_packed_folder_is_held_in_memory_only_where_it_fits(
    tmp_path: Path, memory_bytes: int, kind: type[object]
) -> None:
    memory = random_split()
    await write_packed(tmp_path / "packed", memory)
    dataset = await open_place(tmp_path / "packed", tmp_path, memory_bytes=memory_bytes)
    split = dataset.splits["train"]

    assert isinstance(split, kind)
    assert split.fingerprint == memory.fingerprint
    assert (split.num_classes, split.label_bytes, split.sample_bytes) == (10, 1, 21)
    assert ((await split.read(np.arange(1000)))[0] == memory.images).all()
    await dataset.close()


async def test_flipped_bit_is_found_on_the_way_into_memory(tmp_path: Path) -> None:
    index = await write_packed(tmp_path / "packed", random_split())
    path = tmp_path / "packed" / index.splits["train"].shards[4].file
    path.write_bytes(flip(path.read_bytes(), 999))

    with pytest.raises(DataError, match=f"{path}, bytes 100-124: expected sample 324 of train"):
        await open_place(tmp_path / "packed", tmp_path)


async def test_index_with_the_fingerprint_of_other_samples_is_refused(tmp_path: Path) -> None:
    index = await write_packed(tmp_path / "packed", random_split())
    other = replace(index.splits["train"], fingerprint=random_split(seed=6).fingerprint)
    (tmp_path / "packed" / INDEX_NAME).write_bytes(format_index(replace(index, splits={"train": other})))

    with pytest.raises(DataError, match="packed: expected samples of train with fingerprint"):
        await open_place(tmp_path / "packed", tmp_path)


async def test_missing_shard_is_told_at_the_start(tmp_path: Path) -> None:
    index = await write_packed(tmp_path / "packed", random_split())
    path = tmp_path / "packed" / index.splits["train"].shards[4].file
    path.unlink()

    with pytest.raises(DataError, match=f"{path}: expected a readable file"):
        await open_place(tmp_path / "packed", tmp_path, memory_bytes=0)


async def test_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"{tmp_path}/nowhere: expected a folder with a data set, found no such folder"):
        await open_place(tmp_path / "nowhere", tmp_path)


async def test_unknown_name_without_a_place_lists_the_known(tmp_path: Path) -> None:
    with pytest.raises(UnknownDatasetError, match="known are fashion-mnist, mnist"):
        await open_dataset("pets", None, Reading(cache=tmp_path), report=print)


async def test_closed_data_sets_leave_no_thread_and_no_file_open(s3: S3Server, tmp_path: Path) -> None:
    url = f"s3://places/{tmp_path.name}"
    await write_packed(StoreTarget(ObjectStore(url, tally=Tally())), random_split())
    for memory_bytes in (0, 1 << 30):
        dataset = await open_place(url, tmp_path, memory_bytes=memory_bytes)
        await dataset.splits["train"].read(np.arange(100))
        await dataset.close()

    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("read-")]
    assert not [name for name in open_files() if name.startswith(str(tmp_path))]


async def test_packed_objects_are_read_where_they_lie(s3: S3Server, tmp_path: Path) -> None:
    url, memory = f"s3://places/{tmp_path.name}", random_split()
    await write_packed(StoreTarget(ObjectStore(url, tally=Tally())), memory)
    dataset = await open_place(url, tmp_path, memory_bytes=0)
    split = dataset.splits["train"]

    assert isinstance(split, ShardedSplit)
    assert split.fingerprint == memory.fingerprint
    assert ((await split.read(np.arange(1000)))[1] == memory.labels).all()
    assert len(os.listdir(tmp_path / "blocks")) == 64
    await dataset.close()


async def test_idx_files_are_read_from_object_storage(s3: S3Server, tmp_path: Path) -> None:
    write_idx(tmp_path / "idx")
    for path in await asyncio.to_thread(lambda: list((tmp_path / "idx").iterdir())):
        s3.put(f"s3://places/{tmp_path.name}/{path.name}", path.read_bytes())

    there = (await open_place(f"s3://places/{tmp_path.name}", tmp_path)).splits["train"]
    here = (await open_place(tmp_path / "idx", tmp_path)).splits["train"]
    assert there.fingerprint == here.fingerprint


async def test_prefix_with_nothing_usable_says_what_was_looked_for(s3: S3Server, tmp_path: Path) -> None:
    s3.put("s3://places/other", b"1")

    with pytest.raises(DataError, match=rf"s3://places/nothing: expected a packed data set \({INDEX_NAME}\) or IDX"):
        await open_place("s3://places/nothing", tmp_path)


async def test_storage_that_is_out_of_reach_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"ACCESS_KEY_ID": "a", "SECRET_ACCESS_KEY": "b", "ENDPOINT_URL": "http://127.0.0.1:1"}.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    reading = Reading(cache=tmp_path, deadline_seconds=0.3)

    with pytest.raises(StorageError, match=rf"s3://places/x/{INDEX_NAME}: no answer in 0.3 s"):
        await open_dataset("set", "s3://places/x", reading, report=print)


async def test_cache_with_no_room_for_the_data_set_is_told_at_the_start(s3: S3Server, tmp_path: Path) -> None:
    url, lines = f"s3://places/{tmp_path.name}", list[str]()
    await write_packed(StoreTarget(ObjectStore(url, tally=Tally())), random_split())
    for cache_bytes in (10_000, 30_000):
        reading = Reading(cache=tmp_path, memory_bytes=0, cache_bytes=cache_bytes)
        dataset = await open_dataset("set", url, reading, report=lines.append)
        await dataset.close()

    assert len(lines) == 1
    assert f"{url}: the cache of 0 MB has room for 40% of 0 MB" in lines[0]
    assert "SLUICE_STREAMER_CACHE_BYTES=100000000" in lines[0]


@pytest.mark.skipif(not HERE.is_dir(), reason="Debian's package dataset-fashion-mnist is not installed")
async def test_debians_fashion_mnist_is_what_its_declaration_promises(tmp_path: Path) -> None:
    dataset = await open_dataset("fashion-mnist", None, Reading(cache=tmp_path), report=print)

    assert {name: split.num_samples for name, split in dataset.splits.items()} == {"train": 60_000, "test": 10_000}
    assert dataset.class_names == DECLARATIONS["fashion-mnist"].class_names
