"""Data sets from wherever they lie, ready to be read: by name, by folder, from object storage."""

import asyncio
import enum
import re
from collections.abc import Awaitable, Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np

from streamer.errors import DataError, NoObjectError
from streamer.sources import datasets, idx, memory
from streamer.sources.cache import BLOCKS_FOLDER, BlockCache
from streamer.sources.declarations import DECLARATIONS, IDX_NAMES
from streamer.sources.objects import SCHEME, ObjectStore
from streamer.sources.packing import Readable
from streamer.sources.readahead import Allowance
from streamer.sources.remote import RemoteRecords
from streamer.sources.shards import (
    INDEX_NAME,
    FolderRecords,
    PackedIndex,
    RecordSource,
    ShardedSplit,
    in_thread,
    parse_index,
)
from streamer.sources.split import Dataset, MemorySplit, Split, label_type
from streamer.sources.tally import Tally

Report = Callable[[str], None]

# Blocking work of one data set at the same time: disks and checksums gain nothing from more.
_NUM_THREADS = 4
# Read at once on the way into memory.
_PIECE_BYTES = 16 * 1024**2
# As of streamer.sources.framed, which needs Pillow.
_FRAMED = re.compile(r"(.+):(stretch|center)")


@dataclass(frozen=True, kw_only=True, slots=True)
class Reading:
    """How data sets are read."""

    cache: Path
    """Root of Sluice's cache."""
    cache_bytes: int = 10 * 1024**3
    """Of blocks from object storage on the local disk, at most, at every moment."""
    memory_bytes: int = 1024**3
    """Data sets of up to this size are held in memory; larger ones stay where they are."""
    max_downloads: int = 64
    """At the same time, for each split."""
    read_ahead_bytes: int = 64 * 1024**2
    """Held by reads from object storage that are begun before they are wanted, for all streams of a data set."""
    deadline_seconds: float = 60.0
    """How long object storage may be out of reach before reading fails."""
    image_size: tuple[int, int] | None = None
    """Height and width to which folders of images are scaled; None: they have one size."""
    held_out: float = 0.1
    """Share of a folder of images that becomes ``test`` where it names none."""
    tally: Tally = field(default_factory=Tally)


@dataclass(frozen=True, eq=False, slots=True)
class Found:
    """A data set where it was found, nothing of it read that need not be."""

    name: str
    class_names: tuple[str, ...]
    splits: Mapping[str, Readable]
    where: str
    threads: ThreadPoolExecutor
    cache: BlockCache | None = None

    async def close(self) -> None:
        """Give back threads and files."""
        await asyncio.to_thread(self.threads.shutdown, cancel_futures=True)
        if self.cache is not None:
            self.cache.close()


async def open_dataset(name: str, place: str | None, reading: Reading, *, report: Report) -> Dataset:
    """
    Open a data set: one that fits goes into memory, a larger packed one is read where it lies.

    Args:
        name: What readers call it; one of :data:`streamer.sources.declarations.DECLARATIONS` where ``place`` is None.
        place: A folder of IDX files, of images in folders named by class, or packed; or one in object storage,
            ``s3://bucket/prefix``, packed or of IDX files; ``:stretch`` or ``:center`` behind it brings all images
            to what a network takes, see :mod:`streamer.sources.framed`. None: as
            :func:`streamer.sources.datasets.find` finds it.
        reading: Limits.
        report: Told in plain sentences what a person should know.

    Raises:
        StreamerError: It is not there, not usable, or too large for what it is.
    """
    found = await find(name, place, reading, report=report)
    try:
        splits = await _settle(found, reading)
    except BaseException:
        await found.close()
        raise
    if all(isinstance(split, MemorySplit) for split in splits.values()):
        await found.close()
        return Dataset(found.name, found.class_names, splits)
    if found.cache is not None and (advice := _advice(found, splits.values())):
        report(advice)
    return Dataset(found.name, found.class_names, splits, found.close)


async def find(name: str, place: str | None, reading: Reading, *, report: Report) -> Found:
    """Find a data set without reading it into memory where that can be helped; arguments as for open_dataset."""
    threads = ThreadPoolExecutor(_NUM_THREADS, thread_name_prefix=f"read-{name}")
    place, framing = (None, None) if place is None else parted(place)
    try:
        if place is None or not place.startswith(SCHEME):
            here = None if place is None else Path(place)
            found = await _find_here(name, here, framing, reading, threads, report)
        else:
            found = await _find_in_store(name, place, reading, threads, report)
        return found if framing is None else await _for_network(found, framing, reading, report)
    except BaseException:
        threads.shutdown(wait=False, cancel_futures=True)
        raise


def parted(place: str) -> tuple[str, str | None]:
    """Return where a place is, and the word behind it that says how its images become what a network takes."""
    match = _FRAMED.fullmatch(place)
    return (place, None) if match is None else (match[1], match[2])


async def _for_network(found: Found, framing: str, reading: Reading, report: Report) -> Found:
    from streamer.sources.framed import MANNERS, as_network_takes

    try:
        splits = await as_network_takes(
            found.splits,
            MANNERS[framing],
            held_out=reading.held_out,
            where=found.where,
            threads=found.threads,
            report=report,
        )
    except BaseException:
        if found.cache is not None:
            found.cache.close()
        raise
    return replace(found, splits=splits)


async def _find_here(
    name: str,
    folder: Path | None,
    framing: str | None,
    reading: Reading,
    threads: ThreadPoolExecutor,
    report: Report,
) -> Found:
    if folder is None:
        return await _find_declared(name, folder, reading, threads, report)
    place, kind = await in_thread(threads, partial(_kind_of, name, folder))
    if kind is _Kind.PACKED:
        return await _find_packed(name, place, reading, threads)
    if name in DECLARATIONS:
        # What a known data set lacks is named, where any other folder could be one of images.
        return await _find_declared(name, place, reading, threads, report)
    if kind is _Kind.IDX:
        return await _find_idx(name, str(place), partial(_read_here, place), threads)
    # Pillow is needed for images alone.
    from streamer.sources.folders import look
    from streamer.sources.framed import MANNERS

    images = await in_thread(
        threads,
        lambda: look(
            place,
            size=reading.image_size,
            manner=None if framing is None else MANNERS[framing],
            held_out=reading.held_out,
            threads=threads,
            report=report,
        ),
    )
    return Found(name, next(iter(images.values())).class_names, images, str(place), threads)


class _Kind(enum.Enum):
    PACKED = enum.auto()
    IDX = enum.auto()
    IMAGES = enum.auto()


def _kind_of(name: str, folder: Path) -> tuple[Path, _Kind]:
    if not folder.is_dir():
        raise DataError(folder, expected="a folder with a data set", found="no such folder")
    if name in DECLARATIONS and (folder / name).is_dir():
        folder = folder / name
    if (folder / INDEX_NAME).is_file():
        return folder, _Kind.PACKED
    names = [name for pair in IDX_NAMES.values() for name in (pair.images, pair.labels)]
    # One of them tells what the others should be.
    is_idx = any((folder / spelling).is_file() for name in names for spelling in _spellings(name))
    return folder, _Kind.IDX if is_idx else _Kind.IMAGES


async def _find_declared(
    name: str, folder: Path | None, reading: Reading, threads: ThreadPoolExecutor, report: Report
) -> Found:
    files = await datasets.find(name, data=folder, cache=reading.cache, report=report)
    known = await memory.load(files)
    return Found(name, known.class_names, known.splits, str(files.folder), threads)


async def _find_packed(name: str, folder: Path, reading: Reading, threads: ThreadPoolExecutor) -> Found:
    path = folder / INDEX_NAME
    index = await in_thread(threads, lambda: parse_index(_read_file(path), file=str(path)))
    records = {
        split.name: FolderRecords(folder, split, threads=threads, tally=reading.tally)
        for split in index.splits.values()
    }
    for each in records.values():
        # Now rather than in the middle of an epoch.
        await in_thread(threads, each.check_sizes)
    return Found(name, index.class_names, _sharded(index, records), str(folder), threads)


async def _find_in_store(name: str, place: str, reading: Reading, threads: ThreadPoolExecutor, report: Report) -> Found:
    store = ObjectStore(place, deadline_seconds=reading.deadline_seconds, tally=reading.tally, report=report)
    try:
        content = await store.read(INDEX_NAME)
    except NoObjectError:
        return await _find_idx(name, store.url, partial(_read_object, store), threads)
    index = await in_thread(threads, partial(parse_index, content, file=store.url_of(INDEX_NAME)))
    make_cache = partial(BlockCache, reading.cache / BLOCKS_FOLDER, max_bytes=reading.cache_bytes, tally=reading.tally)
    cache = await in_thread(threads, make_cache)
    keys = frozenset(key for split in index.splits.values() for shard in split.shards for key in shard.blocks)
    records = {
        split.name: RemoteRecords(
            store,
            split,
            cache,
            threads=threads,
            tally=reading.tally,
            max_downloads=reading.max_downloads,
            spared=keys,
        )
        for split in index.splits.values()
    }
    splits = _sharded(index, records, Allowance(reading.read_ahead_bytes))
    return Found(name, index.class_names, splits, store.url, threads, cache)


def _sharded(
    index: PackedIndex, records: Mapping[str, RecordSource], allowance: Allowance | None = None
) -> Mapping[str, ShardedSplit]:
    return {name: ShardedSplit(split, records[name], allowance) for name, split in index.splits.items()}


async def _find_idx(
    name: str, where: str, read: Callable[[str], Awaitable[tuple[str, bytes] | None]], threads: ThreadPoolExecutor
) -> Found:
    """Read IDX files of which nothing is known but their names."""
    pairs = {}
    for split, names in IDX_NAMES.items():
        images, labels = await _read_any(names.images, read), await _read_any(names.labels, read)
        if images is not None and labels is not None:
            pairs[split] = (images, labels)
        elif split == "train":
            raise DataError(
                where,
                expected=f"a packed data set ({INDEX_NAME}) or IDX files ({names.images} and {names.labels})",
                found="neither",
            )
    known = DECLARATIONS.get(name)
    splits = await in_thread(threads, lambda: _parse_idx(pairs, known.num_classes if known else None))
    return Found(name, known.class_names if known else (), splits, where, threads)


_IdxPair = tuple[tuple[str, bytes], tuple[str, bytes]]


def _parse_idx(pairs: Mapping[str, _IdxPair], num_classes: int | None) -> Mapping[str, MemorySplit]:
    parsed = {}
    for split, ((images_file, images_raw), (labels_file, labels_raw)) in pairs.items():
        images = idx.parse_images(idx.unpack(images_raw, file=images_file), file=images_file)
        labels = idx.parse_labels(idx.unpack(labels_raw, file=labels_file), file=labels_file)
        parsed[split] = (images_file, images, labels_file, labels)
    train = parsed["train"][1]
    if num_classes is None:
        num_classes = 1 + max((int(labels.max()) for *_, labels in parsed.values() if len(labels)), default=0)
    for images_file, images, labels_file, labels in parsed.values():
        idx.check_pair(
            images,
            labels,
            images_file=images_file,
            labels_file=labels_file,
            image_shape=(train.shape[1], train.shape[2]),
            num_classes=num_classes,
        )
    return {split: MemorySplit(split, images, labels, num_classes) for split, (_, images, _, labels) in parsed.items()}


async def _read_any(name: str, read: Callable[[str], Awaitable[tuple[str, bytes] | None]]) -> tuple[str, bytes] | None:
    for spelling in _spellings(name):
        found = await read(spelling)
        if found is not None:
            return found
    return None


async def _read_here(folder: Path, name: str) -> tuple[str, bytes] | None:
    path = folder / name
    return await asyncio.to_thread(lambda: (str(path), _read_file(path)) if path.is_file() else None)


async def _read_object(store: ObjectStore, name: str) -> tuple[str, bytes] | None:
    try:
        return store.url_of(name), await store.read(name)
    except NoObjectError:
        return None


def _read_file(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(path, expected="a readable file", found=error.strerror or str(error)) from error


def _spellings(name: str) -> tuple[str, ...]:
    # Some copies are spelt train-images.idx3-ubyte.
    stems = (name, name.replace("-idx", ".idx"))
    return tuple(f"{stem}{suffix}" for stem in stems for suffix in (".gz", ""))


async def _settle(found: Found, reading: Reading) -> Mapping[str, Split]:
    """Bring into memory what fits there."""
    total = sum(split.num_samples * _sample_bytes(split) for split in found.splits.values())
    splits: dict[str, Split] = {}
    for name, split in found.splits.items():
        if isinstance(split, MemorySplit):
            splits[name] = split
        elif total <= reading.memory_bytes:
            splits[name] = await _into_memory(name, split, found)
        elif isinstance(split, ShardedSplit):
            splits[name] = split
        else:
            raise DataError(
                found.where,
                expected=f"images that fit into {reading.memory_bytes:,} bytes of memory when decoded",
                found=f"{total:,} bytes",
                remedy=f"pack them: `sluice data pack {found.where} FOLDER`",
            )
    return splits


def _advice(found: Found, splits: Iterable[Split]) -> str:
    """Tell what it costs that a data set in object storage is larger than the cache; empty where it is not."""
    assert found.cache is not None
    limit = found.cache.max_bytes
    stored = sum(split.stored_bytes for split in splits if isinstance(split, ShardedSplit))
    if stored <= limit:
        return ""
    return (
        f"{found.where}: the cache of {limit / 1e6:,.0f} MB has room for {limit / stored:.0%} of "
        f"{stored / 1e6:,.0f} MB; each epoch fetches the rest again, in a request for nearly every sample of it: "
        f"SLUICE_STREAMER_CACHE_BYTES={_round_up(stored)} keeps all of it"
    )


def _round_up(size: int) -> int:
    """Return the next multiple of 100 MB, with which the cache's own books fit in too."""
    step = 100 * 10**6
    return (size // step + 1) * step


def _sample_bytes(split: Readable) -> int:
    return int(np.prod(split.image_shape)) + label_type(split.num_classes).itemsize


async def _into_memory(name: str, split: Readable, found: Found) -> MemorySplit:
    images = np.empty((split.num_samples, *split.image_shape), np.uint8)
    labels = np.empty(split.num_samples, label_type(split.num_classes))
    step = max(1, _PIECE_BYTES // _sample_bytes(split))
    for first in range(0, split.num_samples, step):
        last = min(split.num_samples, first + step)
        images[first:last], labels[first:last] = await split.read(np.arange(first, last))
    loaded = await in_thread(found.threads, lambda: MemorySplit(name, images, labels, split.num_classes))
    if isinstance(split, ShardedSplit) and split.fingerprint != loaded.fingerprint:
        expected = f"samples of {name} with fingerprint {split.fingerprint.hex()}"
        raise DataError(found.where, expected=expected, found=loaded.fingerprint.hex())
    return loaded
