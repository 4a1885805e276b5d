"""Images with the answers that a version has to give, stored beside it: ``golden.safetensors``."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import safetensors.numpy
import torch
from safetensors import SafetensorError

from training.errors import ExportError
from training.model import IMAGE_SIZE, ServedNetwork

TOLERANCES: Mapping[str, float] = {"float32": 1e-5, "float16": 0.01, "bfloat16": 0.05}
"""Largest difference of a probability, or of a number in an embedding, by precision, on the device it was made for."""

SERVED_FLOAT32_TOLERANCE = 1e-4
"""The same for float32 where it is served: another device sums in another order."""

_SEED = 20_117
_NUM_SEEDED = 16
_MAX_REAL = 48

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True, eq=False)
class Golden:
    """Images and the float32 network's answers."""

    images: npt.NDArray[np.uint8]
    """[N, 1, 28, 28], N at most 64: one request."""
    probabilities: Floats
    """[N, K]"""
    embeddings: Floats
    """[N, D], each of unit length, or zero."""

    @classmethod
    def of(cls, reference: ServedNetwork, real_images: npt.NDArray[np.uint8] | None = None) -> "Golden":
        """
        Ask the network itself.

        Args:
            reference: In float32; its device answers.
            real_images: uint8 [N, 28, 28] or none; the first 48 are taken, beside 16 seeded ones.
        """
        seeded = _seeded()
        real = np.empty((0, IMAGE_SIZE, IMAGE_SIZE), np.uint8) if real_images is None else real_images[:_MAX_REAL]
        images = np.concatenate((seeded, real))[:, np.newaxis]
        with torch.inference_mode():
            answers = reference.eval()(torch.from_numpy(images).to(next(reference.parameters()).device))
        return cls(images, *(answer.cpu().numpy() for answer in answers))

    def save(self, path: Path) -> None:
        """Write to ``path``."""
        tensors: dict[str, npt.NDArray[Any]] = {
            "image": self.images,
            "probabilities": self.probabilities,
            "embedding": self.embeddings,
        }
        safetensors.numpy.save_file(tensors, path)

    @classmethod
    def load(cls, path: Path) -> "Golden":
        """
        Read what :meth:`save` wrote.

        Raises:
            ExportError: It is missing or not of that form.
        """
        try:
            tensors = safetensors.numpy.load_file(path)
            return cls(tensors["image"], tensors["probabilities"], tensors["embedding"])
        except (OSError, SafetensorError, KeyError) as error:
            raise ExportError(f"{path}: no golden answers: {error}") from error

    def differences(self, probabilities: npt.NDArray[Any], embeddings: npt.NDArray[Any], tolerance: float) -> str:
        """
        Return what the answers to :attr:`images` differ in, empty where they are the same within the tolerance.

        The likeliest class has to be the same too, unless the two likeliest are no further apart than the tolerance.
        """
        pairs = (("probabilities", probabilities, self.probabilities), ("embedding", embeddings, self.embeddings))
        for name, found, expected in pairs:
            if found.shape != expected.shape:
                return f"{name} have shape {list(found.shape)}, expected is {list(expected.shape)}"
            difference = np.abs(found - expected).max()
            if not difference <= tolerance:  # also refuses NaN
                return f"{name} differ from the network's by {difference:.2g}, allowed is {tolerance:g}"
        second, first = np.sort(self.probabilities, axis=1)[:, -2:].T
        is_clear = first - second > tolerance
        moved = int((is_clear & (probabilities.argmax(axis=1) != self.probabilities.argmax(axis=1))).sum())
        return f"{moved} of {len(self.images)} images get another class" if moved else ""


def _seeded() -> npt.NDArray[np.uint8]:
    """Return noise of every contrast, coarse and fine, and the two blank images."""
    random = np.random.default_rng(_SEED)
    images = np.zeros((_NUM_SEEDED, IMAGE_SIZE, IMAGE_SIZE), np.uint8)
    images[1] = 255
    for number in range(2, _NUM_SEEDED):
        cell = (1, 2, 4, 7)[number % 4]  # divisors of 28
        cells = random.integers(0, 256, (IMAGE_SIZE // cell, IMAGE_SIZE // cell)) * number // _NUM_SEEDED
        images[number] = cells.repeat(cell, axis=0).repeat(cell, axis=1).astype(np.uint8)
    return images
