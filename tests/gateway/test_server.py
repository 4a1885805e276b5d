import asyncio
import gc
import io
import os
import signal
from contextlib import suppress
from typing import Any

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from numpy.typing import NDArray
from PIL import Image

from gateway.client import ImageClient
from gateway.server import SERVICE, GatewayServer, serve
from gateway.settings import GatewaySettings
from protos.gateway.v1 import image_service_pb2 as pb
from protos.gateway.v1 import image_service_pb2_grpc
from rpc.health import MAX_WATCHERS
from rpc.lifecycle import PortTakenError
from tests.gateway.fake_triton import FakeTriton, label_of
from tests.scraping import becomes


async def test_reflection_lists_the_services(channel: grpc.aio.Channel) -> None:
    call = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo()
    await call.write(reflection_pb2.ServerReflectionRequest(list_services=""))
    listed = (await call.read()).list_services_response.service
    await call.done_writing()

    assert {service.name for service in listed} == {
        "sluice.gateway.v1.ImageService",
        "inference.GRPCInferenceService",
        "grpc.health.v1.Health",
        "grpc.reflection.v1alpha.ServerReflection",
    }


async def test_next_call_is_waited_for_once_and_not_for_each_method(settings: GatewaySettings) -> None:
    before = asyncio.all_tasks()
    async with GatewayServer(settings):
        await asyncio.sleep(0)
        tasks = [getattr(task.get_coro(), "__qualname__", "") for task in asyncio.all_tasks() - before]

    assert [name for name in tasks if "_request_registered_call" in name] == []


async def test_taken_port_is_named_with_the_option(gateway: GatewayServer, settings: GatewaySettings) -> None:
    port = int(gateway.address.rpartition(":")[2])
    with pytest.raises(PortTakenError, match=f"{gateway.address}.*--port or SLUICE_GATEWAY_PORT"):
        await GatewayServer(settings.model_copy(update={"port": port})).__aenter__()


async def test_message_above_the_limit_is_refused(settings: GatewaySettings, digit: NDArray[np.uint8]) -> None:
    small = settings.model_copy(update={"max_message_bytes": 2048})
    async with GatewayServer(small) as gateway, ImageClient(gateway.address) as client:
        await client.wait_ready()
        with pytest.raises(ValueError, match=r"refused the request's size: .*larger than max"):
            await client.classify(np.zeros((100, 100), np.uint8))

        assert (await client.classify(digit)).label == label_of(digit)


async def test_unexpected_exception_shows_no_internals(stub: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any, **options: Any) -> None:
        raise MemoryError("secret of /srv/gateway.py")

    monkeypatch.setattr(Image, "open", broken)
    with pytest.raises(grpc.aio.AioRpcError) as failed:
        await stub.Classify(pb.ClassifyRequest(image=pb.Image(encoded=b"x")))

    assert failed.value.code() is grpc.StatusCode.INTERNAL
    assert (failed.value.details() or "").startswith("internal error, logged as ")


async def test_refused_call_leaves_nothing_for_the_garbage_collector(channel: grpc.aio.Channel) -> None:
    sent = pb.ClassifyRequest(image=pb.Image(encoded=b"no picture, and no other test sends it"))
    request = sent.SerializeToString()
    classify: Any = channel.unary_unary(f"/{SERVICE}/Classify")
    gc.collect()
    gc.disable()
    try:
        with pytest.raises(grpc.aio.AioRpcError, match="image"):
            await classify(request)
        await asyncio.sleep(0)  # the server's task ends
        # By type alone: asking others what they are makes some of them warn.
        kept = [one for one in gc.get_objects() if type(one) is pb.ClassifyRequest and one is not sent]
        assert sent not in kept
    finally:
        gc.enable()


@pytest.mark.parametrize(("version", "num_left"), [("2.51.0", 1), ("2.59.0", 0)])
async def test_inference_that_nobody_waits_for_is_cancelled_only_where_triton_bears_it(
    settings: GatewaySettings, triton: FakeTriton, digit: NDArray[np.uint8], version: str, num_left: int
) -> None:
    triton.version = version
    async with GatewayServer(settings) as gateway, ImageClient(gateway.address) as client:
        await client.wait_ready()
        triton.gate.clear()
        call = asyncio.create_task(client.classify(digit))
        await triton.arrival_of(digit)
        call.cancel()
        classify = f"{SERVICE}/Classify"
        await becomes(1, gateway.metrics_url, "gateway_requests_total", method=classify, code="CANCELLED")
        await becomes(num_left, gateway.metrics_url, "gateway_images_in_flight")
        async with asyncio.timeout(60):
            while triton.num_cancelled < 1 - num_left:  # noqa: ASYNC110 - on its way, and nobody is told
                await asyncio.sleep(0.01)
        triton.gate.set()
    assert triton.num_cancelled == 1 - num_left


async def test_call_in_flight_finishes_while_draining(
    settings: GatewaySettings, triton: FakeTriton, digit: NDArray[np.uint8]
) -> None:
    async with GatewayServer(settings) as gateway, ImageClient(gateway.address) as client:
        await client.wait_ready()
        triton.gate.clear()
        call = asyncio.create_task(client.classify(digit))
        await triton.arrival_of(digit)
        stopping = asyncio.create_task(gateway.__aexit__(None, None, None))
        with pytest.raises(Exception, match=r"no gateway answers|no inference worked"):
            await client.wait_ready(timeout_seconds=0.2)
        assert not call.done()
        triton.gate.set()

        assert (await call).label == label_of(digit)
        await stopping
    assert triton.num_cancelled == 0


async def test_watcher_does_not_hold_up_the_drain(settings: GatewaySettings) -> None:
    patient = settings.model_copy(update={"drain_seconds": 60})
    async with GatewayServer(patient) as gateway, grpc.aio.insecure_channel(gateway.address) as channel:
        watching = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
        await watching.read()
        gateway.drain()
        async with asyncio.timeout(5):
            await gateway.grpc_server.stop(60)

        assert await watching.code() is grpc.StatusCode.OK


async def test_watchers_leave_room_for_calls(settings: GatewaySettings, digit: NDArray[np.uint8]) -> None:
    narrow = settings.model_copy(update={"max_in_flight": 1, "max_batch_images": 1})
    async with (
        GatewayServer(narrow) as gateway,
        ImageClient(gateway.address) as client,
        grpc.aio.insecure_channel(gateway.address) as channel,
    ):
        await client.wait_ready()
        watches = [health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest()) for _ in range(400)]
        told = await asyncio.gather(*(watch.read() for watch in watches), return_exceptions=True)
        # Of one caller; the rest is for the next one.
        assert sum(isinstance(one, grpc.aio.AioRpcError) for one in told) == 400 - MAX_WATCHERS * 15 // 16

        assert (await client.classify(digit)).label == label_of(digit)
        for watch in watches:
            watch.cancel()


async def test_idle_streams_leave_room_for_calls_and_health(
    settings: GatewaySettings, digit: NDArray[np.uint8]
) -> None:
    narrow = settings.model_copy(update={"max_in_flight": 1, "max_batch_images": 1, "max_streams": 32})
    async with (
        GatewayServer(narrow) as gateway,
        ImageClient(gateway.address) as client,
        grpc.aio.insecure_channel(gateway.address) as channel,
    ):
        await client.wait_ready()
        stub: Any = image_service_pb2_grpc.ImageServiceStub(channel)
        idle = [stub.ClassifyStream() for _ in range(800)]
        for stream in idle:
            # One image, which is none: streams as such, and nothing that they ask for. Some are refused before it.
            with suppress(asyncio.InvalidStateError, grpc.aio.AioRpcError):
                await stream.write(pb.ClassifyStreamRequest())
        told = await asyncio.gather(*(stream.read() for stream in idle), return_exceptions=True)
        assert sum(isinstance(one, grpc.aio.AioRpcError) for one in told) == 800 - 30

        assert (await client.classify(digit)).label == label_of(digit)
        await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())


async def test_stream_that_is_idle_for_long_is_ended(settings: GatewaySettings) -> None:
    impatient = settings.model_copy(update={"stream_idle_seconds": 0.1})
    async with GatewayServer(impatient) as gateway, grpc.aio.insecure_channel(gateway.address) as channel:
        stub: Any = image_service_pb2_grpc.ImageServiceStub(channel)
        idle = stub.ClassifyStream()
        await idle.write(pb.ClassifyStreamRequest())
        await idle.read()

        assert await idle.code() is grpc.StatusCode.ABORTED


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_serve_ends_at_a_signal(settings: GatewaySettings, number: signal.Signals) -> None:
    ready = asyncio.Event()
    addresses: list[str] = []

    def on_ready(address: str) -> None:
        addresses.append(address)
        ready.set()

    serving = asyncio.create_task(serve(settings, on_ready=on_ready))
    await ready.wait()
    async with ImageClient(addresses[0]) as client:
        await client.wait_ready()
        os.kill(os.getpid(), number)
        await serving

        with pytest.raises(Exception, match="no gateway answers"):
            await client.models(timeout_seconds=2)


async def test_many_callers_at_once_each_get_their_own_answer(client: ImageClient) -> None:
    images = np.random.default_rng(3).integers(0, 256, (64, 28, 28), np.uint8)
    files = []
    for image in images:
        file = io.BytesIO()
        Image.fromarray(image).save(file, "PNG")
        files.append(file.getvalue())
    answers = await asyncio.gather(*(client.classify(file, polarity="light_on_dark") for file in files))

    assert [one.label for one in answers] == [label_of(image) for image in images]


@pytest.mark.parametrize(
    "method",
    [
        "/sluice.gateway.v1.ImageService/Classify",
        "/sluice.gateway.v1.ImageService/ClassifyBatch",
        "/grpc.health.v1.Health/Check",
    ],
)
@pytest.mark.parametrize("data", [b"\xff\xff\xff", b"\x0a\x7f", b"\x12\x01\xff"], ids=["tag", "length", "UTF-8"])
async def test_malformed_request_is_the_callers_mistake(channel: Any, method: str, data: bytes) -> None:
    if method.endswith("Check"):
        data = b"\x0a\x01\xff"
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await channel.unary_unary(method)(data)

    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert refused.value.details() == f"request: not a valid message for {method}"


@pytest.mark.parametrize(
    "method", ["/grpc.health.v1.Health/Watch", "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"]
)
async def test_malformed_stream_is_the_callers_mistake(channel: Any, method: str) -> None:
    if method.endswith("Watch"):
        call = channel.unary_stream(method)(b"\xff\xff")
    else:
        call = channel.stream_stream(method)(iter([b"\xff\xff"]))
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await call.read()

    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_unknown_method_is_unimplemented(channel: Any) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await channel.unary_unary("/sluice.gateway.v1.ImageService/Nope")(b"")

    assert refused.value.code() is grpc.StatusCode.UNIMPLEMENTED
