from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from PIL import Image

from imaging.decoding import ImageFile, Pixels, UndecodableError
from imaging.framing import Manner, frame
from tests.digits import FORMATS, LOSSLESS, difference, encoded, enlarged


def framed_from(image: Image.Image | bytes) -> Pixels:
    data = encoded(image) if isinstance(image, Image.Image) else image
    return frame(*ImageFile(data).planes(), Manner())


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("is_dark", [False, True])
def test_enlarged_digit_on_margins_comes_back(digit: Pixels, kind: str, is_dark: bool) -> None:
    big = enlarged(digit)
    framed = framed_from(encoded(Image.fromarray(255 - big if is_dark else big), kind))

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
def test_same_digit_in_every_mode(digit: Pixels, mode: str, is_dark: bool) -> None:
    image, kind = MODES[mode](Image.fromarray(255 - digit if is_dark else digit))

    assert difference(framed_from(encoded(image, kind)), digit) < (3 if kind == "JPEG" else 1)


def test_one_bit_image_is_thresholded_digit(digit: Pixels) -> None:
    bilevel = Image.fromarray(digit).point(lambda level: 255 * (level >= 128), "1")

    assert np.array_equal(framed_from(bilevel), np.where(digit >= 128, 255, 0))


def test_16_bit_grey_is_scaled_by_257() -> None:
    values = np.zeros((28, 28), np.uint16)
    values[10, 10:13] = 65535, 257 * 100, 257 * 50 + 129

    assert framed_from(Image.fromarray(values))[10, 10:13].tolist() == [255, 100, 51]


def test_floats_that_are_not_finite_are_refused() -> None:
    values = np.zeros((28, 28), np.float32)
    values[3, 3] = np.nan
    with pytest.raises(UndecodableError, match="pixels that are not finite"):
        framed_from(encoded(Image.fromarray(values), "TIFF"))


def test_mode_without_grey_is_refused() -> None:
    with pytest.raises(UndecodableError):
        framed_from(encoded(Image.new("LAB", (28, 28)), "TIFF"))


def test_first_frame_of_gif_counts(digit: Pixels) -> None:
    first, second = Image.fromarray(digit), Image.fromarray(np.rot90(digit).copy())

    data = encoded(first, "GIF", save_all=True, append_images=[second])

    assert np.array_equal(framed_from(data), digit)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF"])
def test_exif_orientation_is_applied_once(digit: Pixels, kind: str, orientation: int) -> None:
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

    assert difference(framed_from(encoded(stored, kind, exif=exif, **options)), digit) < 3


def test_broken_exif_is_ignored(digit: Pixels) -> None:
    data = encoded(Image.fromarray(digit), exif=b"Exif\0\0II*\0\xff\xff\xff\xff")

    assert np.array_equal(framed_from(data), digit)


@pytest.mark.parametrize("kind", ["ICO", "PCX", "TGA", "JPEG2000", "PDF"])
def test_other_formats_are_refused(digit: Pixels, kind: str) -> None:
    with pytest.raises(UndecodableError, match="unknown format"):
        framed_from(encoded(Image.fromarray(digit), kind))


def test_png_cut_anywhere_is_refused(digit: Pixels) -> None:
    data = encoded(Image.fromarray(enlarged(digit)))
    for length in range(len(data)):
        with pytest.raises(UndecodableError):
            framed_from(data[:length])


@pytest.mark.parametrize("kind", [kind for kind in FORMATS if kind != "PNG"])
def test_file_cut_anywhere_is_refused_or_whole(digit: Pixels, kind: str) -> None:
    data = encoded(Image.fromarray(255 - enlarged(digit, 2)), kind)
    whole = framed_from(data)
    for length in range(0, len(data), max(1, len(data) // 700)):
        try:
            framed = framed_from(data[:length])
        except UndecodableError:
            continue
        assert np.array_equal(framed, whole), f"half an image from {length} of {len(data)} bytes"


def test_png_with_wrong_checksum_is_refused(digit: Pixels) -> None:
    data = bytearray(encoded(Image.fromarray(digit)))
    data[data.index(b"IDAT") + 20] ^= 1
    with pytest.raises(UndecodableError, match="wrong checksum in PNG chunk IDAT"):
        framed_from(bytes(data))


def test_bytes_behind_a_png_are_ignored(digit: Pixels) -> None:
    assert np.array_equal(framed_from(encoded(Image.fromarray(digit)) + b"PK\3\4 more"), digit)
