"""Data of MNIST's shape and size, so that the benchmarks depend on no download: strokes on black, as IDX files."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from streamer.sources.declarations import declaration_of
from streamer.sources.idx import format_images, format_labels

NUM_TRAIN = 60_000
NUM_TEST = 10_000


def digits(num: int, *, seed: int = 1) -> NDArray[np.uint8]:
    """Return images, uint8 [num, 28, 28]: what is measured depends on the number of pixels alone."""
    images = np.zeros((num, 28, 28), np.uint8)
    images[:, 6:22, 8:20] = np.random.default_rng(seed).integers(0, 256, (num, 16, 12), dtype=np.uint8)
    return images


def write_mnist(folder: Path, *, num_train: int = NUM_TRAIN, num_test: int = NUM_TEST) -> None:
    """Write both splits into ``folder``, as files that ``sluice streamer --data`` takes for MNIST."""
    declaration = declaration_of("mnist")
    for seed, (split, num) in enumerate({"train": num_train, "test": num_test}.items()):
        names = declaration.names[split]
        (folder / names.images).write_bytes(format_images(digits(num, seed=seed)))
        labels = np.random.default_rng(seed).integers(0, declaration.num_classes, num, dtype=np.uint8)
        (folder / names.labels).write_bytes(format_labels(labels))
