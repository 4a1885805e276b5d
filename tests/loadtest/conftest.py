"""A gateway in front of a Triton double, and images whose class that double names."""

import asyncio
from collections.abc import AsyncIterator, Coroutine, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import structlog
from PIL import Image

from gateway.client import ImageClient
from gateway.server import GatewayServer
from gateway.settings import GatewaySettings
from loadtest.images import Sample
from tests.gateway.fake_triton import Context, FakeTriton, label_of
from tests.loadtest.virtual_time import InVirtualTime, VirtualLoop


@pytest.fixture(autouse=True)
def quiet_log() -> Iterator[None]:
    """Hundreds of lines, one an RPC, would bury what a failing test prints."""
    structlog.configure(processors=[structlog.testing.LogCapture()])
    yield
    structlog.reset_defaults()


class NewestTriton(FakeTriton):
    """Takes a request that names no version, as Triton does."""

    async def ModelInfer(self, request: Any, context: Context) -> Any:
        request.model_version = request.model_version or "1"
        return await super().ModelInfer(request, context)


@pytest.fixture
async def triton() -> AsyncIterator[NewestTriton]:
    async with NewestTriton() as server:
        yield server


@pytest.fixture
async def gateway(triton: NewestTriton, tmp_path: Path) -> AsyncIterator[GatewayServer]:
    """Ready to answer."""
    settings = GatewaySettings(port=0, metrics_port=0, triton=triton.address, model_repository=tmp_path)
    async with GatewayServer(settings) as server:
        async with ImageClient(server.address) as client:
            await client.wait_ready()
        yield server


@pytest.fixture
def samples() -> list[Sample]:
    """Twenty images, two of each class, whose ink keeps off the border."""
    rng = np.random.default_rng(3)
    made: list[Sample] = []
    while len(made) < 20:
        image = np.zeros((28, 28), np.uint8)
        image[4:24, 4:24] = rng.integers(0, 256, (20, 20), dtype=np.uint8)
        label = label_of(image)
        if sum(sample.label == label for sample in made) < 2:
            made.append(Sample(image, str(label), label))
    return made


@pytest.fixture
def image_folder(samples: list[Sample], tmp_path: Path) -> Path:
    """The same as PNG files, a subfolder a class."""
    folder = tmp_path / "images"
    for number, sample in enumerate(samples):
        path = folder / sample.name / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(sample.pixels).save(path)
    return folder


@pytest.fixture
def in_virtual_time() -> InVirtualTime:
    """Runs a coroutine to its end in no time."""

    def run(work: Coroutine[Any, Any, None]) -> None:
        with asyncio.Runner(loop_factory=VirtualLoop) as runner:
            runner.run(work)

    return run
