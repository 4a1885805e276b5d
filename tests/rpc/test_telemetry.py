"""What calls leave in the metrics, on a real server with raw-bytes methods, and the endpoint that shows it."""

from __future__ import annotations  # grpc's classes are generic in their stubs alone

import asyncio
import socket
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass

import grpc
import pytest
from google.protobuf.empty_pb2 import Empty
from prometheus_client import Metric
from prometheus_client.registry import Collector
from structlog.testing import capture_logs

from protos.streamer.v1 import sample_service_pb2
from rpc.interceptor import Guard
from rpc.lifecycle import PortTakenError
from rpc.telemetry import Endpoint, Registry, method_metrics
from tests.scraping import becomes, scrape, value

DESCRIPTOR = sample_service_pb2.DESCRIPTOR.services_by_name["SampleService"]
# The methods of any service do; these stand for a request, a stream out, and a stream both ways.
REQUEST, STREAM, BOTH = (f"{DESCRIPTOR.full_name}/{name}" for name in ("ListDatasets", "StreamBatches", "PullBatches"))


@dataclass
class Service:
    """A measured server, where it is shown, and a channel to it."""

    server: grpc.aio.Server
    channel: grpc.aio.Channel
    url: str

    def request(self, data: bytes) -> grpc.aio.UnaryUnaryCall[bytes, bytes]:
        method: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = self.channel.unary_unary(f"/{REQUEST}")
        return method(data)

    def stream(self, data: bytes) -> grpc.aio.UnaryStreamCall[bytes, bytes]:
        method: grpc.aio.UnaryStreamMultiCallable[bytes, bytes] = self.channel.unary_stream(f"/{STREAM}")
        return method(data)


async def _respond(request: bytes, context: grpc.aio.ServicerContext[bytes, bytes]) -> bytes:
    match request:
        case b"fail":
            raise ValueError(request)
        case b"abort":
            await context.abort(grpc.StatusCode.NOT_FOUND, "no such thing")
        case b"hold":
            await asyncio.Event().wait()
    return request


async def _stream(request: bytes, context: grpc.aio.ServicerContext[bytes, bytes]) -> AsyncIterator[bytes]:
    try:
        yield request
        yield await _respond(request, context)
        while request in (b"endless", b"clumsy"):
            yield bytes(1 << 20)
    finally:
        if request == b"clumsy":
            raise ValueError(request)


async def _echo(requests: AsyncIterator[bytes], context: object) -> AsyncIterator[bytes]:
    async for request in requests:
        yield request


@pytest.fixture
def registry() -> Registry:
    return Registry("test")


@pytest.fixture
def endpoint(registry: Registry) -> Iterator[Endpoint]:
    opened = Endpoint(registry, "127.0.0.1", 0, option="--metrics-port")
    yield opened
    opened.close()


@pytest.fixture
async def service(registry: Registry, endpoint: Endpoint) -> AsyncIterator[Service]:
    server = grpc.aio.server(interceptors=[Guard(method_metrics("test", [DESCRIPTOR], registry))])
    measured: dict[str, grpc.RpcMethodHandler[bytes, bytes]] = {
        "ListDatasets": grpc.unary_unary_rpc_method_handler(_respond),
        "StreamBatches": grpc.unary_stream_rpc_method_handler(_stream),
        "PullBatches": grpc.stream_stream_rpc_method_handler(_echo),
    }
    other: dict[str, grpc.RpcMethodHandler[bytes, bytes]] = {"Check": grpc.unary_unary_rpc_method_handler(_respond)}
    server.add_generic_rpc_handlers(
        (
            grpc.method_handlers_generic_handler(DESCRIPTOR.full_name, measured),
            grpc.method_handlers_generic_handler("grpc.health.v1.Health", other),
        )
    )
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield Service(server, channel, endpoint.url)
    await server.stop(0)


def series(url: str) -> set[tuple[str, frozenset[tuple[str, str]]]]:
    return {
        (sample.name, frozenset(sample.labels.items()))
        for metric in scrape(url)
        for sample in metric.samples
        if metric.name.startswith("test_")
    }


@pytest.mark.parametrize(("data", "code"), [(b"fine", "OK"), (b"abort", "NOT_FOUND"), (b"fail", "INTERNAL")])
async def test_request_is_counted_and_timed_under_its_status(service: Service, data: bytes, code: str) -> None:
    await asyncio.wait({asyncio.ensure_future(service.request(data).code())})

    await becomes(1, service.url, "test_requests_total", method=REQUEST, code=code)
    assert value(service.url, "test_request_seconds_count", method=REQUEST) == 1
    assert value(service.url, "test_requests_in_flight", method=REQUEST) == 0
    assert value(service.url, "test_received_bytes_total", method=REQUEST) == len(data)


@pytest.mark.parametrize(("data", "code"), [(b"fine", "OK"), (b"abort", "NOT_FOUND"), (b"fail", "INTERNAL")])
async def test_stream_is_counted_under_the_status_it_ended_with(service: Service, data: bytes, code: str) -> None:
    with suppress(grpc.aio.AioRpcError):
        _ = [message async for message in service.stream(data)]

    await becomes(1, service.url, "test_streams_total", method=STREAM, code=code)
    assert value(service.url, "test_streams_in_flight", method=STREAM) == 0


async def test_cancelled_request_leaves_the_flight(service: Service) -> None:
    call = service.request(b"hold")
    await becomes(1, service.url, "test_requests_in_flight", method=REQUEST)
    call.cancel()

    await becomes(1, service.url, "test_requests_total", method=REQUEST, code="CANCELLED")
    assert value(service.url, "test_requests_in_flight", method=REQUEST) == 0


@pytest.mark.parametrize(
    "data",
    [b"hold", b"endless", b"clumsy"],
    ids=["waits for its source", "waits for its reader", "fails when it is closed"],
)
@pytest.mark.parametrize("end", ["cancel", "close", "stop"])
async def test_stream_that_is_cut_leaves_the_flight(service: Service, data: bytes, end: str) -> None:
    call = service.stream(data)
    await call.read()
    assert value(service.url, "test_streams_in_flight", method=STREAM) == 1
    match end:
        case "cancel":
            call.cancel()
        case "close":
            await service.channel.close()
        case "stop":
            await service.server.stop(0)

    await becomes(1, service.url, "test_streams_total", method=STREAM, code="CANCELLED")
    assert value(service.url, "test_streams_in_flight", method=STREAM) == 0
    assert value(service.url, "test_stream_seconds_count", method=STREAM) == 1


async def test_request_that_outlives_the_drain_leaves_the_flight(service: Service) -> None:
    call = service.request(b"hold")
    await becomes(1, service.url, "test_requests_in_flight", method=REQUEST)
    await service.server.stop(0.05)

    await becomes(0, service.url, "test_requests_in_flight", method=REQUEST)
    assert await call.code() is not grpc.StatusCode.OK


async def test_every_message_of_a_stream_is_received(service: Service) -> None:
    method: grpc.aio.StreamStreamMultiCallable[bytes, bytes] = service.channel.stream_stream(f"/{BOTH}")
    assert [message async for message in method(iter([b"one", b"three"]))] == [b"one", b"three"]

    await becomes(1, service.url, "test_streams_total", method=BOTH, code="OK")
    assert value(service.url, "test_received_bytes_total", method=BOTH) == 8


async def test_request_that_cannot_be_parsed_is_counted(registry: Registry, endpoint: Endpoint) -> None:
    server = grpc.aio.server(interceptors=[Guard(method_metrics("test", [DESCRIPTOR], registry))])
    handlers: dict[str, grpc.RpcMethodHandler[bytes, bytes]] = {
        "ListDatasets": grpc.unary_unary_rpc_method_handler(_respond, request_deserializer=Empty.FromString)  # type: ignore[arg-type]  # never called
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(DESCRIPTOR.full_name, handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        await asyncio.wait({asyncio.ensure_future(Service(server, channel, "").request(b"\xff").code())})
    await server.stop(0)

    await becomes(1, endpoint.url, "test_requests_total", method=REQUEST, code="INVALID_ARGUMENT")


async def test_series_are_there_from_the_start_and_strangers_add_none(service: Service) -> None:
    before = series(service.url)
    for path in ("/grpc.health.v1.Health/Check", f"/{DESCRIPTOR.full_name}/Nope", "/a.b/C"):
        method: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = service.channel.unary_unary(path)
        await asyncio.wait({asyncio.ensure_future(method(b"").code())})
    await service.request(b"fine")

    assert series(service.url) == before
    for code in grpc.StatusCode:
        assert ("test_requests_total", frozenset({("method", REQUEST), ("code", code.name)})) in before


# The endpoint


def exchange(endpoint: Endpoint, request: bytes) -> bytes:
    """Send these bytes and return what comes back before the other end closes."""
    with socket.create_connection(address_of(endpoint), timeout=5) as connection:
        connection.sendall(request)
        return b"".join(iter(lambda: connection.recv(65536), b""))


def address_of(endpoint: Endpoint) -> tuple[str, int]:
    host, port = endpoint.url.removeprefix("http://").removesuffix("/metrics").split(":")
    return host, int(port)


@pytest.mark.parametrize(
    ("request_line", "status"),
    [
        (b"GET /metrics HTTP/1.1", b"200 OK"),
        (b"GET /metrics?name=x HTTP/1.0", b"200 OK"),
        (b"GET / HTTP/1.1", b"404 Not Found"),
        (b"GET /metricses HTTP/1.1", b"404 Not Found"),
        (b"POST /metrics HTTP/1.1", b"405 Method Not Allowed"),
        (b"hello", b"400 Bad Request"),
    ],
)
def test_only_metrics_are_there(endpoint: Endpoint, request_line: bytes, status: bytes) -> None:
    head, _, body = exchange(endpoint, request_line + b"\r\n\r\n").partition(b"\r\n\r\n")

    assert head.startswith(b"HTTP/1.1 " + status)
    assert f"Content-Length: {len(body)}\r\n".encode() in head


def test_request_without_end_is_dropped(endpoint: Endpoint) -> None:
    assert exchange(endpoint, b"GET /metrics HTTP/1.1\r\nX: " + bytes(64 * 1024)) == b""


def test_idle_connections_hold_up_neither_readers_nor_the_end(endpoint: Endpoint) -> None:
    idle = [socket.create_connection(address_of(endpoint), timeout=5) for _ in range(30)]
    assert scrape(endpoint.url)
    endpoint.close()

    for connection in idle:
        with connection:
            assert connection.recv(1) == b""
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(address_of(endpoint))


def test_port_can_be_taken_again_at_once(registry: Registry, endpoint: Endpoint) -> None:
    scrape(endpoint.url)
    endpoint.close()
    endpoint.close()
    again = Endpoint(registry, *address_of(endpoint), option="--metrics-port")

    assert scrape(again.url)
    again.close()


def test_taken_port_is_named_with_the_option(endpoint: Endpoint) -> None:
    host, port = address_of(endpoint)

    with pytest.raises(PortTakenError, match=f"{host}:{port}.*--metrics-port"):
        Endpoint(Registry("other"), host, port, option="--metrics-port")


class Broken(Collector):
    def collect(self) -> Iterable[Metric]:
        raise OSError("secret of /srv")


def test_collector_that_fails_is_logged_and_not_shown(registry: Registry, endpoint: Endpoint) -> None:
    registry.register(Broken())
    with capture_logs() as logs:
        answer = exchange(endpoint, b"GET /metrics HTTP/1.1\r\n\r\n")

    assert answer.startswith(b"HTTP/1.1 500")
    assert b"secret" not in answer
    assert [entry["event"] for entry in logs] == ["metrics failed"]
