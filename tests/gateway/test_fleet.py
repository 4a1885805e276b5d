"""Several Tritons behind one gateway."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import numpy as np
import pytest

from gateway.errors import UnknownVersionError, UpstreamFailedError, UpstreamUnavailableError
from gateway.fleet import EJECTED_AFTER, Fleet
from gateway.server import GatewayServer
from gateway.settings import GatewaySettings
from gateway.triton import PROBABILITIES, Rows
from imaging.decoding import Pixels
from protos.gateway.v1 import image_service_pb2 as pb
from protos.gateway.v1 import image_service_pb2_grpc
from tests.gateway.fake_triton import FakeTriton, label_of
from tests.scraping import becomes, value

IMAGE = np.full((1, 28, 28), 3, np.uint8)


@pytest.fixture
async def other() -> AsyncIterator[FakeTriton]:
    async with FakeTriton() as server:
        yield server


@pytest.fixture
async def fleet(triton: FakeTriton, other: FakeTriton) -> AsyncIterator[Fleet]:
    opened = Fleet([triton.address, other.address], control_timeout_seconds=5)
    await opened.ready_versions()
    yield opened
    for server in (triton, other):
        server.gate.set()
    await opened.close(5)


async def ask(fleet: Fleet, version: int = 1) -> Rows:
    return await fleet.asking("mnist", version, PROBABILITIES, 10)(IMAGE.tobytes(), 1)


async def test_batches_go_to_who_has_the_least_to_do(fleet: Fleet, triton: FakeTriton, other: FakeTriton) -> None:
    for server in (triton, other):
        server.gate.clear()
    asked = [asyncio.create_task(ask(fleet)) for _ in range(4)]
    for server in (triton, other):
        while len(server.received) < 2:
            server.arrived.clear()
            await server.arrived.wait()
    for server in (triton, other):
        server.gate.set()
    await asyncio.gather(*asked)

    assert (len(triton.received), len(other.received)) == (2, 2)


async def test_batch_that_nobody_took_goes_to_another(fleet: Fleet, triton: FakeTriton, other: FakeTriton) -> None:
    await triton.stop()
    for _ in range(2 * EJECTED_AFTER):
        assert (await ask(fleet)).shape == (1, 10)

    first, second = fleet.endpoints
    assert (first.is_ejected("mnist", 1), second.is_ejected("mnist", 1)) == (True, False)
    assert len(other.received) == 2 * EJECTED_AFTER


async def test_all_of_them_are_never_ejected_at_once(fleet: Fleet, triton: FakeTriton, other: FakeTriton) -> None:
    for server in (triton, other):
        server.failure = grpc.StatusCode.INTERNAL, "no"
    for _ in range(4 * EJECTED_AFTER):
        with pytest.raises(UpstreamFailedError):
            await ask(fleet)
    for server in (triton, other):
        server.failure = None

    assert (await ask(fleet)).shape == (1, 10)


async def test_version_is_asked_where_it_is(fleet: Fleet, triton: FakeTriton, other: FakeTriton) -> None:
    other.models = {"mnist": [1, 2]}
    versions = await fleet.ready_versions()
    assert sorted(one.version for one in versions) == [1, 2]
    for _ in range(3):
        await ask(fleet, version=2)

    assert (len(triton.received), len(other.received)) == (0, 3)
    with pytest.raises(UnknownVersionError):
        await ask(fleet, version=3)


async def test_fleet_without_anybody_says_so(fleet: Fleet, triton: FakeTriton, other: FakeTriton) -> None:
    for server in (triton, other):
        await server.stop()
    with pytest.raises(UpstreamUnavailableError):
        await fleet.ready_versions()
    with pytest.raises(UpstreamUnavailableError):
        await ask(fleet)


async def test_triton_that_fails_is_left_out_and_taken_back_when_it_is_well(
    settings: GatewaySettings, triton: FakeTriton, other: FakeTriton, digit: Pixels
) -> None:
    """U6: of two replicas one is bad; after it is noticed, callers do not."""
    both = settings.model_copy(update={"triton": f"{triton.address}, {other.address}"})
    async with GatewayServer(both) as gateway, grpc.aio.insecure_channel(gateway.address) as channel:
        stub: Any = image_service_pb2_grpc.ImageServiceStub(channel)
        request = pb.ClassifyRequest(image=pb.Image(raw=pb.RawImage(height=28, width=28, pixels=digit.tobytes())))
        await becomes(1, gateway.metrics_url, "gateway_serving")
        triton.failure = grpc.StatusCode.INTERNAL, "Stub process is not healthy"
        await becomes(1, gateway.metrics_url, "gateway_triton_ejections_total", triton=triton.address)
        for _ in range(50):
            assert (await stub.Classify(request)).prediction.label == label_of(digit)
        assert value(gateway.metrics_url, "gateway_serving") == 1

        triton.failure = None
        while not await reaches(stub, request, triton):
            pass


async def reaches(stub: Any, request: pb.ClassifyRequest, server: FakeTriton) -> bool:
    """Ask ten times at once, and tell whether this Triton had any of it beside its probes, which are blank."""
    num_before = len(server.received)
    await asyncio.gather(*(stub.Classify(request) for _ in range(10)))
    return any(images.any() for images in server.received[num_before:])
