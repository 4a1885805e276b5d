from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import structlog

from gateway.client import ImageClient
from gateway.server import GatewayServer
from gateway.settings import GatewaySettings
from imaging.decoding import Pixels
from protos.gateway.v1 import image_service_pb2_grpc
from tests.digits import seven
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
def digit() -> Pixels:
    return seven()


@pytest.fixture
def dead_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on machines whose only way out is a proxy; this one takes no connection."""
    for name in ("grpc_proxy", "https_proxy", "no_grpc_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
