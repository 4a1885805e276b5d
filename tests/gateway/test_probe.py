import asyncio
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from numpy.typing import NDArray
from tritonclient.grpc import service_pb2, service_pb2_grpc

from gateway.client import ImageClient, ModelUnavailableError
from gateway.fleet import Fleet
from gateway.models import Catalog
from gateway.probe import Probe
from gateway.routing import path_of
from gateway.server import SERVICE, GatewayServer, run
from gateway.settings import GatewaySettings
from protos.gateway.v1 import image_service_pb2 as pb
from protos.gateway.v1 import image_service_pb2_grpc
from rpc.health import Health
from rpc.lifecycle import ServerDiedError
from tests.gateway.fake_triton import FakeTriton, confident, label_of
from tests.scraping import value

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


async def status(call: Any, wanted: int) -> None:
    """Read a Watch until it tells the wanted status."""
    while (await call.read()).status != wanted:
        pass


@pytest.fixture
async def watch(gateway: GatewayServer) -> Any:
    async with grpc.aio.insecure_channel(gateway.address) as channel:
        call = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(service=SERVICE))
        yield call
        call.cancel()


async def test_serving_only_while_an_inference_works(watch: Any, triton: FakeTriton) -> None:
    await status(watch, SERVING)
    assert not triton.received[0].any()

    triton.failure = grpc.StatusCode.INTERNAL, "Stub process is not healthy"
    await status(watch, NOT_SERVING)
    triton.failure = None
    await status(watch, SERVING)
    triton.answer = lambda images: confident(images) * np.nan
    await status(watch, NOT_SERVING)


async def test_not_serving_without_a_model_and_serving_when_it_comes(watch: Any, triton: FakeTriton) -> None:
    await status(watch, SERVING)
    triton.models = {}
    await status(watch, NOT_SERVING)
    triton.models = {"mnist": [4]}
    await status(watch, SERVING)


async def test_probe_that_hangs_is_waited_for_and_not_repeated(settings: GatewaySettings, triton: FakeTriton) -> None:
    hasty = settings.model_copy(update={"probe_timeout_seconds": 0.1, "probe_interval_seconds": 0.0001})
    async with GatewayServer(hasty) as gateway, grpc.aio.insecure_channel(gateway.address) as channel:
        call = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(service=SERVICE))
        await status(call, SERVING)
        triton.gate.clear()
        await status(call, NOT_SERVING)
        num_hanging = len(triton.received)
        # A second probe would take a few round trips to the same server.
        async with grpc.aio.insecure_channel(triton.address) as to_triton:
            stub = service_pb2_grpc.GRPCInferenceServiceStub(to_triton)
            for _ in range(50):
                await stub.RepositoryIndex(service_pb2.RepositoryIndexRequest(ready=True))
        assert len(triton.received) == num_hanging

        triton.gate.set()
        await status(call, SERVING)
        call.cancel()
    assert triton.num_cancelled == 0


async def test_gateway_started_before_triton_refuses_fast_and_recovers(
    triton: FakeTriton, settings: GatewaySettings, digit: NDArray[np.uint8]
) -> None:
    await triton.stop()
    async with GatewayServer(settings) as gateway, ImageClient(gateway.address) as client:
        request = pb.ClassifyRequest(image=pb.Image(raw=pb.RawImage(height=28, width=28, pixels=digit.tobytes())))
        async with grpc.aio.insecure_channel(gateway.address) as channel, asyncio.timeout(1):
            with pytest.raises(grpc.aio.AioRpcError, match="the inference server cannot be reached") as refused:
                await image_service_pb2_grpc.ImageServiceStub(channel).Classify(request)
        assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
        with pytest.raises(ModelUnavailableError, match="no inference worked"):
            await client.wait_ready(timeout_seconds=0.1)

        await triton.start()
        await client.wait_ready()
        assert (await client.classify(digit)).label == label_of(digit)


async def test_probe_that_dies_takes_readiness_and_the_process_with_it(
    gateway: GatewayServer, watch: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    await status(watch, SERVING)
    running = asyncio.create_task(run(gateway, grace_seconds=5))
    async with grpc.aio.insecure_channel(gateway.address) as channel:
        of_model = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(service=f"{SERVICE}/mnist"))
        await status(of_model, SERVING)

        def broken(path: Path) -> bytes:
            raise ZeroDivisionError

        monkeypatch.setattr(Path, "read_bytes", broken)
        await status(watch, NOT_SERVING)
        await status(of_model, NOT_SERVING)
    with pytest.raises(ServerDiedError, match="the probe ended by itself"):
        await running


async def test_serving_while_triton_does_not_say_what_it_has(
    triton: FakeTriton, settings: GatewaySettings, digit: NDArray[np.uint8]
) -> None:
    hasty = settings.model_copy(update={"probe_timeout_seconds": 0.5})
    async with GatewayServer(hasty) as gateway, ImageClient(gateway.address) as client:
        await client.wait_ready()
        triton.index.clear()
        for _ in range(3):
            triton.asked.clear()
            await triton.asked.wait()  # the look before that was given up
            assert (await client.classify(digit)).label == label_of(digit)
        async with grpc.aio.insecure_channel(gateway.address) as channel:
            call = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(service=SERVICE))
            await status(call, SERVING)
            triton.failure = grpc.StatusCode.INTERNAL, "Stub process is not healthy"
            await status(call, NOT_SERVING)
            triton.failure = None
            await status(call, SERVING)
            triton.models = {"mnist": []}
            await status(call, NOT_SERVING)
            call.cancel()
        triton.index.set()


async def test_version_is_judged_while_another_hangs(triton: FakeTriton, settings: GatewaySettings) -> None:
    triton.models = {"mnist": [1], "letters": [1]}
    triton.held = {"letters"}
    triton.gate.clear()
    patient = settings.model_copy(update={"probe_timeout_seconds": 600})
    async with GatewayServer(patient) as gateway, grpc.aio.insecure_channel(gateway.address) as channel:
        call = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(service=SERVICE))
        async with asyncio.timeout(60):
            await status(call, SERVING)
            triton.failure = grpc.StatusCode.INTERNAL, "Stub process is not healthy"
            await status(call, NOT_SERVING)
        call.cancel()
        triton.gate.set()


class Queue(FakeTriton):
    """One whose queue is so long that the probe's inferences, which are blank, wait in it."""

    async def ModelInfer(self, request: Any, context: Any) -> Any:
        if not any(request.raw_input_contents[0]):
            await self.gate.wait()
        return await super().ModelInfer(request, context)


async def test_probe_that_waits_behind_others_does_not_fail_until_they_do(
    settings: GatewaySettings, digit: NDArray[np.uint8]
) -> None:
    seconds = 0.5
    async with Queue() as triton:
        triton.held = ()
        busy = settings.model_copy(update={"triton": triton.address, "probe_timeout_seconds": seconds})
        async with (
            GatewayServer(busy) as gateway,
            ImageClient(gateway.address) as client,
            grpc.aio.insecure_channel(gateway.address) as channel,
        ):
            call = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(service=SERVICE))
            await status(call, SERVING)
            triton.gate.clear()
            loop = asyncio.get_running_loop()
            started = loop.time()
            while loop.time() < started + 4 * seconds:
                await client.classify(digit)
            stopped = loop.time()
            await status(call, NOT_SERVING)
            # It had not been told before.
            assert loop.time() > stopped + seconds / 2
            triton.gate.set()
            await status(call, SERVING)
            call.cancel()


async def test_probes_are_few_however_many_calls_fail(triton: FakeTriton, tmp_path: Path) -> None:
    fleet, health = Fleet([triton.address], control_timeout_seconds=5), Health([""])
    catalog = Catalog(fleet, repository=tmp_path, default_model="mnist")
    probe = Probe(catalog, fleet, health, service="", interval_seconds=600, timeout_seconds=60)
    probe.start()
    await health.serving()
    loop = asyncio.get_running_loop()
    started, num_before = loop.time(), len(triton.requests)
    while loop.time() < started + 0.5:
        probe.hasten()
        await asyncio.sleep(0.001)
    num_probes = len(triton.requests) - num_before
    await probe.stop()
    await fleet.close(5)

    assert 1 <= num_probes <= 2 + (loop.time() - started) / 0.1


def broken(version: int) -> Any:
    """Return what makes a version of :class:`FakeTriton` answer with what are no probabilities."""

    def rewrite(response: Any) -> None:
        if response.model_version == str(version):
            response.raw_output_contents[0] = np.full((response.outputs[0].shape[0], 10), np.nan, np.float32).tobytes()

    return rewrite


@pytest.fixture
async def routed(triton: FakeTriton, settings: GatewaySettings, tmp_path: Path) -> Any:
    """Of a gateway with version 3 as its default, and 2 as a canary that gets nearly everybody."""
    triton.models = {"mnist": [1, 2, 3, 4]}
    path_of(tmp_path, "mnist").write_text('{"default": 3, "canary": {"2": 0.99}}')
    async with GatewayServer(settings) as gateway, ImageClient(gateway.address) as client:
        await client.wait_ready()
        yield gateway, client


async def answerers(client: ImageClient, image: NDArray[np.uint8]) -> set[int]:
    return {(await client.classify(image)).version for _ in range(20)}


async def test_canary_that_fails_gets_nobody_until_it_works(
    routed: Any, triton: FakeTriton, digit: NDArray[np.uint8]
) -> None:
    gateway, client = routed
    while 2 not in await answerers(client, digit):
        pass
    async with grpc.aio.insecure_channel(gateway.address) as channel:
        call = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(service=f"{SERVICE}/mnist"))
        await status(call, SERVING)
        triton.rewrite = broken(2)
        # Two probes: what was found by the first was found afterwards.
        for _ in range(2):
            await probed(triton, 2)
        assert await answerers(client, digit) == {3}
        assert value(gateway.metrics_url, "gateway_serving") == 1

        triton.rewrite = lambda response: None
        while 2 not in await answerers(client, digit):
            pass
        call.cancel()
        assert await call.code() is grpc.StatusCode.CANCELLED  # nothing else was told meanwhile


async def test_default_that_fails_is_not_replaced_by_another_version(
    routed: Any, triton: FakeTriton, digit: NDArray[np.uint8], tmp_path: Path
) -> None:
    gateway, _ = routed
    async with grpc.aio.insecure_channel(gateway.address) as channel:
        call = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(service=f"{SERVICE}/mnist"))
        await status(call, SERVING)
        triton.rewrite = broken(3)
        await status(call, NOT_SERVING)
        stub: Any = image_service_pb2_grpc.ImageServiceStub(channel)
        image = pb.Image(raw=pb.RawImage(height=28, width=28, pixels=digit.tobytes()))
        with pytest.raises(grpc.aio.AioRpcError, match="mnist does not answer now: the model did not answer with"):
            await stub.Classify(pb.ClassifyRequest(image=image, model_version=3))
        # The canary works, for its share.
        assert (await stub.Classify(pb.ClassifyRequest(image=image, model_version=2))).model_version == 2

        path_of(tmp_path, "mnist").write_text('{"default": 4}')
        await status(call, SERVING)
        assert (await stub.Classify(pb.ClassifyRequest(image=image))).model_version == 4
        call.cancel()


async def probed(triton: FakeTriton, version: int) -> None:
    """Wait until one more probe of a version has arrived."""
    num_before = len(triton.requests)
    while not any(
        one.model_version == str(version) and not any(one.raw_input_contents[0]) for one in triton.requests[num_before:]
    ):
        triton.arrived.clear()
        await triton.arrived.wait()
