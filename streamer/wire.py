"""
``Batch`` in wire format without copying its pixels and without a Python object for each index.

Fields may stand in any order and a message may be joined from parts (last one wins, repeated fields add up:
https://protobuf.dev/programming-guides/encoding/). So pixels and indices are written first, before what protobuf writes
of all other fields, and where they stand first they are read in place. Indices are written as varints of four bytes
each, longer than most have to be and as valid: whole arrays are turned into them and back at once. What was written in
another way is left to protobuf.
"""

from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from google.protobuf.message import DecodeError
from numpy.typing import NDArray

from protos.streamer.v1 import sample_service_pb2 as pb

# Tags of one byte: field number, and that a length follows.
_IMAGES = pb.Batch.IMAGES_FIELD_NUMBER << 3 | 2
_INDICES = pb.Batch.INDICES_FIELD_NUMBER << 3 | 2

_MAX_VARINT_BYTES = 10

WIDTH = 4
"""Bytes of an index, as :func:`pack_indices` writes it."""

_MAX_WIDE = 1 << 7 * WIDTH
_WIDE = np.dtype("<u4")
# Of four bytes, as one little-endian number: all but the last say that another follows.
_MARKS, _MARKED = np.uint32(0x80808080), np.uint32(0x00808080)
# A product of floats is one call for all of them and exact below 2**53; the marks, worth the same in each, are taken
# off at the end.
_PLACES = np.array([1.0, 1 << 7, 1 << 14, 1 << 21])
_MARKS_WORTH = float(0x80 * (1 + (1 << 7) + (1 << 14)))

_NOTHING = np.empty(0, np.uint64)


class Message(NamedTuple):
    """A Batch that was read."""

    fields: pb.Batch
    """All but images and indices."""
    indices: NDArray[np.uint64]
    images: NDArray[np.uint8]
    """Their bytes, in the message or in a copy; read-only."""


def pack_indices(indices: NDArray[np.int64]) -> bytes | None:
    """Return each index as a varint of four bytes; None where one needs more."""
    if indices.size and indices.max() >= _MAX_WIDE:
        return None
    wide = indices.astype(_WIDE)
    marked = wide & 0x7F | (wide << 1) & 0x7F00 | (wide << 2) & 0x7F0000 | (wide << 3) & 0x7F000000 | _MARKED
    return marked.tobytes()


def encode(fields: pb.Batch, packed_indices: bytes | None, images: memoryview) -> bytes:
    """
    Return the message; the pixels are copied once.

    Args:
        fields: All but the images, and but the indices where those are packed.
        packed_indices: By :func:`pack_indices`.
        images: C-contiguous.
    """
    parts: list[Any] = []
    if images.nbytes:
        parts += (_head(_IMAGES, images.nbytes), images)
    if packed_indices:
        parts += (_head(_INDICES, len(packed_indices)), packed_indices)
    parts.append(fields.SerializeToString())
    return b"".join(parts)


def decode(data: bytes, expected: tuple[bytes, NDArray[np.int64]] | None = None) -> Message:
    """
    Read a message.

    Args:
        data: The message.
        expected: Indices that may well be in it, packed and as they are: to compare is quicker than to unpack.

    Raises:
        google.protobuf.message.DecodeError: Not a Batch.
    """
    images = indices = None
    start, end = _content(data, 0, _IMAGES)
    if start:
        images = np.frombuffer(data, np.uint8, end - start, start)
    rest = end
    start, end = _content(data, rest, _INDICES)
    if start and expected is not None and data[start:end] == expected[0]:
        indices = expected[1].view(np.uint64)
    elif start:
        indices = _unpacked(data, start, end)
    if indices is not None:
        rest = end
    fields = pb.Batch.FromString(data[rest:])
    if fields.indices or indices is None:
        indices = np.concatenate((_NOTHING if indices is None else indices, np.array(fields.indices, np.uint64)))
        fields.ClearField("indices")
    if fields.images or images is None:
        images = np.frombuffer(fields.images, np.uint8)
        fields.ClearField("images")
    return Message(fields, indices, images)


def _content(data: bytes, place: int, tag: int) -> tuple[int, int]:
    """Return where the content of a field begins and ends that stands at ``place``; 0 and ``place`` for another one."""
    if place == len(data) or data[place] != tag:
        return 0, place
    size, start = _read_varint(data, place + 1)
    if start + size > len(data):
        raise DecodeError("truncated message")
    return start, start + size


def _unpacked(data: bytes, start: int, end: int) -> NDArray[np.uint64] | None:
    """Read varints of four bytes each, None where they are others."""
    if (end - start) % WIDTH:
        return None
    packed = np.frombuffer(data, np.uint8, end - start, start).reshape(-1, WIDTH)
    if ((packed.view(_WIDE) & _MARKS) != _MARKED).any():
        return None
    indices: NDArray[np.uint64] = (packed.dot(_PLACES) - _MARKS_WORTH).astype(np.uint64)
    return indices


def _read_varint(data: bytes, place: int) -> tuple[int, int]:
    value = 0
    for count, byte in enumerate(data[place : place + _MAX_VARINT_BYTES]):
        value |= (byte & 0x7F) << 7 * count
        if byte < 0x80:
            return value, place + count + 1
    raise DecodeError("a number without end")


@lru_cache(maxsize=64)
def _head(tag: int, size: int) -> bytes:
    """Return what stands before a field's content; few sizes occur."""
    encoded = bytearray((tag,))
    while size > 0x7F:
        encoded.append((size & 0x7F) | 0x80)
        size >>= 7
    encoded.append(size)
    return bytes(encoded)
