"""The streamer's process: data into memory, services onto a port, a clean end."""

import asyncio
from collections.abc import Callable, Sequence
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
from rpc.interceptor import Guard
from rpc.telemetry import Endpoint
from streamer.metrics import StreamerMetrics
from streamer.places import Reading, open_dataset
from streamer.servicer import StreamerServicer
from streamer.settings import StreamerSettings
from streamer.split import Dataset, MemorySplit
from streamer.transforms.pool import TransformPool

log = structlog.get_logger(__name__)

_PORT_OPTION = "--port or SLUICE_STREAMER_PORT"
_METRICS_PORT_OPTION = "--metrics-port or SLUICE_STREAMER_METRICS_PORT"
_MNIST = mnist_pb2.DESCRIPTOR.services_by_name["MnistService"]
_SAMPLE = pb.DESCRIPTOR.services_by_name["SampleService"]
_HEALTH = health_pb2.DESCRIPTOR.services_by_name["Health"]

# Health watches, checks, reflection, and streams that were ended and whose readers have not taken notice.
_SPARE_RPCS = MAX_WATCHERS + 128
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
    reading = Reading(
        cache=settings.cache,
        cache_bytes=settings.cache_bytes,
        memory_bytes=settings.memory_bytes,
        deadline_seconds=settings.storage_deadline_seconds,
    )
    server, datasets = StreamerServer(settings), []
    async with AsyncExitStack() as stack:
        stack.push_async_callback(server.stop)
        server.bind()
        for name, place in settings.places.items():
            dataset = await _load(name, place, reading)
            stack.push_async_callback(dataset.close)
            datasets.append(dataset)
        # Once more, as streams read from the data sets until they end.
        stack.push_async_callback(server.stop)
        await server.start(datasets)
        log.info("serving", address=server.address, metrics=server.metrics_url)
        if on_ready is not None:
            on_ready(server.address)
        await lifecycle.run_until_signalled(
            server.grpc_server, grace_seconds=settings.drain_seconds, on_drain=server.drain
        )


async def _load(name: str, place: str | None, reading: Reading) -> Dataset:
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
    """

    def __init__(self, settings: StreamerSettings, datasets: Sequence[Dataset] = ()) -> None:
        self._settings = settings
        self._datasets = datasets
        self._port: int | None = None
        self._endpoint: Endpoint | None = None
        self._health = Health(["", _MNIST.full_name, _SAMPLE.full_name])
        self._metrics = StreamerMetrics([_MNIST, _SAMPLE], health=self._health, max_streams=settings.max_streams)
        self._servicer: StreamerServicer | None = None
        self._pool: TransformPool | None = None
        self._starting = asyncio.Lock()
        guard = Guard(self._metrics.methods, idle_seconds=settings.idle_seconds)
        self.grpc_server = grpc.aio.server(
            interceptors=[guard],
            options=_options(settings),
            maximum_concurrent_rpcs=settings.max_streams + _SPARE_RPCS,
        )

    async def __aenter__(self) -> Self:
        self.bind()
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
        return joined(self._settings.host, self._port)

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
        host, settings = self._settings.host, self._settings
        endpoint = Endpoint(self._metrics.registry, host, settings.metrics_port, option=_METRICS_PORT_OPTION)
        try:
            self._port = lifecycle.bind(self.grpc_server, host, settings.port, option=_PORT_OPTION)
        except BaseException:
            endpoint.close()
            raise
        self._endpoint = endpoint

    async def start(self, datasets: Sequence[Dataset]) -> None:
        """Serve ``datasets``; when this returns readers can come."""
        by_name = {dataset.name: dataset for dataset in datasets}
        self._servicer = StreamerServicer(self._settings, by_name, self._metrics, self._started_pool)
        self.grpc_server.add_generic_rpc_handlers(_services(self._servicer))
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self.grpc_server)
        names = (*(each.full_name for each in (_MNIST, _SAMPLE, _HEALTH)), reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, self.grpc_server)
        await self.grpc_server.start()
        self._health.report(True)

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
                pool = TransformPool(
                    self._settings.transform_workers, max_sample_bytes=self._settings.max_message_bytes
                )
                await pool.start()
                self._pool = pool
            return self._pool


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


def _options(settings: StreamerSettings) -> list[tuple[str, int]]:
    return [
        # A second server on the same port has to fail, not to share it.
        ("grpc.so_reuseport", 0),
        ("grpc.max_receive_message_length", _MAX_REQUEST_BYTES),
        ("grpc.max_send_message_length", settings.max_message_bytes),
        ("grpc.server_handshake_timeout_ms", 5_000),
        # A reader whose machine is gone frees its stream within 40 s.
        ("grpc.keepalive_time_ms", 30_000),
        ("grpc.keepalive_timeout_ms", 10_000),
        ("grpc.http2.min_recv_ping_interval_without_data_ms", 10_000),
    ]
