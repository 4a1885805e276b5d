import numpy as np
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from PIL import Image

from imaging.decoding import ImageFile, Pixels
from imaging.framing import Framing, Manner, Polarity, center, frame
from tests.digits import LOSSLESS, difference, encoded, enlarged


def framed_from(image: Image.Image | bytes, polarity: Polarity = "auto", framing: Framing = "auto") -> Pixels:
    data = encoded(image) if isinstance(image, Image.Image) else image
    return frame(*ImageFile(data).planes(), Manner(polarity, framing))


@pytest.mark.parametrize("kind", LOSSLESS)
def test_28x28_grey_passes_bit_exact(digit: Pixels, kind: str) -> None:
    framed = framed_from(encoded(Image.fromarray(digit), kind))

    assert framed.dtype == np.uint8
    assert np.array_equal(framed, digit)


def test_28x28_dark_on_light_is_inverted_exactly(digit: Pixels) -> None:
    assert np.array_equal(framed_from(Image.fromarray(255 - digit)), digit)


def test_given_polarity_wins_over_the_border(digit: Pixels) -> None:
    assert np.array_equal(framed_from(Image.fromarray(digit), "dark_on_light"), 255 - digit)
    assert np.array_equal(framed_from(Image.fromarray(255 - digit), "light_on_dark"), 255 - digit)


@pytest.mark.parametrize("ink", [0, 255], ids=["black ink", "white ink"])
def test_ink_on_transparent_ground(digit: Pixels, ink: int) -> None:
    big = enlarged(digit)
    image = Image.merge("LA", (Image.new("L", big.shape[::-1], ink), Image.fromarray(big)))

    assert difference(framed_from(image), digit) < 0.5


def test_black_ink_on_white_card_with_transparent_corners(digit: Pixels) -> None:
    big = enlarged(digit)
    alpha = np.full_like(big, 255)
    alpha[:30, :30] = alpha[-30:, :30] = alpha[:30, -30:] = alpha[-30:, -30:] = 0
    image = Image.merge("LA", (Image.fromarray(255 - big), Image.fromarray(alpha)))

    assert difference(framed_from(image), digit) < 0.5


def test_white_card_in_transparent_margin(digit: Pixels) -> None:
    big = np.pad(enlarged(digit), 200)
    alpha = np.zeros_like(big)
    alpha[200:-200, 200:-200] = 255
    image = Image.merge("LA", (Image.fromarray(255 - big), Image.fromarray(alpha)))

    assert difference(framed_from(image), digit) < 0.5


@pytest.mark.parametrize("mode", ["P", "L", "RGB"])
def test_transparent_colour_is_ground(digit: Pixels, mode: str) -> None:
    bilevel = np.where(digit >= 128, np.uint8(0), np.uint8(200))
    image = Image.fromarray(bilevel).convert("RGB").convert(mode) if mode != "P" else Image.fromarray(bilevel)
    key: int | tuple[int, int, int] = (200, 200, 200) if mode == "RGB" else 200
    if mode == "P":
        image = image.convert("P")
        key = int(np.asarray(image)[0, 0])

    framed = framed_from(encoded(image, transparency=key))

    assert np.array_equal(framed, np.where(digit >= 128, 255, 0))


def test_all_transparent_is_blank() -> None:
    assert not framed_from(Image.new("RGBA", (50, 50), (200, 10, 10, 0))).any()


def test_center_is_near_identity_for_mnist_like_digit(digit: Pixels) -> None:
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
    digit: Pixels,
    times: int,
    margins: tuple[int, int, int, int],
    is_dark: bool,
    ground: int,
    contrast: int,
) -> None:
    big = (enlarged(digit, times, margins).astype(int) * contrast // 255 + ground).astype(np.uint8)

    assert difference(framed_from(Image.fromarray(255 - big if is_dark else big)), digit) < 1.5


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


def test_noisy_ground_is_not_taken_for_ink(digit: Pixels) -> None:
    noise = np.random.default_rng(0).normal(0, 5, enlarged(digit).shape)
    photo = np.clip(210 - 0.7 * enlarged(digit) + noise, 0, 255).astype(np.uint8)

    assert difference(framed_from(Image.fromarray(photo)), digit) < 4


def test_thin_strokes_keep_full_contrast() -> None:
    drawing = np.zeros((400, 400), np.uint8)
    drawing[50:350, 200] = 255
    drawing[50, 100:300] = 255

    assert framed_from(Image.fromarray(drawing)).max() == 255


def test_stretch_scales_the_whole_image(digit: Pixels) -> None:
    wide = np.kron(digit, np.ones((3, 7), np.uint8))

    assert np.array_equal(framed_from(Image.fromarray(wide), framing="stretch"), digit)


@pytest.mark.parametrize("framing", ["auto", "center"])
@pytest.mark.parametrize("size", [(1, 1), (28, 28), (4000, 3), (3, 4000), (200, 100)])
@pytest.mark.parametrize("level", [0, 77, 255])
def test_one_grey_is_blank(framing: Framing, size: tuple[int, int], level: int) -> None:
    framed = framed_from(Image.new("L", size, level), framing=framing)

    assert framed.shape == (28, 28)
    assert not framed.any()


@pytest.mark.parametrize("size", [(4000, 3), (3, 4000), (2000, 1)])
def test_ink_in_extreme_ratios_is_framed(size: tuple[int, int]) -> None:
    image = Image.new("L", size)
    image.paste(255, (size[0] // 4, size[1] // 4, size[0] // 4 * 3 + 1, size[1] // 4 * 3 + 1))

    assert framed_from(image).max() == 255
