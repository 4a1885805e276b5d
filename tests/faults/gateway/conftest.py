"""A gateway in a process of its own, in front of a Triton in this one."""

from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import grpc
import pytest
import pytest_asyncio

from protos.gateway.v1.image_service_pb2_grpc import ImageServiceStub
from tests.faults.gateway.asker import Asker
from tests.faults.gateway.process import Gateway, started
from tests.faults.gateway.standin import StandIn
from tests.faults.report import Row, note
from tests.gateway.fake_triton import FakeTriton

GatewayOf = Callable[..., Gateway]
Measured = Callable[..., Row]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def triton() -> AsyncIterator[FakeTriton]:
    """Of all tests of a file, which leave it as they found it."""
    async with FakeTriton() as server:
        yield server


@pytest_asyncio.fixture(loop_scope="module")
async def stand_in() -> AsyncIterator[StandIn]:
    """One more Triton, in a process of its own."""
    async with started(StandIn()) as process:
        yield process


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def gateway(triton: FakeTriton, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Gateway]:
    """Of all tests of a file: serving, with the default settings."""
    folder = tmp_path_factory.mktemp("gateway")
    async with started(Gateway(triton.address, folder / "gateway.log", "--model-repository", str(folder))) as process:
        yield process


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def unprobed(triton: FakeTriton, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Gateway]:
    """As :func:`gateway`, with a probe that leaves what arrives at Triton to the tests."""
    folder = tmp_path_factory.mktemp("unprobed")
    options = ("--model-repository", str(folder), "--probe-interval-seconds", "3600")
    async with started(Gateway(triton.address, folder / "gateway.log", *options)) as process:
        yield process


@pytest.fixture
def gateway_of(tmp_path: Path) -> Iterator[GatewayOf]:
    """Make a gateway in front of a Triton or several, with the options given; to be started by the test."""
    made: list[Gateway] = []

    def make(tritons: str, *options: str) -> Gateway:
        log = tmp_path / f"gateway-{len(made)}.log"
        made.append(Gateway(tritons, log, "--model-repository", str(tmp_path), *options))
        return made[-1]

    yield make
    for gateway in made:
        gateway.close()


@pytest_asyncio.fixture(loop_scope="module")
async def ask(unprobed: Gateway, triton: FakeTriton) -> AsyncIterator[Asker]:
    """Of a gateway that is well before and after."""
    await unprobed.check()
    options = [("grpc.max_send_message_length", -1), ("grpc.use_local_subchannel_pool", 1)]
    async with grpc.aio.insecure_channel(unprobed.address, options=options) as channel:
        yield Asker(ImageServiceStub(channel), triton, unprobed)
    await unprobed.check()


@pytest.fixture
def measured(request: pytest.FixtureRequest) -> Measured:
    """
    Say which row of docs/faults.md a test is.

    ``row = measured("P5", fault="...", promised="...")`` before anything that may skip or fail; figures are added as
    they are found, ``row.add("CPU", "0.04 s")``. Asked again, it is the same row.
    """
    rows: dict[str, Row] = {}

    def row(name: str, *, fault: str, promised: str) -> Row:
        if name not in rows:
            rows[name] = note(request.node, name, fault, promised)
        return rows[name]

    return row
