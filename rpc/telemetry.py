"""What a service tells of itself in numbers: metrics of its calls, and the ``/metrics`` endpoint that shows them."""

import asyncio
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from http import HTTPStatus
from importlib.metadata import version
from itertools import accumulate
from threading import Thread

import grpc
import structlog
from google.protobuf.descriptor import ServiceDescriptor
from prometheus_client import (
    CollectorRegistry,
    GCCollector,
    Info,
    Metric,
    PlatformCollector,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

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
    """
    What one method's calls add up to; whoever calls :meth:`begin` owes one :meth:`end`.

    Plain numbers of one thread, shown by :class:`_Family`: the library's own counters, each behind a lock, would be a
    twentieth of what a small call costs.

    Args:
        buckets: Upper bounds of the times to tell apart, in seconds, ascending.
    """

    __slots__ = ("_buckets", "ended", "in_flight", "num_by_bucket", "received_bytes", "seconds")

    def __init__(self, buckets: Sequence[float]) -> None:
        self._buckets = buckets
        # Each from the start, so that the first error is an increase from 0 and not a series out of nowhere.
        self.ended = {code.name: 0 for code in grpc.StatusCode}
        self.in_flight = 0
        self.num_by_bucket = [0] * (len(buckets) + 1)
        self.received_bytes = 0
        self.seconds = 0.0

    def begin(self) -> None:
        """Count a call in."""
        self.in_flight += 1

    def receive(self, num_bytes: int) -> None:
        """Count a message that came."""
        self.received_bytes += num_bytes

    def end(self, code: str, seconds: float) -> None:
        """Count a call out; ``code`` is gRPC's name of its status, anything else counts as UNKNOWN."""
        self.in_flight -= 1
        self.seconds += seconds
        self.num_by_bucket[bisect_left(self._buckets, seconds)] += 1
        self.ended[code if code in self.ended else "UNKNOWN"] += 1


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
    requests = _Family(service, "request", _REQUEST_BUCKETS)
    streams = _Family(service, "stream", _STREAM_BUCKETS)
    methods = {
        f"/{descriptor.full_name}/{method.name}": (
            streams if method.client_streaming or method.server_streaming else requests
        ).add(f"{descriptor.full_name}/{method.name}")
        for descriptor in descriptors
        for method in descriptor.methods
    }
    registry.register(_Families(service, (requests, streams)))
    return methods


class _Family:
    """Methods that are measured alike."""

    def __init__(self, service: str, kind: str, buckets: Sequence[float]) -> None:
        self._name = f"{service}_{kind}"
        self._kind = kind
        self._buckets = buckets
        self.methods: dict[str, MethodMetrics] = {}

    def add(self, method: str) -> MethodMetrics:
        metrics = self.methods[method] = MethodMetrics(self._buckets)
        return metrics

    def collect(self) -> Iterable[Metric]:
        kind = self._kind.title()
        ended = CounterMetricFamily(f"{self._name}s", f"{kind}s that ended.", labels=["method", "code"])
        seconds = HistogramMetricFamily(
            f"{self._name}_seconds", f"Time from a {self._kind}'s arrival to its end.", labels=["method"]
        )
        in_flight = GaugeMetricFamily(f"{self._name}s_in_flight", f"{kind}s that have not ended.", labels=["method"])
        bounds = [*map(floatToGoString, self._buckets), "+Inf"]
        for method, metrics in self.methods.items():
            for code, count in metrics.ended.items():
                ended.add_metric([method, code], count)
            counts = accumulate(metrics.num_by_bucket)
            seconds.add_metric([method], list(zip(bounds, counts, strict=True)), metrics.seconds)
            in_flight.add_metric([method], metrics.in_flight)
        yield from (ended, seconds, in_flight)


class _Families(Collector):
    """Shows them, and what they have in common."""

    def __init__(self, service: str, families: Sequence[_Family]) -> None:
        self._service = service
        self._families = families

    def collect(self) -> Iterable[Metric]:
        received = CounterMetricFamily(
            f"{self._service}_received_bytes", "Size of the messages that came.", labels=["method"]
        )
        for family in self._families:
            for method, metrics in family.methods.items():
                received.add_metric([method], metrics.received_bytes)
        yield received
        for family in self._families:
            yield from family.collect()


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
