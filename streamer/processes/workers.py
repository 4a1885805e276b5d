"""
Several processes that serve as one streamer: one port, one copy of the data in memory, one page of metrics.

Data that fits into memory is loaded by the process that starts the others, and shared by all of them.
"""

import asyncio
import os
from collections.abc import Callable
from contextlib import AsyncExitStack
from typing import Any

import structlog

from rpc import lifecycle
from rpc.address import joined
from rpc.cores import num_cores
from rpc.health import Health
from rpc.processes.workers import Workers
from rpc.telemetry import Endpoint
from streamer.occupancy import give_back, reserve
from streamer.processes.shared import SharedSplit
from streamer.server import METRICS_PORT_OPTION, PORT_OPTION, load, metrics_of, reading_of
from streamer.settings import StreamerSettings
from streamer.sources.places import Reading
from streamer.sources.split import MemorySplit

log = structlog.get_logger(__name__)

_MODULE = "streamer.processes.worker"
_LARGEST = (
    "streamer_serving",
    "streamer_streams_in_flight_limit",
    "streamer_cache_bytes",
    "streamer_cache_limit_bytes",
)


async def serve(settings: StreamerSettings, *, on_ready: Callable[[str], None] | None = None) -> None:
    """
    Do what :func:`streamer.server.serve` does, with ``settings.num_workers`` processes.

    Cancelling this, or killing this process, ends them.

    Args:
        settings: As :func:`rpc.settings.load` gives them.
        on_ready: Told the address once every process serves.

    Raises:
        StreamerError: There is no usable data.
        WorkerError: No process starts, at first or several times in a row after all died; or this is not Linux.
        PortTakenError: A port is taken; raised before any data is fetched.
    """
    count, reading = settings.num_workers, reading_of(settings)
    async with AsyncExitStack() as stack:
        own = metrics_of(settings, Health([]), reading.tally)
        workers = Workers(_MODULE, count, hang_seconds=settings.hang_seconds, own=own, largest=_LARGEST)
        occupancy = reserve(count)
        stack.callback(os.close, occupancy)
        reserved = stack.enter_context(lifecycle.reserve(settings.host, settings.port, option=PORT_OPTION))
        settings = settings.model_copy(update={"port": reserved.getsockname()[1]})
        endpoint = Endpoint(workers, settings.host, settings.metrics_port, option=METRICS_PORT_OPTION)
        # In a thread: one that asks for metrics waits for this loop.
        stack.push_async_callback(asyncio.to_thread, endpoint.close)
        stack.push_async_callback(workers.stop, 0)
        datasets, descriptors = await _share(settings, reading, stack)
        orders = [
            {
                "settings": _part(settings, number, count).model_dump(mode="json"),
                "occupancy": {"descriptor": occupancy, "number": number, "count": count},
                "datasets": datasets,
            }
            for number in range(count)
        ]
        await workers.start(orders, [occupancy, *descriptors])
        address = joined(settings.host, settings.port)
        log.info("serving", address=address, metrics=endpoint.url, workers=count)
        if on_ready is not None:
            on_ready(address)
        await workers.run(grace_seconds=settings.drain_seconds, on_end=lambda number: give_back(occupancy, number))


async def _share(
    settings: StreamerSettings, reading: Reading, stack: AsyncExitStack
) -> tuple[list[dict[str, Any]], list[int]]:
    """Load what goes into memory; return what to tell the workers about it, and the descriptors they need."""
    told: list[dict[str, Any]] = []
    descriptors = []
    for name, place in settings.places.items():
        dataset = await load(name, place, reading)
        try:
            splits = [split for split in dataset.splits.values() if isinstance(split, MemorySplit)]
            if len(splits) < len(dataset.splits):
                # Read where it lies, by each for itself.
                told.append({"name": name, "place": place})
                continue
            shared = []
            for split in splits:
                shared.append(await asyncio.to_thread(SharedSplit.of, split))
                stack.callback(os.close, shared[-1].descriptor)
        finally:
            await dataset.close()
        descriptors += [split.descriptor for split in shared]
        fields = [split.as_json() for split in shared]
        told.append({"name": name, "class_names": dataset.class_names, "splits": fields})
    return told, descriptors


def _part(settings: StreamerSettings, number: int, count: int) -> StreamerSettings:
    """Return the settings of one worker: its share of what is meant for all of them."""
    transforms = settings.transform_workers
    if transforms is None:
        transforms = num_cores()
    return settings.model_copy(
        update={
            "workers": 1,
            # None stays none; of fewer than there are workers each gets one.
            "transform_workers": transforms and max(1, transforms // count + (number < transforms % count)),
        }
    )
