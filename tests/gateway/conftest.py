from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import structlog
from numpy.typing import NDArray

from gateway.client import ImageClient
from gateway.server import GatewayServer
from gateway.settings import GatewaySettings
from protos.gateway.v1 import image_service_pb2_grpc
from tests.gateway.fake_triton import FakeTriton


@pytest.fixture(autouse=True)
def quiet_log() -> Iterator[None]:
    """Hundreds of lines, one an RPC, would bury what a failing test prints."""
    structlog.configure(processors=[structlog.testing.LogCapture()])
    yield
    structlog.reset_defaults()


@pytest.fixture
async def triton() -> AsyncIterator[FakeTriton]:
    async with FakeTriton() as server:
        yield server


@pytest.fixture
def settings(triton: FakeTriton, tmp_path: Path) -> GatewaySettings:
    return GatewaySettings(
        port=0,
        metrics_port=0,
        triton=triton.address,
        model_repository=tmp_path,
        probe_interval_seconds=0.05,
        probe_timeout_seconds=2,
        drain_seconds=5,
    )


@pytest.fixture
async def gateway(settings: GatewaySettings) -> AsyncIterator[GatewayServer]:
    """Listening, and ready as soon as its Triton is."""
    async with GatewayServer(settings) as server:
        yield server


@pytest.fixture
async def client(gateway: GatewayServer) -> AsyncIterator[ImageClient]:
    """Of a gateway that is ready."""
    async with ImageClient(gateway.address) as opened:
        await opened.wait_ready()
        yield opened


@pytest.fixture
async def channel(gateway: GatewayServer, client: ImageClient) -> AsyncIterator[grpc.aio.Channel]:
    """To a gateway that is ready, without a client's retries."""
    async with grpc.aio.insecure_channel(gateway.address) as opened:
        yield opened


@pytest.fixture
def stub(channel: grpc.aio.Channel) -> Any:
    return image_service_pb2_grpc.ImageServiceStub(channel)


@pytest.fixture
def digit() -> NDArray[np.uint8]:
    """Return a seven as MNIST would hold it: 20x20 with soft edges, centred by mass, full contrast."""
    big = np.zeros((200, 200), np.uint8)
    big[0:30, 20:180] = 255
    for row in range(30, 200):
        left = 145 - (row - 30) // 2
        big[row, left : left + 35] = 255
    small = big.reshape(20, 10, 20, 10).mean(axis=(1, 3)).astype(np.uint8)
    framed = np.zeros((28, 28), np.uint8)
    rows, columns = np.arange(20), np.arange(20)
    top = round(14 - float(small.sum(axis=1) @ rows) / float(small.sum()))
    left = round(14 - float(small.sum(axis=0) @ columns) / float(small.sum()))
    framed[top : top + 20, left : left + 20] = small
    return framed


@pytest.fixture
def dead_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on machines whose only way out is a proxy; this one takes no connection."""
    for name in ("grpc_proxy", "https_proxy", "no_grpc_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
