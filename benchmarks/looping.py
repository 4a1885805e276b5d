"""Turns of one process each around images in large numbers: the bare model in a loop, and a stream to the gateway."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import torch

from benchmarks import frames
from benchmarks.turn import Work
from benchmarks.window import Window
from protos.gateway.v1 import image_service_pb2 as pb
from training.release.export import load_served

_OPTIONS = (("grpc.enable_http_proxy", 0),)
# TorchScript specialises in its first passes.
_WARM_PASSES = 5
_READ_EVERY = 101


def torchscript(model: str, images: str, threads: int) -> Work:
    """
    Run a ``model.pt``, prepared as Triton's backend does it, in a loop; items are images.

    Args:
        model: The file.
        images: File of :func:`numpy.save`, uint8 [N, 28, 28]; N is the size of a batch.
        threads: Intra-op.
    """
    torch.set_num_threads(threads)
    served = load_served(Path(model), torch.device("cpu"))
    image_N1HW = torch.from_numpy(np.load(images))[:, None].contiguous()

    def work(window: Window) -> None:
        with torch.inference_mode():
            for _ in range(_WARM_PASSES):
                served(image_N1HW)
            while not window.add(len(image_N1HW)):
                served(image_N1HW)

    return work


def classify_stream(address: str, images: str, in_flight: int, is_png: bool) -> Work:
    """
    Ask by ClassifyStream with grpc.aio and bytes, as many images as may be in flight at once; items are images.

    Args:
        address: Of the gateway.
        images: As of :func:`torchscript`.
        in_flight: Images sent and not answered yet.
        is_png: Whether they go as PNG or as pixels.
    """
    requests = frames.stream_requests(np.load(images), is_png=is_png)

    async def work(window: Window) -> None:
        room = asyncio.Semaphore(in_flight)

        async def asking() -> AsyncIterator[bytes]:
            while True:
                for request in requests:
                    await room.acquire()
                    yield request

        async with grpc.aio.insecure_channel(address, options=_OPTIONS) as channel:
            method: Any = channel.stream_stream(frames.CLASSIFY_STREAM)
            call = method(asking())
            try:
                number = 0
                async for answer in call:
                    room.release()
                    # Reading each would be part of what is measured.
                    if number % _READ_EVERY == 0:
                        _require_success(answer)
                    if window.add(1):
                        return
                    number += 1
            finally:
                call.cancel()

    return work


def _require_success(answer: bytes) -> None:
    result = pb.ClassifyStreamResponse.FromString(answer).result
    if result.code:
        raise RuntimeError(f"ClassifyStream: code {result.code}: {result.error}")
