import struct
import zlib
from io import BytesIO

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from imaging.decoding import ImageFile, Pixels, UndecodableError
from imaging.plain_png import MAX_SIDE, PlainPng
from tests.digits import encoded

Grey = NDArray[np.uint8]


def saved(image: Image.Image, **options: object) -> bytes:
    buffer = BytesIO()
    image.save(buffer, "PNG", **options)
    return buffer.getvalue()


def by_pillow(data: bytes) -> Grey:
    with Image.open(BytesIO(data)) as image:
        return np.asarray(image)


@given(width=st.integers(1, 70), height=st.integers(1, 70), seed=st.integers(0, 9), level=st.sampled_from([0, 1, 9]))
def test_pixels_are_those_that_pillow_reads(width: int, height: int, seed: int, level: int) -> None:
    noise = np.random.default_rng(seed).integers(0, 256, (height, width), np.uint8)
    data = saved(Image.fromarray(noise // 64 * 64), compress_level=level)
    plain = PlainPng.found(data)
    assert plain is not None
    pixels = plain.pixels()
    assert pixels is not None

    assert (plain.width, plain.height) == (width, height)
    assert np.array_equal(pixels, by_pillow(data))


def test_what_says_more_than_pixels_is_left_to_pillow(digit: Pixels) -> None:
    image, text = Image.fromarray(digit), PngInfo()
    text.add_text("note", "words")
    others = {
        "palette": saved(image.convert("P")),
        "colour": saved(image.convert("RGB")),
        "16 bits": saved(Image.fromarray(digit.astype(np.uint16) * 257)),
        "1 bit": saved(image.convert("1")),
        "transparency": saved(image, transparency=0),
        "text": saved(image, pnginfo=text),
        "EXIF": saved(image, exif=b"Exif\0\0"),
        "not a PNG": encoded(image, "BMP"),
        "nothing": b"",
    }

    assert [name for name, data in others.items() if PlainPng.found(data) is not None] == []


def test_large_image_is_left_to_pillow() -> None:
    assert PlainPng.found(saved(Image.new("L", (MAX_SIDE, MAX_SIDE)))) is not None
    assert PlainPng.found(saved(Image.new("L", (MAX_SIDE + 1, 1)))) is None


@given(position=st.integers(8, 200), bit=st.integers(0, 7))
def test_flipped_bit_is_refused(position: int, bit: int) -> None:
    data = bytearray(saved(Image.fromarray(np.arange(784, dtype=np.uint8).reshape(28, 28))))
    data[position % len(data)] ^= 1 << bit
    with pytest.raises(UndecodableError):
        ImageFile(bytes(data)).planes()


def chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def png_of(compressed: bytes) -> bytes:
    head = chunk(b"IHDR", struct.pack(">II5B", 28, 28, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", compressed) + chunk(b"IEND", b"")


def test_half_a_stream_under_right_checksums_is_refused() -> None:
    data = png_of(zlib.compress(bytes(29 * 28))[:-8])

    assert PlainPng.found(data) is not None
    with pytest.raises(UndecodableError, match="truncated"):
        ImageFile(data).planes()


def test_more_pixels_than_the_header_says_are_not_inflated() -> None:
    planes = ImageFile(png_of(zlib.compress(bytes(29 * 28) + bytes(10_000_000)))).planes()

    assert planes[0].shape == (28, 28)
