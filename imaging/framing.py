"""
From grey to the network's 28x28: bright ink on a dark ground, framed.

Pure; whoever trains and whoever serves calls :func:`frame`, so that a network is asked about what it was taught.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image

from imaging.decoding import Pixels

Polarity = Literal["auto", "light_on_dark", "dark_on_light"]
Framing = Literal["auto", "center", "stretch"]

SIDE = 28
"""Height and width of the network's frame, in pixels."""

# MNIST's digits fill a 20x20 box inside the 28x28 field.
_BOX = 20
# Grey levels between ground and ink below which there is only paper texture: 6 % of the range.
_MIN_CONTRAST = 16
# Up to here going through all pixels takes less time than the calls that go through them.
_FEW_PIXELS = 64 * 64
# Share of the contrast above which a pixel is ink. Chosen on MNIST's test images, enlarged, saved as JPEG and
# with noise added: lower takes JPEG's ringing for ink, higher cuts the soft edge of clean strokes.
_INK_SHARE = 0.1
# Ink also has to stand this many standard deviations of the ground's noise above it.
_INK_SIGMAS = 4.0


@dataclass(frozen=True, slots=True)
class Manner:
    """How images of any size and colour become what a network takes; a model's card says which is its own."""

    polarity: Polarity = "auto"
    """``auto`` decides from the border of each image, see :func:`normalise_polarity`."""
    framing: Framing = "auto"
    """
    ``auto`` takes a 28x28 image as it is and centres any other; ``center`` is how MNIST was made, see :func:`center`;
    ``stretch`` scales the whole image.
    """


def frame(grey: Pixels, alpha: Pixels | None, manner: Manner) -> Pixels:
    """
    Return an image as the network wants it.

    Args:
        grey: uint8, shape (H, W).
        alpha: uint8, shape (H, W), 255 opaque; ``None`` where all of it is opaque.
        manner: How.

    Returns:
        uint8, shape (28, 28), 0 the ground and 255 the strongest ink. All zeros where there is no ink.
    """
    ink = normalise_polarity(grey, alpha, manner.polarity)
    if manner.framing == "stretch":
        return stretch(ink)
    if manner.framing == "auto" and ink.shape == (SIDE, SIDE):
        return ink
    return center(ink)


def normalise_polarity(grey: Pixels, alpha: Pixels | None, polarity: Polarity) -> Pixels:
    """
    Make ink bright on a dark ground, and what is transparent ground.

    ``auto`` compares the border's median with the image's least and greatest value: a border nearer to the
    greatest means dark ink. Where the border is mostly transparent (of the visible part, if only its surroundings
    are), the mean brightness of what is visible decides. An opaque image of one grey has no ink: all zeros.

    Args:
        grey: uint8, shape (H, W).
        alpha: uint8, shape (H, W), 255 opaque; ``None`` where all of it is opaque.
        polarity: As it is known, or ``auto``.

    Returns:
        uint8, shape (H, W); ``grey`` itself where there is nothing to change.
    """
    if alpha is not None and alpha.min() == 255:
        alpha = None
    if polarity == "auto":
        dark_ink = _is_ink_dark(grey) if alpha is None else _is_visible_ink_dark(grey, alpha)
        if dark_ink is None:
            return np.zeros_like(grey)
    else:
        dark_ink = polarity == "dark_on_light"
    ink = 255 - grey if dark_ink else grey
    if alpha is None:
        return ink
    # Rounded division by 255; 16 bits hold 255 * 255 + 127.
    return ((ink.astype(np.uint16) * alpha + 127) // 255).astype(np.uint8)


def center(ink: Pixels) -> Pixels:
    """
    Frame ink the way MNIST's digits were: in a 20x20 box, keeping the ratio, centred by mass in 28x28.

    Before that the ground, the border's median, is taken away and the contrast stretched to 255; after the scaling
    it is stretched once more, because thin strokes fade in it, which MNIST's, being thick, did not.

    Source: Y. LeCun, C. Cortes, C. Burges, "The MNIST database of handwritten digits",
    http://yann.lecun.com/exdb/mnist/, section on file formats. There the centre of mass lies on index 14 within
    half a pixel, which the test images confirm.

    Args:
        ink: uint8, shape (H, W), bright ink.

    Returns:
        uint8, shape (28, 28); all zeros where nothing stands out from the border.
    """
    border = np.sort(_border(ink))
    ground = int(border[len(border) // 2])
    contrast = int(ink.max()) - ground
    if contrast < _MIN_CONTRAST:
        return np.zeros((SIDE, SIDE), np.uint8)
    # The median absolute deviation times 1.4826 estimates the standard deviation of normal noise.
    noise = 1.4826 * float(np.median(np.abs(border.astype(np.int16) - ground)))
    is_ink = ink > ground + _INK_SHARE * contrast + _INK_SIGMAS * noise
    rows, columns = np.flatnonzero(is_ink.any(axis=1)), np.flatnonzero(is_ink.any(axis=0))
    if rows.size == 0:
        return np.zeros((SIDE, SIDE), np.uint8)
    cropped = ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    levels = np.clip((np.arange(256) - ground) * 255 / contrast + 0.5, 0, 255).astype(np.uint8)
    return _place_by_mass(_fit(levels[cropped]))


def stretch(ink: Pixels) -> Pixels:
    """
    Scale the whole image to 28x28, whatever its ratio.

    Args:
        ink: uint8, shape (H, W).
    """
    if ink.shape == (SIDE, SIDE):
        return ink
    return _resize(ink, SIDE, SIDE)


def _border(pixels: Pixels) -> Pixels:
    return np.concatenate((pixels[0], pixels[-1], pixels[1:-1, 0], pixels[1:-1, -1]))


def _is_ink_dark(grey: Pixels) -> bool | None:
    """``None``: one grey, no ink."""
    if grey.size <= _FEW_PIXELS:
        # Most that come are small and on black already, which bytes tell in a fifth of the time.
        width, data = grey.shape[1], grey.tobytes()
        if not (data[:width] + data[-width:] + data[::width] + data[width - 1 :: width]).strip(b"\0"):
            return False if data.strip(b"\0") else None
    low, high = int(grey.min()), int(grey.max())
    if low == high:
        return None
    border = np.sort(_border(grey))
    return 2 * int(border[len(border) // 2]) > low + high


def _is_visible_ink_dark(grey: Pixels, alpha: Pixels) -> bool | None:
    visible = alpha >= 128
    rows, columns = np.flatnonzero(visible.any(axis=1)), np.flatnonzero(visible.any(axis=0))
    if rows.size == 0:
        return None
    box = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
    around = _border(visible[box].view(np.uint8)).view(np.bool_)
    shown = grey[visible]
    low, high = int(shown.min()), int(shown.max())
    if 2 * np.count_nonzero(around) >= around.size and high - low >= _MIN_CONTRAST:
        border = np.sort(_border(grey[box])[around])
        return 2 * int(border[len(border) // 2]) > low + high
    return float(np.average(grey, weights=alpha)) < 128


def _fit(ink: Pixels) -> Pixels:
    """Scale so that the longer side is 20, and let the strongest ink be 255."""
    height, width = ink.shape
    longer = max(height, width)
    if longer != _BOX:
        ink = _resize(ink, max(1, round(height * _BOX / longer)), max(1, round(width * _BOX / longer)))
    strongest = int(ink.max())
    if 0 < strongest < 255:
        ink = (ink.astype(np.uint16) * 255 // strongest).astype(np.uint8)
    return ink


def _resize(ink: Pixels, height: int, width: int) -> Pixels:
    # The box filter averages exactly the pixels it replaces: an enlarged MNIST digit comes back unchanged.
    shrinks = ink.shape[0] >= height and ink.shape[1] >= width
    resample = Image.Resampling.BOX if shrinks else Image.Resampling.BICUBIC
    return np.asarray(Image.fromarray(ink).resize((width, height), resample))


def _place_by_mass(ink: Pixels) -> Pixels:
    height, width = ink.shape
    mass = max(1, int(ink.sum()))
    row = int(ink.sum(axis=1) @ np.arange(height)) / mass
    column = int(ink.sum(axis=0) @ np.arange(width)) / mass
    # Whole pixels, and never over the edge.
    top = min(max(0, round(SIDE / 2 - row)), SIDE - height)
    left = min(max(0, round(SIDE / 2 - column)), SIDE - width)
    framed = np.zeros((SIDE, SIDE), np.uint8)
    framed[top : top + height, left : left + width] = ink
    return framed
