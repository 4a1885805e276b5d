"""How often two pictures of one class are called more alike than two of different ones."""

import asyncio

import numpy as np
from numpy.typing import NDArray

from gateway.client import ImageClient

Pair = tuple[NDArray[np.uint8], NDArray[np.uint8]]

_CALLERS = 32


async def share_ordered_right(address: str, images: NDArray[np.uint8], labels: NDArray[np.int64]) -> float:
    """Return in which share of 1,000 draws a pair of one class scores higher than a pair of two."""
    chance = np.random.default_rng(0)

    def pair(*, is_same: bool) -> Pair:
        first = chance.integers(len(labels))
        others = np.flatnonzero((labels == labels[first]) == is_same)
        return images[first], images[chance.choice(others[others != first])]

    callers = asyncio.Semaphore(_CALLERS)
    async with ImageClient(address, timeout_seconds=60) as client:

        async def score(first: NDArray[np.uint8], second: NDArray[np.uint8]) -> float:
            async with callers:
                return (await client.compare(first, second)).score

        same = await asyncio.gather(*(score(*pair(is_same=True)) for _ in range(1000)))
        different = await asyncio.gather(*(score(*pair(is_same=False)) for _ in range(1000)))
    return float(np.mean(np.array(same) > np.array(different)))
