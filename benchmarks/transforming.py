"""
``python -m benchmarks.transforming``: what each transform costs, and what augmentation in a DataLoader does.

The DataLoader turns, moves, scales and shears one sample after the other, as is usual: with torch's ``affine_grid`` and
``grid_sample``, which torchvision's transforms of tensors are made of; its other rows do what ``augment-v1`` does.
"""

import asyncio
import math
import os
import platform
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset, IterableDataset

from benchmarks.interleaved import Contender, Rate, compare
from streamer.transforms.pool import TransformPool
from streamer.transforms.transform import Transform, parse

ROUNDS = 5
SECONDS = 0.5
BATCH_SIZE = 256
WORKERS = 2
AUGMENT = "augment-v1"

# Each does something to every sample.
SPECS = (
    "crop(height=24,width=24)",
    "pad(pixels=2)",
    "shift(pixels=2)",
    "rotate(degrees=10)",
    "scale(percent=10)",
    "shear(degrees=5)",
    "elastic(pixels=1.5)",
    "cutout(pixels=8)",
    "noise(std=10)",
    "normalise(mean=0.1307,std=0.3081)",
    AUGMENT,
    "augment-v1|normalise(mean=0.1307,std=0.3081)",
    "augment-v1(elastic=1.5,cutout=8)",
)

Images = NDArray[np.uint8]


def digits() -> Images:
    """Return strokes on black, of MNIST's size: what is measured depends on the number of pixels alone."""
    rng = np.random.default_rng(1)
    images = np.zeros((4096, 28, 28), np.uint8)
    images[:, 6:22, 8:20] = rng.integers(0, 256, (4096, 16, 12), dtype=np.uint8)
    return images


class OneByOne(Dataset[torch.Tensor]):
    """Samples augmented one at a time with torch."""

    def __init__(self, images: Images) -> None:
        self._images = torch.from_numpy(images)

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> torch.Tensor:
        """Return the sample, turned by up to 10 degrees, and so on, as ``augment-v1`` does it."""
        degrees, x, y, percent, lean = (2 * torch.rand(5) - 1).tolist()
        angle, shear, size = math.radians(10 * degrees), math.tan(math.radians(5 * lean)), 1 + 0.1 * percent
        sine, cosine = math.sin(angle) / size, math.cos(angle) / size
        to_grid = 2 / 28  # the grid's coordinates go from -1 to 1
        map_ = torch.tensor(
            [[cosine, shear * cosine - sine, 2 * x * to_grid], [sine, shear * sine + cosine, 2 * y * to_grid]]
        )
        image = self._images[index].float()[None, None]
        grid = torch.nn.functional.affine_grid(map_[None], [1, 1, 28, 28], align_corners=False)
        sampled = torch.nn.functional.grid_sample(image, grid, align_corners=False)
        return sampled[0].round().to(torch.uint8)


class OursOneByOne(Dataset[NDArray[np.generic]]):
    """Samples augmented one at a time with the streamer's own transform."""

    def __init__(self, images: Images, transform: Transform) -> None:
        self._images, self._transform = images, transform

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> NDArray[np.generic]:
        """Return the sample."""
        alone: NDArray[np.generic] = self._transform.apply(
            self._images[index : index + 1], np.array([index]), seed=1, epoch=0
        )
        return alone.reshape(alone.shape[1:])


class OursInBatches(IterableDataset[NDArray[np.generic]]):
    """Whole batches augmented with the streamer's own transform."""

    def __init__(self, images: Images, transform: Transform) -> None:
        self._images, self._transform = images, transform

    def __iter__(self) -> Iterator[NDArray[np.generic]]:
        """Return the batches."""
        for first in range(0, len(self._images), BATCH_SIZE):
            part = slice(first, first + BATCH_SIZE)
            yield self._transform.apply(self._images[part], np.arange(first, first + BATCH_SIZE), seed=1, epoch=0)


def contenders(images: Images, pool: TransformPool) -> dict[str, Contender]:
    """Return what is compared; items are samples."""
    augment = parse(AUGMENT, image_shape=(28, 28))
    rows: dict[str, Contender] = {spec: _alone(parse(spec, image_shape=(28, 28)), images) for spec in SPECS}
    rows[f"{AUGMENT}, pool of {WORKERS} processes"] = _pooled(pool, augment, images)
    rows[f"DataLoader of {WORKERS} workers, torch, one by one"] = _loaded(_loader(OneByOne(images), BATCH_SIZE))
    rows[f"DataLoader of {WORKERS} workers, {AUGMENT} one by one"] = _loaded(
        _loader(OursOneByOne(images, augment), BATCH_SIZE)
    )
    rows[f"DataLoader of {WORKERS} workers, {AUGMENT} in batches"] = _loaded(
        _loader(OursInBatches(images, augment), None)
    )
    return rows


def _alone(transform: Transform, images: Images) -> Contender:
    async def work(seconds: float) -> int:
        return _repeat(lambda: transform.apply(batch, indices, seed=1, epoch=0), seconds)

    batch, indices = images[:BATCH_SIZE], np.arange(BATCH_SIZE)
    return work


def _repeat(work: Callable[[], object], seconds: float) -> int:
    end, samples = time.perf_counter() + seconds, 0
    while time.perf_counter() < end:
        work()
        samples += BATCH_SIZE
    return samples


def _pooled(pool: TransformPool, transform: Transform, images: Images) -> Contender:
    async def work(seconds: float) -> int:
        end = time.perf_counter() + seconds
        # Each of two streams has a batch in the works.
        return sum(await asyncio.gather(stream(end), stream(end)))

    async def stream(end: float) -> int:
        samples = 0
        while time.perf_counter() < end:
            await pool.apply(transform, images[:BATCH_SIZE], np.arange(BATCH_SIZE), seed=1, epoch=0)
            samples += BATCH_SIZE
        return samples

    return work


def _loader(dataset: Dataset[Any], batch_size: int | None) -> DataLoader[Any]:
    return DataLoader(dataset, batch_size=batch_size, num_workers=WORKERS, persistent_workers=True)


def _loaded(loader: DataLoader[Any]) -> Contender:
    async def work(seconds: float) -> int:
        end, samples = time.perf_counter() + seconds, 0
        while time.perf_counter() < end:
            for batch in loader:
                samples += len(batch)
                if time.perf_counter() > end:
                    break
        return samples

    return work


async def main() -> None:
    """Compare them and print a table."""
    images = digits()
    async with TransformPool(WORKERS) as pool:
        rates = await compare(contenders(images, pool), rounds=ROUNDS, seconds=SECONDS)
    print(_report(rates))


def _report(rates: dict[str, Rate]) -> str:
    lines = [
        f"{len(os.sched_getaffinity(0))} cores ({platform.machine()}), Python {platform.python_version()}, "
        f"NumPy {version('numpy')}, torch {version('torch')}; {ROUNDS} turns of {SECONDS:g} s each, "
        f"28 x 28 pixels, batches of {BATCH_SIZE}.",
        "",
        "| | µs a sample, median | samples/s, median | lowest | highest |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for name, rate in rates.items():
        name = name.replace("|", "\\|")
        lines.append(
            f"| {name} | {1e6 / rate.median:.2f} | {rate.median:,.0f} | {rate.lowest:,.0f} | {rate.highest:,.0f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    asyncio.run(main())
