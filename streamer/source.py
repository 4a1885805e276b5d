"""The samples of a data set in memory, read once from its files."""

import asyncio
import hashlib
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import aiofiles
import numpy as np
from numpy.typing import NDArray

from streamer import idx
from streamer.declarations import DatasetFiles, Declaration, SplitFiles, content_of, declaration_of
from streamer.errors import DataError

_FINGERPRINT_FORMAT = b"sluice split 1"


@dataclass(frozen=True, eq=False, slots=True)
class Split:
    """One split in memory; safe to share, as its arrays are read-only."""

    name: str
    images: NDArray[np.uint8]
    """Shape (N, height, width), C-contiguous, ink bright on dark."""
    labels: NDArray[np.uint8]
    """Shape (N,), each in ``range(num_classes)``."""
    num_classes: int
    fingerprint: bytes
    """SHA-256 over shape, pixels and labels: equal wherever the same samples lie in the same order."""

    @property
    def num_samples(self) -> int:
        """At least 1."""
        return len(self.labels)

    @property
    def image_shape(self) -> tuple[int, ...]:
        """Height, width."""
        return self.images.shape[1:]

    @property
    def sample_bytes(self) -> int:
        """Bytes of one image and its label."""
        return int(self.images[0].nbytes + self.labels.itemsize)


@dataclass(frozen=True, eq=False, slots=True)
class Dataset:
    """A data set in memory."""

    name: str
    class_names: tuple[str, ...]
    splits: Mapping[str, Split]


async def load(files: DatasetFiles) -> Dataset:
    """
    Read every split of a data set into memory.

    Raises:
        DataError: A file is missing, damaged, not IDX, or disagrees with its partner or its checksum.
    """
    known = declaration_of(files.name)
    splits = {}
    for name, split_files in files.splits.items():
        splits[name] = await _load_split(name, split_files, known, files.remedy)
    return Dataset(files.name, known.class_names, splits)


def make_split(name: str, images: NDArray[np.uint8], labels: NDArray[np.uint8], *, num_classes: int) -> Split:
    """
    Make a split of arrays in memory; they are made read-only.

    Args:
        name: ``train`` or ``test``.
        images: uint8, shape (N, height, width), C-contiguous.
        labels: uint8, shape (N,).
        num_classes: One more than the largest label allowed.
    """
    images.flags.writeable = False
    labels.flags.writeable = False
    digest = hashlib.sha256(_FINGERPRINT_FORMAT)
    digest.update(struct.pack(f"<B{images.ndim}Q", images.ndim, *images.shape))
    digest.update(images.data)
    digest.update(labels.data)
    return Split(name, images, labels, num_classes, digest.digest())


async def _load_split(name: str, files: SplitFiles, known: Declaration, remedy: str) -> Split:
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
) -> Split:
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
    return make_split(name, images, labels, num_classes=known.num_classes)
