"""
One of the processes that serve as one streamer: ``python -m streamer.processes.worker SOCKET``.

:mod:`streamer.processes.workers` starts it.
"""

from collections.abc import Awaitable, Iterator
from typing import Any

from rpc import log
from rpc.processes.parent import Parent, work
from streamer.errors import StreamerError
from streamer.occupancy import Occupancy
from streamer.processes.shared import SharedSplit
from streamer.server import StreamerServer, load, reading_of, run
from streamer.settings import StreamerSettings
from streamer.sources.places import Reading
from streamer.sources.split import Dataset, MemoryDataset


async def _serve(order: dict[str, Any], parent: Parent) -> None:
    settings = StreamerSettings(**order["settings"])
    log.configure(settings.log_level)
    reading = reading_of(settings)
    server = StreamerServer(settings, tally=reading.tally, occupancy=Occupancy.among(**order["occupancy"]))
    parent.listen(server.metrics.registry)
    try:
        # Its port is bound once there is data: from then on the kernel sends readers here.
        await run(server, _loading(order["datasets"], reading), on_ready=parent.ready)
    finally:
        await server.stop()


def _loading(datasets: list[dict[str, Any]], reading: Reading) -> Iterator[Awaitable[Dataset]]:
    for dataset in datasets:
        if "splits" in dataset:
            yield _shared(dataset)
        else:
            yield load(dataset["name"], dataset["place"], reading)


async def _shared(dataset: dict[str, Any]) -> Dataset:
    splits = {fields["name"]: SharedSplit.from_json(fields).open() for fields in dataset["splits"]}
    return MemoryDataset(dataset["name"], tuple(dataset["class_names"]), splits)


if __name__ == "__main__":
    work(_serve, StreamerError)
