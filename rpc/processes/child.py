"""One of the processes that serve together, as their parent sees it; :mod:`rpc.processes.parent` is the other side."""

import asyncio
import json
import signal
import socket
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import structlog

from rpc import interpreter
from rpc.processes import totals
from rpc.processes.errors import WorkerError

log = structlog.get_logger(__name__)

ANSWER_SECONDS = 2.0
"""How long metrics are waited for; of one that does not answer they are shown as they were the last time."""

_START_SECONDS = 120.0
# A worker that drains ends by itself; what it may need beyond its time, and to end at once.
_STOP_SECONDS = 5.0
# One hangs after so many questions in a row without a turn of its event loop in between. Counted, and not the time
# alone: after a pause of this process, or of the whole machine, each has the time of a question to show a turn.
_QUESTIONS = 5
_MAX_LINE_BYTES = 16 * 1024**2


class Child:
    """
    One process, and its successors.

    Args:
        number: Of this one among the workers.
        module: What it runs.
        hang_seconds: How long its event loop may stand still.
    """

    def __init__(self, number: int, module: str, hang_seconds: float) -> None:
        self.number = number
        self.metrics: totals.Snapshot = {}
        """As of the last answer."""
        self.is_serving = False
        self.failed_starts = 0
        """In a row."""
        self._module = module
        self._hang_seconds = hang_seconds
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

    def prepare(self, order: Any, descriptors: Sequence[int]) -> None:
        """Say what it will serve, as JSON can, and which open files it inherits."""
        self._order, self._descriptors = json.dumps([self.number, order]).encode(), tuple(descriptors)

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
        """Kill the process once its event loop stands still: stopped, or stuck, it would keep its callers for ever."""
        assert self._process is not None
        assert self._writer is not None
        hang_seconds, unturned, turns = self._hang_seconds, 0, -1
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
            async with asyncio.timeout_at(self._asked_at + ANSWER_SECONDS):
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
                    *interpreter.command(self._module, str(theirs.fileno())),
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


def _cause(code: int) -> str:
    if code >= 0:
        return f"status {code}"
    try:
        return signal.Signals(-code).name
    except ValueError:
        return f"signal {-code}"
