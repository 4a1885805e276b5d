import struct
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from gateway.errors import InvalidImageError
from gateway.images import Limits, open_encoded, open_raw
from imaging.decoding import Pixels
from imaging.framing import Framing, Manner, Polarity
from tests.digits import FORMATS, encoded

LIMITS = Limits(max_bytes=1 << 20, max_pixels=1 << 20)


def frame(data: bytes | Image.Image, limits: Limits = LIMITS) -> Pixels:
    data = encoded(data) if isinstance(data, Image.Image) else data
    return open_encoded(data, limits).frame(Manner())


def test_empty_is_refused() -> None:
    with pytest.raises(InvalidImageError, match=r"^encoded: empty; accepted are PNG, JPEG, BMP"):
        frame(b"")


@pytest.mark.parametrize(
    "data", [b"x", b"GIF89a", b"\x89PNG\r\n\x1a\n", b"%PDF-1.7", b"<svg/>", b"II*\0", b"P5", b"RIFF0000WEBP"]
)
def test_what_is_no_image_is_refused(data: bytes) -> None:
    with pytest.raises(InvalidImageError, match=r"^encoded: not a readable image: .*; accepted are PNG"):
        frame(data)


@hypothesis_settings(deadline=None, max_examples=200)
@given(kind=st.sampled_from(FORMATS), flips=st.dictionaries(st.integers(0, 10_000), st.integers(0, 255), max_size=8))
def test_damaged_files_raise_nothing_else(kind: str, flips: dict[int, int]) -> None:
    data = bytearray(encoded(Image.linear_gradient("L").resize((40, 30)), kind))
    for position, value in flips.items():
        data[position % len(data)] = value

    refusal = None
    try:
        framed = frame(bytes(data))
    except InvalidImageError as error:
        refusal = error

    assert refusal is None or (refusal.field == "encoded" and " at 0x" not in refusal.reason)
    assert refusal is not None or framed.shape == (28, 28)


def test_too_many_bytes_are_refused_before_reading(digit: Pixels) -> None:
    with pytest.raises(InvalidImageError, match=r"^encoded: 101 bytes; allowed are 100$"):
        frame(b"x" * 101, limits=Limits(100, 1000))


def png_that_declares(width: int, height: int) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("size", [(1025, 1024), (60_000, 60_000), (10_000, 10_000), (1, 2**31 - 1)])
def test_too_many_pixels_are_refused_from_the_header(size: tuple[int, int]) -> None:
    with pytest.raises(InvalidImageError, match=r"allowed are 1048576|not a readable image"):
        open_encoded(png_that_declares(*size), LIMITS)


def test_text_bomb_is_refused(digit: Pixels) -> None:
    body = b"k\0\0" + zlib.compress(bytes(64 << 20), 9)
    bomb = struct.pack(">I", len(body)) + b"zTXt" + body + struct.pack(">I", zlib.crc32(b"zTXt" + body))
    data = encoded(Image.fromarray(digit))
    with pytest.raises(InvalidImageError, match="Decompressed data too large"):
        frame(data[:33] + bomb + data[33:])


# Raw pixels


@hypothesis_settings(deadline=None, max_examples=80)
@given(
    height=st.integers(1, 90),
    width=st.integers(1, 90),
    channels=st.sampled_from([0, 1, 3, 4]),
    polarity=st.sampled_from(["auto", "light_on_dark", "dark_on_light"]),
    framing=st.sampled_from(["auto", "center", "stretch"]),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_pixels_give_a_frame(
    height: int, width: int, channels: int, polarity: Polarity, framing: Framing, seed: int
) -> None:
    pixels = np.random.default_rng(seed).bytes(height * width * (channels or 1))
    framed = open_raw(pixels, height=height, width=width, channels=channels, limits=LIMITS).frame(
        Manner(polarity, framing)
    )

    assert framed.shape == (28, 28)
    assert framed.dtype == np.uint8


@pytest.mark.parametrize("channels", [0, 1, 3, 4])
def test_raw_pixels_equal_encoded_ones(digit: Pixels, channels: int) -> None:
    image = ImageOps.colorize(Image.fromarray(digit), "navy", "yellow").convert(
        {0: "L", 1: "L", 3: "RGB", 4: "RGBA"}[channels]
    )
    raw = open_raw(np.asarray(image).tobytes(), height=28, width=28, channels=channels, limits=LIMITS)

    assert np.array_equal(raw.frame(Manner()), frame(image))


@pytest.mark.parametrize(
    ("height", "width", "channels", "length", "message"),
    [
        (0, 28, 1, 0, r"raw\.height: 0; allowed are 1\.\.4096"),
        (28, 4097, 1, 28 * 4097, r"raw\.width: 4097; allowed are 1\.\.4096"),
        (28, 28, 2, 28 * 28 * 2, r"raw\.channels: 2; allowed are 0 or 1 \(grey\), 3 \(RGB\), 4 \(RGBA\)"),
        (28, 28, 3, 784, r"raw\.pixels: 784 bytes; 28x28 with 3 channels takes 2352"),
        (28, 28, 1, 783, r"raw\.pixels: 783 bytes; 28x28 with 1 channel takes 784"),
        (1100, 1000, 1, 1_100_000, r"raw\.pixels: 1100x1000 is 1100000 pixels; allowed are 1048576"),
    ],
)
def test_raw_that_does_not_fit_is_refused(height: int, width: int, channels: int, length: int, message: str) -> None:
    with pytest.raises(InvalidImageError, match=f"^{message}$"):
        open_raw(bytes(length), height=height, width=width, channels=channels, limits=LIMITS)
