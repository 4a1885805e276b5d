"""
Images as requests bring them: what one may cost is bounded by :class:`Limits`, what is wrong names its field.

Pure: no gRPC, no messages, no event loop. How they become 28x28 is in :mod:`imaging`.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from gateway.errors import InvalidImageError
from imaging.decoding import FORMAT_NAMES, ImageFile, Pixels, Planes, TooLargeError, UndecodableError, grey_of
from imaging.framing import Manner, frame

MAX_RAW_SIDE = 4096
"""Largest height or width of a raw image, in pixels."""

_ACCEPTED = f"accepted are {FORMAT_NAMES}"


@dataclass(frozen=True, slots=True)
class Limits:
    """What one image may cost; both are checked before anything is decoded."""

    max_bytes: int
    """Largest encoded file, in bytes."""
    max_pixels: int
    """Most pixels, height times width, by the header."""


class Picture:
    """
    An image whose header was checked and whose pixels are not decoded yet.

    Opening is cheap and decoding is not: ``num_pixels`` tells a caller where to do the latter.
    """

    def __init__(self, height: int, width: int, decode: Callable[[], Planes]) -> None:
        self.num_pixels = height * width
        self._decode = decode

    def frame(self, manner: Manner) -> Pixels:
        """
        Decode the image and return it as :func:`imaging.framing.frame` does.

        Raises:
            InvalidImageError: The data is truncated, damaged, or in a colour mode that has no grey.
        """
        try:
            grey, alpha = self._decode()
        except UndecodableError as error:
            raise _unreadable(error) from error
        return frame(grey, alpha, manner)


def open_encoded(data: bytes, limits: Limits) -> Picture:
    """
    Read the header of a PNG, JPEG, BMP, GIF, WebP, TIFF or PNM file; see :class:`imaging.decoding.ImageFile`.

    Raises:
        InvalidImageError: Field ``encoded``: empty, above a limit, or not such a file.
    """
    if not data:
        raise InvalidImageError("encoded", f"empty; {_ACCEPTED}")
    if len(data) > limits.max_bytes:
        raise InvalidImageError("encoded", f"{len(data)} bytes; allowed are {limits.max_bytes}")
    try:
        file = ImageFile(data)
    except TooLargeError as error:
        raise InvalidImageError("encoded", f"too many pixels; allowed are {limits.max_pixels}") from error
    except UndecodableError as error:
        raise _unreadable(error) from error
    width, height = file.width, file.height
    if width * height > limits.max_pixels:
        raise InvalidImageError(
            "encoded", f"{width}x{height} is {width * height} pixels; allowed are {limits.max_pixels}"
        )
    return Picture(height, width, file.planes)


def open_raw(pixels: bytes, *, height: int, width: int, channels: int, limits: Limits) -> Picture:
    """
    Check an image that comes as plain pixels.

    Args:
        pixels: uint8, height*width*channels bytes, row-major, channels last.
        height: 1..4096.
        width: 1..4096.
        channels: 0 or 1 grey, 3 RGB, 4 RGBA.
        limits: ``max_pixels`` counts here; the bytes follow from it.

    Raises:
        InvalidImageError: Field ``raw.height``, ``raw.width``, ``raw.channels`` or ``raw.pixels``.
    """
    for name, side in (("height", height), ("width", width)):
        if not 1 <= side <= MAX_RAW_SIDE:
            raise InvalidImageError(f"raw.{name}", f"{side}; allowed are 1..{MAX_RAW_SIDE}")
    if channels not in (0, 1, 3, 4):
        raise InvalidImageError("raw.channels", f"{channels}; allowed are 0 or 1 (grey), 3 (RGB), 4 (RGBA)")
    depth = channels or 1
    if len(pixels) != height * width * depth:
        raise InvalidImageError(
            "raw.pixels",
            f"{len(pixels)} bytes; {height}x{width} with {depth} channel{'s' * (depth > 1)} takes "
            f"{height * width * depth}",
        )
    if height * width > limits.max_pixels:
        raise InvalidImageError(
            "raw.pixels", f"{height}x{width} is {height * width} pixels; allowed are {limits.max_pixels}"
        )
    return Picture(height, width, lambda: _raw_planes(pixels, height, width, depth))


def _unreadable(error: UndecodableError) -> InvalidImageError:
    return InvalidImageError("encoded", f"not a readable image: {error}; {_ACCEPTED}")


def _raw_planes(pixels: bytes, height: int, width: int, channels: int) -> Planes:
    values = np.frombuffer(pixels, np.uint8)
    if channels == 1:
        return values.reshape(height, width), None
    values = values.reshape(height, width, channels)
    return grey_of(values), values[:, :, 3] if channels == 4 else None
