"""Image files of any format and colour mode as planes of grey and alpha."""

import struct
import zlib
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

# Importing a plugin registers it; without this, Pillow's first TIFF or WebP would load all forty of them.
from PIL import (
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    JpegImagePlugin,
    PngImagePlugin,
    PpmImagePlugin,
    TiffImagePlugin,
    UnidentifiedImageError,
    WebPImagePlugin,
)

from imaging.plain_png import PlainPng
from imaging.structure import TooManyPartsError, check_parts

Pixels = NDArray[np.uint8]
Planes = tuple[Pixels, Pixels | None]
"""Grey and alpha, uint8, shape (H, W) each; no alpha where all of it is opaque."""

_PLUGINS = (
    PngImagePlugin.PngImageFile,
    JpegImagePlugin.JpegImageFile,
    BmpImagePlugin.BmpImageFile,
    GifImagePlugin.GifImageFile,
    WebPImagePlugin.WebPImageFile,
    TiffImagePlugin.TiffImageFile,
    PpmImagePlugin.PpmImageFile,
)
FORMATS = tuple(plugin.format for plugin in _PLUGINS)
"""As Pillow calls them."""

FORMAT_NAMES = "PNG, JPEG, BMP, GIF, WebP, TIFF, PGM"
"""For people."""

_ORIENTATION = 0x0112
_TURNED: dict[int, Callable[[Pixels], Pixels]] = {
    2: np.fliplr,
    3: lambda pixels: pixels[::-1, ::-1],
    4: np.flipud,
    5: np.transpose,
    6: lambda pixels: np.rot90(pixels, -1),
    7: lambda pixels: pixels[::-1, ::-1].T,
    8: np.rot90,
}


class UndecodableError(Exception):
    """It is no image of these formats, or a damaged one; the text says why and may be shown to a stranger."""


class TooLargeError(UndecodableError):
    """Its header declares more pixels than Pillow opens."""


class ImageFile:
    """
    An image file whose header was read and whose pixels are not decoded yet.

    The first frame counts, EXIF orientation is applied, whatever follows the end of a PNG is ignored. 16-bit grey is
    scaled by 1/257. 32-bit integers and floats do not say what white is: their own least and greatest value become 0
    and 255.

    Args:
        data: The file's content.

    Raises:
        UndecodableError: Empty, not such a file, or one of too many parts; see :mod:`imaging.structure`.
    """

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._plain = PlainPng.found(data)
        if self._plain is not None:
            self.width, self.height = self._plain.width, self._plain.height
            """In pixels, before it is turned upright."""
            return
        try:
            check_parts(data)
        except TooManyPartsError as error:
            raise UndecodableError(str(error)) from error
        self._image = open_header(BytesIO(data))
        self.width, self.height = self._image.size

    def planes(self) -> Planes:
        """
        Decode it; once.

        Raises:
            UndecodableError: Truncated, damaged, or in a colour mode that has no grey.
        """
        if self._plain is not None:
            pixels = self._plain.pixels()
            if pixels is not None:
                return pixels, None
            self._image = open_header(BytesIO(self._data))
        image = self._image
        # Parsers of hostile bytes raise anything, from KeyError to zlib.error, and it all means the same.
        try:
            if image.format == "PNG":
                _check_png(self._data)
            image.load()
            grey, alpha = _planes(image)
        except MemoryError:
            raise
        except Exception as error:
            raise _undecodable(error) from error
        # Last, because a PNG may bring its EXIF behind the pixels and a TIFF is turned by load() itself.
        turned = _TURNED.get(_orientation(image))
        if turned is not None:
            grey, alpha = turned(grey), None if alpha is None else turned(alpha)
        return grey, alpha


def open_header(file: Path | BytesIO) -> Image.Image:
    """
    Read the header of an image file.

    Raises:
        UndecodableError: Not such a file.
        OSError: A path that cannot be read.
    """
    try:
        return Image.open(file, formats=FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise TooLargeError("too many pixels") from error
    except MemoryError:
        raise
    except Exception as error:
        # Of the file system, not of what is in the file: Pillow's own have no number.
        if isinstance(file, Path) and isinstance(error, OSError) and error.errno is not None:
            raise
        raise _undecodable(error) from error


def grey_of(values: Pixels) -> Pixels:
    """
    Return the grey of colours, as of the same colours in a file.

    Args:
        values: uint8, shape (H, W, 3) or (H, W, 4).
    """
    return np.asarray(Image.fromarray(values).convert("L"))


def _undecodable(error: Exception) -> UndecodableError:
    # Pillow's texts are fit to be shown but for the one with the repr of our buffer in it.
    if isinstance(error, UnidentifiedImageError):
        return UndecodableError("unknown format or damaged header")
    if isinstance(error, (OSError, SyntaxError, ValueError, Warning)) and str(error):
        return UndecodableError(str(error)[:120])
    return UndecodableError("damaged")


def _check_png(data: bytes) -> None:
    """Pillow takes a PNG without its end, and pixels whose checksum is wrong."""
    position = 8
    while True:
        if position + 12 > len(data):
            raise OSError("image file is truncated")
        length, kind = struct.unpack_from(">I4s", data, position)
        end = position + 12 + length
        if end > len(data):
            raise OSError("image file is truncated")
        # A capital first letter marks a chunk that the pixels depend on.
        if kind[:1].isupper() and zlib.crc32(memoryview(data)[position + 4 : end - 4]) != int.from_bytes(
            data[end - 4 : end]
        ):
            raise OSError(f"wrong checksum in PNG chunk {kind.decode('latin-1')}")
        if kind == b"IEND":
            return
        position = end


def _orientation(image: Image.Image) -> int:
    if image.format != "TIFF" and not image.info.keys() & {
        "exif",
        "Raw profile type exif",
        "xmp",
        "XML:com.adobe.xmp",
    }:
        return 1
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except Exception:
        # Cameras write broken EXIF around sound pixels.
        return 1


def _planes(image: Image.Image) -> tuple[Pixels, Pixels | None]:
    mode = image.mode
    if mode == "I" or mode == "F" or mode.startswith("I;"):
        return _wide_planes(image)
    if image.has_transparency_data:
        if mode in ("La", "RGBa"):
            image = image.convert(mode.upper())
        elif mode not in ("LA", "RGBA"):
            image = image.convert("RGBA")
        return np.asarray(image.convert("L")), np.asarray(image.getchannel("A"))
    return np.asarray(image if mode == "L" else image.convert("L")), None


def _wide_planes(image: Image.Image) -> tuple[Pixels, Pixels | None]:
    """More than 8 bits a pixel: 16-bit integers have a range of their own, the rest take the one they use."""
    values = np.asarray(image)
    key = image.info.get("transparency")
    alpha = np.where(values == key, 0, 255).astype(np.uint8) if isinstance(key, int) else None
    # Pillow stores PGM with a maximum above 255 as I, scaled to 65535.
    if values.dtype.itemsize == 2 or image.format == "PPM":
        return ((values.astype(np.uint32) + 128) // 257).astype(np.uint8), alpha
    low, high = float(values.min()), float(values.max())
    if not np.isfinite(high - low):
        raise ValueError("pixels that are not finite numbers")
    if low == high:
        return np.zeros(values.shape, np.uint8), alpha
    scaled = (values.astype(np.float64) - low) * (255 / (high - low)) + 0.5
    return scaled.astype(np.uint8), alpha
