"""Writing packed data sets: see :mod:`streamer.sources.shards` for the format."""

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from concurrent.futures import Executor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from streamer.errors import DataError
from streamer.sources import atomic
from streamer.sources.objects import ObjectStore
from streamer.sources.shards import (
    INDEX_NAME,
    PackedIndex,
    PackedSplit,
    Records,
    Shard,
    format_index,
    in_thread,
    make_records,
)
from streamer.sources.split import Fingerprint, Samples

DEFAULT_SHARD_BYTES = 64 * 1024**2
DEFAULT_BLOCK_BYTES = 256 * 1024

# Samples are read and written in pieces of about this size.
_PIECE_BYTES = 8 * 1024**2


class Readable(Protocol):
    """What can be packed: a split, or what will become one."""

    @property
    def num_samples(self) -> int:
        """At least 1."""

    @property
    def image_shape(self) -> tuple[int, ...]:
        """Height, width, and 3 where there is colour."""

    @property
    def num_classes(self) -> int:
        """Every label is less."""

    async def read(self, indices: NDArray[np.int64]) -> Samples:
        """Return samples in the order of their indices."""


class Target(Protocol):
    """Where a packed data set goes."""

    @property
    def work(self) -> Path:
        """Folder for shards in the making."""

    async def add(self, name: str) -> None:
        """Take over the finished shard of this name from the work folder."""

    async def finish(self, index: bytes) -> None:
        """Let the data set appear: all shards are there."""


class FolderTarget:
    """
    A folder that appears whole or not at all.

    Args:
        folder: Does not exist yet, or is empty.

    Raises:
        DataError: It holds something, or nothing can be written there.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise DataError(folder, expected="a new or an empty folder to pack into", found="something in its place")
        try:
            folder.absolute().parent.mkdir(parents=True, exist_ok=True)
            # Beside its goal: a rename across file systems is not atomic.
            self.work = Path(tempfile.mkdtemp(dir=folder.absolute().parent, prefix=".new-"))
        except OSError as error:
            raise _unwritable(folder, error) from error

    async def add(self, name: str) -> None:
        """Do nothing: it lies where it should."""

    async def finish(self, index: bytes) -> None:
        """Give the folder its name."""
        atomic.write_file(self.work / INDEX_NAME, index)
        atomic.publish_folder(self.work, self._folder)


class StoreTarget:
    """A prefix in object storage; the index goes there last, and shards are never written over by others."""

    def __init__(self, store: ObjectStore) -> None:
        self._store = store
        self.work = Path(tempfile.mkdtemp(prefix="sluice-pack-"))

    async def add(self, name: str) -> None:
        """Upload a shard, and remove it here."""
        await self._store.write(name, self.work / name)
        (self.work / name).unlink()

    async def finish(self, index: bytes) -> None:
        """Upload the index."""
        await self._store.write(INDEX_NAME, index)


async def pack(
    name: str,
    class_names: tuple[str, ...],
    splits: Mapping[str, Readable],
    target: Target,
    *,
    threads: Executor,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    block_bytes: int = DEFAULT_BLOCK_BYTES,
    report: Callable[[str], None],
) -> PackedIndex:
    """
    Pack a data set; memory stays within some ten megabytes, or a few samples where they are larger.

    Cancelling, like an error, leaves nothing in a folder; in object storage, shards without an index.

    Args:
        name: Of the data set.
        class_names: Empty when the classes are plain numbers.
        splits: By name.
        target: Where to.
        threads: Does what blocks.
        shard_bytes: Size of a shard, at most, but at least one block.
        block_bytes: Size of a block, at most, but at least one record.
        report: Told about each finished shard.

    Raises:
        DataError: A sample cannot be read, a label is out of range, or the disk is full.
        StorageError: The object storage refuses.
    """
    try:
        packed = {}
        for split_name, split in splits.items():
            writer = _Writer(
                split_name, split, target, threads=threads, shard_bytes=shard_bytes, block_bytes=block_bytes
            )
            packed[split_name] = await writer.write(report)
        index = PackedIndex(name=name, class_names=class_names, splits=packed)
        await target.finish(format_index(index))
        return index
    except OSError as error:
        raise _unwritable(target.work, error) from error
    finally:
        shutil.rmtree(target.work, ignore_errors=True)


class _Writer:
    """Writes one split, shard by shard."""

    def __init__(
        self, name: str, split: Readable, target: Target, *, threads: Executor, shard_bytes: int, block_bytes: int
    ) -> None:
        self._split = split
        self._target = target
        self._threads = threads
        # Without shards, fingerprint and blocks it tells sizes only.
        sizes = PackedSplit(
            name=name,
            num_samples=split.num_samples,
            image_shape=split.image_shape,
            num_classes=split.num_classes,
            fingerprint=b"",
            block_samples=0,
            shards=(),
        )
        self._packed = replace(sizes, block_samples=max(1, block_bytes // sizes.record_bytes))
        self._shard_samples = self._whole_blocks(shard_bytes)
        self._piece_samples = self._whole_blocks(_PIECE_BYTES)
        self._fingerprint = Fingerprint((split.num_samples, *split.image_shape))

    async def write(self, report: Callable[[str], None]) -> PackedSplit:
        total = self._split.num_samples
        shards: list[Shard] = []
        for first in range(0, total, self._shard_samples):
            last = min(total, first + self._shard_samples)
            shards.append(await self._write_shard(f"{self._packed.name}-{len(shards):05}", first, last))
            await self._target.add(shards[-1].file)
            report(f"{self._packed.name}: {last:,} of {total:,} samples in {len(shards)} shards")
        fingerprint = self._fingerprint.digest()
        known = getattr(self._split, "fingerprint", fingerprint)
        if known != fingerprint:
            expected, found = f"samples with fingerprint {known.hex()}", f"{fingerprint.hex()}: they changed meanwhile"
            raise DataError(self._packed.name, expected=expected, found=found)
        return replace(self._packed, fingerprint=fingerprint, shards=tuple(shards))

    async def _write_shard(self, name: str, first: int, last: int) -> Shard:
        path, digest, blocks = self._target.work / name, hashlib.sha256(), []
        for start in range(first, last, self._piece_samples):
            images, labels = await self._split.read(np.arange(start, min(last, start + self._piece_samples)))
            records = await in_thread(self._threads, partial(self._records, images, labels, start))
            await in_thread(self._threads, partial(_append, path, records))
            blocks += await in_thread(self._threads, partial(self._digests, digest, records))
        # Named by its content too: packing anew beside an index that is in use cannot change what it points to.
        file = f"{name}-{digest.hexdigest()[:12]}.records"
        path.rename(path.with_name(file))
        return Shard(file=file, num_samples=last - first, sha256=digest.hexdigest(), blocks=tuple(blocks))

    def _records(self, images: NDArray[np.uint8], labels: NDArray[Any], start: int) -> Records:
        if labels.max() >= self._split.num_classes:
            at = int(np.argmax(labels >= self._split.num_classes))
            expected = f"labels from 0 to {self._split.num_classes - 1}"
            raise DataError(self._packed.name, expected=expected, found=f"{labels[at]} at index {start + at}")
        self._fingerprint.add(images, labels)
        return make_records(self._packed, images, labels, first_index=start)

    def _digests(self, shard: "hashlib._Hash", records: Records) -> list[str]:
        shard.update(records.data)
        step = self._packed.block_samples
        return [hashlib.sha256(records[row : row + step].data).hexdigest() for row in range(0, len(records), step)]

    def _whole_blocks(self, size: int) -> int:
        """Return how many samples of whole blocks fit into ``size`` bytes; of one block at least."""
        return max(1, size // self._packed.block_bytes) * self._packed.block_samples


def _append(path: Path, records: Records) -> None:
    with open(path, "ab") as file:
        file.write(records.data)
        file.flush()
        os.fsync(file.fileno())


def _unwritable(folder: Path, error: OSError) -> DataError:
    return DataError(folder, expected="a folder with room to write to", found=error.strerror or str(error))
