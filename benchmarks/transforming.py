"""``python -m benchmarks.transforming``: what each transform costs by itself, and in the pool."""

import asyncio
import time

import numpy as np
from numpy.typing import NDArray

from benchmarks import report
from benchmarks.augmenting import AUGMENT
from benchmarks.digits import digits
from benchmarks.interleaved import Contender, Spread, compare
from streamer.transforms.pool import TransformPool
from streamer.transforms.transform import Transform, parse

ROUNDS = 5
SECONDS = 0.5
BATCH_SIZE = 256
WORKERS = 2

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
    f"{AUGMENT}|normalise(mean=0.1307,std=0.3081)",
    f"{AUGMENT}(elastic=1.5,cutout=8)",
)

Images = NDArray[np.uint8]


def contenders(images: Images, pool: TransformPool) -> dict[str, Contender]:
    """Return what is compared; items are samples."""
    rows = {spec: _alone(parse(spec, image_shape=(28, 28)), images) for spec in SPECS}
    rows[f"{AUGMENT}, pool of {WORKERS} processes"] = _pooled(pool, parse(AUGMENT, image_shape=(28, 28)), images)
    return rows


def _alone(transform: Transform, images: Images) -> Contender:
    async def work(seconds: float) -> int:
        end, samples = time.perf_counter() + seconds, 0
        while time.perf_counter() < end:
            transform.apply(images, indices, seed=1, epoch=0)
            samples += len(images)
        return samples

    indices = np.arange(len(images))
    return work


def _pooled(pool: TransformPool, transform: Transform, images: Images) -> Contender:
    async def work(seconds: float) -> int:
        end = time.perf_counter() + seconds
        # Each of two streams has a batch in the works.
        return sum(await asyncio.gather(stream(end), stream(end)))

    async def stream(end: float) -> int:
        samples = 0
        while time.perf_counter() < end:
            await pool.apply(transform, images, indices, seed=1, epoch=0)
            samples += len(images)
        return samples

    indices = np.arange(len(images))
    return work


async def main() -> None:
    """Compare them and print a table."""
    async with TransformPool(WORKERS) as pool:
        rates = await compare(contenders(digits(BATCH_SIZE), pool), rounds=ROUNDS, seconds=SECONDS)
    print(report.surroundings("python -m benchmarks.transforming", ("numpy",)))
    print(f"{ROUNDS} turns of {SECONDS:g} s each, 28 x 28 pixels, batches of {BATCH_SIZE}; items are samples.\n")
    header = ("", "µs a sample, median", *report.RATES)
    print(report.table(header, (_row(spec, rate) for spec, rate in rates.items())))


def _row(spec: str, rate: Spread) -> list[str]:
    return [spec.replace("|", "\\|"), f"{1e6 / rate.median:.2f}", *report.figures(rate)]


if __name__ == "__main__":
    asyncio.run(main())
