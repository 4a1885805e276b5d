"""
One of the processes that serve together: ``python -m streamer.processes.worker SOCKET``.

:mod:`streamer.processes.workers` starts it.

Standard input says in JSON what to serve. What comes over the socket are bytes: each ``?`` asks for metrics, each ``!``
whether the event loop goes round. What goes back are lines of JSON: ``ready``, ``metrics``, ``turns``, or ``problem``
as the last. The process ends when the socket does, however that happens.
"""

import asyncio
import json
import os
import socket
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress
from threading import Lock, Thread
from typing import Any

import structlog

from rpc import log
from rpc.lifecycle import PortTakenError, ServerDiedError
from streamer.errors import StreamerError
from streamer.occupancy import Occupancy
from streamer.processes import totals
from streamer.processes.shared import SharedSplit
from streamer.server import StreamerServer, load, reading_of, run
from streamer.settings import StreamerSettings
from streamer.sources.places import Reading
from streamer.sources.split import Dataset, MemoryDataset

# To end in order once the parent has gone.
_END_SECONDS = 5.0


class _Parent:
    """The way to the parent; its socket is left to the end of the process, as a thread waits at it."""

    def __init__(self, descriptor: int) -> None:
        self._socket = socket.socket(fileno=descriptor)
        self._lock = Lock()
        self._turns = 0

    def listen(self, *, on_asked: Callable[[], totals.Snapshot], on_end: Callable[[], object]) -> None:
        """Answer from now on, in a thread of its own: while this event loop is busy too."""
        loop, metrics = asyncio.get_running_loop(), b"{}"

        def soon(call: Callable[[], object]) -> None:
            # The loop may have closed by itself.
            with suppress(RuntimeError):
                loop.call_soon_threadsafe(call)

        def answer() -> None:
            nonlocal metrics
            with suppress(ConnectionError):
                while question := self._socket.recv(1):
                    if question == b"?":
                        # Whatever is wrong with metrics: without this thread the process would count as one that hangs.
                        try:
                            metrics = totals.encode(on_asked())
                        except Exception:
                            structlog.get_logger(__name__).exception("metrics failed")
                        self._say(b'{"metrics": %s}' % metrics)
                    else:
                        # Told of the turns so far, as the loop itself must never wait for this socket.
                        self._say(b'{"turns": %d}' % self._turns)
                        soon(self._turn)
            soon(on_end)
            # A loop that stands still hears nothing of it, and there is nobody left to kill this process.
            time.sleep(_END_SECONDS)
            os._exit(1)

        Thread(target=answer, name="parent", daemon=True).start()

    def _turn(self) -> None:
        self._turns += 1

    def tell(self, **what: str) -> None:
        """Say something, if there is someone to hear it."""
        with suppress(ConnectionError):
            self._say(json.dumps(what).encode())

    def _say(self, line: bytes) -> None:
        with self._lock:
            self._socket.sendall(line + b"\n")


def main(arguments: list[str]) -> None:
    """Serve until SIGTERM, or the parent's end."""
    parent, order = _Parent(int(arguments[0])), sys.stdin.buffer.read()
    if order:  # else the parent is gone already
        _obey(json.loads(order), parent)


def _obey(order: dict[str, Any], parent: _Parent) -> None:
    settings = StreamerSettings(**order["settings"])
    log.configure(settings.log_level)
    structlog.contextvars.bind_contextvars(worker=order["number"])
    try:
        occupancy = Occupancy.among(order["occupancy"], order["number"], order["count"])
        asyncio.run(_serve(settings, order["datasets"], occupancy, parent))
    except asyncio.CancelledError:
        pass  # there is nobody left to serve for
    except (StreamerError, PortTakenError, ServerDiedError) as error:
        parent.tell(problem=str(error))
        sys.exit(1)


async def _serve(
    settings: StreamerSettings, datasets: list[dict[str, Any]], occupancy: Occupancy, parent: _Parent
) -> None:
    task = asyncio.current_task()
    assert task is not None
    reading = reading_of(settings)
    server = StreamerServer(settings, tally=reading.tally, occupancy=occupancy)
    parent.listen(
        on_asked=lambda: totals.snapshot(server.metrics.registry),
        on_end=task.cancel,
    )
    try:
        # Its port is bound once there is data: from then on the kernel sends readers here.
        await run(server, _loading(datasets, reading), on_ready=lambda address: parent.tell(ready=address))
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
    main(sys.argv[1:])
