"""
Several processes that serve as one streamer: one port, one copy of the data in memory, one page of metrics.

Python uses one core. This process starts the others, restarts those that die or hang, and shows their metrics added
up; it has no part in gRPC itself. The port is shared by SO_REUSEPORT: the kernel gives each new connection to one of
those who listen, by its addresses and ports, which is by chance.
"""

import asyncio
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, suppress
from typing import Any

import structlog
from prometheus_client import Metric
from prometheus_client.registry import Collector

from rpc import lifecycle
from rpc.address import joined
from rpc.health import Health
from rpc.telemetry import Endpoint
from streamer import interpreter
from streamer.cores import num_cores
from streamer.errors import WorkerError
from streamer.occupancy import give_back, reserve
from streamer.processes import totals
from streamer.processes.shared import SharedSplit
from streamer.server import METRICS_PORT_OPTION, PORT_OPTION, load, metrics_of, reading_of
from streamer.settings import StreamerSettings
from streamer.sources.places import Reading
from streamer.sources.split import MemorySplit

log = structlog.get_logger(__name__)

_START_SECONDS = 120.0
# A worker that drains ends by itself; what it may need beyond its time, and to end at once.
_STOP_SECONDS = 5.0
_FIRST_PAUSE_SECONDS = 0.1
_LONGEST_PAUSE_SECONDS = 30.0
# One that ran for so long is restarted after the first pause again.
_STEADY_SECONDS = 60.0
# Of each worker, where none serves any more.
_MAX_FAILED_STARTS = 5
# One that does not answer is shown as it was the last time.
_ANSWER_SECONDS = 2.0
# One hangs after so many questions in a row without a turn of its event loop in between. Counted, and not the time
# alone: after a pause of this process, or of the whole machine, each has the time of a question to show a turn.
_QUESTIONS = 5
_MAX_LINE_BYTES = 16 * 1024**2

_LARGEST = (
    "streamer_serving",
    "streamer_streams_in_flight_limit",
    "streamer_cache_bytes",
    "streamer_cache_limit_bytes",
    "python_info",
)
_SMALLEST = ("process_start_time_seconds",)


async def serve(settings: StreamerSettings, *, on_ready: Callable[[str], None] | None = None) -> None:
    """
    Do what :func:`streamer.server.serve` does, with ``settings.num_workers`` processes.

    Data that fits into memory is loaded here, once, and shared by all of them. Cancelling this, or killing this
    process, ends them.

    Args:
        settings: As :func:`rpc.settings.load` gives them.
        on_ready: Told the address once every process serves.

    Raises:
        StreamerError: There is no usable data; or no process starts, at first or several times in a row after all died.
        PortTakenError: A port is taken; raised before any data is fetched.
    """
    if sys.platform != "linux":
        raise WorkerError(f"workers: {settings.num_workers} need Linux, which spreads readers over them; 1 is allowed")
    async with AsyncExitStack() as stack:
        reserved = stack.enter_context(lifecycle.reserve(settings.host, settings.port, option=PORT_OPTION))
        settings = settings.model_copy(update={"port": reserved.getsockname()[1]})
        occupancy = reserve(settings.num_workers)
        stack.callback(os.close, occupancy)
        workers = Workers(settings, occupancy)
        endpoint = Endpoint(workers, settings.host, settings.metrics_port, option=METRICS_PORT_OPTION)
        # In a thread: one that asks for metrics waits for this loop.
        stack.push_async_callback(asyncio.to_thread, endpoint.close)
        stack.push_async_callback(workers.stop, 0)
        datasets, descriptors = await _share(settings, reading_of(settings), stack)
        await workers.start(datasets, descriptors)
        address = joined(settings.host, settings.port)
        log.info("serving", address=address, metrics=endpoint.url, workers=settings.num_workers)
        if on_ready is not None:
            on_ready(address)
        await _supervise(workers, settings.drain_seconds)


async def _supervise(workers: "Workers", grace_seconds: float) -> None:
    try:
        async with asyncio.TaskGroup() as group:
            workers.keep(group)
            await lifecycle.run_until_signalled(workers, grace_seconds=grace_seconds)
    except ExceptionGroup as errors:
        raise errors.exceptions[0] from None


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


class Workers(Collector):
    """
    The processes, from :meth:`start` to :meth:`stop`; as a collector of metrics, for another thread, their sum.

    Args:
        settings: With the port that is held for them.
        occupancy: Descriptor of the memory in which they count their streams.
    """

    def __init__(self, settings: StreamerSettings, occupancy: int) -> None:
        self._loop = asyncio.get_running_loop()
        self._occupancy = occupancy
        count = settings.num_workers
        self._workers = [_Worker(number, _part(settings, number, count)) for number in range(count)]
        self._keeping: list[asyncio.Task[None]] = []
        # Shows every metric from the start.
        self._own = metrics_of(settings, Health([]), reading_of(settings).tally)
        self._ended: totals.Snapshot = {}

    async def start(self, datasets: Sequence[Mapping[str, Any]], descriptors: Sequence[int]) -> None:
        """
        Start all of them and wait until those serve that can; :meth:`keep` tries the others again.

        Args:
            datasets: What they are told of each.
            descriptors: Named there, for them to inherit.

        Raises:
            WorkerError: None does.
        """
        told = {"count": len(self._workers), "occupancy": self._occupancy, "datasets": datasets}
        for worker in self._workers:
            worker.prepare(told, [self._occupancy, *descriptors])
        async with asyncio.TaskGroup() as group:
            starts = [group.create_task(self._start(worker)) for worker in self._workers]
        problems = [problem for start in starts if (problem := start.result()) is not None]
        if len(problems) == len(self._workers):
            raise problems[0]

    def keep(self, group: asyncio.TaskGroup) -> None:
        """Restart those that die or hang, until :meth:`stop`; the group fails once none serves and none can start."""
        self._keeping = [group.create_task(self._keep(worker)) for worker in self._workers]

    async def stop(self, grace: float | None) -> None:
        """End all of them: they drain for ``grace`` seconds; 0 ends them at once, in a drain too."""
        for task in self._keeping:
            task.cancel()
        if self._keeping:
            await asyncio.wait(self._keeping)
        await asyncio.gather(*(worker.stop(grace or 0.0) for worker in self._workers))

    def collect(self) -> Iterator[Metric]:
        """Yield the sums over all processes, also those that ended; not from the event loop's own thread."""
        with suppress(TimeoutError, RuntimeError):
            asyncio.run_coroutine_threadsafe(self._ask(), self._loop).result(2 * _ANSWER_SECONDS)
        snapshots = (totals.snapshot(self._own.registry), *(worker.metrics for worker in self._workers), self._ended)
        return totals.metrics(totals.total(snapshots, largest=_LARGEST, smallest=_SMALLEST))

    async def _ask(self) -> None:
        await asyncio.gather(*(worker.ask() for worker in self._workers))

    async def _start(self, worker: "_Worker") -> WorkerError | None:
        try:
            await worker.start()
        except WorkerError as error:
            worker.failed_starts += 1
            log.warning("worker does not start", worker=worker.number, times=worker.failed_starts, problem=str(error))
            return error
        return None

    async def _keep(self, worker: "_Worker") -> None:
        pause = _FIRST_PAUSE_SECONDS
        while True:
            if worker.is_serving:
                started = time.monotonic()
                cause = await worker.ended()
                self._settle(worker)
                if time.monotonic() - started > _STEADY_SECONDS:
                    pause = _FIRST_PAUSE_SECONDS
                log.warning("worker died", worker=worker.number, cause=cause, restarts_in=pause)
            await asyncio.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)
            self._own.worker_restarts += 1
            problem = await self._start(worker)
            if problem is not None and self._have_failed:
                raise WorkerError(f"{problem}; {worker.failed_starts} times in a row, and no other serves") from problem

    @property
    def _have_failed(self) -> bool:
        """Whether there is nobody left: one that fails while others serve is tried for ever, they are worth more."""
        return all(worker.failed_starts >= _MAX_FAILED_STARTS for worker in self._workers)

    def _settle(self, worker: "_Worker") -> None:
        """Keep what a process counted before it ended, as far as anyone has seen it, and free the places it had."""
        self._ended = totals.total((self._ended, totals.growing(worker.metrics)))
        worker.metrics = {}
        give_back(self._occupancy, worker.number)


class _Worker:
    """One process, and its successors."""

    def __init__(self, number: int, settings: StreamerSettings) -> None:
        self.number = number
        self.metrics: totals.Snapshot = {}
        """As of the last answer."""
        self.is_serving = False
        self.failed_starts = 0
        """In a row."""
        self._settings = settings
        self._order = b""
        self._descriptors: tuple[int, ...] = ()
        self._process: asyncio.subprocess.Process | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._listening: asyncio.Task[None] | None = None
        self._ready: asyncio.Future[None] | None = None
        self._answer: asyncio.Future[None] | None = None
        self._asked_at = 0.0
        self._turns = 0
        self._problem = ""

    def prepare(self, told: Mapping[str, Any], descriptors: Sequence[int]) -> None:
        """Say what it will serve."""
        order = {**told, "number": self.number, "settings": self._settings.model_dump(mode="json")}
        self._order, self._descriptors = json.dumps(order).encode(), tuple(descriptors)

    async def start(self) -> None:
        """
        Start the process and wait until it serves; cancelling this ends it.

        Raises:
            WorkerError: It ended, or took too long.
        """
        try:
            await self._spawn()
            assert self._ready is not None
            async with asyncio.timeout(_START_SECONDS):
                await self._ready
            self.is_serving, self.failed_starts = True, 0
        except TimeoutError:
            await self.stop(0)
            raise WorkerError(f"worker {self.number} was not ready after {_START_SECONDS:g} s") from None
        except OSError as error:
            raise WorkerError(f"worker {self.number} does not start: {error}") from error
        except BaseException:
            await self.stop(0)
            raise

    async def ended(self) -> str:
        """Wait until the process has ended, or hangs and is killed, and return how."""
        assert self._process is not None
        assert self._listening is not None
        watching = asyncio.create_task(self._watch())
        try:
            code = await self._process.wait()
            self.is_serving = False
        finally:
            watching.cancel()
        # What it said last has been heard then.
        await asyncio.wait((self._listening,))
        return self._problem or _cause(code)

    async def _watch(self) -> None:
        """Kill the process once its event loop stands still: stopped, or stuck, it would keep its readers for ever."""
        assert self._process is not None
        assert self._writer is not None
        hang_seconds, unturned, turns = self._settings.hang_seconds, 0, -1
        while unturned < _QUESTIONS:
            self._writer.write(b"!")
            await asyncio.sleep(hang_seconds / _QUESTIONS)
            unturned = unturned + 1 if self._turns == turns else 0
            turns = self._turns
        self._problem = f"killed, as its event loop stood still for {hang_seconds:g} s"
        with suppress(ProcessLookupError):
            self._process.kill()

    async def ask(self) -> None:
        """Bring :attr:`metrics` up to date, if the process answers in time."""
        if self._writer is None or self._writer.is_closing():
            return
        if self._answer is None:
            loop = asyncio.get_running_loop()
            self._answer, self._asked_at = loop.create_future(), loop.time()
            self._writer.write(b"?")
        with suppress(TimeoutError):
            # Nobody waits for one that has been silent for longer already.
            async with asyncio.timeout_at(self._asked_at + _ANSWER_SECONDS):
                await asyncio.shield(self._answer)

    async def stop(self, grace_seconds: float) -> None:
        """End the process; it drains for ``grace_seconds``, and with 0 stops at once."""
        process = self._process
        if process is None:
            return
        if grace_seconds and process.returncode is None:
            with suppress(ProcessLookupError):
                process.send_signal(signal.SIGTERM)
        elif self._writer is not None:
            self._writer.close()
        try:
            async with asyncio.timeout(grace_seconds + _STOP_SECONDS):
                await process.wait()
        except TimeoutError:
            log.warning("worker killed", worker=self.number, problem="it did not end in time")
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()

    async def _spawn(self) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            try:
                # In a group of its own, so that Ctrl-C in a terminal reaches its parent alone.
                self._process = await asyncio.create_subprocess_exec(
                    *interpreter.command("streamer.processes.worker", str(theirs.fileno())),
                    env=interpreter.environment(),
                    stdin=asyncio.subprocess.PIPE,
                    pass_fds=(theirs.fileno(), *self._descriptors),
                    process_group=0,
                )
            except BaseException:
                ours.close()
                raise
        reader, self._writer = await asyncio.open_connection(sock=ours, limit=_MAX_LINE_BYTES)
        loop = asyncio.get_running_loop()
        self._ready, self._answer, self._turns, self._problem = loop.create_future(), None, 0, ""
        self._listening = asyncio.create_task(self._listen(reader, self._ready))
        assert self._process.stdin is not None
        with suppress(ConnectionError):
            self._process.stdin.write(self._order)
            await self._process.stdin.drain()
        self._process.stdin.close()

    async def _listen(self, reader: asyncio.StreamReader, ready: asyncio.Future[None]) -> None:
        assert self._writer is not None
        try:
            with suppress(ConnectionError):
                while line := await reader.readline():
                    self._hear(line, ready)
        finally:
            self._writer.close()
            self._answered()
            if not ready.done():
                ready.set_exception(
                    WorkerError(self._problem or f"worker {self.number} ended before it was ready; the log says why")
                )

    def _hear(self, line: bytes, ready: asyncio.Future[None]) -> None:
        ((kind, what),) = json.loads(line).items()
        if kind == "metrics":
            self.metrics = totals.decode(what)
            self._answered()
        elif kind == "turns":
            self._turns = what
        elif kind == "problem":
            self._problem = f"worker {self.number}: {what}"
        elif not ready.done():
            ready.set_result(None)

    def _answered(self) -> None:
        answer, self._answer = self._answer, None
        if answer is not None and not answer.done():
            answer.set_result(None)


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


def _cause(code: int) -> str:
    if code >= 0:
        return f"status {code}"
    try:
        return signal.Signals(-code).name
    except ValueError:
        return f"signal {-code}"
