"""How many images a second the gateway classifies, against the same model asked straight at Triton."""

import asyncio
import time
from collections.abc import Awaitable, Callable

import numpy as np
import numpy.typing as npt

from benchmarks import frames
from benchmarks.bench import DIRECT, PNG, RAW
from benchmarks.interleaved import Contender
from gateway.client import ImageClient
from serving.control import TritonControl

CALLERS = 64


def contenders(gateway: ImageClient, triton: TritonControl, images: npt.NDArray[np.uint8]) -> dict[str, Contender]:
    """Return callers of both, :data:`CALLERS` at once; items are images [N, 28, 28]."""
    pngs = [frames.png(image) for image in images]

    def direct(number: int) -> Awaitable[object]:
        return triton.infer("mnist", images[number % len(images)][None, None])

    def raw(number: int) -> Awaitable[object]:
        return gateway.classify(images[number % len(images)])

    def png(number: int) -> Awaitable[object]:
        return gateway.classify(pngs[number % len(pngs)])

    def batch(number: int) -> Awaitable[object]:
        start = number * CALLERS % (len(pngs) - CALLERS)
        return gateway.classify_batch(pngs[start : start + CALLERS])

    return {
        DIRECT: _callers(direct, CALLERS, 1),
        RAW: _callers(raw, CALLERS, 1),
        PNG: _callers(png, CALLERS, 1),
        f"ClassifyBatch of {CALLERS} PNGs, 2 callers": _callers(batch, 2, CALLERS),
    }


def _callers(ask: Callable[[int], Awaitable[object]], callers: int, images_a_call: int) -> Contender:
    async def work(seconds: float) -> int:
        end, calls = time.perf_counter() + seconds, 0

        async def caller() -> None:
            nonlocal calls
            while time.perf_counter() < end:
                calls += 1
                await ask(calls)

        await asyncio.gather(*(caller() for _ in range(callers)))
        return calls * images_a_call

    return work
