"""A long conversation."""

import asyncio
from typing import Any

import grpc
import numpy as np
from numpy.typing import NDArray

from gateway.server import GatewayServer
from gateway.settings import GatewaySettings
from protos.gateway.v1 import image_service_pb2 as pb
from protos.gateway.v1 import image_service_pb2_grpc
from tests.gateway.fake_triton import FakeTriton, label_of
from tests.gateway.servicer.calls import picture
from tests.scraping import becomes, value


def streamed(number: int, image: pb.Image, **fields: Any) -> pb.ClassifyStreamRequest:
    return pb.ClassifyStreamRequest(id=number, request=pb.ClassifyRequest(image=image, **fields))


async def test_stream_answers_each_image_under_its_id_and_bad_ones_in_their_place(
    stub: Any, triton: FakeTriton
) -> None:
    images = np.random.default_rng(0).integers(0, 256, (300, 28, 28), np.uint8)
    call = stub.ClassifyStream()
    for number, image in enumerate(images):
        bad = number % 100 == 7
        await call.write(
            streamed(
                number, pb.Image(encoded=b"no image") if bad else picture(image, polarity=pb.POLARITY_LIGHT_ON_DARK)
            )
        )
    await call.write(streamed(300, picture(images[0]), model="no-such"))
    await call.done_writing()
    answers = {response.id: response async for response in call}

    assert len(answers) == 301
    for number, image in enumerate(images):
        result = answers[number].result
        if number % 100 == 7:
            assert (result.code, result.error[:14]) == (grpc.StatusCode.INVALID_ARGUMENT.value[0], "image.encoded:")
        else:
            assert (result.code, result.prediction.label, answers[number].model_version) == (0, label_of(image), 1)
    assert answers[300].result.code == grpc.StatusCode.NOT_FOUND.value[0]
    assert await call.code() is grpc.StatusCode.OK


async def test_stream_whose_answers_nobody_takes_is_not_read_any_further(
    settings: GatewaySettings, triton: FakeTriton
) -> None:
    narrow = settings.model_copy(update={"stream_window": 4})
    async with GatewayServer(narrow) as gateway, grpc.aio.insecure_channel(gateway.address) as channel:
        stub: Any = image_service_pb2_grpc.ImageServiceStub(channel)
        await becomes(1, gateway.metrics_url, "gateway_serving")
        triton.gate.clear()
        call = stub.ClassifyStream()
        for number in range(50):
            await call.write(streamed(number, picture(np.full((28, 28), number, np.uint8))))
        await becomes(4, gateway.metrics_url, "gateway_images_in_flight")
        async with asyncio.timeout(5):
            # A later call is answered after whatever was read before it.
            await stub.ListModels(pb.ListModelsRequest())
        assert value(gateway.metrics_url, "gateway_images_admitted_total") == 4
        triton.gate.set()
        await call.done_writing()
        assert sorted([response.id async for response in call]) == list(range(50))


async def test_stream_is_read_no_further_than_its_bytes_have_room(
    settings: GatewaySettings, triton: FakeTriton
) -> None:
    narrow = settings.model_copy(update={"max_in_flight_bytes": 1 << 20, "probe_timeout_seconds": 60.0})
    large = pb.Image(raw=pb.RawImage(height=500, width=500))
    async with GatewayServer(narrow) as gateway, grpc.aio.insecure_channel(gateway.address) as channel:
        stub: Any = image_service_pb2_grpc.ImageServiceStub(channel)
        await becomes(1, gateway.metrics_url, "gateway_serving")
        triton.gate.clear()
        call = stub.ClassifyStream()

        async def send() -> None:
            for number in range(12):
                large.raw.pixels = bytes([number]) * (500 * 500)
                await call.write(streamed(number, large))
            await call.done_writing()

        sending = asyncio.create_task(send())
        method = "sluice.gateway.v1.ImageService/ClassifyStream"
        # Three quarters for who can wait, and one that waits.
        await becomes(3, gateway.metrics_url, "gateway_images_in_flight")
        async with asyncio.timeout(5):
            # A later call is answered after whatever was read before it.
            await stub.ListModels(pb.ListModelsRequest())
        assert value(gateway.metrics_url, "gateway_received_bytes_total", method=method) < 5 * 500 * 500
        triton.gate.set()
        assert sorted([response.id async for response in call]) == list(range(12))
        await sending


async def test_stream_that_is_cancelled_leaves_no_place_taken(
    gateway: GatewayServer, stub: Any, triton: FakeTriton, digit: NDArray[np.uint8]
) -> None:
    triton.gate.clear()
    call = stub.ClassifyStream()
    await call.write(streamed(0, picture(digit)))
    await triton.arrival_of(digit)
    call.cancel()
    triton.gate.set()

    await becomes(0, gateway.metrics_url, "gateway_images_in_flight")
    assert (await stub.Classify(pb.ClassifyRequest(image=picture(digit)))).prediction.label == label_of(digit)


async def test_stream_waits_for_room_where_a_call_is_sent_away(
    settings: GatewaySettings, digit: NDArray[np.uint8]
) -> None:
    narrow = settings.model_copy(update={"max_in_flight": 2, "max_batch_images": 2})
    async with GatewayServer(narrow) as gateway, grpc.aio.insecure_channel(gateway.address) as channel:
        stub: Any = image_service_pb2_grpc.ImageServiceStub(channel)
        call = stub.ClassifyStream()
        for number in range(20):
            await call.write(streamed(number, picture(np.full((28, 28), number, np.uint8))))
        await call.done_writing()

        assert [response.result.code async for response in call] == [0] * 20
