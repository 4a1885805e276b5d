"""The suite of corruptions: what holds for all of them, and what makes each the one it is."""

import numpy as np
import numpy.typing as npt
import pytest

from training.evaluation.corruptions import CORRUPTIONS, SEVERITIES, Draws, corrupt

Images = npt.NDArray[np.uint8]

INDICES = np.arange(700, 718)

AMOUNTS = {
    "shift": (13.9, 20.7, 27.0, 32.1, 34.9),
    "rotation": (8.6, 14.9, 20.2, 24.8, 27.6),
    "scale": (9.3, 12.6, 15.1, 17.3, 19.3),
    "shear": (7.1, 12.5, 17.9, 22.9, 26.5),
    "gaussian-noise": (10.3, 20.6, 30.8, 40.7, 49.9),
    "shot-noise": (2.1, 3.3, 4.6, 6.4, 9.3),
    "impulse-noise": (3.4, 8.7, 15.2, 25.2, 37.4),
    "gaussian-blur": (6.4, 11.0, 14.7, 18.8, 22.8),
    "motion-blur": (5.6, 9.2, 12.4, 15.3, 17.7),
    "glass-blur": (7.2, 9.4, 11.6, 14.2, 17.3),
    "pixelate": (6.8, 8.9, 11.4, 15.4, 19.3),
    "brightness": (35.3, 70.6, 106.8, 142.1, 176.3),
    "contrast": (15.7, 23.1, 28.7, 32.4, 35.5),
    "fog": (35.5, 53.2, 71.0, 88.7, 106.5),
    "stripe": (19.5, 39.2, 58.5, 86.5, 113.8),
    "occlusion": (1.1, 2.9, 5.8, 10.1, 14.6),
    "spatter": (6.0, 12.0, 20.1, 31.3, 45.0),
    "zigzag": (7.1, 12.3, 18.8, 26.6, 36.0),
    "dotted-line": (3.6, 5.6, 8.8, 12.7, 18.6),
    "thinning": (3.9, 7.8, 11.7, 14.6, 17.1),
    "thickening": (9.5, 19.2, 29.2, 39.7, 50.3),
    "edges": (7.8, 13.0, 18.2, 22.1, 26.0),
}
"""Mean change of a pixel, in grey levels, by severity."""


@pytest.fixture(scope="module")
def strokes() -> Images:
    """18 images of one bright stroke each, grey at its ends."""
    images = np.zeros((18, 28, 28), np.uint8)
    for place, image in enumerate(images):
        image[6:22, 8 + place % 9 : 12 + place % 9] = 255
        image[6, 8:20] = image[21, 8:20] = 100
    return images


def damage(images: Images, name: str, severity: int) -> float:
    return float(np.abs(corrupt(images, name, severity) - images.astype(float)).mean())


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_batches_cut_and_ordered_anyhow_come_out_alike(strokes: Images, name: str) -> None:
    whole = corrupt(strokes, name, 4, indices=INDICES)
    backwards = corrupt(strokes[::-1], name, 4, indices=INDICES[::-1])
    parts = [corrupt(strokes[place], name, 4, indices=INDICES[place]) for place in np.split(np.arange(18), [1, 7])]

    assert (str(whole.dtype), whole.shape) == ("uint8", strokes.shape)
    np.testing.assert_array_equal(np.concatenate(parts), whole)
    np.testing.assert_array_equal(backwards[::-1], whole)


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_severities_go_up(strokes: Images, name: str) -> None:
    amounts = [damage(strokes, name, severity) for severity in SEVERITIES]

    assert amounts[0] > 0
    assert amounts == sorted(amounts)
    assert amounts[-1] > 1.5 * amounts[0]


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_images_given_stay_as_they_are(strokes: Images, name: str) -> None:
    before = strokes.copy()
    corrupt(strokes, name, 5)

    np.testing.assert_array_equal(strokes, before)


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_no_image_at_all_is_no_error(name: str) -> None:
    assert corrupt(np.zeros((0, 28, 28), np.uint8), name, 1).shape == (0, 28, 28)


RANDOM = set(CORRUPTIONS) - {
    "scale", "gaussian-blur", "pixelate", "brightness", "contrast", "thinning", "thickening", "edges",
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(RANDOM))
def test_another_seed_or_index_gives_another_accident(strokes: Images, name: str) -> None:
    same = np.repeat(strokes[:1], 8, axis=0)
    here, there = corrupt(same, name, 3, seed=0), corrupt(same, name, 3, seed=1)

    assert (here != there).any()
    assert len({image.tobytes() for image in here}) > 1


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_amounts_are_those_that_results_were_measured_with(strokes: Images, name: str) -> None:
    """Who changes them makes old results mean something else, and should know."""
    assert [damage(strokes, name, severity) for severity in SEVERITIES] == pytest.approx(AMOUNTS[name], abs=0.1)


@pytest.mark.parametrize(("height", "width"), [(8, 8), (32, 20)])
def test_other_sizes_are_taken(height: int, width: int) -> None:
    image = np.full((2, height, width), 128, np.uint8)

    for name in CORRUPTIONS:
        assert corrupt(image, name, 5).shape == image.shape


def test_unknown_name_or_severity_is_refused_with_what_is_allowed(strokes: Images) -> None:
    with pytest.raises(ValueError, match=r"corruption 'rain': there is none; known are shift, rotation"):
        corrupt(strokes, "rain", 1)
    with pytest.raises(ValueError, match="severity 6: 1 to 5 are allowed"):
        corrupt(strokes, "fog", 6)


def test_draws_are_even_and_never_repeat() -> None:
    draws = Draws("key", np.arange(500))
    first, second = draws.uniform(200), draws.uniform(200)

    assert ((first > 0) & (first < 1)).all()
    assert np.histogram(first, bins=10, range=(0, 1))[0] == pytest.approx(10_000, rel=0.05)
    assert len(np.unique(np.concatenate((first, second)))) == 200_000
    assert abs(np.corrcoef(first[:-1].ravel(), first[1:].ravel())[0, 1]) < 0.02


def test_normal_draws_are_normal() -> None:
    drawn = Draws("key", np.arange(500)).normal(400)

    assert (drawn.mean(), drawn.std()) == pytest.approx((0, 1), abs=0.01)
    assert (np.abs(drawn) < 1.96).mean() == pytest.approx(0.95, abs=0.003)


def test_shot_noise_counts_as_many_photons_as_the_image_is_bright() -> None:
    grey = np.full((400, 28, 28), 102, np.uint8)  # 0.4 of 255
    noisy = corrupt(grey, "shot-noise", 1) / 255 * 30

    assert noisy.mean() == pytest.approx(12, abs=0.05)
    assert noisy.var() == pytest.approx(12, rel=0.02)


def test_rotation_and_shift_keep_the_ink() -> None:
    disc = (np.hypot(*(np.indices((28, 28)) - 13.5)) < 7)[None].repeat(6, axis=0).astype(np.uint8) * 255
    turned, moved = corrupt(disc, "rotation", 5), corrupt(disc, "shift", 5)

    assert np.abs(turned - disc.astype(float)).mean() < 6  # a disc about the middle looks alike from all sides
    np.testing.assert_allclose(moved.sum(axis=(1, 2)), disc.sum(axis=(1, 2)), rtol=0.01)
    offset = np.hypot(*(np.array(np.nonzero(moved[0] > 127)).mean(axis=1) - 13.5))
    assert offset == pytest.approx(5.5, abs=0.3)
