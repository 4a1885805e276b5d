"""A digit, and the files that it comes in."""

import io
from typing import Any

import numpy as np
from PIL import Image

from imaging.decoding import Pixels

FORMATS = ["PNG", "JPEG", "BMP", "GIF", "WEBP", "TIFF", "PPM"]
LOSSLESS = ["PNG", "BMP", "GIF", "TIFF", "PPM"]


def seven() -> Pixels:
    """Return a seven as MNIST would hold it: 20x20 with soft edges, centred by mass, full contrast."""
    big = np.zeros((200, 200), np.uint8)
    big[0:30, 20:180] = 255
    for row in range(30, 200):
        left = 145 - (row - 30) // 2
        big[row, left : left + 35] = 255
    small = big.reshape(20, 10, 20, 10).mean(axis=(1, 3)).astype(np.uint8)
    framed = np.zeros((28, 28), np.uint8)
    rows, columns = np.arange(20), np.arange(20)
    top = round(14 - float(small.sum(axis=1) @ rows) / float(small.sum()))
    left = round(14 - float(small.sum(axis=0) @ columns) / float(small.sum()))
    framed[top : top + 20, left : left + 20] = small
    return framed


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    """An image as a file."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def enlarged(digit: Pixels, times: int = 10, margins: tuple[int, int, int, int] = (40, 90, 10, 150)) -> Pixels:
    """Each pixel as a square, with margins above, below, left and right."""
    top, bottom, left, right = margins
    return np.pad(np.kron(digit, np.ones((times, times), np.uint8)), ((top, bottom), (left, right)))


def difference(first: Pixels, second: Pixels) -> float:
    """Grey levels, mean over the pixels."""
    return float(np.abs(first.astype(int) - second).mean())
