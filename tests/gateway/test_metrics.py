import asyncio
from typing import Any

import grpc
import numpy as np
import pytest
from numpy.typing import NDArray

from gateway.client import ImageClient
from gateway.server import SERVICE, GatewayServer, serve
from gateway.settings import GatewaySettings
from protos.gateway.v1 import image_service_pb2 as pb
from protos.gateway.v1 import image_service_pb2_grpc
from rpc.lifecycle import PortTakenError
from tests.gateway.fake_triton import FakeTriton
from tests.scraping import becomes, documented, faults, scrape, shown, value

CLASSIFY = {"method": f"{SERVICE}/Classify"}


def request(image: NDArray[np.uint8]) -> pb.ClassifyRequest:
    height, width = image.shape
    raw = pb.RawImage(pixels=image.tobytes(), height=height, width=width, channels=1)
    return pb.ClassifyRequest(image=pb.Image(raw=raw))


async def test_good_and_bad_request_are_counted(gateway: GatewayServer, stub: Any, digit: NDArray[np.uint8]) -> None:
    good, bad = request(digit), pb.ClassifyRequest(image=pb.Image(encoded=b"no image"))
    await stub.Classify(good)
    with pytest.raises(grpc.aio.AioRpcError):
        await stub.Classify(bad)

    url = gateway.metrics_url
    await becomes(1, url, "gateway_requests_total", code="INVALID_ARGUMENT", **CLASSIFY)
    assert value(url, "gateway_requests_total", code="OK", **CLASSIFY) == 1
    assert value(url, "gateway_request_seconds_count", **CLASSIFY) == 2
    assert value(url, "gateway_received_bytes_total", **CLASSIFY) == good.ByteSize() + bad.ByteSize()


async def test_images_of_a_batch_are_counted_one_by_one(
    gateway: GatewayServer, client: ImageClient, digit: NDArray[np.uint8]
) -> None:
    await client.classify_batch([digit] * 5)

    assert value(gateway.metrics_url, "gateway_images_admitted_total") == 5
    assert value(gateway.metrics_url, "gateway_requests_total", code="OK", method=f"{SERVICE}/ClassifyBatch") == 1


async def test_image_of_a_caller_who_left_is_in_flight_until_triton_answers(
    gateway: GatewayServer, stub: Any, triton: FakeTriton, digit: NDArray[np.uint8]
) -> None:
    url = gateway.metrics_url
    triton.gate.clear()
    call = stub.Classify(request(digit))
    await triton.arrival_of(digit)
    assert value(url, "gateway_requests_in_flight", **CLASSIFY) == 1
    call.cancel()

    await becomes(1, url, "gateway_requests_total", code="CANCELLED", **CLASSIFY)
    assert value(url, "gateway_requests_in_flight", **CLASSIFY) == 0
    assert value(url, "gateway_images_in_flight") == 1
    triton.gate.set()
    await becomes(0, url, "gateway_images_in_flight")


async def test_refused_images_are_counted(
    settings: GatewaySettings, triton: FakeTriton, digit: NDArray[np.uint8]
) -> None:
    narrow = settings.model_copy(update={"max_in_flight": 1, "max_batch_images": 1})
    async with GatewayServer(narrow) as gateway, grpc.aio.insecure_channel(gateway.address) as channel:
        await becomes(1, gateway.metrics_url, "gateway_serving")
        stub: Any = image_service_pb2_grpc.ImageServiceStub(channel)
        triton.gate.clear()
        held = stub.Classify(request(digit))
        await triton.arrival_of(digit)
        with pytest.raises(grpc.aio.AioRpcError, match="overloaded"):
            await stub.Classify(request(digit))
        triton.gate.set()
        await held

        assert value(gateway.metrics_url, "gateway_images_in_flight_limit") == 1
        assert value(gateway.metrics_url, "gateway_images_refused_total", reason="images") == 1
        assert value(gateway.metrics_url, "gateway_images_admitted_total") == 1


async def test_failing_triton_shows_in_readiness_and_errors(
    gateway: GatewayServer, stub: Any, triton: FakeTriton, digit: NDArray[np.uint8]
) -> None:
    assert value(gateway.metrics_url, "gateway_serving") == 1
    triton.failure = (grpc.StatusCode.INTERNAL, "no")
    with pytest.raises(grpc.aio.AioRpcError):
        await stub.Classify(request(digit))

    assert value(gateway.metrics_url, "gateway_upstream_errors_total") == 1
    await becomes(0, gateway.metrics_url, "gateway_serving")


async def test_metrics_show_the_drain(settings: GatewaySettings, triton: FakeTriton, digit: NDArray[np.uint8]) -> None:
    async with GatewayServer(settings) as gateway, ImageClient(gateway.address) as client:
        await client.wait_ready()
        triton.gate.clear()
        call = asyncio.create_task(client.classify(digit))
        await triton.arrival_of(digit)
        stopping = asyncio.create_task(gateway.__aexit__(None, None, None))
        await becomes(0, gateway.metrics_url, "gateway_serving")
        assert value(gateway.metrics_url, "gateway_requests_in_flight", **CLASSIFY) == 1
        triton.gate.set()
        await asyncio.gather(call, stopping)

        with pytest.raises(OSError, match="refused"):
            scrape(gateway.metrics_url)


async def test_taken_metrics_port_is_named_and_no_port_is_kept(
    gateway: GatewayServer, settings: GatewaySettings
) -> None:
    host, port = gateway.metrics_url.removeprefix("http://").removesuffix("/metrics").split(":")
    taken = settings.model_copy(update={"metrics_port": int(port)})
    with pytest.raises(PortTakenError, match=f"{host}:{port}.*--metrics-port or SLUICE_GATEWAY_METRICS_PORT"):
        await serve(taken)


async def test_gateway_port_that_is_taken_leaves_the_metrics_port_free(
    gateway: GatewayServer, settings: GatewaySettings
) -> None:
    async with GatewayServer(settings) as other:
        port = int(other.metrics_url.removesuffix("/metrics").rpartition(":")[2])
    taken = {"port": int(gateway.address.rpartition(":")[2]), "metrics_port": port}
    with pytest.raises(PortTakenError, match="--port"):
        await serve(settings.model_copy(update=taken))

    async with GatewayServer(settings.model_copy(update={"metrics_port": port})) as again:
        assert scrape(again.metrics_url)


async def test_two_gateways_of_one_process_count_apart(
    gateway: GatewayServer, settings: GatewaySettings, stub: Any, digit: NDArray[np.uint8]
) -> None:
    async with GatewayServer(settings) as other:
        await stub.Classify(request(digit))

        assert value(gateway.metrics_url, "gateway_images_admitted_total") == 1
        assert value(other.metrics_url, "gateway_images_admitted_total") == 0


async def test_answers_are_counted_by_version_as_long_as_it_is_ready(
    gateway: GatewayServer, stub: Any, triton: FakeTriton, digit: NDArray[np.uint8]
) -> None:
    url, name = gateway.metrics_url, "gateway_version_requests_total"
    triton.models = {"mnist": [1, 2]}
    await loaded(stub, [2, 1])
    await stub.Classify(request(digit))
    await stub.ClassifyBatch(pb.ClassifyBatchRequest(images=[request(digit).image] * 5, model_version=1))
    assert value(url, name, model="mnist", version="2") == value(url, name, model="mnist", version="1") == 1

    triton.models = {"mnist": [2]}
    await loaded(stub, [2])
    samples = [sample for metric in scrape(url) for sample in metric.samples if sample.name == name]
    assert [(sample.labels["version"], sample.value) for sample in samples] == [("2", 1)]


async def loaded(stub: Any, versions: list[int]) -> None:
    """Wait until the gateway knows of these versions."""
    while list((await stub.ListModels(pb.ListModelsRequest())).models[0].versions) != versions:
        pass


async def test_page_names_every_metric_and_no_other(gateway: GatewayServer, client: ImageClient) -> None:
    assert documented("gateway") == shown(gateway.metrics_url)


async def test_metrics_are_named_and_explained_as_prometheus_asks(gateway: GatewayServer) -> None:
    assert faults(gateway.metrics_url) == []
