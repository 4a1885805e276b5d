"""The streamer's process: data into memory, services onto a port, a clean end."""

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import AsyncExitStack
from types import TracebackType
from typing import Any, Self

import grpc
import structlog
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from protos import mnist_pb2
from protos.streamer.v1 import sample_service_pb2 as pb
from rpc import lifecycle
from rpc.address import joined
from rpc.health import MAX_WATCHERS, Health
from rpc.interceptor import MAX_UNASKED, Guard
from rpc.telemetry import Endpoint
from streamer.metrics import StreamerMetrics
from streamer.occupancy import Occupancy
from streamer.servicer import StreamerServicer
from streamer.settings import StreamerSettings
from streamer.sources.places import Reading, open_dataset
from streamer.sources.split import Dataset, MemorySplit
from streamer.sources.tally import Tally
from streamer.transforms.pool import TransformPool

log = structlog.get_logger(__name__)

PORT_OPTION = "--port or SLUICE_STREAMER_PORT"
METRICS_PORT_OPTION = "--metrics-port or SLUICE_STREAMER_METRICS_PORT"
_MNIST = mnist_pb2.DESCRIPTOR.services_by_name["MnistService"]
_SAMPLE = pb.DESCRIPTOR.services_by_name["SampleService"]
_HEALTH = health_pb2.DESCRIPTOR.services_by_name["Health"]

# Readers send their request with the call itself; one that does not holds no place, and a call of the server all the
# same.
_REQUEST_SECONDS = 10.0
# Health watches, calls without a request, and for a moment each: those that have just come, checks, what is refused,
# and streams that were ended and whose readers have not taken notice.
_SPARE_RPCS = MAX_WATCHERS + MAX_UNASKED + 512
# Times the wait for an idle reader: ten minutes, unless set otherwise. Streams that were ended, and whose readers never
# take notice, count as calls until then; a connection that a server closes is a line in the log of whoever uses it.
_IDLE_CONNECTION = 2
# Every request here is a few hundred bytes.
_MAX_REQUEST_BYTES = 64 * 1024


async def serve(settings: StreamerSettings, *, on_ready: Callable[[str], None] | None = None) -> None:
    """
    Find the data, serve it until SIGTERM or SIGINT, drain, stop.

    Cancelling this stops the server at once.

    Args:
        settings: As :func:`rpc.settings.load` gives them.
        on_ready: Told the address once readers can come.

    Raises:
        StreamerError: There is no usable data.
        PortTakenError: A port is taken; raised before any data is fetched.
    """
    reading = reading_of(settings)
    server = StreamerServer(settings, tally=reading.tally)
    async with AsyncExitStack() as stack:
        stack.push_async_callback(server.stop)
        server.bind()
        await run(server, (load(name, place, reading) for name, place in settings.places.items()), on_ready=on_ready)


async def run(
    server: "StreamerServer", loading: Iterable[Awaitable[Dataset]], *, on_ready: Callable[[str], None] | None = None
) -> None:
    """Serve data sets as :func:`serve` does; they are loaded one by one, and closed in the end."""
    async with AsyncExitStack() as stack:
        datasets = []
        for each in loading:
            dataset = await each
            stack.push_async_callback(dataset.close)
            datasets.append(dataset)
        # Before they are closed: streams read from them until they end.
        stack.push_async_callback(server.stop)
        await server.start(datasets)
        if on_ready is not None:
            on_ready(server.address)
        await lifecycle.run_until_signalled(
            server.grpc_server,
            grace_seconds=server.settings.drain_seconds,
            on_drain=server.drain,
            wait_idle=server.guard.wait_idle,
        )


def reading_of(settings: StreamerSettings) -> Reading:
    """Return how data sets are read under these settings."""
    return Reading(
        cache=settings.cache,
        cache_bytes=settings.cache_bytes,
        memory_bytes=settings.memory_bytes,
        max_downloads=settings.max_downloads,
        read_ahead_bytes=settings.read_ahead_bytes,
        deadline_seconds=settings.storage_deadline_seconds,
    )


async def load(name: str, place: str | None, reading: Reading) -> Dataset:
    """Open a data set and say in the log what it holds; arguments and errors as of open_dataset."""
    dataset = await open_dataset(name, place, reading, report=lambda line: log.info("data", message=line))
    for split in dataset.splits.values():
        where = "memory" if isinstance(split, MemorySplit) else "place"
        log.info("ready", dataset=name, split=split.name, samples=split.num_samples, read_from=where)
    return dataset


class StreamerServer:
    """
    The streamer without process around it: ``async with StreamerServer(settings, datasets) as server``.

    Args:
        settings: Where to listen, and limits.
        datasets: What to serve; may come with :meth:`start` instead.
        tally: Of what they cost to read, for the metrics.
        occupancy: Of this process among several on a port that is held for them; one of several shows its metrics to
            those who ask :attr:`metrics`, and nowhere else. None: it serves by itself.

    Attributes:
        settings: As given.
        metrics: What it counts.
    """

    def __init__(
        self,
        settings: StreamerSettings,
        datasets: Sequence[Dataset] = (),
        *,
        tally: Tally | None = None,
        occupancy: Occupancy | None = None,
    ) -> None:
        self.settings = settings
        self._datasets = datasets
        self._occupancy = occupancy
        self._port: int | None = None
        self._endpoint: Endpoint | None = None
        self._health = Health(["", _MNIST.full_name, _SAMPLE.full_name])
        self.metrics = metrics_of(settings, self._health, tally or Tally())
        self._servicer: StreamerServicer | None = None
        self._pool: TransformPool | None = None
        self._starting = asyncio.Lock()
        self.guard = Guard(self.metrics.methods, idle_seconds=settings.idle_seconds, request_seconds=_REQUEST_SECONDS)
        self.grpc_server = grpc.aio.server(
            interceptors=[self.guard],
            options=_options(settings, is_worker=occupancy is not None),
            maximum_concurrent_rpcs=settings.max_streams + _SPARE_RPCS,
        )

    async def __aenter__(self) -> Self:
        await self.start(self._datasets)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    @property
    def address(self) -> str:
        """``host:port`` to connect to; known once bound."""
        assert self._port is not None
        return joined(self.settings.host, self._port)

    @property
    def metrics_url(self) -> str:
        """Where Prometheus finds its metrics from :meth:`bind` to :meth:`stop`."""
        assert self._endpoint is not None
        return self._endpoint.url

    @property
    def active_streams(self) -> int:
        """Streams open right now."""
        return self._servicer.active_streams if self._servicer else 0

    def bind(self) -> None:
        """
        Take both ports, and show metrics from now on.

        Raises:
            PortTakenError: Names the address and the option that changes it; no port is kept.
        """
        host, settings = self.settings.host, self.settings
        if self._occupancy is not None:
            self._port = lifecycle.bind(self.grpc_server, host, settings.port, option=PORT_OPTION, is_reserved=True)
            return
        endpoint = Endpoint(self.metrics.registry, host, settings.metrics_port, option=METRICS_PORT_OPTION)
        try:
            self._port = lifecycle.bind(self.grpc_server, host, settings.port, option=PORT_OPTION)
        except BaseException:
            endpoint.close()
            raise
        self._endpoint = endpoint

    async def start(self, datasets: Sequence[Dataset]) -> None:
        """
        Serve ``datasets``; when this returns readers can come.

        Raises:
            PortTakenError: As of :meth:`bind`, which is done here where it was not before.
        """
        if self._port is None:
            self.bind()
        by_name = {dataset.name: dataset for dataset in datasets}
        self._servicer = StreamerServicer(self.settings, by_name, self.metrics, self._started_pool, self._occupancy)
        self.grpc_server.add_generic_rpc_handlers(_services(self._servicer))
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self.grpc_server)
        names = (*(each.full_name for each in (_MNIST, _SAMPLE, _HEALTH)), reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, self.grpc_server)
        await self.grpc_server.start()
        self._health.report(True)
        if self._endpoint is not None:
            log.info("serving", address=self.address, metrics=self.metrics_url)

    def drain(self) -> None:
        """Tell orchestrators NOT_SERVING, and readers of batches to go on elsewhere."""
        if self._servicer is not None:
            self._servicer.drain()
        self._health.drain()

    async def stop(self) -> None:
        """End every stream and give the ports back; harmless when done already."""
        self.drain()
        try:
            await self.grpc_server.stop(0)
            # One that is being started is waited for.
            async with self._starting:
                if self._pool is not None:
                    await self._pool.close()
        finally:
            if self._endpoint is not None:
                self._endpoint.close()

    async def _started_pool(self) -> TransformPool:
        """Return the pool for transforms; a streamer that transforms nothing has no processes for it."""
        async with self._starting:
            if self._pool is None:
                pool = TransformPool(self.settings.transform_workers, max_sample_bytes=self.settings.max_message_bytes)
                await pool.start()
                self._pool = self.metrics.pool = pool
            return self._pool


def metrics_of(settings: StreamerSettings, health: Health, tally: Tally) -> StreamerMetrics:
    """Make the metrics of a streamer's services; arguments as of :class:`StreamerMetrics`."""
    return StreamerMetrics([_MNIST, _SAMPLE], health=health, settings=settings, tally=tally)


def _services(servicer: StreamerServicer) -> tuple[grpc.GenericRpcHandler, ...]:
    """
    Register both services by hand, as samples and batches come encoded.

    The generated registration would have protobuf encode batches, which takes several times as long.
    """
    mnist: dict[str, grpc.RpcMethodHandler[Any, Any]] = {
        "GetTrainingSamples": grpc.unary_stream_rpc_method_handler(
            servicer.GetTrainingSamples, request_deserializer=mnist_pb2.DataRequest.FromString
        ),
    }
    sample: dict[str, grpc.RpcMethodHandler[Any, Any]] = {
        "ListDatasets": grpc.unary_unary_rpc_method_handler(
            servicer.ListDatasets,
            request_deserializer=pb.ListDatasetsRequest.FromString,
            response_serializer=pb.ListDatasetsResponse.SerializeToString,
        ),
        "StreamBatches": grpc.unary_stream_rpc_method_handler(
            servicer.StreamBatches, request_deserializer=pb.StreamBatchesRequest.FromString
        ),
        "PullBatches": grpc.stream_stream_rpc_method_handler(
            servicer.PullBatches, request_deserializer=pb.PullBatchesRequest.FromString
        ),
    }
    return (
        grpc.method_handlers_generic_handler(_MNIST.full_name, mnist),
        grpc.method_handlers_generic_handler(_SAMPLE.full_name, sample),
    )


def _options(settings: StreamerSettings, *, is_worker: bool) -> list[tuple[str, int]]:
    return [
        # A second server on the same port has to fail, not to share it, unless it is meant to.
        ("grpc.so_reuseport", int(is_worker)),
        ("grpc.max_receive_message_length", _MAX_REQUEST_BYTES),
        ("grpc.max_send_message_length", settings.max_message_bytes),
        ("grpc.server_handshake_timeout_ms", 5_000),
        # A reader whose machine is gone frees its stream within 40 s.
        ("grpc.keepalive_time_ms", 30_000),
        ("grpc.keepalive_timeout_ms", 10_000),
        # With it goes what waits for readers that never take notice of their stream's end. Streams that go on keep it.
        ("grpc.max_connection_idle_ms", int(_IDLE_CONNECTION * settings.idle_seconds * 1000)),
        ("grpc.http2.min_recv_ping_interval_without_data_ms", 10_000),
    ]
