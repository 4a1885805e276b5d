"""Several Tritons behind one gateway."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import numpy as np
import pytest
from tritonclient.grpc import service_pb2

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


async def test_instances_of_all_who_work_count_together(fleet: Fleet, triton: FakeTriton, other: FakeTriton) -> None:
    other.max_batch_size = 32
    (version,) = await fleet.ready_versions()
    assert (version.num_instances, version.max_batch_size) == (2, 32)

    await triton.stop()
    (version,) = await fleet.ready_versions()
    assert version.num_instances == 1


async def test_batch_that_nobody_took_goes_to_another(fleet: Fleet, triton: FakeTriton, other: FakeTriton) -> None:
    await triton.stop()
    for _ in range(2 * EJECTED_AFTER):
        assert (await ask(fleet)).shape == (1, 10)

    first, second = fleet.endpoints
    assert (first.is_ejected("mnist", 1), second.is_ejected("mnist", 1)) == (True, False)
    assert len(other.received) == 2 * EJECTED_AFTER


async def test_batch_whose_triton_died_of_it_goes_to_no_other(
    fleet: Fleet, triton: FakeTriton, other: FakeTriton
) -> None:
    triton.gate.clear()
    asked = asyncio.create_task(ask(fleet))
    await triton.arrived.wait()
    await triton.stop()
    with pytest.raises(UpstreamUnavailableError):
        await asked

    assert len(other.received) == 0


async def test_batch_goes_to_another_when_its_version_has_just_gone(
    fleet: Fleet, triton: FakeTriton, other: FakeTriton
) -> None:
    triton.models = {}
    assert (await ask(fleet)).shape == (1, 10)

    assert len(other.received) == 1


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


@pytest.fixture
async def hasty(triton: FakeTriton, other: FakeTriton) -> AsyncIterator[Fleet]:
    """Of two, of which the first did not say what it has."""
    opened = Fleet([triton.address, other.address], control_timeout_seconds=1)
    triton.index.clear()
    await opened.ready_versions()
    yield opened
    triton.index.set()
    await opened.close(5)


async def test_look_waits_for_nobody_who_said_nothing_the_last_time(hasty: Fleet, other: FakeTriton) -> None:
    other.models = {"mnist": [1, 2]}
    hanging = hasty.endpoints[0].look()

    assert sorted(one.version for one in await hasty.ready_versions()) == [1, 2]
    assert not hanging.done()


class TestPassingOn:
    """Of Triton's own protocol."""

    async def test_who_answers_is_asked_when_another_is_dead(
        self, fleet: Fleet, triton: FakeTriton, other: FakeTriton
    ) -> None:
        await triton.stop()
        for _ in range(3):
            assert (await fleet.control("ServerMetadata", service_pb2.ServerMetadataRequest())).name == "triton"
            await fleet.infer(inference("mnist"))
        await fleet.ready_versions()

        assert [endpoint.is_reachable for endpoint in fleet.endpoints] == [False, True]
        assert len(other.received) == 3

    async def test_inference_whose_triton_died_of_it_goes_to_no_other(
        self, fleet: Fleet, triton: FakeTriton, other: FakeTriton
    ) -> None:
        triton.gate.clear()
        asked = asyncio.create_task(fleet.infer(inference("mnist")))
        await triton.arrived.wait()
        await triton.stop()
        with pytest.raises(grpc.aio.AioRpcError):
            await asked

        assert len(other.received) == 0

    async def test_who_said_nothing_is_asked_last(self, hasty: Fleet, triton: FakeTriton, other: FakeTriton) -> None:
        triton.models = other.models = {"new": [1]}
        await hasty.infer(inference("new"))

        assert (len(triton.received), len(other.received)) == (0, 1)

    async def test_model_of_another_kind_is_asked_where_it_is(
        self, fleet: Fleet, triton: FakeTriton, other: FakeTriton
    ) -> None:
        other.dims = [3, 224, 224]
        other.models = {"faces": [1]}
        assert {one.name for one in await fleet.ready_versions()} == {"mnist"}
        for _ in range(3):
            await fleet.infer(inference("faces"))

        assert (len(triton.received), len(other.received)) == (0, 3)
        with pytest.raises(grpc.aio.AioRpcError, match="version 7 is not at ready state"):
            await fleet.infer(inference("faces", version="7"))

    async def test_model_loaded_since_the_last_look_is_found(
        self, fleet: Fleet, triton: FakeTriton, other: FakeTriton
    ) -> None:
        other.models = {"mnist": [1], "new": [1]}
        request = service_pb2.ModelConfigRequest(name="new", version="1")

        assert (await fleet.control("ModelConfig", request)).config.name == "new"
        await fleet.infer(inference("new"))

    @pytest.mark.parametrize("version", ["9" * 5000, "\u0663"])
    async def test_version_that_is_none_is_refused_by_triton(self, fleet: Fleet, version: str) -> None:
        for asked in (
            fleet.infer(inference("mnist", version)),
            fleet.control("ModelConfig", service_pb2.ModelConfigRequest(name="mnist", version=version)),
        ):
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await asked
            assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT


def inference(model: str, version: str = "1") -> Any:
    return service_pb2.ModelInferRequest(model_name=model, model_version=version, raw_input_contents=[IMAGE.tobytes()])


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
