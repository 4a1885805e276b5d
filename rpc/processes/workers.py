"""
The processes that serve together, from outside: one port, one page of metrics, and a successor for who dies or hangs.

Python uses one core. The process that starts the others has no part in gRPC itself. The port is shared by
SO_REUSEPORT: the kernel gives each new connection to one of those who listen, by its addresses and ports, which is by
chance.
"""

import asyncio
import sys
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import suppress
from typing import Any, Protocol

import structlog
from prometheus_client import Metric
from prometheus_client.registry import Collector

from rpc import lifecycle
from rpc.processes import totals
from rpc.processes.child import ANSWER_SECONDS, Child
from rpc.processes.errors import WorkerError
from rpc.processes.totals import Family, Snapshot

log = structlog.get_logger(__name__)

_FIRST_PAUSE_SECONDS = 0.1
_LONGEST_PAUSE_SECONDS = 30.0
# One that ran for so long is restarted after the first pause again.
_STEADY_SECONDS = 60.0
# Of each worker, where none serves any more.
_MAX_FAILED_STARTS = 5

_LARGEST = ("python_info",)
_SMALLEST = ("process_start_time_seconds",)


class Metrics(Protocol):
    """The metrics of a service, as far as :class:`Workers` needs them."""

    worker_restarts: int
    """Processes that were started again; counted here."""

    @property
    def registry(self) -> Collector:
        """All of them."""


class Workers(Collector):
    """
    The processes, from :meth:`start` to :meth:`stop`; as a collector of metrics, for another thread, their sum.

    Args:
        module: What each of them runs; its main program is :func:`rpc.processes.parent.work`.
        count: How many.
        hang_seconds: How long the event loop of one may stand still before it is killed and another one started.
        own: Metrics of this process, which show every one that the service has from the start.
        largest: Gauges that say the same in each process, or of which the largest counts.
        smallest: Gauges of which the smallest counts.
        told: Gauges that the workers tell alone: this process' own counts where there is no worker.

    Raises:
        WorkerError: This system does not spread connections over processes.
    """

    def __init__(
        self,
        module: str,
        count: int,
        *,
        hang_seconds: float,
        own: Metrics,
        largest: Collection[str] = (),
        smallest: Collection[str] = (),
        told: Collection[str] = (),
    ) -> None:
        if sys.platform != "linux":
            raise WorkerError(f"workers: {count} need Linux, which spreads callers over them; 1 is allowed")
        self._loop = asyncio.get_running_loop()
        self._children = [Child(number, module, hang_seconds) for number in range(count)]
        self._keeping: list[asyncio.Task[None]] = []
        self._own = own
        self._largest, self._smallest, self._told = {*_LARGEST, *largest}, {*_SMALLEST, *smallest}, frozenset(told)
        self._ended: Snapshot = {}

    async def start(self, orders: Sequence[Any], descriptors: Sequence[int] = ()) -> None:
        """
        Start all of them and wait until those serve that can; :meth:`run` tries the others again.

        Args:
            orders: What each of them is told, as JSON can.
            descriptors: Named there, for all of them to inherit.

        Raises:
            WorkerError: None does.
        """
        for child, order in zip(self._children, orders, strict=True):
            child.prepare(order, descriptors)
        async with asyncio.TaskGroup() as group:
            starts = [group.create_task(self._start(child)) for child in self._children]
        problems = [problem for start in starts if (problem := start.result()) is not None]
        if len(problems) == len(self._children):
            raise problems[0]

    async def run(self, *, grace_seconds: float, on_end: Callable[[int], None] = lambda number: None) -> None:
        """
        Restart those that die or hang, until SIGTERM or SIGINT; then let all drain, up to a second signal.

        Args:
            grace_seconds: As of :func:`rpc.lifecycle.run_until_signalled`.
            on_end: Called with the number of a worker whose process has ended, before it has a successor.

        Raises:
            WorkerError: None serves any more and none can start.
        """
        try:
            async with asyncio.TaskGroup() as group:
                self._keeping = [group.create_task(self._keep(child, on_end)) for child in self._children]
                await lifecycle.run_until_signalled(self, grace_seconds=grace_seconds)
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from None

    async def stop(self, grace: float | None) -> None:
        """End all of them: they drain for ``grace`` seconds; 0 ends them at once, in a drain too."""
        for task in self._keeping:
            task.cancel()
        if self._keeping:
            await asyncio.wait(self._keeping)
        await asyncio.gather(*(child.stop(grace or 0.0) for child in self._children))

    def collect(self) -> Iterator[Metric]:
        """Yield the sums over all processes, also those that ended; not from the event loop's own thread."""
        with suppress(TimeoutError, RuntimeError):
            asyncio.run_coroutine_threadsafe(self._ask(), self._loop).result(2 * ANSWER_SECONDS)
        living = [child.metrics for child in self._children if child.metrics]
        own = totals.snapshot(self._own.registry)
        if living:
            # Kept without values, as they say in which order all are shown.
            own |= {name: Family(own[name].kind, own[name].help, {}) for name in self._told & own.keys()}
        summed = totals.total((own, *living, self._ended), largest=self._largest, smallest=self._smallest)
        return totals.metrics(summed)

    async def _ask(self) -> None:
        await asyncio.gather(*(child.ask() for child in self._children))

    async def _start(self, child: Child) -> WorkerError | None:
        try:
            await child.start()
        except WorkerError as error:
            child.failed_starts += 1
            log.warning("worker does not start", worker=child.number, times=child.failed_starts, problem=str(error))
            return error
        return None

    async def _keep(self, child: Child, on_end: Callable[[int], None]) -> None:
        pause = _FIRST_PAUSE_SECONDS
        while True:
            if child.is_serving:
                started = time.monotonic()
                cause = await child.ended()
                self._settle(child)
                on_end(child.number)
                if time.monotonic() - started > _STEADY_SECONDS:
                    pause = _FIRST_PAUSE_SECONDS
                log.warning("worker died", worker=child.number, cause=cause, restarts_in=pause)
            await asyncio.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)
            self._own.worker_restarts += 1
            problem = await self._start(child)
            if problem is not None and self._have_failed:
                raise WorkerError(f"{problem}; {child.failed_starts} times in a row, and no other serves") from problem

    @property
    def _have_failed(self) -> bool:
        """Whether there is nobody left: one that fails while others serve is tried for ever, they are worth more."""
        return all(child.failed_starts >= _MAX_FAILED_STARTS for child in self._children)

    def _settle(self, child: Child) -> None:
        """Keep what a process counted before it ended, as far as anyone has seen it."""
        self._ended = totals.total((self._ended, totals.growing(child.metrics)))
        child.metrics = {}
