"""
The parent, as one of the processes that serve together sees it; :mod:`rpc.processes.child` is the other side.

Standard input says in JSON what to serve. What comes over a socket are bytes: each ``?`` asks for metrics, each ``!``
whether the event loop goes round. What goes back are lines of JSON: ``ready``, ``metrics``, ``turns``, or ``problem``
as the last. The process ends when the socket does, however that happens.
"""

import asyncio
import json
import os
import socket
import sys
import time
from collections.abc import Callable, Coroutine
from contextlib import suppress
from threading import Lock, Thread
from typing import Any

import structlog
from prometheus_client.registry import Collector

from rpc.lifecycle import PortTakenError, ServerDiedError
from rpc.processes import totals

# To end in order once the parent has gone.
_END_SECONDS = 5.0


class Parent:
    """The way to the parent; its socket is left to the end of the process, as a thread waits at it."""

    def __init__(self, descriptor: int) -> None:
        self._socket = socket.socket(fileno=descriptor)
        self._lock = Lock()
        self._turns = 0

    def listen(self, registry: Collector) -> None:
        """
        Answer from now on, in a thread of its own: while this event loop is busy too.

        The task that calls this is cancelled once the parent has gone.

        Args:
            registry: Metrics to answer with.
        """
        loop, task, metrics = asyncio.get_running_loop(), asyncio.current_task(), b"{}"
        assert task is not None

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
                            metrics = totals.encode(totals.snapshot(registry))
                        except Exception:
                            structlog.get_logger(__name__).exception("metrics failed")
                        self._say(b'{"metrics": %s}' % metrics)
                    else:
                        # Told of the turns so far, as the loop itself must never wait for this socket.
                        self._say(b'{"turns": %d}' % self._turns)
                        soon(self._turn)
            soon(task.cancel)
            # A loop that stands still hears nothing of it, and there is nobody left to kill this process.
            time.sleep(_END_SECONDS)
            os._exit(1)

        Thread(target=answer, name="parent", daemon=True).start()

    def ready(self, address: str) -> None:
        """Say that callers can come."""
        self._tell(ready=address)

    def fail(self, problem: Exception) -> None:
        """Say why this process ends."""
        self._tell(problem=str(problem))

    def _turn(self) -> None:
        self._turns += 1

    def _tell(self, **what: str) -> None:
        # There may be nobody left to hear it.
        with suppress(ConnectionError):
            self._say(json.dumps(what).encode())

    def _say(self, line: bytes) -> None:
        with self._lock:
            self._socket.sendall(line + b"\n")


def work(
    serve: Callable[[Any, Parent], Coroutine[Any, Any, None]],
    *problems: type[Exception],
    run: Callable[[Coroutine[Any, Any, None]], None] = asyncio.run,
) -> None:
    """
    Be a worker until SIGTERM, or the parent's end; the whole main program of one.

    Args:
        serve: Given what :meth:`rpc.processes.workers.Workers.start` was told for this one. It lets the parent
            :meth:`~Parent.listen`, says when it is :meth:`~Parent.ready`, and returns after SIGTERM.
        problems: Errors that are told to the parent in one line, beside those of :mod:`rpc.lifecycle`.
        run: What runs that, as :func:`asyncio.run` does.
    """
    parent, told = Parent(int(sys.argv[1])), sys.stdin.buffer.read()
    if not told:
        return  # the parent is gone already
    number, order = json.loads(told)
    known: tuple[type[Exception], ...] = (PortTakenError, ServerDiedError, *problems)
    structlog.contextvars.bind_contextvars(worker=number)
    try:
        run(serve(order, parent))
    except asyncio.CancelledError:
        pass  # there is nobody left to serve for
    except known as problem:
        parent.fail(problem)
        sys.exit(1)
