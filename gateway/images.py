"""
From an image as people have it to the network's 28x28: grey, bright ink on a dark ground, framed.

Pure: no gRPC, no messages, no event loop. What one call may cost is bounded by :class:`Limits`.
"""

import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from typing import Literal

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

from gateway.errors import InvalidImageError

Polarity = Literal["auto", "light_on_dark", "dark_on_light"]
Framing = Literal["auto", "center", "stretch"]
Pixels = NDArray[np.uint8]

SIDE = 28
"""Height and width of the network's frame, in pixels."""

MAX_RAW_SIDE = 4096
"""Largest height or width of a raw image, in pixels."""

_PLUGINS = (
    PngImagePlugin.PngImageFile,
    JpegImagePlugin.JpegImageFile,
    BmpImagePlugin.BmpImageFile,
    GifImagePlugin.GifImageFile,
    WebPImagePlugin.WebPImageFile,
    TiffImagePlugin.TiffImageFile,
    PpmImagePlugin.PpmImageFile,
)
_FORMATS = tuple(plugin.format for plugin in _PLUGINS)
_ACCEPTED = "accepted are PNG, JPEG, BMP, GIF, WebP, TIFF, PGM"

# MNIST's digits fill a 20x20 box inside the 28x28 field.
_BOX = 20
# Grey levels between ground and ink below which there is only paper texture: 6 % of the range.
_MIN_CONTRAST = 16
# Share of the contrast above which a pixel is ink. Chosen on MNIST's test images, enlarged, saved as JPEG and
# with noise added: lower takes JPEG's ringing for ink, higher cuts the soft edge of clean strokes.
_INK_SHARE = 0.1
# Ink also has to stand this many standard deviations of the ground's noise above it.
_INK_SIGMAS = 4.0

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

    def __init__(self, height: int, width: int, decode: Callable[[], tuple[Pixels, Pixels | None]]) -> None:
        self.num_pixels = height * width
        self._decode = decode

    def frame(self, *, polarity: Polarity, framing: Framing) -> Pixels:
        """
        Decode the image and return it as the network wants it.

        Args:
            polarity: ``auto`` decides from the border, see :func:`normalise_polarity`.
            framing: ``auto`` takes a 28x28 image as it is and centres any other; ``center`` is how MNIST was
                made, see :func:`center`; ``stretch`` scales the whole image.

        Returns:
            uint8, shape (28, 28), 0 the ground and 255 the strongest ink. All zeros where there is no ink.

        Raises:
            InvalidImageError: The data is truncated, damaged, or in a colour mode that has no grey.
        """
        grey, alpha = self._decode()
        ink = normalise_polarity(grey, alpha, polarity)
        if framing == "stretch":
            return stretch(ink)
        if framing == "auto" and ink.shape == (SIDE, SIDE):
            return ink
        return center(ink)


def open_encoded(data: bytes, limits: Limits) -> Picture:
    """
    Read the header of a PNG, JPEG, BMP, GIF, WebP, TIFF or PNM file.

    The first frame counts, EXIF orientation is applied, transparent pixels become ground, whatever follows the
    end of a PNG is ignored. 16-bit grey is scaled by 1/257. 32-bit integers and floats do not say what white
    is: their own least and greatest value become 0 and 255.

    Raises:
        InvalidImageError: Field ``encoded``: empty, above a limit, or not such a file.
    """
    if not data:
        raise InvalidImageError("encoded", f"empty; {_ACCEPTED}")
    if len(data) > limits.max_bytes:
        raise InvalidImageError("encoded", f"{len(data)} bytes; allowed are {limits.max_bytes}")
    try:
        image = Image.open(BytesIO(data), formats=_FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise InvalidImageError("encoded", f"too many pixels; allowed are {limits.max_pixels}") from error
    except MemoryError:
        raise
    except Exception as error:
        raise _unreadable(error) from error
    width, height = image.size
    if width * height > limits.max_pixels:
        raise InvalidImageError(
            "encoded", f"{width}x{height} is {width * height} pixels; allowed are {limits.max_pixels}"
        )
    return Picture(height, width, lambda: _decode(image, data))


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


def normalise_polarity(grey: Pixels, alpha: Pixels | None, polarity: Polarity) -> Pixels:
    """
    Make ink bright on a dark ground, and what is transparent ground.

    ``auto`` compares the border's median with the image's least and greatest value: a border nearer to the
    greatest means dark ink. Where the border is mostly transparent (of the visible part, if only its surroundings
    are), the mean brightness of what is visible decides. An opaque image of one grey has no ink: all zeros.

    Args:
        grey: uint8, shape (H, W).
        alpha: uint8, shape (H, W), 255 opaque; ``None`` where all of it is opaque.
        polarity: As it is known, or ``auto``.

    Returns:
        uint8, shape (H, W); ``grey`` itself where there is nothing to change.
    """
    if alpha is not None and alpha.min() == 255:
        alpha = None
    if polarity == "auto":
        dark_ink = _is_ink_dark(grey) if alpha is None else _is_visible_ink_dark(grey, alpha)
        if dark_ink is None:
            return np.zeros_like(grey)
    else:
        dark_ink = polarity == "dark_on_light"
    ink = 255 - grey if dark_ink else grey
    if alpha is None:
        return ink
    # Rounded division by 255; 16 bits hold 255 * 255 + 127.
    return ((ink.astype(np.uint16) * alpha + 127) // 255).astype(np.uint8)


def center(ink: Pixels) -> Pixels:
    """
    Frame ink the way MNIST's digits were: in a 20x20 box, keeping the ratio, centred by mass in 28x28.

    Before that the ground, the border's median, is taken away and the contrast stretched to 255; after the scaling
    it is stretched once more, because thin strokes fade in it, which MNIST's, being thick, did not.

    Source: Y. LeCun, C. Cortes, C. Burges, "The MNIST database of handwritten digits",
    http://yann.lecun.com/exdb/mnist/, section on file formats. There the centre of mass lies on index 14 within
    half a pixel, which the test images confirm.

    Args:
        ink: uint8, shape (H, W), bright ink.

    Returns:
        uint8, shape (28, 28); all zeros where nothing stands out from the border.
    """
    border = np.sort(_border(ink))
    ground = int(border[len(border) // 2])
    contrast = int(ink.max()) - ground
    if contrast < _MIN_CONTRAST:
        return np.zeros((SIDE, SIDE), np.uint8)
    # The median absolute deviation times 1.4826 estimates the standard deviation of normal noise.
    noise = 1.4826 * float(np.median(np.abs(border.astype(np.int16) - ground)))
    is_ink = ink > ground + _INK_SHARE * contrast + _INK_SIGMAS * noise
    rows, columns = np.flatnonzero(is_ink.any(axis=1)), np.flatnonzero(is_ink.any(axis=0))
    if rows.size == 0:
        return np.zeros((SIDE, SIDE), np.uint8)
    cropped = ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    levels = np.clip((np.arange(256) - ground) * 255 / contrast + 0.5, 0, 255).astype(np.uint8)
    return _place_by_mass(_fit(levels[cropped]))


def stretch(ink: Pixels) -> Pixels:
    """
    Scale the whole image to 28x28, whatever its ratio.

    Args:
        ink: uint8, shape (H, W).
    """
    if ink.shape == (SIDE, SIDE):
        return ink
    return _resize(ink, SIDE, SIDE)


def _unreadable(error: Exception) -> InvalidImageError:
    # Pillow's texts are fit to be shown but for the one with the repr of our buffer in it.
    if isinstance(error, UnidentifiedImageError):
        reason = "unknown format or damaged header"
    elif isinstance(error, (OSError, SyntaxError, ValueError, Warning)) and str(error):
        reason = str(error)[:120]
    else:
        reason = "damaged"
    return InvalidImageError("encoded", f"not a readable image: {reason}; {_ACCEPTED}")


def _decode(image: Image.Image, data: bytes) -> tuple[Pixels, Pixels | None]:
    """Parsers of hostile bytes raise anything, from KeyError to zlib.error, and it all means the same."""
    try:
        if image.format == "PNG":
            _check_png(data)
        image.load()
        grey, alpha = _planes(image)
    except MemoryError:
        raise
    except Exception as error:
        raise _unreadable(error) from error
    # Last, because a PNG may bring its EXIF behind the pixels and a TIFF is turned by load() itself.
    turned = _TURNED.get(_orientation(image))
    if turned is not None:
        grey, alpha = turned(grey), None if alpha is None else turned(alpha)
    return grey, alpha


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


def _raw_planes(pixels: bytes, height: int, width: int, channels: int) -> tuple[Pixels, Pixels | None]:
    values = np.frombuffer(pixels, np.uint8)
    if channels == 1:
        return values.reshape(height, width), None
    values = values.reshape(height, width, channels)
    # Through Pillow, so that a colour has the same grey raw as encoded.
    grey = np.asarray(Image.fromarray(values).convert("L"))
    return grey, values[:, :, 3] if channels == 4 else None


def _border(pixels: NDArray[np.uint8]) -> Pixels:
    return np.concatenate((pixels[0], pixels[-1], pixels[1:-1, 0], pixels[1:-1, -1]))


def _is_ink_dark(grey: Pixels) -> bool | None:
    """``None``: one grey, no ink."""
    low, high = int(grey.min()), int(grey.max())
    if low == high:
        return None
    border = np.sort(_border(grey))
    return 2 * int(border[len(border) // 2]) > low + high


def _is_visible_ink_dark(grey: Pixels, alpha: Pixels) -> bool | None:
    visible = alpha >= 128
    rows, columns = np.flatnonzero(visible.any(axis=1)), np.flatnonzero(visible.any(axis=0))
    if rows.size == 0:
        return None
    box = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
    around = _border(visible[box].view(np.uint8)).view(np.bool_)
    shown = grey[visible]
    low, high = int(shown.min()), int(shown.max())
    if 2 * np.count_nonzero(around) >= around.size and high - low >= _MIN_CONTRAST:
        border = np.sort(_border(grey[box])[around])
        return 2 * int(border[len(border) // 2]) > low + high
    return float(np.average(grey, weights=alpha)) < 128


def _fit(ink: Pixels) -> Pixels:
    """Scale so that the longer side is 20, and let the strongest ink be 255."""
    height, width = ink.shape
    longer = max(height, width)
    if longer != _BOX:
        ink = _resize(ink, max(1, round(height * _BOX / longer)), max(1, round(width * _BOX / longer)))
    strongest = int(ink.max())
    if 0 < strongest < 255:
        ink = (ink.astype(np.uint16) * 255 // strongest).astype(np.uint8)
    return ink


def _resize(ink: Pixels, height: int, width: int) -> Pixels:
    # The box filter averages exactly the pixels it replaces: an enlarged MNIST digit comes back unchanged.
    shrinks = ink.shape[0] >= height and ink.shape[1] >= width
    resample = Image.Resampling.BOX if shrinks else Image.Resampling.BICUBIC
    return np.asarray(Image.fromarray(ink).resize((width, height), resample))


def _place_by_mass(ink: Pixels) -> Pixels:
    height, width = ink.shape
    mass = max(1, int(ink.sum()))
    row = int(ink.sum(axis=1) @ np.arange(height)) / mass
    column = int(ink.sum(axis=0) @ np.arange(width)) / mass
    # Whole pixels, and never over the edge.
    top = min(max(0, round(SIDE / 2 - row)), SIDE - height)
    left = min(max(0, round(SIDE / 2 - column)), SIDE - width)
    framed = np.zeros((SIDE, SIDE), np.uint8)
    framed[top : top + height, left : left + width] = ink
    return framed
