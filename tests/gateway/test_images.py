import io
import struct
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image, ImageOps

from gateway.errors import InvalidImageError
from gateway.images import Framing, Limits, Polarity, center, open_encoded, open_raw

Digit = NDArray[np.uint8]

LIMITS = Limits(max_bytes=1 << 20, max_pixels=1 << 20)
ROOMY = Limits(max_bytes=1 << 24, max_pixels=1 << 24)

FORMATS = ["PNG", "JPEG", "BMP", "GIF", "WEBP", "TIFF", "PPM"]
LOSSLESS = ["PNG", "BMP", "GIF", "TIFF", "PPM"]


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def frame(
    data: bytes | Image.Image, polarity: Polarity = "auto", framing: Framing = "auto", limits: Limits = LIMITS
) -> Digit:
    data = encoded(data) if isinstance(data, Image.Image) else data
    return open_encoded(data, limits).frame(polarity=polarity, framing=framing)


def enlarged(digit: Digit, times: int = 10, margins: tuple[int, int, int, int] = (40, 90, 10, 150)) -> Digit:
    top, bottom, left, right = margins
    return np.pad(np.kron(digit, np.ones((times, times), np.uint8)), ((top, bottom), (left, right)))


def difference(first: Digit, second: Digit) -> float:
    return float(np.abs(first.astype(int) - second).mean())


# What is accepted as it is


@pytest.mark.parametrize("kind", LOSSLESS)
def test_28x28_grey_passes_bit_exact(digit: Digit, kind: str) -> None:
    framed = frame(encoded(Image.fromarray(digit), kind))

    assert framed.dtype == np.uint8
    assert np.array_equal(framed, digit)


def test_28x28_dark_on_light_is_inverted_exactly(digit: Digit) -> None:
    assert np.array_equal(frame(Image.fromarray(255 - digit)), digit)


def test_given_polarity_wins_over_the_border(digit: Digit) -> None:
    assert np.array_equal(frame(Image.fromarray(digit), "dark_on_light"), 255 - digit)
    assert np.array_equal(frame(Image.fromarray(255 - digit), "light_on_dark"), 255 - digit)


# Formats and colour modes


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("is_dark", [False, True])
def test_enlarged_digit_on_margins_comes_back(digit: Digit, kind: str, is_dark: bool) -> None:
    big = enlarged(digit)
    framed = frame(encoded(Image.fromarray(255 - big if is_dark else big), kind))

    assert difference(framed, digit) < (0.5 if kind in LOSSLESS else 3)


MODES: dict[str, Callable[[Image.Image], tuple[Image.Image, str]]] = {
    "L": lambda image: (image, "PNG"),
    "LA": lambda image: (image.convert("LA"), "PNG"),
    "La": lambda image: (image.convert("LA"), "TIFF"),
    "P": lambda image: (image.convert("P"), "PNG"),
    "PA": lambda image: (image.convert("P").convert("PA"), "TIFF"),
    "RGB": lambda image: (image.convert("RGB"), "PNG"),
    "RGBA": lambda image: (image.convert("RGBA"), "PNG"),
    "RGBX": lambda image: (image.convert("RGBX"), "TIFF"),
    "CMYK jpeg": lambda image: (image.convert("CMYK"), "JPEG"),
    "CMYK tiff": lambda image: (image.convert("CMYK"), "TIFF"),
    "YCbCr": lambda image: (image.convert("YCbCr"), "TIFF"),
    "I;16": lambda image: (Image.fromarray(np.asarray(image).astype(np.uint16) * 257), "PNG"),
    "I;16 tiff": lambda image: (Image.fromarray(np.asarray(image).astype(np.uint16) * 257), "TIFF"),
    "I;16 pgm": lambda image: (Image.fromarray(np.asarray(image).astype(np.int32) * 257), "PPM"),
    "I": lambda image: (Image.fromarray(np.asarray(image).astype(np.int32) * 1000 - 7), "TIFF"),
    "F": lambda image: (Image.fromarray(np.asarray(image).astype(np.float32) / 255), "TIFF"),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("is_dark", [False, True])
def test_same_digit_in_every_mode(digit: Digit, mode: str, is_dark: bool) -> None:
    image, kind = MODES[mode](Image.fromarray(255 - digit if is_dark else digit))

    assert difference(frame(encoded(image, kind)), digit) < (3 if kind == "JPEG" else 1)


def test_one_bit_image_is_thresholded_digit(digit: Digit) -> None:
    bilevel = Image.fromarray(digit).point(lambda level: 255 * (level >= 128), "1")

    assert np.array_equal(frame(bilevel), np.where(digit >= 128, 255, 0))


def test_16_bit_grey_is_scaled_by_257() -> None:
    values = np.zeros((28, 28), np.uint16)
    values[10, 10:13] = 65535, 257 * 100, 257 * 50 + 129

    assert frame(Image.fromarray(values))[10, 10:13].tolist() == [255, 100, 51]


def test_floats_that_are_not_finite_are_refused() -> None:
    values = np.zeros((28, 28), np.float32)
    values[3, 3] = np.nan
    with pytest.raises(InvalidImageError, match="encoded: not a readable image: pixels that are not finite"):
        frame(encoded(Image.fromarray(values), "TIFF"))


def test_mode_without_grey_is_refused() -> None:
    with pytest.raises(InvalidImageError, match="not a readable image"):
        frame(encoded(Image.new("LAB", (28, 28)), "TIFF"))


def test_first_frame_of_gif_counts(digit: Digit) -> None:
    first, second = Image.fromarray(digit), Image.fromarray(np.rot90(digit).copy())

    data = encoded(first, "GIF", save_all=True, append_images=[second])

    assert np.array_equal(frame(data), digit)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF"])
def test_exif_orientation_is_applied_once(digit: Digit, kind: str, orientation: int) -> None:
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    upright = Image.fromarray(enlarged(digit))
    stored = upright.transpose(undo[orientation]) if orientation in undo else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    options: dict[str, Any] = {"lossless": True} if kind == "WEBP" else {}

    assert difference(frame(encoded(stored, kind, exif=exif, **options)), digit) < 3


def test_broken_exif_is_ignored(digit: Digit) -> None:
    data = encoded(Image.fromarray(digit), exif=b"Exif\0\0II*\0\xff\xff\xff\xff")

    assert np.array_equal(frame(data), digit)


# Transparency


@pytest.mark.parametrize("ink", [0, 255], ids=["black ink", "white ink"])
def test_ink_on_transparent_ground(digit: Digit, ink: int) -> None:
    big = enlarged(digit)
    image = Image.merge("LA", (Image.new("L", big.shape[::-1], ink), Image.fromarray(big)))

    assert difference(frame(image), digit) < 0.5


def test_black_ink_on_white_card_with_transparent_corners(digit: Digit) -> None:
    big = enlarged(digit)
    alpha = np.full_like(big, 255)
    alpha[:30, :30] = alpha[-30:, :30] = alpha[:30, -30:] = alpha[-30:, -30:] = 0
    image = Image.merge("LA", (Image.fromarray(255 - big), Image.fromarray(alpha)))

    assert difference(frame(image), digit) < 0.5


def test_white_card_in_transparent_margin(digit: Digit) -> None:
    big = np.pad(enlarged(digit), 200)
    alpha = np.zeros_like(big)
    alpha[200:-200, 200:-200] = 255
    image = Image.merge("LA", (Image.fromarray(255 - big), Image.fromarray(alpha)))

    assert difference(frame(image), digit) < 0.5


@pytest.mark.parametrize("mode", ["P", "L", "RGB"])
def test_transparent_colour_is_ground(digit: Digit, mode: str) -> None:
    bilevel = np.where(digit >= 128, np.uint8(0), np.uint8(200))
    image = Image.fromarray(bilevel).convert("RGB").convert(mode) if mode != "P" else Image.fromarray(bilevel)
    key: int | tuple[int, int, int] = (200, 200, 200) if mode == "RGB" else 200
    if mode == "P":
        image = image.convert("P")
        key = int(np.asarray(image)[0, 0])

    framed = frame(encoded(image, transparency=key))

    assert np.array_equal(framed, np.where(digit >= 128, 255, 0))


def test_all_transparent_is_blank() -> None:
    assert not frame(Image.new("RGBA", (50, 50), (200, 10, 10, 0))).any()


# Framing


def test_center_is_near_identity_for_mnist_like_digit(digit: Digit) -> None:
    assert difference(center(digit), digit) < 0.5


@hypothesis_settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    times=st.integers(2, 16),
    margins=st.tuples(*[st.integers(0, 200)] * 4),
    is_dark=st.booleans(),
    ground=st.integers(0, 60),
    contrast=st.integers(100, 190),
)
def test_framing_does_not_depend_on_size_place_polarity_or_contrast(
    digit: Digit,
    times: int,
    margins: tuple[int, int, int, int],
    is_dark: bool,
    ground: int,
    contrast: int,
) -> None:
    big = (enlarged(digit, times, margins).astype(int) * contrast // 255 + ground).astype(np.uint8)

    assert difference(frame(Image.fromarray(255 - big if is_dark else big), limits=ROOMY), digit) < 1.5


@hypothesis_settings(deadline=None, max_examples=50)
@given(st.integers(0, 2**32 - 1))
def test_centre_of_mass_lies_on_index_14(seed: int) -> None:
    blob = np.zeros((60, 60), np.uint8)
    blob[20:40, 25:40] = np.random.default_rng(seed).integers(50, 256, (20, 15))
    framed = center(blob)
    row = (framed.sum(axis=1) @ np.arange(28)) / framed.sum()
    column = (framed.sum(axis=0) @ np.arange(28)) / framed.sum()

    assert abs(row - 14) <= 0.5
    assert abs(column - 14) <= 0.5


def test_noisy_ground_is_not_taken_for_ink(digit: Digit) -> None:
    noise = np.random.default_rng(0).normal(0, 5, enlarged(digit).shape)
    photo = np.clip(210 - 0.7 * enlarged(digit) + noise, 0, 255).astype(np.uint8)

    assert difference(frame(Image.fromarray(photo)), digit) < 4


def test_thin_strokes_keep_full_contrast() -> None:
    drawing = np.zeros((400, 400), np.uint8)
    drawing[50:350, 200] = 255
    drawing[50, 100:300] = 255

    assert frame(Image.fromarray(drawing)).max() == 255


def test_stretch_scales_the_whole_image(digit: Digit) -> None:
    wide = np.kron(digit, np.ones((3, 7), np.uint8))

    assert np.array_equal(frame(Image.fromarray(wide), framing="stretch"), digit)


@pytest.mark.parametrize("framing", ["auto", "center"])
@pytest.mark.parametrize("size", [(1, 1), (28, 28), (4000, 3), (3, 4000), (200, 100)])
@pytest.mark.parametrize("level", [0, 77, 255])
def test_one_grey_is_blank(framing: Framing, size: tuple[int, int], level: int) -> None:
    framed = frame(Image.new("L", size, level), framing=framing)

    assert framed.shape == (28, 28)
    assert not framed.any()


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
        polarity=polarity, framing=framing
    )

    assert framed.shape == (28, 28)
    assert framed.dtype == np.uint8


@pytest.mark.parametrize("size", [(4000, 3), (3, 4000), (2000, 1)])
def test_ink_in_extreme_ratios_is_framed(size: tuple[int, int]) -> None:
    image = Image.new("L", size)
    image.paste(255, (size[0] // 4, size[1] // 4, size[0] // 4 * 3 + 1, size[1] // 4 * 3 + 1))

    assert frame(image).max() == 255


# Refusals


def test_empty_is_refused() -> None:
    with pytest.raises(InvalidImageError, match=r"^encoded: empty; accepted are PNG, JPEG, BMP"):
        frame(b"")


@pytest.mark.parametrize(
    "data", [b"x", b"GIF89a", b"\x89PNG\r\n\x1a\n", b"%PDF-1.7", b"<svg/>", b"II*\0", b"P5", b"RIFF0000WEBP"]
)
def test_what_is_no_image_is_refused(data: bytes) -> None:
    with pytest.raises(InvalidImageError, match=r"^encoded: not a readable image: .*; accepted are PNG"):
        frame(data)


@pytest.mark.parametrize("kind", ["ICO", "PCX", "TGA", "JPEG2000", "PDF"])
def test_other_formats_are_refused(digit: Digit, kind: str) -> None:
    with pytest.raises(InvalidImageError, match="unknown format"):
        frame(encoded(Image.fromarray(digit), kind))


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


def test_png_cut_anywhere_is_refused(digit: Digit) -> None:
    data = encoded(Image.fromarray(enlarged(digit)))
    for length in range(len(data)):
        with pytest.raises(InvalidImageError):
            frame(data[:length])


@pytest.mark.parametrize("kind", [kind for kind in FORMATS if kind != "PNG"])
def test_file_cut_anywhere_is_refused_or_whole(digit: Digit, kind: str) -> None:
    data = encoded(Image.fromarray(255 - enlarged(digit, 2)), kind)
    whole = frame(data)
    for length in range(0, len(data), max(1, len(data) // 700)):
        try:
            framed = frame(data[:length])
        except InvalidImageError:
            continue
        assert np.array_equal(framed, whole), f"half an image from {length} of {len(data)} bytes"


def test_png_with_wrong_checksum_is_refused(digit: Digit) -> None:
    data = bytearray(encoded(Image.fromarray(digit)))
    data[data.index(b"IDAT") + 20] ^= 1
    with pytest.raises(InvalidImageError, match="wrong checksum in PNG chunk IDAT"):
        frame(bytes(data))


def test_bytes_behind_a_png_are_ignored(digit: Digit) -> None:
    assert np.array_equal(frame(encoded(Image.fromarray(digit)) + b"PK\3\4 more"), digit)


def test_too_many_bytes_are_refused_before_reading(digit: Digit) -> None:
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


def test_text_bomb_is_refused(digit: Digit) -> None:
    body = b"k\0\0" + zlib.compress(bytes(64 << 20), 9)
    bomb = struct.pack(">I", len(body)) + b"zTXt" + body + struct.pack(">I", zlib.crc32(b"zTXt" + body))
    data = encoded(Image.fromarray(digit))
    with pytest.raises(InvalidImageError, match="Decompressed data too large"):
        frame(data[:33] + bomb + data[33:])


# Raw pixels


@pytest.mark.parametrize("channels", [0, 1, 3, 4])
def test_raw_pixels_equal_encoded_ones(digit: Digit, channels: int) -> None:
    image = ImageOps.colorize(Image.fromarray(digit), "navy", "yellow").convert(
        {0: "L", 1: "L", 3: "RGB", 4: "RGBA"}[channels]
    )
    raw = open_raw(np.asarray(image).tobytes(), height=28, width=28, channels=channels, limits=LIMITS)

    assert np.array_equal(raw.frame(polarity="auto", framing="auto"), frame(image))


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
