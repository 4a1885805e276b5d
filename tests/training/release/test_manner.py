import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image, ImageDraw

from imaging.framing import Manner, center, stretch
from training.release.manner import manner_of

Images = npt.NDArray[np.uint8]


def pictures(*, ground: int, ink: int, side: int = 40) -> list[Images]:
    """Twenty bars of all sizes, off the middle, that reach into the border."""
    found = []
    for number in range(20):
        image = Image.new("L", (side, side), ground)
        ImageDraw.Draw(image).rectangle((number % 7, 0, 20 + number, 9 + number), fill=ink)
        found.append(np.asarray(image))
    return found


@pytest.mark.parametrize(
    ("images", "manner"),
    [
        pytest.param([center(image) for image in pictures(ground=0, ink=200)], Manner("auto", "auto"), id="digits"),
        pytest.param([stretch(image) for image in pictures(ground=0, ink=200)], Manner("auto", "stretch"), id="things"),
        pytest.param(
            [stretch(image) for image in pictures(ground=220, ink=20)], Manner("light_on_dark", "stretch"), id="bright"
        ),
        pytest.param([np.zeros((28, 28), np.uint8)], Manner("auto", "auto"), id="blank"),
    ],
)
def test_card_says_what_leaves_the_training_images_as_they_are(images: list[Images], manner: Manner) -> None:
    assert manner_of(np.stack(images)) == manner


def test_some_images_that_differ_do_not_decide() -> None:
    digits = [center(image) for image in pictures(ground=0, ink=200)]
    things = [stretch(image) for image in pictures(ground=0, ink=200)]

    assert manner_of(np.stack(digits + things[:3])).framing == "auto"
    assert manner_of(np.stack(digits + things)).framing == "stretch"
