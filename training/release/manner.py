"""How a gateway has to make a network's images out of files: what it was trained on tells."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from imaging.framing import Manner, Polarity, center, normalise_polarity

# Of the training images; a thousand tell a share to some percent.
_LOOKED_AT = 1000
# Grey levels, mean over an image: what centring changes of MNIST's digits is below 0.3, of clothes above 20.
_UNCHANGED_LEVELS = 4.0
_MOST = 0.8


def manner_of(images_NHW: npt.NDArray[np.uint8]) -> Manner:
    """
    Return the manner of which a network's training images are fixed points, for its card.

    A file that is framed in another manner than those were gets an answer about a picture that the network has never
    seen the like of: clothes that fill the frame, asked about in the 20x20 box of MNIST's digits.

    Args:
        images_NHW: Images as the network is given them, such as those it was validated on, uint8, shape (N, 28, 28),
            N at least 1.

    Returns:
        Polarity ``auto`` where deciding from the border leaves the images as they are, else ``light_on_dark``, which
        always does. Framing ``auto`` where centring leaves them so, as it does MNIST's digits, else ``stretch``.
    """
    looked_at = images_NHW[:: max(1, len(images_NHW) // _LOOKED_AT)]
    polarity: Polarity = "auto" if _most([_keeps_polarity(image) for image in looked_at]) else "light_on_dark"
    return Manner(polarity, "auto" if _most([_is_centred(image) for image in looked_at]) else "stretch")


def _keeps_polarity(image_HW: npt.NDArray[np.uint8]) -> bool:
    return np.array_equal(normalise_polarity(image_HW, None, "auto"), image_HW)


def _is_centred(image_HW: npt.NDArray[np.uint8]) -> bool:
    return float(np.abs(center(image_HW).astype(np.int16) - image_HW).mean()) < _UNCHANGED_LEVELS


def _most(claims: Sequence[bool]) -> bool:
    return float(np.mean(claims)) >= _MOST
