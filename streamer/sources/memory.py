"""The samples of a data set in memory, read once from its files."""

import asyncio
from pathlib import Path

import aiofiles

from streamer.errors import DataError
from streamer.sources import idx
from streamer.sources.declarations import DatasetFiles, Declaration, SplitFiles, content_of, declaration_of
from streamer.sources.split import MemoryDataset, MemorySplit


async def load(files: DatasetFiles) -> MemoryDataset:
    """
    Read every split of a data set into memory.

    Raises:
        DataError: A file is missing, damaged, not IDX, or disagrees with its partner or its checksum.
    """
    known = declaration_of(files.name)
    splits = {}
    for name, split_files in files.splits.items():
        splits[name] = await _load_split(name, split_files, known, files.remedy)
    return MemoryDataset(files.name, known.class_names, splits)


async def _load_split(name: str, files: SplitFiles, known: Declaration, remedy: str) -> MemorySplit:
    images, labels = await _read(files.images), await _read(files.labels)
    # Unpacking and hashing 47 MB takes most of a second: not on the event loop.
    return await asyncio.to_thread(_parse, name, files, images, labels, known, remedy)


async def _read(path: Path) -> bytes:
    try:
        async with aiofiles.open(path, "rb") as file:
            return await file.read()
    except OSError as error:
        raise DataError(path, expected="a readable file", found=error.strerror or str(error)) from error


def _parse(
    name: str, files: SplitFiles, images_raw: bytes, labels_raw: bytes, known: Declaration, remedy: str
) -> MemorySplit:
    images_content = content_of(images_raw, files.images_sha256, files.images, remedy=remedy)
    labels_content = content_of(labels_raw, files.labels_sha256, files.labels, remedy=remedy)
    images = idx.parse_images(images_content, file=str(files.images))
    labels = idx.parse_labels(labels_content, file=str(files.labels))
    idx.check_pair(
        images,
        labels,
        images_file=str(files.images),
        labels_file=str(files.labels),
        image_shape=known.image_shape,
        num_classes=known.num_classes,
    )
    return MemorySplit(name, images, labels, known.num_classes)
