"""What a service tells of itself in numbers: metrics of its calls, and the ``/metrics`` endpoint that shows them."""

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from http import HTTPStatus
from importlib.metadata import version
from threading import Thread

import grpc
import structlog
from google.protobuf.descriptor import ServiceDescriptor
from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    GCCollector,
    Histogram,
    Info,
    Metric,
    PlatformCollector,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.registry import Collector

from rpc.address import joined
from rpc.lifecycle import listen

log = structlog.get_logger(__name__)

_REQUEST_BUCKETS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
_STREAM_BUCKETS = (0.01, 0.1, 1, 10, 60, 300, 1800, 7200, 28800)

# The format's own version; https://prometheus.io/docs/instrumenting/exposition_formats/
_TEXT_FORMAT = "text/plain; version=0.0.4; charset=utf-8"
# From the connection to the last byte taken; Prometheus itself gives up after 10.
_ANSWER_SECONDS = 10.0
_MAX_CONNECTIONS = 64
_MAX_REQUEST_BYTES = 16 * 1024
# Longer than making one answer takes, which is all that close() may have to wait for.
_CLOSE_SECONDS = 1.0


class Registry(CollectorRegistry):
    """
    Metrics of one server object, with those of its process, of Python and of this version beside them.

    Leaves out the library's ``_created`` series: they double the text, and its format has no use for them.

    Args:
        service: What each name of the service's own begins with.
    """

    def __init__(self, service: str) -> None:
        super().__init__()
        ProcessCollector(registry=self)
        PlatformCollector(registry=self)
        GCCollector(registry=self)
        Info(f"{service}_build", "Which version runs, in its label; always 1.", registry=self).info(
            {"version": version("sluice")}
        )

    def collect(self) -> Iterable[Metric]:
        """Yield every metric as it is now."""
        for metric in super().collect():
            metric.samples = [sample for sample in metric.samples if not sample.name.endswith("_created")]
            yield metric


class MethodMetrics:
    """The metrics of one method; whoever calls :meth:`begin` owes one :meth:`end`."""

    def __init__(self, method: str, family: "_Family") -> None:
        self._received_bytes = family.received_bytes.labels(method)
        self._in_flight = family.in_flight.labels(method)
        self._seconds = family.seconds.labels(method)
        # Each from the start, so that the first error is an increase from 0 and not a series out of nowhere.
        self._ended = {code.name: family.ended.labels(method, code.name) for code in grpc.StatusCode}

    def begin(self) -> None:
        """Count a call in."""
        self._in_flight.inc()

    def receive(self, num_bytes: int) -> None:
        """Count a message that came."""
        self._received_bytes.inc(num_bytes)

    def end(self, code: str, seconds: float) -> None:
        """Count a call out; ``code`` is gRPC's name of its status, anything else counts as UNKNOWN."""
        self._in_flight.dec()
        self._seconds.observe(seconds)
        self._ended.get(code, self._ended["UNKNOWN"]).inc()


def method_metrics(
    service: str, descriptors: Iterable[ServiceDescriptor], registry: CollectorRegistry
) -> Mapping[str, MethodMetrics]:
    """
    Make the metrics of every method of these gRPC services, by its path ``/package.Service/Method``.

    Methods that stream in either direction have metrics of their own: what is long for a request is short for them.

    Args:
        service: What each name begins with.
        descriptors: Of the gRPC services. Their methods are all the values that the label ``method`` ever takes.
        registry: Where the metrics are shown.
    """
    received_bytes = Counter(
        f"{service}_received_bytes", "Size of the messages that came.", ["method"], registry=registry
    )
    requests = _Family(service, "request", _REQUEST_BUCKETS, received_bytes, registry)
    streams = _Family(service, "stream", _STREAM_BUCKETS, received_bytes, registry)
    return {
        f"/{descriptor.full_name}/{method.name}": MethodMetrics(
            f"{descriptor.full_name}/{method.name}",
            streams if method.client_streaming or method.server_streaming else requests,
        )
        for descriptor in descriptors
        for method in descriptor.methods
    }


class _Family:
    def __init__(
        self,
        service: str,
        kind: str,
        buckets: Sequence[float],
        received_bytes: Counter,
        registry: CollectorRegistry,
    ) -> None:
        name, labels = f"{service}_{kind}", ["method"]
        self.received_bytes = received_bytes
        self.ended = Counter(f"{name}s", f"{kind.title()}s that ended.", [*labels, "code"], registry=registry)
        self.seconds = Histogram(
            f"{name}_seconds", f"Time from a {kind}'s arrival to its end.", labels, registry=registry, buckets=buckets
        )
        self.in_flight = Gauge(f"{name}s_in_flight", f"{kind.title()}s that have not ended.", labels, registry=registry)


class Endpoint:
    """
    ``GET /metrics`` over HTTP, from construction to :meth:`close`.

    Has a thread with an event loop of its own: it answers while the process' loop is busy. A reader that is slow holds
    up nobody and is cut off after 10 seconds.

    Args:
        registry: What is shown; asked in that thread.
        host: As of :func:`rpc.lifecycle.listen`, and so are ``port`` and ``option``.
        port: As said.
        option: As said.

    Attributes:
        url: Where it is.

    Raises:
        PortTakenError: The address cannot be bound.
    """

    def __init__(self, registry: Collector, host: str, port: int, *, option: str) -> None:
        self._registry = registry
        self._socket = listen(host, port, option=option)
        self.url = f"http://{joined(host, self._socket.getsockname()[1])}/metrics"
        self._num_connections = 0
        self._loop = asyncio.new_event_loop()
        self._closing = asyncio.Event()
        self._thread = Thread(target=self._run, name="metrics", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Give the port back and end every connection at once; harmless when done already."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._closing.set)
            self._thread.join(_CLOSE_SECONDS)

    def _run(self) -> None:
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            runner.run(self._serve())

    async def _serve(self) -> None:
        server = await asyncio.start_server(self._converse, sock=self._socket, limit=_MAX_REQUEST_BYTES)
        try:
            await self._closing.wait()
        finally:
            # Connections are not waited for: the runner cancels them.
            server.close()

    async def _converse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._num_connections += 1
        try:
            if self._num_connections <= _MAX_CONNECTIONS:
                with suppress(TimeoutError, OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
                    async with asyncio.timeout(_ANSWER_SECONDS):
                        writer.write(self._answer(await reader.readuntil(b"\r\n\r\n")))
                        writer.close()
                        await writer.wait_closed()
        finally:
            self._num_connections -= 1
            writer.transport.abort()

    def _answer(self, request: bytes) -> bytes:
        match request.partition(b"\r\n")[0].split():
            case [b"GET", target, _] if target.partition(b"?")[0] == b"/metrics":
                return self._metrics()
            case [b"GET", _, _]:
                return _response(HTTPStatus.NOT_FOUND, "only /metrics is here\n")
            case [_, _, _]:
                return _response(HTTPStatus.METHOD_NOT_ALLOWED, "only GET is allowed\n")
        return _response(HTTPStatus.BAD_REQUEST, "not an HTTP request\n")

    def _metrics(self) -> bytes:
        try:
            return _response(HTTPStatus.OK, generate_latest(self._registry).decode())
        except Exception:
            log.exception("metrics failed")
            return _response(HTTPStatus.INTERNAL_SERVER_ERROR, "metrics failed; the log says why\n")


def _response(status: HTTPStatus, text: str) -> bytes:
    body = text.encode()
    head = (
        f"HTTP/1.1 {status.value} {status.phrase}",
        f"Content-Type: {_TEXT_FORMAT}",
        f"Content-Length: {len(body)}",
        "Allow: GET",
        "Connection: close",
    )
    return "\r\n".join([*head, "", ""]).encode() + body
