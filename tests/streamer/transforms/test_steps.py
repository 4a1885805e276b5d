"""What each step makes of images: against NumPy's own functions, or against bilinear sampling written out."""

import math

import numpy as np
import pytest
from numpy.typing import NDArray

from streamer.transforms.draws import Draws
from streamer.transforms.parameters import Spread
from streamer.transforms.resampling import AffineMaps, Sampler
from streamer.transforms.steps import Elastic, Noise, Rotate, Scale, Shear, Shift, sine_cosine
from streamer.transforms.transform import parse

Images = NDArray[np.uint8]


@pytest.fixture
def images() -> Images:
    """Forty images of random pixels: the hardest there are to sample."""
    return np.random.default_rng(5).integers(0, 256, (40, 28, 28), dtype=np.uint8)


def made(spec: str, images: Images, *, seed: int | None = 1, epoch: int = 0) -> NDArray[np.generic]:
    transform = parse(spec, image_shape=images.shape[1:])
    return transform.apply(images, np.arange(len(images)), seed=seed, epoch=epoch)


def words(count: int) -> NDArray[np.uint32]:
    return Draws(np.arange(count), seed=4, epoch=0).words(0, 4)


@pytest.mark.parametrize(
    "spec",
    [
        "",
        "rotate(degrees=0)|shift(pixels=0)|scale(percent=0)|shear(degrees=0)",
        "elastic(pixels=0)|cutout(pixels=0)|noise(std=0)|pad(pixels=0)",
        "augment-v1(rotate=0,shift=0,scale=0,shear=0)",
        # These are sampled, with a map that changes nothing.
        "crop(height=28,width=28)",
        "shift(pixels=3..3)|shift(pixels=-3..-3)",
        "rotate(degrees=77..77)|rotate(degrees=-77..-77)",
    ],
)
def test_nothing_changes_with_parameters_of_zero(spec: str, images: Images) -> None:
    np.testing.assert_array_equal(made(spec, images), images)


@pytest.mark.parametrize("quarters", [-2, -1, 1, 2])
@pytest.mark.parametrize("side", [1, 2, 27, 28])
def test_rotate_turns_counter_clockwise(quarters: int, side: int, images: Images) -> None:
    square = images[:, :side, :side]

    turned = made(f"rotate(degrees={90 * quarters}..{90 * quarters})", square)

    np.testing.assert_array_equal(turned, np.rot90(square, quarters, axes=(1, 2)))


def test_shift_moves_right_and_down_and_fills_with_zero(images: Images) -> None:
    shifted = made("shift(pixels=3..3)", images)

    np.testing.assert_array_equal(shifted[:, 3:, 3:], images[:, :-3, :-3])
    assert not shifted[:, :3].any()
    assert not shifted[:, :, :3].any()


def test_shift_by_more_than_the_image_leaves_zeros(images: Images) -> None:
    assert not made("shift(pixels=-1000..-1000)", images).any()
    assert not made("shift(pixels=28..28)", images).any()


def test_half_a_pixel_mixes_neighbours_rounding_half_up() -> None:
    image = np.array([[[10, 11, 0], [10, 11, 0], [0, 0, 0]]], np.uint8)

    shifted = made("shift(pixels=-0.5..-0.5)", image)

    assert shifted[0].tolist() == [[11, 6, 0], [5, 3, 0], [0, 0, 0]]  # of 10.5, 5.5; 5.25, 2.75


def test_scale_by_a_whole_factor_repeats_pixels() -> None:
    image = np.zeros((1, 6, 6), np.uint8)
    image[0, 2:4, 2:4] = 200

    larger, smaller = made("scale(percent=200..200)", image), made("scale(percent=-50..-50)", image)

    assert larger[0, 1:5, 1:5].min() == 200
    assert smaller.sum() == pytest.approx(int(image.sum()) / 4, rel=0.01)


def test_shear_leans_the_top_to_the_right() -> None:
    image = np.zeros((1, 5, 5), np.uint8)
    image[0, :, 2] = 100

    leaning = made("shear(degrees=45..45)", image)

    np.testing.assert_array_equal(leaning[0], np.fliplr(np.eye(5, dtype=np.uint8)) * 100)


def test_mirror_swaps_left_and_right_of_its_share_of_samples(images: Images) -> None:
    many = images[np.arange(400) % len(images)]

    mirrored = made("mirror(probability=0.25)", many)

    swapped = (mirrored == many[:, :, ::-1]).all(axis=(1, 2))
    assert ((mirrored == many).all(axis=(1, 2)) | swapped).all()
    assert 60 < swapped.sum() < 140
    np.testing.assert_array_equal(made("mirror(probability=1)", images), images[:, :, ::-1])


def test_pad_puts_zeros_around(images: Images) -> None:
    np.testing.assert_array_equal(made("pad(pixels=3)", images), np.pad(images, ((0, 0), (3, 3), (3, 3))))


def test_crop_cuts_the_middle_or_any_window(images: Images) -> None:
    middle = made("crop(height=20,width=10,at=centre)", images)
    windows = made("crop(height=27,width=25)", images)

    np.testing.assert_array_equal(middle, images[:, 4:24, 9:19])
    every = np.lib.stride_tricks.sliding_window_view(images, (27, 25), axis=(1, 2))
    found = [(every[n] == windows[n]).all(axis=(2, 3)) for n in range(len(images))]
    assert all(hits.sum() == 1 for hits in found)
    assert np.sum(found, axis=0).min() >= 1  # each of the 8 places is someone's


def test_geometric_steps_in_a_row_are_sampled_once(images: Images) -> None:
    """There and back again: sampled twice, random pixels would be smeared."""
    there_and_back = made("shift(pixels=0.5..0.5)|scale(percent=25..25)|scale(percent=-20..-20)", images)

    np.testing.assert_array_equal(there_and_back, made("shift(pixels=0.5..0.5)", images))


def test_sampling_agrees_with_bilinear_interpolation_written_out(images: Images) -> None:
    rng = np.random.default_rng(2)
    parts = rng.uniform(-1.5, 1.5, (4, len(images)))
    x0, y0 = rng.uniform(-5, 30, (2, len(images)))
    maps = AffineMaps(parts[0], parts[1], x0, parts[2], parts[3], y0)
    out = np.empty((len(images), 20, 33), np.uint8)

    Sampler((28, 28), (20, 33)).sample(images, maps, None, out)

    exact = np.stack([bilinear(images[n], maps[n : n + 1], 20, 33) for n in range(len(images))])
    assert np.abs(out - exact).max() < 255 / 128 + 0.5  # a place is off by 1/256 in x and in y, at most
    assert np.abs(out - exact).mean() < 0.6


def bilinear(image: Images, maps: AffineMaps, height: int, width: int) -> NDArray[np.float64]:
    """In floating point, pixel by pixel."""
    framed = np.pad(image.astype(np.float64), 200)
    result = np.empty((height, width))
    for row in range(height):
        for column in range(width):
            x = float((maps.xx * column + maps.xy * row + maps.x0)[0]) + 200
            y = float((maps.yx * column + maps.yy * row + maps.y0)[0]) + 200
            left, top = math.floor(x), math.floor(y)
            across, down = x - left, y - top
            (a, b), (c, d) = framed[top : top + 2, left : left + 2]
            result[row, column] = (a * (1 - across) + b * across) * (1 - down) + (c * (1 - across) + d * across) * down
    return result


def test_steps_apply_in_the_order_written() -> None:
    image = np.zeros((1, 9, 9), np.uint8)
    image[0, 4, 4] = 255

    first = made("shift(pixels=2..2)|rotate(degrees=90..90)", image)
    last = made("rotate(degrees=90..90)|shift(pixels=2..2)", image)

    assert np.argwhere(first[0]).tolist() == [[2, 6]]
    assert np.argwhere(last[0]).tolist() == [[6, 6]]


def test_channels_move_together(images: Images) -> None:
    coloured = np.stack([images, images[::-1], 255 - images], axis=-1)

    result = made("augment-v1(elastic=2,cutout=9)", coloured)

    assert result.shape == coloured.shape
    np.testing.assert_array_equal(result[..., 0], made("augment-v1(elastic=2,cutout=9)", images))


def test_elastic_moves_no_point_further_than_asked() -> None:
    """A ramp shows in each pixel how far it was fetched from."""
    ramp = np.broadcast_to((np.arange(28) * 9).astype(np.uint8), (200, 28, 28)).copy()

    bent = made("elastic(pixels=2,spacing=6)", ramp).astype(np.float64)[:, 3:-3, 3:-3]

    moved = bent / 9 - np.arange(28)[3:-3]
    assert 0.9 < np.abs(moved).max() <= 2.1
    assert moved.mean() == pytest.approx(0, abs=0.05)
    assert np.abs(np.diff(moved, axis=1)).max() < 1.5  # smooth: neighbours move alike


def test_elastic_bends_what_the_map_before_it_made(images: Images) -> None:
    """Sampled once, yet as if turned first: a quarter turn loses nothing, and random numbers go by a step's place."""
    turned = np.ascontiguousarray(np.rot90(images, axes=(1, 2)))

    at_once = made("rotate(degrees=90..90)|elastic(pixels=2)", images)

    np.testing.assert_array_equal(at_once, made("shift(pixels=0)|elastic(pixels=2)", turned))


def test_what_follows_a_bend_moves_what_it_made(images: Images) -> None:
    bent = made("elastic(pixels=2)", images)

    moved = made("elastic(pixels=2)|shift(pixels=3..3)", images)

    np.testing.assert_array_equal(moved[:, 3:, 3:], bent[:, :-3, :-3])


def test_cutout_paints_squares_anywhere_with_its_probability() -> None:
    white = np.full((4000, 20, 20), 255, np.uint8)

    painted = made("cutout(pixels=5,fill=7,probability=0.25)", white)

    sizes = (painted == 7).sum(axis=(1, 2))
    assert set(np.unique(painted)) == {7, 255}
    assert set(sizes) <= {0, *(height * width for height in (3, 4, 5) for width in (3, 4, 5))}
    assert np.mean(sizes > 0) == pytest.approx(0.25, abs=0.02)
    assert (painted == 7).any(axis=0).all()


def test_noise_is_normal_and_cut_off_at_the_ends() -> None:
    grey = np.full((300, 28, 28), 128, np.uint8)

    noise = made("noise(std=20)", grey).astype(np.float64) - 128
    ends = made("noise(std=20)", (grey // 128) * 255)

    assert noise.mean() == pytest.approx(0, abs=0.15)
    assert noise.std() == pytest.approx(20, rel=0.01)
    assert np.mean(np.abs(noise) <= 20.5) == pytest.approx(0.695, abs=0.005)
    assert np.mean(ends == 255) == pytest.approx(0.51, abs=0.01)
    assert Noise(0.001).apply(grey, Draws(np.arange(300), seed=1, epoch=0), 0).min() == 128


@pytest.mark.parametrize(("dtype", "digits"), [("float32", 6), ("float16", 2)])
def test_normalise_makes_floats(dtype: str, digits: int, images: Images) -> None:
    result = made(f"normalise(mean=0.1307,std=0.3081,dtype={dtype})", images)

    assert result.dtype == np.dtype(dtype)
    np.testing.assert_allclose(result.astype(np.float64), (images / 255 - 0.1307) / 0.3081, atol=10.0**-digits)


def test_normalise_takes_numbers_for_each_channel(images: Images) -> None:
    coloured = np.stack([images] * 3, axis=-1)

    result = made("normalise(mean=0.1:0.2:0.3,std=0.5)", coloured)

    np.testing.assert_allclose(result.astype(np.float64), (coloured / 255 - [0.1, 0.2, 0.3]) / 0.5, atol=1e-6)


def test_random_parameters_are_uniform_over_their_range() -> None:
    draws, shape = words(20_000), (28, 28)

    turned = Rotate(Spread(-30, 10)).maps(draws, shape)
    shifted = Shift(Spread(-2, 2)).maps(draws, shape)
    scaled = Scale(Spread(-20, 50)).maps(draws, shape)
    leaning = Shear(Spread(-5, 5)).maps(draws, shape)

    for values, low, high in (
        (np.degrees(np.arctan2(turned.yx, turned.xx)), -30, 10),
        (-shifted.x0, -2, 2),
        (-shifted.y0, -2, 2),
        (100 / scaled.xx - 100, -20, 50),
        (np.degrees(np.arctan(leaning.xy)), -5, 5),
    ):
        quarters = np.quantile(values, [0, 0.25, 0.5, 0.75, 1])
        np.testing.assert_allclose(quarters, np.linspace(low, high, 5), atol=0.015 * (high - low))
    assert abs(np.corrcoef(shifted.x0, shifted.y0)[0, 1]) < 0.03


def test_sine_and_cosine_are_right_everywhere_and_exact_at_right_angles() -> None:
    degrees = np.linspace(-200, 200, 100_001)

    sine, cosine = sine_cosine(degrees)
    right_sine, right_cosine = sine_cosine(np.array([-180.0, -90, 0, 90, 180]))

    np.testing.assert_allclose(sine, np.sin(np.radians(degrees)), atol=1e-12)
    np.testing.assert_allclose(cosine, np.cos(np.radians(degrees)), atol=1e-12)
    np.testing.assert_array_equal(right_sine, [0, -1, 0, 1, 0])
    np.testing.assert_array_equal(right_cosine, [-1, 0, 1, 0, -1])


def test_a_batch_of_any_length_gives_the_same_as_its_samples_alone(images: Images) -> None:
    """Across the chunks that sampling works in."""
    many = np.concatenate([images] * 4)[:131]
    transform = parse("augment-v1(elastic=1.5,cutout=6)|noise(std=5)", image_shape=(28, 28))
    indices = np.arange(1000, 1131)

    together = transform.apply(many, indices, seed=3, epoch=4)

    for n in (0, 63, 64, 127, 128, 130):
        np.testing.assert_array_equal(
            together[n], transform.apply(many[n : n + 1], indices[n : n + 1], seed=3, epoch=4)[0]
        )


@pytest.mark.parametrize("shape", [(1, 1), (1, 28), (28, 1), (3, 200), (300, 2)])
def test_images_of_odd_shapes_are_bent_and_moved(shape: tuple[int, int]) -> None:
    images = np.full((3, *shape), 200, np.uint8)

    result = made("shift(pixels=0.3)|elastic(pixels=0.2)|noise(std=1)", images)

    assert result.shape == images.shape
    assert result.any()


def test_neutral_steps_still_have_their_own_random_numbers(images: Images) -> None:
    """Turning one part of a preset off leaves what the others draw as it is."""
    alone = made("augment-v1(shift=0,scale=0,shear=0)", images)

    np.testing.assert_array_equal(alone, made("rotate(degrees=10)", images))
    assert Elastic(0.0).is_neutral
