"""The checksum of a batch, the same on both ends of the wire."""

import struct

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from streamer.plan import Plan

REQUEST_CHECKSUM = "sluice-request-crc32c"
"""Metadata in which a reader may send :func:`request_checksum` of its request for batches."""

_HEADER = struct.Struct("<7Q")


def batch_checksum(
    plan: Plan,
    *,
    position: int,
    next_position: int,
    indices: NDArray[np.int64] | NDArray[np.uint64],
    images: NDArray[np.uint8] | bytes,
    labels: NDArray[np.uint8] | bytes,
) -> int:
    """
    Return the CRC-32C of a batch and of what was asked for, as sample_service.proto defines ``Batch.crc32c``.

    Args:
        plan: Gives seed, epoch, world size and rank.
        position: Of the global batch.
        next_position: Of the one after it.
        indices: Shape (N,), little-endian.
        images: The bytes of N images, C-contiguous.
        labels: The bytes of N labels, C-contiguous, little-endian.
    """
    header = _HEADER.pack(plan.seed or 0, plan.epoch, plan.world_size, plan.rank, position, next_position, len(indices))
    crc = google_crc32c.value(header + indices.tobytes())
    crc = google_crc32c.extend(crc, images)
    return int(google_crc32c.extend(crc, labels))


def request_checksum(request: bytes) -> str:
    """
    Return the CRC-32C of a request in eight hexadecimal digits.

    ``Batch.crc32c`` covers of a request which samples it asks for, and not what becomes of them: the transform.

    Args:
        request: StreamBatchesRequest in wire format, fields in the order of their numbers.
    """
    return f"{google_crc32c.value(request):08x}"
