"""
Packed data sets: the samples as records of one size in a few large files, which need not fit into memory.

A packed data set is a folder, or a prefix in object storage, with ``index.json`` and the shards it names. A shard
is nothing but records one after another; a record is the pixels of an image, its label, and four bytes of checksum:

    numpy.memmap("train-00000-….records", [("image", "u1", (28, 28)), ("label", "<u1"), ("crc32c", "<u4")])

The checksum is the CRC-32C of pixels and label, exclusive-or'ed with the sample's index in its split (modulo
2**32), so that a record in the wrong place is found as surely as one with a flipped bit. Each record is checked
each time it is read: that costs a quarter of a microsecond for one of 789 bytes, and no more of the disk than the
record itself.

The index gives for each split shape, counts, fingerprint and shards, and for each shard its SHA-256 and that of
each of its blocks. A block is a fixed number of records, the unit that is fetched from object storage and cached;
block j of a shard begins at byte ``j * block_samples * record_bytes``. All shards of a split but its last hold the
same number of samples, and each begins with a block, so that a sample is found by arithmetic. The index ends with
the SHA-256 of itself: of the rest of its content as compact JSON with sorted keys.

Why not a format that exists: tar (WebDataset) has to be read from its start; MDS, ArrayRecord and TFRecord put
samples of any size behind tables of offsets, and check whole files or nothing; Parquet, HDF5 and Zarr check pages
or chunks, so that one sample of a random order costs a whole chunk, and bring 10 to 100 MB of library.
"""

import asyncio
import hashlib
import json
import math
import os
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Executor
from copy import copy
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from threading import Lock
from typing import Any, Protocol, TypeVar

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from streamer.errors import DataError, DataLossError
from streamer.slicing import Slice
from streamer.sources.readahead import Allowance
from streamer.sources.split import Samples, label_type
from streamer.sources.tally import Tally

INDEX_NAME = "index.json"

Records = NDArray[np.uint8]
"""Shape (N, record_bytes)."""

_FORMAT = "sluice packed data set"
_VERSION = 1
_CRC_BYTES = 4
# Each holds a descriptor; many systems allow a process 1,024 of them.
_MAX_OPEN_SHARDS = 256

Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True, slots=True)
class Shard:
    """One file of records."""

    file: str
    """Name beside the index."""
    num_samples: int
    sha256: str
    blocks: tuple[str, ...]
    """SHA-256 of each block."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Block:
    """Where a block lies: bytes ``first_byte`` to ``first_byte + size`` of the shard ``file``."""

    file: str
    first_byte: int
    size: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class PackedSplit:
    """What the index says about one split."""

    name: str
    num_samples: int
    image_shape: tuple[int, ...]
    num_classes: int
    fingerprint: bytes
    block_samples: int
    """Records in each block but the last of a shard."""
    shards: tuple[Shard, ...]

    @cached_property
    def image_bytes(self) -> int:
        """Bytes of one image."""
        return math.prod(self.image_shape)

    @cached_property
    def label_bytes(self) -> int:
        """1, 2 or 4."""
        return label_type(self.num_classes).itemsize

    @cached_property
    def sample_bytes(self) -> int:
        """Bytes of one image and its label."""
        return self.image_bytes + self.label_bytes

    @cached_property
    def record_bytes(self) -> int:
        """Bytes of a sample with its checksum."""
        return self.sample_bytes + _CRC_BYTES

    @cached_property
    def block_bytes(self) -> int:
        """Bytes of every block but the last of a shard."""
        return self.block_samples * self.record_bytes

    @cached_property
    def shard_samples(self) -> int:
        """Samples of every shard but the last."""
        return self.shards[0].num_samples

    @cached_property
    def shard_blocks(self) -> int:
        """Blocks of every shard but the last."""
        return len(self.shards[0].blocks)

    def block(self, number: int) -> Block:
        """Return where a block lies; they are numbered through all shards."""
        shard_number, within = divmod(number, self.shard_blocks)
        shard = self.shards[shard_number]
        first_byte = within * self.block_bytes
        size = min(self.block_bytes, shard.num_samples * self.record_bytes - first_byte)
        return Block(file=shard.file, first_byte=first_byte, size=size, sha256=shard.blocks[within])

    def first_index(self, number: int) -> int:
        """Return the sample that a block begins with."""
        shard_number, within = divmod(number, self.shard_blocks)
        return shard_number * self.shard_samples + within * self.block_samples

    def place_of(self, index: int) -> tuple[Shard, int]:
        """Return the shard of a sample and the first byte of its record there."""
        shard_number, row = divmod(index, self.shard_samples)
        return self.shards[shard_number], row * self.record_bytes

    def damage(self, where: str, index: int) -> DataLossError:
        """Make the error about the record of a sample; ``where`` is the folder or URL of the index."""
        shard, first_byte = self.place_of(index)
        return DataLossError(
            f"{where.rstrip('/')}/{shard.file}",
            first_byte,
            first_byte + self.record_bytes - 1,
            expected=f"sample {index} of {self.name} with its checksum",
            found="other bytes",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class PackedIndex:
    """What ``index.json`` holds."""

    name: str
    class_names: tuple[str, ...]
    splits: Mapping[str, PackedSplit]


def format_index(index: PackedIndex) -> bytes:
    """Write the content of ``index.json``."""
    content: dict[str, Any] = {
        "format": _FORMAT,
        "version": _VERSION,
        "name": index.name,
        "class_names": list(index.class_names),
        "splits": {name: _describe(split) for name, split in index.splits.items()},
    }
    return json.dumps({**content, "sha256": _digest(content)}, indent=1).encode() + b"\n"


def parse_index(content: bytes, *, file: str) -> PackedIndex:
    """
    Read ``index.json``.

    Args:
        content: The whole file.
        file: Its path or URL, for errors.

    Raises:
        DataError: It is damaged, or something else, or of a later version.
    """
    try:
        table = json.loads(content)
        claimed, found = table.pop("sha256"), _digest(table)
        is_ours = table["format"] == _FORMAT
    except (ValueError, LookupError, AttributeError, TypeError) as error:
        raise DataError(file, expected="the index of a packed data set", found=f"something else ({error})") from error
    if claimed != found:
        raise DataError(file, expected=f"content with SHA-256 {claimed}", found=found)
    if not is_ours or table["version"] != _VERSION:
        found = f"{table['format']!r}, version {table.get('version')}"
        raise DataError(file, expected=f"{_FORMAT!r}, version {_VERSION}", found=found)
    # From here on it is what was written: its own checksum says so.
    splits = {name: _parse_split(name, split) for name, split in table["splits"].items()}
    return PackedIndex(name=table["name"], class_names=tuple(table["class_names"]), splits=splits)


def _describe(split: PackedSplit) -> dict[str, Any]:
    return {
        "num_samples": split.num_samples,
        "image_shape": list(split.image_shape),
        "image_type": "uint8",
        "label_type": f"uint{8 * split.label_bytes}, little-endian",
        "num_classes": split.num_classes,
        "fingerprint": split.fingerprint.hex(),
        "record_bytes": split.record_bytes,
        "block_samples": split.block_samples,
        "shards": [
            {
                "file": shard.file,
                "num_samples": shard.num_samples,
                "bytes": shard.num_samples * split.record_bytes,
                "sha256": shard.sha256,
                "blocks_sha256": list(shard.blocks),
            }
            for shard in split.shards
        ],
    }


def _parse_split(name: str, table: dict[str, Any]) -> PackedSplit:
    shards = tuple(
        Shard(
            file=shard["file"],
            num_samples=shard["num_samples"],
            sha256=shard["sha256"],
            blocks=tuple(shard["blocks_sha256"]),
        )
        for shard in table["shards"]
    )
    return PackedSplit(
        name=name,
        num_samples=table["num_samples"],
        image_shape=tuple(table["image_shape"]),
        num_classes=table["num_classes"],
        fingerprint=bytes.fromhex(table["fingerprint"]),
        block_samples=table["block_samples"],
        shards=shards,
    )


def _digest(table: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(table, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def make_records(split: PackedSplit, images: NDArray[np.uint8], labels: NDArray[Any], *, first_index: int) -> Records:
    """Write the samples ``first_index`` and following as records."""
    records = np.empty((len(labels), split.record_bytes), np.uint8)
    records[:, : split.image_bytes] = images.reshape(len(labels), -1)
    typed = np.ascontiguousarray(labels, label_type(split.num_classes))
    records[:, split.image_bytes : split.sample_bytes] = typed.view(np.uint8).reshape(len(labels), -1)
    indices = np.arange(first_index, first_index + len(labels))
    crcs = _checksums(split, records) ^ indices.astype(np.uint32)
    records[:, split.sample_bytes :] = crcs.astype("<u4").view(np.uint8).reshape(-1, _CRC_BYTES)
    return records


def damaged(split: PackedSplit, records: Records, indices: NDArray[np.int64]) -> NDArray[np.intp]:
    """
    Return which records are not the samples of these indices.

    Args:
        split: Gives the sizes.
        records: C-contiguous, as read.
        indices: Shape (N,): what each record should be.
    """
    stored = np.ascontiguousarray(records[:, split.sample_bytes :]).view("<u4")[:, 0]
    return np.flatnonzero(stored ^ indices.astype(np.uint32) ^ _checksums(split, records))


def samples_of(split: PackedSplit, records: Records) -> Samples:
    """Take records apart into images and labels."""
    images = np.ascontiguousarray(records[:, : split.image_bytes]).reshape(-1, *split.image_shape)
    labels = np.ascontiguousarray(records[:, split.image_bytes : split.sample_bytes])
    return images, labels.view(label_type(split.num_classes))[:, 0]


def _checksums(split: PackedSplit, records: Records) -> NDArray[np.uint32]:
    checksum, size, step = google_crc32c.value, split.sample_bytes, split.record_bytes
    # The C code behind it takes nothing but bytes.
    content = records.tobytes()
    crcs = [checksum(content[first : first + size]) for first in range(0, len(content), step)]
    return np.array(crcs, np.uint32)


class RecordSource(Protocol):
    """Where the records of a split lie."""

    async def read(self, indices: NDArray[np.int64], *, ahead_bytes: int = 0) -> Samples:
        """
        Do as :meth:`streamer.sources.split.Split.read` does.

        Args:
            indices: As there.
            ahead_bytes: What the same reader wants before these samples.
        """


class ShardedSplit:
    """
    A packed split that stays where it is; every read checks what it brings.

    Args:
        split: From the index.
        records: Where its records lie.
        allowance: For reads that are begun before they are wanted; None where that gains nothing.
    """

    def __init__(self, split: PackedSplit, records: RecordSource, allowance: Allowance | None = None) -> None:
        self.name = split.name
        self.num_samples = split.num_samples
        self.image_shape = split.image_shape
        self.num_classes = split.num_classes
        self.label_bytes = split.label_bytes
        self.fingerprint = split.fingerprint
        self.sample_bytes = split.sample_bytes
        self.stored_bytes = split.num_samples * split.record_bytes
        self.read = records.read
        self.allowance = allowance

    def sliced(self, part: Slice) -> "ShardedSplit":
        """Return a part of it that reads the same records."""

        async def read(indices: NDArray[np.int64], *, ahead_bytes: int = 0) -> Samples:
            return await self.read(part.base_indices(indices), ahead_bytes=ahead_bytes)

        sliced = copy(self)
        sliced.num_samples, sliced.fingerprint, sliced.read = part.num_samples, part.fingerprint, read
        return sliced


class FolderRecords:
    """
    The shards of one split in a local folder, mapped into memory as they are needed.

    Holding the records mapped rather than reading them by the call makes a batch one operation for the
    interpreter, however many places it comes from. A file that shrinks while it is read ends the process (SIGBUS),
    as does a disk that fails: replace a packed folder as a whole, do not write into it.

    Args:
        folder: Holds the shards.
        split: From the index there.
        threads: Does the reading.
        tally: Told about damage.
    """

    def __init__(self, folder: Path, split: PackedSplit, *, threads: Executor, tally: Tally) -> None:
        self._folder = folder
        self._split = split
        self._threads = threads
        self._tally = tally
        self._lock = Lock()
        self._mapped: OrderedDict[int, Records] = OrderedDict()

    async def read(self, indices: NDArray[np.int64], *, ahead_bytes: int = 0) -> Samples:
        """Read and check samples, in a thread; what is read ahead needs no turn."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, self._read, indices)

    def check_sizes(self) -> None:
        """
        Look at every shard once, without reading it; blocks.

        Raises:
            DataError: Names one that is missing or has another size.
        """
        for shard in self._split.shards:
            self._check_size(shard)

    def _read(self, indices: NDArray[np.int64]) -> Samples:
        split = self._split
        records = np.empty((len(indices), split.record_bytes), np.uint8)
        shard_of, row_of = np.divmod(indices, split.shard_samples)
        for shard_number, chosen in groups(shard_of):
            records[chosen] = np.take(self._shard(shard_number), row_of[chosen], axis=0)
        wrong = damaged(split, records, indices)
        if len(wrong):
            self._tally.add(checksum_failures=len(wrong))
            raise split.damage(str(self._folder), int(indices[wrong[0]]))
        return samples_of(split, records)

    def _shard(self, number: int) -> Records:
        shard = self._split.shards[number]
        # Each time: reading past the end of a mapped file that was cut short would end the process.
        path = self._check_size(shard)
        with self._lock:
            if number not in self._mapped:
                try:
                    self._mapped[number] = np.memmap(path, np.uint8, "r").reshape(-1, self._split.record_bytes)
                except (OSError, ValueError) as error:
                    raise DataError(path, expected="a readable file", found=str(error)) from error
            self._mapped.move_to_end(number)
            if len(self._mapped) > _MAX_OPEN_SHARDS:
                # Unmapped when the last thread that reads from it lets go.
                self._mapped.popitem(last=False)
            return self._mapped[number]

    def _check_size(self, shard: Shard) -> Path:
        path, size = self._folder / shard.file, shard.num_samples * self._split.record_bytes
        try:
            found = os.stat(path).st_size
        except OSError as error:
            raise DataError(path, expected="a readable file", found=error.strerror or str(error)) from error
        if found != size:
            raise DataError(path, expected=f"{size} bytes", found=str(found))
        return path


def groups(keys: NDArray[np.int64]) -> Iterator[tuple[int, NDArray[np.intp]]]:
    """Yield each different key with the positions where it stands, in the order of first appearance."""
    order = np.argsort(keys, kind="stable")
    starts = np.flatnonzero(np.diff(keys[order], prepend=keys[order[:1]] - 1)) if len(keys) else order
    pieces = np.split(order, starts[1:])
    # Sorting was stable, so a piece begins with the key's first position.
    for piece in sorted(pieces, key=lambda piece: int(piece[0])) if len(keys) else ():
        yield int(keys[piece[0]]), piece


async def in_thread(threads: Executor, work: Callable[[], Result]) -> Result:
    """
    Run ``work`` in a thread and wait for its end even when cancelled: it may hold what others wait for.

    The error that ended it is raised; after a cancellation, CancelledError.
    """
    future = asyncio.get_running_loop().run_in_executor(threads, work)
    try:
        return await asyncio.shield(future)
    except asyncio.CancelledError:
        if not future.cancelled():
            await asyncio.wait([future])
            future.exception()
        raise
