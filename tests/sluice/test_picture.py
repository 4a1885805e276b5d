import numpy as np
from rich.console import Console

from sluice import picture


def test_digit_without_colour_is_drawn_in_shades() -> None:
    image = np.zeros((4, 3), np.uint8)
    image[0, 1] = 255
    image[3, 0] = 128

    assert picture.digit(image, colour=False).plain == " @ \n=  "


def test_digit_in_colour_has_two_pixels_a_character() -> None:
    image = np.array([[0], [200]], np.uint8)
    (span,) = picture.digit(image, colour=True).spans

    assert span.style == "rgb(0,0,0) on rgb(200,200,200)"


def test_confusion_leaves_zeros_blank() -> None:
    console = Console(width=80)
    with console.capture() as captured:
        console.print(picture.confusion(np.array([[5, 0], [2, 7]]), ["cat", "dog"]))
    rows = [line.split() for line in captured.get().splitlines() if line.strip()][-2:]

    assert rows == [["cat", "5"], ["dog", "2", "7"]]
