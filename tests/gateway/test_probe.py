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
from gateway.routing import path_of
from gateway.server import SERVICE, GatewayServer
from gateway.settings import GatewaySettings
from protos.gateway.v1 import image_service_pb2 as pb
from protos.gateway.v1 import image_service_pb2_grpc
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


async def test_probe_that_dies_takes_readiness_with_it(watch: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    await status(watch, SERVING)

    def broken(path: Path) -> bytes:
        raise ZeroDivisionError

    monkeypatch.setattr(Path, "read_bytes", broken)
    await status(watch, NOT_SERVING)


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
