"""The checksum of a batch, the same on both ends of the wire."""

import struct

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from streamer.plan import Plan

_HEADER = struct.Struct("<7Q")


def batch_checksum(
    plan: Plan,
    *,
    position: int,
    next_position: int,
    indices: NDArray[np.uint64],
    images: NDArray[np.uint8] | bytes,
    labels: NDArray[np.uint8] | bytes,
) -> int:
    """
    Return the CRC-32C of a batch and of what was asked for, as sample_service.proto defines ``Batch.crc32c``.

    Args:
        plan: Gives seed, epoch, world size and rank.
        position: Of the global batch.
        next_position: Of the one after it.
        indices: Shape (N,).
        images: The bytes of N images, C-contiguous.
        labels: The bytes of N labels, C-contiguous, little-endian.
    """
    header = _HEADER.pack(plan.seed or 0, plan.epoch, plan.world_size, plan.rank, position, next_position, len(indices))
    crc = google_crc32c.value(header + indices.astype("<u8", copy=False).tobytes())
    crc = google_crc32c.extend(crc, images)
    return int(google_crc32c.extend(crc, labels))
