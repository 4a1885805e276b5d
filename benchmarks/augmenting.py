"""
What ``augment-v1`` does, inside a ``DataLoader``: one sample after the other, in the ways that are usual.

Each turns, scales and shears about the centre, moves, and interpolates linearly, as torchvision's ``RandomAffine`` does
on tensors (:func:`by_torch`) and on images (:func:`by_pillow`), but without what it does around them.
"""

import math
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage  # type: ignore[import-untyped]  # scipy has no types
from torch.utils.data import Dataset

from benchmarks import loading
from benchmarks.turn import Work

AUGMENT = "augment-v1"
"""The transform that is measured, at its defaults."""

_SIDE = 28
_CENTRE = (_SIDE - 1) / 2


class Augmented(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """
    Samples in memory that are augmented when they are asked for.

    Args:
        images: uint8 [N, 28, 28].
        labels: int64 [N].
        augment: Takes an image and the map from pixels of the new one to pixels of the old, [2, 3], x before y.
    """

    def __init__(
        self, images: torch.Tensor, labels: torch.Tensor, augment: Callable[[torch.Tensor, list[float]], torch.Tensor]
    ) -> None:
        self._images, self._labels, self._augment = images, labels, augment

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the sample, changed in another way each time."""
        return self._augment(self._images[index], _drawn_map()), self._labels[index]


def by_torch(image: torch.Tensor, to_old: list[float]) -> torch.Tensor:
    """Return it sampled by ``affine_grid`` and ``grid_sample``."""
    a, b, c, d, e, f = to_old
    # The grid's coordinates go from -1 to 1 about the centre, where the map's constant part is the shift alone.
    x, y = ((a + b - 1) * _CENTRE + c) * 2 / _SIDE, ((d + e - 1) * _CENTRE + f) * 2 / _SIDE
    theta = torch.tensor([[[a, b, x], [d, e, y]]])
    grid = torch.nn.functional.affine_grid(theta, [1, 1, _SIDE, _SIDE], align_corners=False)
    sampled = torch.nn.functional.grid_sample(image.float()[None, None], grid, align_corners=False)
    return sampled[0, 0].round().to(torch.uint8)


def by_pillow(image: torch.Tensor, to_old: list[float]) -> torch.Tensor:
    """Return it sampled by ``Image.transform``."""
    a, b, c, d, e, f = to_old
    # Pillow's coordinates are of pixels' corners.
    corners = (a, b, c + (1 - a - b) / 2, d, e, f + (1 - d - e) / 2)
    sampled = Image.fromarray(image.numpy()).transform(
        (_SIDE, _SIDE), Image.Transform.AFFINE, corners, Image.Resampling.BILINEAR
    )
    return torch.from_numpy(np.array(sampled))


def by_scipy(image: torch.Tensor, to_old: list[float]) -> torch.Tensor:
    """Return it sampled by ``ndimage.affine_transform``."""
    a, b, c, d, e, f = to_old
    sampled: NDArray[np.uint8] = ndimage.affine_transform(image.numpy(), [[e, d], [b, a]], [f, c], order=1)
    return torch.from_numpy(sampled)


WAYS: Mapping[str, Callable[[torch.Tensor, list[float]], torch.Tensor]] = {
    "torch": by_torch,
    "Pillow": by_pillow,
    "SciPy": by_scipy,
}


def read(data: str, batch_size: int, workers: int, way: str) -> Work:
    """Read augmented samples through a ``DataLoader``."""
    dataset = Augmented(*loading.in_memory(Path(data)), WAYS[way])
    return loading.read(dataset, batch_size=batch_size, workers=workers)


def _drawn_map() -> list[float]:
    """Draw what the preset draws: up to 10 degrees, 2 pixels across and down, 10 % in size, 5 degrees of shear."""
    turn, right, down, larger, lean = (2 * torch.rand(5) - 1).tolist()
    angle, shear, size = math.radians(10 * turn), math.tan(math.radians(5 * lean)), 1 + 0.1 * larger
    sine, cosine = math.sin(angle) / size, math.cos(angle) / size
    a, b, d, e = cosine, shear * cosine - sine, sine, shear * sine + cosine
    # About the centre: it goes to itself, but for the shift.
    return [a, b, (1 - a - b) * _CENTRE + 2 * right, d, e, (1 - d - e) * _CENTRE + 2 * down]
