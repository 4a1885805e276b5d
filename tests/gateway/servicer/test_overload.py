"""A gateway that is full, and callers who leave."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import numpy as np
import pytest
from google.rpc.error_details_pb2 import RetryInfo
from google.rpc.status_pb2 import Status
from numpy.typing import NDArray

from gateway.server import GatewayServer
from gateway.settings import GatewaySettings
from protos.gateway.v1 import image_service_pb2 as pb
from protos.gateway.v1 import image_service_pb2_grpc
from tests.gateway.fake_triton import FakeTriton, label_of
from tests.gateway.servicer.calls import picture, refusal
from tests.scraping import becomes


@pytest.fixture
async def narrow_stub(settings: GatewaySettings) -> AsyncIterator[Any]:
    """To a gateway that takes one image at a time."""
    narrow = settings.model_copy(update={"max_in_flight": 1, "max_batch_images": 1})
    async with GatewayServer(narrow) as gateway, grpc.aio.insecure_channel(gateway.address) as channel:
        yield image_service_pb2_grpc.ImageServiceStub(channel)


def pushback(error: grpc.aio.AioRpcError) -> str:
    return str(dict(error.trailing_metadata() or ())["grpc-retry-pushback-ms"])


def retry_info(error: grpc.aio.AioRpcError) -> RetryInfo:
    """Read google.rpc.RetryInfo as a client in any language does."""
    status = Status.FromString(dict(error.trailing_metadata() or ())["grpc-status-details-bin"])
    info = RetryInfo()
    assert status.details[0].Unpack(info)
    assert (status.code, status.message) == (error.code().value[0], error.details())
    return info


async def eventually(stub: Any, request: pb.ClassifyRequest) -> pb.ClassifyResponse:
    """Try again as often as the server's pushback says; any other error has none."""
    while True:
        try:
            response: pb.ClassifyResponse = await stub.Classify(request)
        except grpc.aio.AioRpcError as error:
            await asyncio.sleep(int(pushback(error)) / 1000)
        else:
            return response


async def test_call_beyond_the_bound_is_refused_at_once_with_pushback(
    narrow_stub: Any, triton: FakeTriton, digit: NDArray[np.uint8]
) -> None:
    request = pb.ClassifyRequest(image=picture(digit))
    triton.gate.clear()
    first = narrow_stub.Classify(request)
    await triton.arrival_of(digit)

    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await narrow_stub.Classify(request)
    assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert 10 <= int(pushback(refused.value)) <= 5000
    assert retry_info(refused.value).retry_delay.ToMilliseconds() == int(pushback(refused.value))

    triton.gate.set()
    assert (await first).prediction.label == label_of(digit)
    assert (await eventually(narrow_stub, request)).prediction.label == label_of(digit)


async def test_what_is_refused_anyway_is_refused_before_its_request_is_read(
    settings: GatewaySettings, triton: FakeTriton, digit: NDArray[np.uint8]
) -> None:
    narrow = settings.model_copy(update={"max_in_flight": 1, "max_batch_images": 1})
    async with GatewayServer(narrow) as gateway, grpc.aio.insecure_channel(gateway.address) as channel:
        triton.gate.clear()
        first = image_service_pb2_grpc.ImageServiceStub(channel).Classify(pb.ClassifyRequest(image=picture(digit)))
        await triton.arrival_of(digit)

        without_request: Any = channel.stream_unary("/sluice.gateway.v1.ImageService/ClassifyBatch")()
        with pytest.raises(grpc.aio.AioRpcError, match="1 images are in flight") as refused:
            await without_request
        assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert 10 <= int(pushback(refused.value)) <= 5000

        triton.gate.set()
        await first


async def test_bytes_of_a_request_count_whatever_they_are(
    settings: GatewaySettings, triton: FakeTriton, digit: NDArray[np.uint8]
) -> None:
    narrow = settings.model_copy(update={"max_in_flight_bytes": 1 << 20, "probe_timeout_seconds": 60.0})
    request = pb.ClassifyRequest(image=picture(digit))
    # Field 1000, which this version does not know.
    request.MergeFromString(b"\xc2\x3e" + b"\x80\x80\x40" + bytes(1 << 20))
    async with GatewayServer(narrow) as gateway, grpc.aio.insecure_channel(gateway.address) as channel:
        stub: Any = image_service_pb2_grpc.ImageServiceStub(channel)
        await becomes(1, gateway.metrics_url, "gateway_serving")
        triton.gate.clear()
        large = stub.Classify(request)
        await triton.arrival_of(digit)
        code, words = await refusal(stub.Classify(pb.ClassifyRequest(image=picture(digit))))
        triton.gate.set()
        await large

    assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "bytes are in flight" in words


async def test_cancelled_caller_leaves_its_inference_running_and_its_place_taken(
    narrow_stub: Any, triton: FakeTriton, digit: NDArray[np.uint8]
) -> None:
    request = pb.ClassifyRequest(image=picture(digit))
    triton.gate.clear()
    call = narrow_stub.Classify(request)
    await triton.arrival_of(digit)
    call.cancel()
    code, _ = await refusal(narrow_stub.Classify(request))
    assert code is grpc.StatusCode.RESOURCE_EXHAUSTED

    triton.gate.set()
    assert (await eventually(narrow_stub, request)).prediction.label == label_of(digit)
    assert triton.num_cancelled == 0
