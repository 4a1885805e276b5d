"""Builds the gateway from its parts and runs it until it is signalled."""

import asyncio
import warnings
from collections.abc import Callable
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any, Self

import grpc
import structlog
from grpc_health.v1 import health_pb2_grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2_grpc
from PIL import Image
from tritonclient.grpc import service_pb2_grpc

from gateway import passthrough
from gateway.admission import Admission
from gateway.cache import RowCache
from gateway.decoders import Decoders
from gateway.fleet import Fleet
from gateway.images import Limits
from gateway.lanes import Lanes
from gateway.metrics import GatewayMetrics
from gateway.models import Catalog
from gateway.parsing import batch_parser
from gateway.passthrough import PassthroughServicer
from gateway.probe import Probe
from gateway.scopes import NEEDS
from gateway.servicer import ImageServicer
from gateway.settings import GatewaySettings
from protos.gateway.v1 import image_service_pb2, image_service_pb2_grpc
from rpc import precedence
from rpc.access import Access, has_scope, identity
from rpc.address import is_loopback, joined
from rpc.health import MAX_WATCHERS, Health
from rpc.interceptor import ALL_OTHERS, MAX_UNASKED, Guard
from rpc.keys import Keyring
from rpc.lag import LagWatch
from rpc.lifecycle import bind, run_until_signalled
from rpc.registration import ByName
from rpc.settings import SettingsError
from rpc.shares import Shares
from rpc.telemetry import Endpoint
from rpc.tls import server_credentials
from rpc.tracing import Tracer

log = structlog.get_logger(__name__)

_DESCRIPTOR = image_service_pb2.DESCRIPTOR.services_by_name["ImageService"]
SERVICE = _DESCRIPTOR.full_name
"""Name of the service in health checks and reflection."""

PORT_OPTION = "--port or SLUICE_GATEWAY_PORT"
METRICS_PORT_OPTION = "--metrics-port or SLUICE_GATEWAY_METRICS_PORT"
# Calls that admission does not count: without a request yet, on their way in or out, and such that ask no model.
_SPARE_CALLS = MAX_UNASKED + 128
_MAX_CHECKS = 128
_MAX_REFLECTIONS = 64
# Calls that are being refused, which is told to each.
_MAX_REFUSALS = 512
# For inferences whose callers have gone: ending one with the channel is what Triton 2.51 does not always survive.
_LEFT_CALLS_SECONDS = 2.0
_NEVER = 2**31 - 1


@dataclass(frozen=True, slots=True)
class _Upstream:
    """The way to Triton, and what is known of it."""

    fleet: Fleet
    lanes: Lanes
    catalog: Catalog
    probe: Probe


class GatewayServer:
    """
    One gateway process' worth of objects: ``async with GatewayServer(settings) as gateway: gateway.address``.

    Leaving the block drains: health says NOT_SERVING, new calls are refused, those in flight may take
    ``drain_seconds``. Being ready is not waited for; health tells it.

    Args:
        settings: All of them.
        is_worker: Whether this is one of several on a port that is held for them. It takes callers once its first
            inference has worked, at the latest after ``probe_timeout_seconds``: until then the others have them. It
            shows its metrics to those who ask :attr:`metrics`, and nowhere else.

    Attributes:
        address: ``host:port`` that it listens on.
        metrics: What it counts.
        metrics_url: Where Prometheus finds them, until the drain is over.
        grpc_server: The started server.
        probing: What proves readiness; without it nothing is answered any more.
    """

    address: str
    metrics_url: str
    grpc_server: grpc.aio.Server
    probing: asyncio.Task[None]

    def __init__(self, settings: GatewaySettings, *, is_worker: bool = False) -> None:
        self._settings = settings
        self._is_worker = is_worker
        self._health = Health(["", SERVICE])
        self._admission = Admission(settings.max_in_flight, settings.max_in_flight_bytes)
        self.metrics = metrics_of(self._admission, self._health)
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Self:
        """
        Listen.

        Raises:
            PortTakenError: An address cannot be bound.
        """
        async with AsyncExitStack() as stack:
            await self._start(stack)
            self._stack = stack.pop_all()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.drain()
        await self._stack.aclose()

    def drain(self) -> None:
        """Report NOT_SERVING from now on; calls are still taken."""
        self._health.drain()

    async def _start(self, stack: AsyncExitStack) -> None:
        settings = self._settings
        # What Pillow says of odd files would be written to the log, and kept for ever, once for each text.
        warnings.filterwarnings("ignore", module="PIL")
        # Above its own limit, far beyond ours, it only warns.
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        server = self._listen(stack)

        # Closed in the opposite order: calls end, then the probe, then what runs at Triton, then its channel; the
        # metrics go last, so that a drain can be watched.
        upstream = self._reach_triton(stack)
        self._offer(server, upstream, stack)
        lag = LagWatch(self.metrics.observe_lag)
        stack.callback(lag.stop)
        stack.push_async_callback(server.stop, settings.drain_seconds)
        self.probing = upstream.probe.start()
        if self._is_worker:
            with suppress(TimeoutError):
                async with asyncio.timeout(settings.probe_timeout_seconds):
                    await self._health.serving()
            self._bind()
        await server.start()

    def _reach_triton(self, stack: AsyncExitStack) -> "_Upstream":
        settings, tracer = self._settings, self._tracer
        fleet = Fleet(
            settings.triton_addresses(),
            control_timeout_seconds=settings.probe_timeout_seconds,
            outgoing=tracer.outgoing if tracer is not None else None,
        )
        left_seconds = min(settings.drain_seconds, _LEFT_CALLS_SECONDS)
        stack.push_async_callback(fleet.close, left_seconds)
        cache = RowCache(settings.cache_rows)
        lanes = Lanes(
            fleet.asking,
            timeout_seconds=settings.upstream_timeout_seconds,
            may_cancel=lambda: fleet.may_cancel,
            batches_per_instance=settings.batches_per_instance,
            joins=settings.single_flight,
            cache=cache,
            traces=tracer,
            on_batch=self.metrics.observe_batch,
        )
        stack.push_async_callback(lanes.drained, left_seconds)
        catalog = Catalog(
            fleet,
            repository=settings.model_repository,
            default_model=settings.default_model,
            may_list=partial(has_scope, "models"),
            on_refresh=lanes.keep,
        )
        self.metrics.watch(lanes, fleet, cache, catalog)
        probe = Probe(
            catalog,
            fleet,
            self._health,
            service=SERVICE,
            interval_seconds=settings.probe_interval_seconds,
            timeout_seconds=settings.probe_timeout_seconds,
            on_failure=lanes.fail_waiting,
        )
        stack.push_async_callback(probe.stop)
        return _Upstream(fleet, lanes, catalog, probe)

    def _offer(self, server: grpc.aio.Server, upstream: "_Upstream", stack: AsyncExitStack) -> None:
        """Add every service to the server."""
        settings, probe = self._settings, upstream.probe
        decoders = Decoders(settings.decode_threads)
        stack.callback(decoders.close)

        def on_upstream_error() -> None:
            self.metrics.count_upstream_error()
            probe.hasten()

        servicer = ImageServicer(
            catalog=upstream.catalog,
            admission=self._admission,
            lanes=upstream.lanes,
            require=probe.require,
            decoders=decoders,
            limits=Limits(settings.max_image_bytes, settings.max_pixels),
            max_batch_images=settings.max_batch_images,
            stream_window=settings.stream_window,
            on_upstream_error=on_upstream_error,
            on_answer=self.metrics.count_answer,
        )
        passing = PassthroughServicer(
            upstream=upstream.fleet,
            admission=self._admission,
            identity=identity,
            require=probe.require,
            route=upstream.catalog.routed,
            refresh=upstream.catalog.refresh,
            is_ready=lambda: self._health.is_serving,
            is_model_ready=probe.is_serving,
            upstream_timeout_seconds=settings.upstream_timeout_seconds,
            on_upstream_error=on_upstream_error,
            on_answer=self.metrics.count_answer,
        )
        for method in ("Classify", "ClassifyBatch"):
            self.guard.add_gate(f"/{SERVICE}/{method}", servicer.turn_away)
        by_name: Any = ByName(server)
        image_service_pb2_grpc.add_ImageServiceServicer_to_server(servicer, by_name)
        service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(passing, by_name)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, by_name)
        told = (SERVICE, passthrough.SERVICE, "grpc.health.v1.Health", reflection.SERVICE_NAME)
        reflection_pb2_grpc.add_ServerReflectionServicer_to_server(reflection.aio.ReflectionServicer(told), by_name)

    def _listen(self, stack: AsyncExitStack) -> grpc.aio.Server:
        settings = self._settings
        self._credentials, access = _credentials(settings), _access(settings)
        if not self._is_worker:
            endpoint = Endpoint(self.metrics.registry, settings.host, settings.metrics_port, option=METRICS_PORT_OPTION)
            stack.callback(endpoint.close)
            self.metrics_url = endpoint.url
        self._tracer = Tracer(settings.otlp_endpoint, "sluice-gateway") if settings.otlp_endpoint else None
        if self._tracer is not None:
            stack.push_async_callback(self._tracer.close)
        rooms = _rooms(settings)
        self.guard = Guard(
            self.metrics.methods,
            access=access,
            tracer=self._tracer,
            parsers=_parsers(settings),
            idle_seconds=settings.stream_idle_seconds or None,
            request_seconds=settings.request_seconds,
            pause_seconds=settings.stream_idle_seconds or None,
            has_certificates=self._credentials is not None,
            rooms=rooms,
        )
        server = grpc.aio.server(
            interceptors=(self.guard,),
            options=_options(settings, is_worker=self._is_worker),
            # Where gRPC refuses health checks too; the rooms, which do not, are full before.
            maximum_concurrent_rpcs=sum(room.limit for room in set(rooms.values())) + _MAX_REFUSALS,
        )
        self.grpc_server = server
        if not self._is_worker:
            self._bind()
        return server

    def _bind(self) -> None:
        host, port, is_reserved = self._settings.host, self._settings.port, self._is_worker
        port = bind(
            self.grpc_server, host, port, option=PORT_OPTION, is_reserved=is_reserved, credentials=self._credentials
        )
        self.address = joined(host, port)


async def serve(settings: GatewaySettings, *, on_ready: Callable[[str], None] | None = None) -> None:
    """
    Run a gateway until SIGTERM or SIGINT; a second signal ends it without waiting for calls in flight.

    Args:
        settings: All of them.
        on_ready: Called with ``host:port`` once it listens, which is before the first inference has worked.

    Raises:
        PortTakenError: An address cannot be bound.
        SettingsError: TLS files or keys cannot be used, or are missing where plaintext would leave this machine.
    """
    async with GatewayServer(settings) as gateway:
        log.info("listening", address=gateway.address, metrics=gateway.metrics_url)
        await run(gateway, grace_seconds=settings.drain_seconds, on_ready=on_ready)


async def run(gateway: GatewayServer, *, grace_seconds: float, on_ready: Callable[[str], None] | None = None) -> None:
    """Run a gateway that listens as :func:`serve` does, which raises ServerDiedError where it cannot go on."""
    precedence.take()
    if on_ready is not None:
        on_ready(gateway.address)
    await run_until_signalled(
        gateway.grpc_server,
        grace_seconds=grace_seconds,
        on_drain=gateway.drain,
        wait_idle=gateway.guard.wait_idle,
        vital={"the probe": gateway.probing},
    )


def check(settings: GatewaySettings) -> None:
    """
    Look whether a gateway can be made, before several are.

    Raises:
        SettingsError: As of :func:`serve`.
    """
    _credentials(settings)
    _access(settings)


def metrics_of(admission: Admission, health: Health) -> GatewayMetrics:
    """Make the metrics of a gateway's services; arguments as of :class:`GatewayMetrics`."""
    return GatewayMetrics([_DESCRIPTOR, passthrough.DESCRIPTOR], admission=admission, health=health)


def _credentials(settings: GatewaySettings) -> grpc.ServerCredentials | None:
    tls = settings.tls
    if tls is not None:
        return server_credentials(tls)
    if is_loopback(settings.host):
        return None
    if not settings.insecure:
        raise SettingsError(
            f"host = {settings.host}: beyond loopback the gateway needs tls_cert and tls_key; `insecure` does without, "
            "in a network that you trust"
        )
    if settings.keys_file is not None:
        log.warning("API keys can be read on their way: there is no TLS", host=settings.host)
    return None


def _parsers(settings: GatewaySettings) -> dict[str, Callable[[bytes], Any]]:
    return {f"/{SERVICE}/ClassifyBatch": batch_parser(settings.max_batch_images)}


def _rooms(settings: GatewaySettings) -> dict[str, Shares]:
    """Return how many calls there may be of each kind, so that none takes the places of another: health's above all."""
    streams = Shares(settings.max_streams)
    return {
        ALL_OTHERS: Shares(settings.max_in_flight + _SPARE_CALLS),
        f"/{SERVICE}/ClassifyStream": streams,
        f"/{passthrough.SERVICE}/ModelStreamInfer": streams,
        "/grpc.health.v1.Health/Watch": Shares(MAX_WATCHERS),
        "/grpc.health.v1.Health/": Shares(_MAX_CHECKS),
        f"/{reflection.SERVICE_NAME}/": Shares(_MAX_REFLECTIONS),
    }


def _access(settings: GatewaySettings) -> Access | None:
    return None if settings.keys_file is None else Access(Keyring(settings.keys_file), NEEDS)


def _milliseconds(seconds: float) -> int:
    """Return a time as gRPC takes it, which has a large number for never."""
    return round(seconds * 1000) if seconds else _NEVER


def _options(settings: GatewaySettings, *, is_worker: bool) -> list[tuple[str, int]]:
    return [
        # Two gateways on one port would share its callers unnoticed.
        ("grpc.so_reuseport", int(is_worker)),
        # Limits
        ("grpc.max_receive_message_length", settings.max_message_bytes),
        ("grpc.max_allowed_incoming_connections", settings.max_connections),
        ("grpc.max_concurrent_streams", settings.max_connection_calls),
        # The first is where gRPC begins to refuse some at random, the second where it refuses all.
        ("grpc.max_metadata_size", settings.max_metadata_bytes),
        ("grpc.absolute_max_metadata_size", settings.max_metadata_bytes),
        ("grpc.server_handshake_timeout_ms", round(settings.handshake_seconds * 1000)),
        ("grpc.max_connection_idle_ms", _milliseconds(settings.connection_idle_seconds)),
        ("grpc.max_connection_age_ms", _milliseconds(settings.connection_age_seconds)),
        ("grpc.max_connection_age_grace_ms", _milliseconds(settings.connection_grace_seconds)),
        # Peers that are gone without a word are noticed; peers that check on us themselves are welcome.
        ("grpc.keepalive_time_ms", 60_000),
        ("grpc.keepalive_timeout_ms", 10_000),
        ("grpc.http2.min_recv_ping_interval_without_data_ms", 10_000),
        ("grpc.http2.max_ping_strikes", 2),
        ("grpc.keepalive_permit_without_calls", 1),
    ]
