"""
Transforms on all cores, off the event loop: in processes of their own.

In threads it would be no faster: NumPy lets go of the interpreter's lock for each of its many short operations and has
to get it back after it, from an event loop that is busy with other streams.
"""

import asyncio
import functools
import json
import mmap
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import IO, Any, Self

import numpy as np
import structlog
from numpy.typing import NDArray

from rpc import interpreter
from rpc.cores import num_cores
from streamer.errors import TransformError, TransformPoolError
from streamer.transforms.transform import Transform
from streamer.transforms.worker import Layout

log = structlog.get_logger(__name__)

# Less work than this is done at once, on the event loop: to hand it over would take as long.
_INLINE_SECONDS = 0.0003
# What a part of a batch is worth, at least, and takes of a worker's memory, at most (but for a single large sample).
_PART_SECONDS = 0.0005
_PART_BYTES = 4 * 1024**2
_ATTEMPTS = 3
_START_SECONDS = 60.0
_STOP_SECONDS = 5.0

# glibc: keep memory that was given back, rather than have the kernel make fresh pages for every batch.
_ENVIRONMENT = {
    "MALLOC_MMAP_THRESHOLD_": str(32 * 1024**2),
    "MALLOC_TRIM_THRESHOLD_": str(64 * 1024**2),
    "OPENBLAS_NUM_THREADS": "1",
    "OMP_NUM_THREADS": "1",
}


class TransformPool:
    """
    Processes that transform batches: ``async with TransformPool() as pool: await pool.apply(...)``.

    A process that ends is started again, and its work done again. Of memory each takes about 40 MB, 4 MiB for the
    samples it works on (more where one sample is larger), and what its transforms need.

    Args:
        workers: Processes; None for one on each core that this process may use, 0 for none: then a thread does the
            work.
        modules: Imported by each process first; for steps of one's own, see :func:`streamer.transforms.steps.register`.
        max_batches: Batches worked on at once, at most; more wait their turn. None for twice ``workers``.
        max_sample_bytes: A sample that takes more, with what becomes of it, is left to a thread.
        timeout_seconds: How long a part of a batch may take before its process is given up.
    """

    def __init__(
        self,
        workers: int | None = None,
        *,
        modules: Sequence[str] = (),
        max_batches: int | None = None,
        max_sample_bytes: int = 64 * 1024**2,
        timeout_seconds: float = 60.0,
    ) -> None:
        count = num_cores() if workers is None else workers
        self._memory_bytes = max(_PART_BYTES, max_sample_bytes)
        self._workers = [_Worker(modules, self._memory_bytes, timeout_seconds) for _ in range(count)]
        self._idle: asyncio.LifoQueue[_Worker] = asyncio.LifoQueue()
        self._places = asyncio.Semaphore(max_batches or 2 * max(1, count))
        self._exchanges: set[asyncio.Task[None]] = set()
        self._is_closed = False
        self.waiting = 0
        """Batches that wait for their turn."""

    @property
    def busy(self) -> int:
        """Processes at work."""
        return len(self._exchanges)

    @property
    def num_workers(self) -> int:
        """Processes there are, at work or not."""
        return len(self._workers)

    @property
    def restarts(self) -> int:
        """Processes that ended, or were given up, and were started again."""
        return sum(worker.restarts for worker in self._workers)

    @property
    def process_ids(self) -> list[int]:
        """Of the processes that run."""
        return [worker.process_id for worker in self._workers if worker.process_id is not None]

    async def start(self) -> None:
        """
        Start the processes and wait until they are ready, some tenths of a second.

        Raises:
            TransformPoolError: One does not start.
        """
        try:
            async with asyncio.TaskGroup() as group:
                for worker in self._workers:
                    group.create_task(worker.start())
        except BaseException as error:
            await self.close()
            if isinstance(error, ExceptionGroup):
                raise error.exceptions[0] from error
            raise
        for worker in self._workers:
            self._idle.put_nowait(worker)

    async def close(self) -> None:
        """End the processes, also in the middle of their work; what waits for them fails with TransformPoolError."""
        self._is_closed = True
        for exchange in self._exchanges:
            exchange.cancel()
        await asyncio.gather(*self._exchanges, return_exceptions=True)
        await asyncio.gather(*(worker.stop() for worker in self._workers))

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def apply(
        self,
        transform: Transform,
        images: NDArray[np.uint8],
        indices: NDArray[np.integer],
        *,
        seed: int | None,
        epoch: int,
    ) -> NDArray[np.generic]:
        """
        Transform a batch; arguments, result and errors as of :meth:`Transform.apply`.

        A large batch is cut into parts for several processes; what takes less time than to hand it over is done here.
        Batches are begun in the order of the calls. Safe to cancel: a process that is at work for the caller finishes
        its part, and goes on with others'.

        Raises:
            TransformPoolError: The pool is closed, or this batch has ended three processes in a row.
        """
        seconds = len(images) * transform.seconds_per_sample
        if seconds <= _INLINE_SECONDS:
            return transform.apply(images, indices, seed=seed, epoch=epoch)
        self.waiting += 1
        try:
            await self._places.acquire()
        finally:
            self.waiting -= 1
        if not self._workers or Layout(transform, 1).size > self._memory_bytes:
            apply = functools.partial(transform.apply, images, indices, seed=seed, epoch=epoch)
            thread = asyncio.get_running_loop().run_in_executor(None, apply)
            # Not before: it works on when its caller has gone, and many callers could come and go meanwhile.
            thread.add_done_callback(lambda _: self._places.release())
            return await asyncio.shield(thread)
        try:
            out = np.empty((len(images), *transform.image_shape), transform.dtype)
            await self._all(
                [
                    _Part(transform, images[cut], indices[cut], seed, epoch, out[cut])
                    for cut in self._cuts(transform, len(images), seconds)
                ]
            )
            return out
        finally:
            self._places.release()

    def _cuts(self, transform: Transform, length: int, seconds: float) -> list[slice]:
        parts = min(len(self._workers), max(1, round(seconds / _PART_SECONDS)))
        fitting = max(1, _PART_BYTES // Layout(transform, 1).size)
        size = min(-(-length // parts), fitting)
        return [slice(first, first + size) for first in range(0, length, size)]

    async def _all(self, parts: list["_Part"]) -> None:
        tasks = [asyncio.create_task(self._do(part)) for part in parts]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _do(self, part: "_Part") -> None:
        lost: TransformPoolError | None = None
        for _ in range(_ATTEMPTS):
            worker = await self._idle.get()
            if self._is_closed:
                self._idle.put_nowait(worker)  # for the next that waits to come by and see it
                raise TransformPoolError("the pool of transforms is closed")
            exchange = self._begin(worker, part)
            try:
                # Shielded: a worker whose caller went away is free again once it has answered, not before.
                return await asyncio.shield(exchange)
            except TransformPoolError as error:
                lost = error
            except asyncio.CancelledError:
                if exchange.cancelled():
                    raise TransformPoolError("the pool of transforms was closed") from None
                raise
        indices = f"one of the samples {part.indices[0]} to {part.indices[-1]}, or a lack of memory, may be the cause"
        raise TransformPoolError(f"{lost}, {_ATTEMPTS} times; {indices}") from lost

    def _begin(self, worker: "_Worker", part: "_Part") -> asyncio.Task[None]:
        def ended(exchange: asyncio.Task[None]) -> None:
            self._exchanges.discard(exchange)
            self._idle.put_nowait(worker)

        exchange = asyncio.create_task(worker.exchange(part))
        self._exchanges.add(exchange)
        exchange.add_done_callback(ended)
        return exchange


@dataclass(frozen=True, eq=False, slots=True)
class _Part:
    """Samples that one worker is given at once, and where what becomes of them is to go."""

    transform: Transform
    images: NDArray[np.uint8]
    indices: NDArray[np.integer]
    seed: int | None
    epoch: int
    out: NDArray[np.generic]


class _Worker:
    """One process, started again when it is needed after it ended."""

    def __init__(self, modules: Sequence[str], memory_bytes: int, timeout_seconds: float) -> None:
        self._modules = modules
        self._memory_bytes = memory_bytes
        self._timeout_seconds = timeout_seconds
        self._memory: mmap.mmap | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None
        self.restarts = 0

    @property
    def process_id(self) -> int | None:
        """None while there is no process."""
        return self._process.pid if self._process is not None and self._process.poll() is None else None

    async def start(self) -> None:
        """
        Start the process and wait until it is ready.

        Raises:
            TransformPoolError: It does not start.
        """
        ours = self._spawn()
        self._reader, self._writer = await asyncio.open_connection(sock=ours)
        try:
            async with asyncio.timeout(_START_SECONDS):
                await self._answer()
        except TimeoutError:
            await self.stop()
            raise TransformPoolError(f"a process for transforms was not ready within {_START_SECONDS:g} s") from None

    def _spawn(self) -> socket.socket:
        ours, theirs = socket.socketpair()
        try:
            with theirs, _anonymous_file() as file:
                os.ftruncate(file.fileno(), self._memory_bytes)  # takes memory only where it is written to
                self._memory = mmap.mmap(file.fileno(), self._memory_bytes)
                self._process = _spawn(
                    [str(theirs.fileno()), str(file.fileno()), str(self._memory_bytes), *self._modules],
                    (theirs.fileno(), file.fileno()),
                )
        except OSError as error:
            ours.close()
            raise TransformPoolError(f"a process for transforms does not start: {error}") from error
        return ours

    async def exchange(self, part: _Part) -> None:
        """
        Have the process work on a part.

        Raises:
            TransformError: A sample failed.
            TransformPoolError: The process ended, does not answer, or did not start.
        """
        if self.process_id is None:
            await self.stop()
            self.restarts += 1
            log.warning("transform_process_restarts", restarts=self.restarts)
            await self.start()
        assert self._memory is not None
        assert self._writer is not None
        layout = Layout(part.transform, len(part.images))
        np.copyto(layout.images(self._memory), part.images)
        np.copyto(layout.indices(self._memory), part.indices, casting="unsafe")
        request = {
            "spec": part.transform.canonical,
            "shape": part.transform.input_shape,
            "count": layout.count,
            "seed": part.seed,
            "epoch": part.epoch,
        }
        self._writer.write(json.dumps(request).encode() + b"\n")
        try:
            async with asyncio.timeout(self._timeout_seconds):
                answer = await self._answer()
        except TimeoutError:
            await self.stop()
            problem = f"a process for transforms did not answer for {self._timeout_seconds:g} s"
            raise TransformPoolError(problem) from None
        if "index" in answer:
            raise TransformError(answer["index"], answer["problem"])
        if "problem" in answer:
            raise TransformPoolError(f"a process for transforms failed: {answer['problem']}")
        np.copyto(part.out, layout.results(self._memory))

    async def stop(self) -> None:
        """End the process."""
        if self._writer is not None:
            self._writer.close()
            self._reader = self._writer = None
        if self._process is not None:
            await asyncio.to_thread(_end, self._process)
            self._process = None
        self._memory = None

    async def _answer(self) -> dict[str, Any]:
        assert self._reader is not None
        try:
            line = await self._reader.readline()
        except ConnectionError:
            line = b""
        if not line:
            await self.stop()
            raise TransformPoolError("a process for transforms ended")
        answer: dict[str, Any] = json.loads(line)
        return answer


def _spawn(arguments: list[str], descriptors: Sequence[int]) -> subprocess.Popen[bytes]:
    # In a group of its own, so that Ctrl-C in a terminal reaches this process alone.
    return subprocess.Popen(
        interpreter.command("streamer.transforms.worker", *arguments),
        env={**_ENVIRONMENT, **interpreter.environment()},
        stdin=subprocess.DEVNULL,
        pass_fds=descriptors,
        process_group=0,
    )


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a process that is idle, or at work, or stuck: its work is worth nothing any more."""
    process.kill()
    process.wait(_STOP_SECONDS)


def _anonymous_file() -> IO[bytes]:
    """Return a file in memory that is gone with the last process that has it, however that ends."""
    if sys.platform == "linux":
        return open(os.memfd_create("sluice-transforms"), "r+b", buffering=0)
    return tempfile.TemporaryFile()
