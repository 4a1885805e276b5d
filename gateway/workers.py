"""Several processes that serve as one gateway: each a whole one, with its share of what is meant for all of them."""

import asyncio
from collections.abc import Callable
from contextlib import AsyncExitStack

import structlog

from gateway.admission import Admission
from gateway.server import METRICS_PORT_OPTION, PORT_OPTION, check, metrics_of
from gateway.settings import GatewaySettings
from rpc.address import joined
from rpc.health import Health
from rpc.lifecycle import reserve
from rpc.processes.workers import Workers
from rpc.telemetry import Endpoint

log = structlog.get_logger(__name__)

_MODULE = "gateway.worker"
# One that does not serve refuses its part of the callers.
_SMALLEST = ("gateway_serving",)
_TOLD = ("gateway_serving", "gateway_images_in_flight_limit")


async def serve(settings: GatewaySettings, *, on_ready: Callable[[str], None] | None = None) -> None:
    """
    Do what :func:`gateway.server.serve` does, with ``settings.num_workers`` processes.

    Cancelling this, or killing this process, ends them.

    Args:
        settings: Of all of them together.
        on_ready: Called with ``host:port`` once every process listens.

    Raises:
        PortTakenError: An address cannot be bound.
        SettingsError: As of :func:`gateway.server.serve`.
        WorkerError: No process starts, at first or several times in a row after all died; or this is not Linux.
    """
    check(settings)
    count = settings.num_workers
    own = metrics_of(Admission(settings.max_in_flight, settings.max_in_flight_bytes), Health([]))
    workers = Workers(_MODULE, count, hang_seconds=settings.hang_seconds, own=own, smallest=_SMALLEST, told=_TOLD)
    async with AsyncExitStack() as stack:
        reserved = stack.enter_context(reserve(settings.host, settings.port, option=PORT_OPTION))
        settings = settings.model_copy(update={"port": reserved.getsockname()[1]})
        endpoint = Endpoint(workers, settings.host, settings.metrics_port, option=METRICS_PORT_OPTION)
        # In a thread: one that asks for metrics waits for this loop.
        stack.push_async_callback(asyncio.to_thread, endpoint.close)
        stack.push_async_callback(workers.stop, 0)
        await workers.start([part(settings, number, count).model_dump(mode="json") for number in range(count)])
        address = joined(settings.host, settings.port)
        log.info("listening", address=address, metrics=endpoint.url, workers=count)
        if on_ready is not None:
            on_ready(address)
        await workers.run(grace_seconds=settings.drain_seconds)


def part(settings: GatewaySettings, number: int, count: int) -> GatewaySettings:
    """
    Return the settings of one worker, whose limits are its share.

    Each has room for the largest batch all the same, and one of what cannot be less.
    """

    def share(whole: int, least: int = 1) -> int:
        return max(least, whole // count + (number < whole % count))

    return settings.model_copy(
        update={
            "workers": 1,
            # A comparison is two images.
            "max_in_flight": share(settings.max_in_flight, max(2, settings.max_batch_images)),
            "max_in_flight_bytes": share(settings.max_in_flight_bytes, 1024),
            "max_streams": share(settings.max_streams),
            "max_connections": share(settings.max_connections),
            # None stays none.
            "cache_rows": settings.cache_rows and share(settings.cache_rows),
            "decode_threads": share(settings.decode_threads),
        }
    )
