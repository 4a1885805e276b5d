"""
The PNG that small grey images mostly come as: 8 bits a pixel, not interlaced, its pixels in one chunk, nothing else.

Of such a file everything is at a known place: no need for a parser, which takes twice as long as the pixels do.
Source: https://www.w3.org/TR/png-3/, 5.3 (chunks), 11.2 (IHDR, IDAT, IEND).
"""

import struct
import zlib
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray
from PIL import Image

MAX_SIDE = 256
"""Largest height and width, in pixels; beyond, the pixels take longer than all else."""

# Signature; length and name of IHDR; width, height, depth, colour, compression, filter, interlacing; checksum; length
# and name of IDAT.
_HEAD = struct.Struct(">8s I4s II5s I I4s")
_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_GREY = bytes((8, 0, 0, 0, 0))
_END = b"\0\0\0\0IEND\xaeB`\x82"
_CHECKSUM_BYTES = 4
# What the checksums of IHDR and IDAT are of begins with their names.
_IHDR = slice(12, 29)
_IDAT_FROM = 37


@dataclass(frozen=True, slots=True)
class PlainPng:
    """A file that was found to be one; its checksums and its pixels were not looked at yet."""

    width: int
    """1..256."""
    height: int
    """1..256."""
    _data: bytes
    _ends: int
    _header_checksum: int

    @classmethod
    def found(cls, data: bytes) -> Self | None:
        """Return it, None where the file is anything else."""
        if len(data) < _HEAD.size or not data.startswith(_SIGNATURE):
            return None
        _, length, name, width, height, kind, checksum, num_bytes, next_name = _HEAD.unpack_from(data)
        if (length, name, kind, next_name) != (13, b"IHDR", _GREY, b"IDAT"):
            return None
        if not (1 <= width <= MAX_SIDE and 1 <= height <= MAX_SIDE):
            return None
        ends = _HEAD.size + num_bytes
        if not data.startswith(_END, ends + _CHECKSUM_BYTES):
            return None
        return cls(width, height, data, ends, checksum)

    def pixels(self) -> NDArray[np.uint8] | None:
        """Return them, uint8, shape (height, width); None where the file is damaged, which Pillow tells better."""
        data, ends = self._data, self._ends
        checksum = int.from_bytes(data[ends : ends + _CHECKSUM_BYTES])
        if zlib.crc32(data[_IHDR]) != self._header_checksum or zlib.crc32(data[_IDAT_FROM:ends]) != checksum:
            return None
        try:
            image = Image.frombytes("L", (self.width, self.height), data[_HEAD.size : ends], "zip", "L")
        except ValueError:
            return None
        return np.frombuffer(image.tobytes(), np.uint8).reshape(self.height, self.width)
