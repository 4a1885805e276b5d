"""
Splits in memory that several processes share.

Written once, sealed, and gone with the last process that has them, however that ends: a file without a name.
"""

import fcntl
import math
import mmap
import os
from dataclasses import asdict, dataclass
from typing import Any, Self

import numpy as np

from streamer.sources.split import MemorySplit, label_type

_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SEAL


@dataclass(frozen=True, kw_only=True, slots=True)
class SharedSplit:
    """Where a split lies: images, then labels. Another process needs this and the descriptor; Linux only."""

    name: str
    shape: tuple[int, ...]
    """Of all images together, (N, ...)."""
    num_classes: int
    fingerprint: bytes
    descriptor: int

    @classmethod
    def of(cls, split: MemorySplit) -> Self:
        """
        Copy a split to where others can have it; the descriptor is the caller's to close.

        Raises:
            OSError: There is no memory left.
        """
        descriptor = os.memfd_create(f"sluice-{split.name}", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            for array in (split.images, split.labels):
                _write(descriptor, array.data.cast("B"))
            fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, _SEALS)
        except BaseException:
            os.close(descriptor)
            raise
        return cls(
            name=split.name,
            shape=split.images.shape,
            num_classes=split.num_classes,
            fingerprint=split.fingerprint,
            descriptor=descriptor,
        )

    def open(self) -> MemorySplit:
        """Return the split in place: nothing is read or copied."""
        images_bytes, dtype = math.prod(self.shape), label_type(self.num_classes)
        size = images_bytes + self.shape[0] * dtype.itemsize
        # Private, as a sealed file can be mapped shared from Linux 6.7 on alone; nobody writes, so nothing is copied.
        flags = mmap.MAP_PRIVATE | mmap.MAP_POPULATE
        memory = mmap.mmap(self.descriptor, size, flags=flags, prot=mmap.PROT_READ)
        images = np.frombuffer(memory, np.uint8, images_bytes).reshape(self.shape)
        labels = np.frombuffer(memory, dtype, self.shape[0], images_bytes)
        return MemorySplit(self.name, images, labels, self.num_classes, self.fingerprint)

    def as_json(self) -> dict[str, Any]:
        """Return what :meth:`from_json` reads."""
        return asdict(self) | {"fingerprint": self.fingerprint.hex()}

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Self:
        """Return what :meth:`as_json` described, in a process that inherited the descriptor."""
        return cls(**fields | {"shape": tuple(fields["shape"]), "fingerprint": bytes.fromhex(fields["fingerprint"])})


def _write(descriptor: int, content: memoryview) -> None:
    # The kernel takes 2 GiB at once, at most.
    while content:
        content = content[os.write(descriptor, content) :]
