import asyncio
import gzip
from pathlib import Path

import numpy as np
import pytest

from streamer.errors import DataError
from streamer.sources import datasets, idx, memory
from streamer.sources.declarations import DatasetFiles, SplitFiles
from streamer.sources.split import MemoryDataset, MemorySplit


async def load(folder: Path) -> MemoryDataset:
    return await memory.load(await datasets.find("mnist", data=folder, cache=folder / "unused", report=print))


def split_of(images: np.ndarray[tuple[int, int, int], np.dtype[np.uint8]], labels: list[int]) -> MemorySplit:
    return MemorySplit("train", images, np.array(labels, np.uint8), num_classes=10)


async def test_samples_are_the_files_own_and_read_only(mnist_folder: Path) -> None:
    train = (await load(mnist_folder)).splits["train"]

    content = gzip.decompress((mnist_folder / "train-images-idx3-ubyte.gz").read_bytes())
    assert train.images.tobytes() == content[16:]
    assert train.labels.tobytes() == (mnist_folder / "train-labels-idx1-ubyte").read_bytes()[8:]
    assert train.images.flags.c_contiguous
    assert not train.images.flags.writeable
    assert not train.labels.flags.writeable


def test_fingerprint_tells_content_shape_and_order_apart() -> None:
    images = np.arange(16, dtype=np.uint8).reshape(2, 2, 4)
    other = [split_of(images.reshape(2, 4, 2).copy(), [1, 2]), split_of(images[::-1].copy(), [1, 2])]
    other += [split_of(images.copy(), [2, 1]), split_of(images.copy(), [1, 2])]

    fingerprints = {split.fingerprint for split in other}
    assert len(fingerprints) == 4
    assert split_of(images.copy(), [1, 2]).fingerprint == other[-1].fingerprint


def test_arrays_of_a_split_become_read_only() -> None:
    split = split_of(np.zeros((2, 2, 4), np.uint8), [1, 2])

    assert not split.images.flags.writeable
    assert not split.labels.flags.writeable


async def test_fingerprint_does_not_depend_on_the_packing(mnist_folder: Path) -> None:
    before = (await load(mnist_folder)).splits["train"].fingerprint
    packed = mnist_folder / "train-images-idx3-ubyte.gz"
    packed.with_suffix("").write_bytes(gzip.decompress(packed.read_bytes()))
    packed.unlink()

    assert (await load(mnist_folder)).splits["train"].fingerprint == before


async def test_truncated_gzip_file_is_named(mnist_folder: Path) -> None:
    path = mnist_folder / "train-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:1000])

    with pytest.raises(DataError, match=r"train-images-idx3-ubyte\.gz: expected a whole gzip file, found one cut"):
        await load(mnist_folder)


async def test_bad_magic_number_is_named(mnist_folder: Path) -> None:
    path = mnist_folder / "train-labels-idx1-ubyte"
    path.write_bytes(b"\x00\x00\x08\x03" + path.read_bytes()[4:])

    with pytest.raises(DataError, match=r"train-labels-idx1-ubyte: expected .* magic number 2049, found 2051"):
        await load(mnist_folder)


async def test_count_that_disagrees_with_the_labels_is_named(mnist_folder: Path) -> None:
    (mnist_folder / "t10k-labels-idx1-ubyte").write_bytes(idx.format_labels(np.zeros(99, np.uint8)))

    with pytest.raises(DataError, match=r"t10k-labels-idx1-ubyte: expected 100 labels.*found 99"):
        await load(mnist_folder)


async def test_unreadable_file_is_named(mnist_folder: Path) -> None:
    files = await datasets.find("mnist", data=mnist_folder, cache=mnist_folder, report=print)
    (mnist_folder / "t10k-labels-idx1-ubyte").unlink()

    with pytest.raises(DataError, match="t10k-labels-idx1-ubyte: expected a readable file, found No such file"):
        await memory.load(files)


async def test_wrong_checksum_names_file_expected_found_and_remedy(mnist_folder: Path) -> None:
    labels = mnist_folder / "train-labels-idx1-ubyte"
    split = SplitFiles(images=mnist_folder / "train-images-idx3-ubyte.gz", labels=labels, labels_sha256="ab" * 32)
    files = DatasetFiles(name="mnist", folder=mnist_folder, is_small=False, splits={"train": split}, remedy="delete it")

    with pytest.raises(
        DataError, match=f"{labels}: expected content with SHA-256 (ab){{32}}, found [0-9a-f]{{64}}; delete it"
    ):
        await memory.load(files)


async def test_loading_leaves_the_event_loop_free(mnist_folder: Path) -> None:
    task = asyncio.create_task(load(mnist_folder))
    turns = 0
    while not task.done():
        await asyncio.sleep(0)
        turns += 1

    assert turns > 10
