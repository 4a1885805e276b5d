"""What every source of samples looks like to the rest of the streamer, and the one that lies in memory."""

import hashlib
import struct
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from streamer.slicing import Slice

Samples = tuple[NDArray[np.uint8], NDArray[Any]]
"""Images of shape (N, ...), C-contiguous, and labels of shape (N,), unsigned little-endian; both the reader's own."""

_FINGERPRINT_FORMAT = b"sluice split 1"

# Of a slice that has a table of where its samples lie, 4 MiB: looking a batch up takes 1 us instead of 50.
_MAX_ROWS = 1 << 20


class Split(Protocol):
    """One split of a data set, wherever its samples lie; any number of readers may share it."""

    @property
    def name(self) -> str:
        """``train`` or ``test``."""

    @property
    def num_samples(self) -> int:
        """At least 1."""

    @property
    def image_shape(self) -> tuple[int, ...]:
        """Height, width, and 3 where there is colour."""

    @property
    def num_classes(self) -> int:
        """Every label is less."""

    @property
    def label_bytes(self) -> int:
        """1, 2 or 4."""

    @property
    def fingerprint(self) -> bytes:
        """As :class:`Fingerprint` makes it: equal wherever the same samples lie in the same order."""

    @property
    def sample_bytes(self) -> int:
        """Bytes of one image and its label."""

    async def read(self, indices: NDArray[np.int64]) -> Samples:
        """
        Return samples in the order of their indices, each checked since it last left a disk or a network.

        Safe to cancel: what was begun for this reader alone is stopped and leaves nothing behind.

        Args:
            indices: Shape (N,), each in ``range(num_samples)``; the same one may come twice.

        Raises:
            DataLossError: Bytes are not what was written, and cannot be had again.
            DataError: A file is missing or has another size.
            StorageError: The object storage refused, or did not answer in time.
        """

    def sliced(self, part: Slice) -> "Split":
        """Return a part of it as a split of its own, whose samples stay where they are; blocks up to 50 ms."""


async def _nothing() -> None: ...


@dataclass(frozen=True, eq=False, slots=True)
class Dataset:
    """A data set ready to be read."""

    name: str
    class_names: tuple[str, ...]
    """Empty when the classes are plain numbers."""
    splits: Mapping[str, Split]
    close: Callable[[], Awaitable[None]] = field(default=_nothing, repr=False)
    """Give back threads, files and connections; nobody may read after."""


@dataclass(frozen=True, eq=False, slots=True)
class MemorySplit:
    """
    A split in memory; its arrays become read-only.

    Args:
        name: ``train`` or ``test``.
        images: uint8, shape (N, ...), C-contiguous.
        labels: Shape (N,), of the type that :func:`label_type` gives, each in ``range(num_classes)``.
        num_classes: One more than the largest label allowed.
        fingerprint: Where it is known already; else it is taken, which reads every sample.
        part: Which of the samples are in it; None: all of them.
    """

    name: str
    images: NDArray[np.uint8]
    labels: NDArray[Any]
    num_classes: int
    fingerprint: bytes = b""
    part: Slice | None = None
    _rows: NDArray[np.signedinteger[Any]] | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        self.images.flags.writeable = False
        self.labels.flags.writeable = False
        if not self.fingerprint:
            fingerprint = Fingerprint(self.images.shape)
            fingerprint.add(self.images, self.labels)
            object.__setattr__(self, "fingerprint", fingerprint.digest())
        if self.part is not None and self.part.num_samples <= _MAX_ROWS:
            object.__setattr__(self, "_rows", self.part.table())

    @property
    def num_samples(self) -> int:
        """At least 1."""
        return len(self.labels) if self.part is None else self.part.num_samples

    @property
    def image_shape(self) -> tuple[int, ...]:
        """Height, width, and 3 where there is colour."""
        return self.images.shape[1:]

    @property
    def label_bytes(self) -> int:
        """1, 2 or 4."""
        return self.labels.itemsize

    @property
    def sample_bytes(self) -> int:
        """Bytes of one image and its label."""
        return int(self.images[0].nbytes + self.labels.itemsize)

    async def read(self, indices: NDArray[np.int64]) -> Samples:
        """Return samples at once, without giving way to anyone: a batch takes microseconds."""
        rows = self._rows_of(indices)
        return np.take(self.images, rows, axis=0), np.take(self.labels, rows)

    def gather(self, indices: NDArray[np.int64], gathered: NDArray[np.uint8]) -> Samples:
        """
        Return the same, with the images in the first elements of ``gathered``.

        Args:
            indices: Shape (N,), each in ``range(num_samples)``; this is not checked.
            gathered: Shape (M, ...) with M >= N, C-contiguous.
        """
        images, rows = gathered[: len(indices)], self._rows_of(indices)
        # Clipping is what makes NumPy write in place: its check of the indices has it write elsewhere first.
        self.images.take(rows, axis=0, out=images, mode="clip")
        return images, self.labels.take(rows)

    def sliced(self, part: Slice) -> Self:
        """Return a part of it that has its arrays in common with it."""
        return replace(self, fingerprint=part.fingerprint, part=part)

    def _rows_of(self, indices: NDArray[np.int64]) -> NDArray[np.signedinteger[Any]]:
        """Return where samples lie in the arrays."""
        if self.part is None:
            return indices
        return self.part.base_indices(indices) if self._rows is None else self._rows.take(indices)


@dataclass(frozen=True, eq=False, slots=True)
class MemoryDataset(Dataset):
    """A data set that lies in memory as a whole."""

    splits: Mapping[str, MemorySplit]


class Fingerprint:
    """
    SHA-256 over shape, pixels and labels, taken in pieces.

    It does not depend on how the samples are stored: the same in IDX files, in a folder of images and in shards.

    Args:
        shape: Of all images together, (N, ...).
    """

    def __init__(self, shape: tuple[int, ...]) -> None:
        self._digest = hashlib.sha256(_FINGERPRINT_FORMAT)
        self._digest.update(struct.pack(f"<B{len(shape)}Q", len(shape), *shape))
        # The labels come after all pixels; they are small enough to wait in memory.
        self._labels = bytearray()

    def add(self, images: NDArray[np.uint8], labels: NDArray[Any]) -> None:
        """Take the next samples; images C-contiguous, labels little-endian."""
        self._digest.update(images.data)
        self._labels += labels.data.cast("B")

    def digest(self) -> bytes:
        """Return 32 bytes, once all samples are in."""
        digest = self._digest.copy()
        digest.update(self._labels)
        return digest.digest()


def label_type(num_classes: int) -> np.dtype[Any]:
    """Return the smallest of uint8, uint16 and uint32, little-endian, that holds every label."""
    return np.dtype("<u1" if num_classes <= 1 << 8 else "<u2" if num_classes <= 1 << 16 else "<u4")
