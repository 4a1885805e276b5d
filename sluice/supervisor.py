"""The local supervisor: starts services, waits until each is ready, restarts what dies, stops all of it."""

import asyncio
import os
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from sluice.readiness import environment

ERROR_PREFIX = "error: "
"""How a service's last line begins when it ends because of something its user can put right."""

_LOG_LIMIT_BYTES = 16 * 2**20
_FIRST_PAUSE_SECONDS = 0.5
_LONGEST_PAUSE_SECONDS = 30.0
_STEADY_SECONDS = 60.0
"""A service that ran this long is restarted after the first pause again."""


class ServiceError(RuntimeError):
    """A service did not get ready; the message holds the end of its log."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Service:
    """One ``sluice`` command that runs until it is stopped."""

    name: str
    arguments: Sequence[str]
    """What follows ``sluice`` on its command line."""
    ready_seconds: float = 60.0
    """How long it may take to announce itself."""
    stop_seconds: float = 20.0
    """How long it may take to end after SIGTERM; then it is killed."""


class Supervisor:
    """
    Runs services as child processes until it is closed; ``async with`` closes it.

    Every child has a process group of its own, so that a Ctrl-C in the terminal reaches the supervisor alone,
    which stops the services in reverse order. Children end with the supervisor, even when it is killed.

    Args:
        logs: Folder for one log file a service.
        report: Told in one line what happened, when something dies or comes back.
    """

    def __init__(self, logs: Path, report: Callable[[str], None]) -> None:
        self._logs = logs
        self._report = report
        self._running: list[_Running] = []

    async def __aenter__(self) -> Self:
        try:
            self._logs.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ServiceError(f"cannot write logs to {self._logs}: {error.strerror} (SLUICE_UP_LOGS)") from error
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    async def start(self, service: Service) -> str:
        """
        Start a service and return the address it announced; from then on it is restarted when it dies.

        Cancelling this ends the process.

        Raises:
            ServiceError: It ended, or took longer than ``ready_seconds``.
        """
        running = _Running(service, self._logs / f"{service.name}.log", self._report)
        self._running.append(running)
        address = await running.start()
        running.watch()
        return address

    def address(self, name: str) -> str:
        """Return where the service of this name listens now."""
        return self._named(name).address

    def pid(self, name: str) -> int:
        """Return the process id of the service of this name; another one after a restart."""
        return self._named(name).pid

    async def stop(self) -> None:
        """End all services, the last started first; idempotent. Cancelling this kills those that are left."""
        try:
            while self._running:
                await self._running[-1].stop()
                self._running.pop()
        except asyncio.CancelledError:
            for running in self._running:
                running.kill()
            raise

    def _named(self, name: str) -> "_Running":
        return next(running for running in self._running if running.service.name == name)


class _Running:
    def __init__(self, service: Service, log: Path, report: Callable[[str], None]) -> None:
        self.service = service
        self.address = ""
        self._log = log
        self._report = report
        self._log_start = 0
        self._process: asyncio.subprocess.Process | None = None
        self._watcher: asyncio.Task[None] | None = None

    async def start(self) -> str:
        reader, writer = os.pipe()
        try:
            self._process = await self._spawn(writer)
        except BaseException:
            os.close(reader)
            raise
        finally:
            os.close(writer)
        try:
            async with asyncio.timeout(self.service.ready_seconds):
                line = await _read_line(reader)
        except TimeoutError as error:
            await self._end()
            raise ServiceError(self._explain(f"was not ready after {self.service.ready_seconds:.0f} s")) from error
        except BaseException:
            await self._end()
            raise
        if not line:
            code = await self._process.wait()
            raise ServiceError(self._explain(f"ended with status {code} before it was ready"))
        self.address = line
        return line

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def watch(self) -> None:
        self._watcher = asyncio.create_task(self._restart_when_dead())

    async def stop(self) -> None:
        if self._watcher is not None:
            self._watcher.cancel()
            await asyncio.wait({self._watcher})
        await self._end()

    def kill(self) -> None:
        """End the process and what it started at once."""
        if self._process is not None and self._process.returncode is None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)

    async def _spawn(self, ready: int) -> asyncio.subprocess.Process:
        if self._log.exists() and self._log.stat().st_size > _LOG_LIMIT_BYTES:
            self._log.replace(self._log.with_suffix(".log.1"))
        with self._log.open("ab") as log:
            self._log_start = log.tell()
            return await asyncio.create_subprocess_exec(
                sys.executable, "-m", "sluice", *self.service.arguments,
                stdin=asyncio.subprocess.DEVNULL, stdout=log, stderr=log,
                pass_fds=(ready,), env=environment(ready), start_new_session=True,
            )  # fmt: skip

    async def _restart_when_dead(self) -> None:
        loop = asyncio.get_running_loop()
        pause = _FIRST_PAUSE_SECONDS
        while True:
            assert self._process is not None
            since = loop.time()
            code = await self._process.wait()
            if loop.time() - since > _STEADY_SECONDS:
                pause = _FIRST_PAUSE_SECONDS
            self._report(f"{self.service.name} died ({_cause(code)}); starting it again in {pause:g} s")
            await asyncio.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)
            try:
                await self.start()
            except (ServiceError, OSError) as error:  # a full disk may pass, and so may what the service lacked
                self._report(f"{self.service.name} could not be started: {error}")
            else:
                self._report(f"{self.service.name} is back on {self.address}")

    async def _end(self) -> None:
        process = self._process
        if process is None or process.returncode is not None:
            return
        with suppress(ProcessLookupError):
            process.send_signal(signal.SIGTERM)
        try:
            async with asyncio.timeout(self.service.stop_seconds):
                await process.wait()
        except TimeoutError:
            self._report(f"{self.service.name} did not end within {self.service.stop_seconds:.0f} s; killed")
            self.kill()
            await process.wait()
        except asyncio.CancelledError:
            self.kill()  # nobody waits any more
            raise

    def _explain(self, what: str) -> str:
        with self._log.open("rb") as log:
            log.seek(self._log_start)
            tail = log.read().decode(errors="replace").splitlines()[-8:]
        if tail and tail[-1].startswith(ERROR_PREFIX):  # it said itself what is wrong
            return f"{self.service.name}: {tail[-1].removeprefix(ERROR_PREFIX)}"
        return "\n".join(
            [f"{self.service.name} {what}; its log {self._log} ends with:", *(f"  {line}" for line in tail)]
        )


async def _read_line(descriptor: int) -> str:
    """Return the first line of a pipe, empty when it closes without one; closes the descriptor."""
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader()
    transport, _ = await loop.connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(descriptor, "rb")
    )
    try:
        return (await reader.readline()).decode().strip()
    finally:
        transport.close()


def _cause(code: int) -> str:
    if code >= 0:
        return f"status {code}"
    try:
        return signal.Signals(-code).name
    except ValueError:
        return f"signal {-code}"
