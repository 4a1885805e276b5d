"""A gateway as a process of its own, and what the kernel says of it."""

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from gateway.asking.failures import OverloadedError
from gateway.client import ImageClient
from sluice.readiness import environment
from tests.digits import seven
from tests.gateway.fake_triton import label_of

ROOT = Path(__file__).resolve().parents[3]
MEBI = 1 << 20
# For machines ten times slower than most.
PATIENCE_SECONDS = 60.0

T = TypeVar("T")
P = TypeVar("P", bound="Process")

_LOOK_SECONDS = 0.05
_TICKS = os.sysconf("SC_CLK_TCK")
_PAGE = os.sysconf("SC_PAGE_SIZE")
_PEAK = re.compile(r"^VmHWM:\s+(\d+) kB", re.MULTILINE)
_HANDED_DOWN = {"SLUICE_READY_FD", "SLUICE_PARENT_PID"}


@dataclass(frozen=True, slots=True)
class Cost:
    """What some time cost a gateway."""

    cpu_seconds: float
    peak_bytes: int
    """Resident memory at its height, beyond what it was at first."""

    def __str__(self) -> str:
        return f"{self.cpu_seconds:.2f} s of CPU, {self.peak_bytes / MEBI:+.1f} MiB at the height"


class Meter:
    """Measures what a gateway spends from now on; one at a time."""

    def __init__(self, gateway: "Gateway") -> None:
        self._gateway = gateway
        gateway.forget_peak()
        self._rss_bytes, self._cpu_seconds = gateway.rss_bytes, gateway.cpu_seconds

    def cost(self) -> Cost:
        """Return it so far."""
        gateway = self._gateway
        return Cost(gateway.cpu_seconds - self._cpu_seconds, max(0, gateway.peak_bytes - self._rss_bytes))


class Gateway:
    """
    ``sluice gateway`` on a free port.

    Figures are of the process and its children together.

    Args:
        triton: ``host:port`` of its Triton.
        log: Where what it prints goes.
        options: Further ones of the command.
    """

    def __init__(self, triton: str, log: Path, *options: str) -> None:
        self.address = ""
        self._arguments = ("--port", "0", "--metrics-port", "0", "--triton", triton, *options)
        self._log = log
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    @property
    def is_alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def rss_bytes(self) -> int:
        """Resident memory now."""
        return sum(int(_read(pid, "statm").split()[1]) for pid in self._pids()) * _PAGE

    @property
    def peak_bytes(self) -> int:
        """Resident memory at its height since :meth:`forget_peak`, each process at its own."""
        return sum(int(_PEAK.findall(_read(pid, "status"))[0]) for pid in self._pids()) * 1024

    def forget_peak(self) -> None:
        """Begin anew with :attr:`peak_bytes`."""
        for pid in self._pids():
            # Linux, proc_pid_clear_refs(5).
            Path(f"/proc/{pid}/clear_refs").write_text("5")

    @property
    def cpu_seconds(self) -> float:
        """User and system time so far."""
        # After the command's name, which may hold spaces.
        fields = [_read(pid, "stat").rpartition(")")[2].split() for pid in self._pids()]
        return sum(int(each[11]) + int(each[12]) for each in fields) / _TICKS

    @property
    def num_fds(self) -> int:
        """Open files and sockets now."""
        return sum(len(os.listdir(f"/proc/{pid}/fd")) for pid in self._pids())

    def lines(self) -> list[dict[str, Any]]:
        """Return what it has logged; a line that is not JSON, as the event it would be."""
        return [_parsed(line) for line in self._log.read_text(errors="replace").splitlines()]

    async def start(self) -> None:
        """Start the process, from the main thread, and wait until it listens and serves."""
        await self.listen()
        await self.check()

    async def listen(self) -> None:
        """Start the process, from the main thread, and wait until it listens, whether it serves or not."""
        with os.fdopen(self._launch()) as pipe:
            self.address = (await asyncio.to_thread(pipe.readline)).strip()
        assert self.address, self._log.read_text()[-2000:]

    @property
    def metrics_url(self) -> str:
        """Where its metrics are."""
        return str(next(line["metrics"] for line in self.lines() if line["event"] == "listening"))

    def send(self, number: signal.Signals) -> None:
        """Send it a signal."""
        assert self._process is not None
        self._process.send_signal(number)

    def _launch(self) -> int:
        """Start it, and return where it will announce its address."""
        reader, writer = os.pipe()
        inherited = {
            name: value
            for name, value in environment(writer).items()
            if name in _HANDED_DOWN or not name.startswith("SLUICE_")
        }
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "sluice", "gateway", *self._arguments],
                cwd=ROOT, env=inherited, stdin=subprocess.DEVNULL, stdout=log, stderr=log, pass_fds=(writer,),
            )  # fmt: skip
        os.close(writer)
        return reader

    async def check(self) -> None:
        """Fail unless it reports that it serves, and answers what is right."""
        image = seven()
        async with ImageClient(self.address, timeout_seconds=PATIENCE_SECONDS) as client:
            await client.wait_ready()
            answer = await client.classify(image)
        assert answer.label == label_of(image)

    async def recover(self) -> None:
        """Wait until :meth:`check` passes where the gateway is overloaded at first."""
        async with asyncio.timeout(PATIENCE_SECONDS):
            while True:
                try:
                    return await self.check()
                except OverloadedError as error:
                    await asyncio.sleep(error.retry_after_seconds)  # as it asks its callers to

    async def drop_to(self, num_fds: int) -> int:
        """Wait until no more files are open than these, or for as long as is usual, and return how many are."""
        with suppress(TimeoutError):
            await until(lambda: self.num_fds <= num_fds)
        return self.num_fds

    async def ended_within(self, seconds: float) -> int | None:
        """Wait so long for it to end, and return its status; ``None`` where it did not."""
        assert self._process is not None
        try:
            return await asyncio.to_thread(self._process.wait, seconds)
        except subprocess.TimeoutExpired:
            return None

    def close(self) -> None:
        """SIGKILL, and wait until it is gone."""
        if self._process is not None:
            self._process.send_signal(signal.SIGKILL)
            self._process.wait()

    def _pids(self) -> Iterator[int]:
        waiting = [self.pid]
        while waiting:
            pid = waiting.pop()
            yield pid
            waiting += map(int, _read(pid, f"task/{pid}/children").split())


class Process(Protocol):
    """What :func:`started` starts and ends."""

    async def start(self) -> None: ...

    def close(self) -> None: ...


@asynccontextmanager
async def started(process: P) -> AsyncIterator[P]:
    """Start it, from the main thread, and kill it in the end."""
    try:
        await process.start()
        yield process
    finally:
        process.close()


async def until(look: Callable[[], T | None], *, within_seconds: float = PATIENCE_SECONDS) -> T:
    """Wait until a look at what another process holds, counts or logs finds something, and return that."""
    async with asyncio.timeout(within_seconds):
        while not (found := look()):  # noqa: ASYNC110 - of another process, which tells nobody
            await asyncio.sleep(_LOOK_SECONDS)
    return found


def _read(pid: int, name: str) -> str:
    return Path(f"/proc/{pid}/{name}").read_text()


def _parsed(line: str) -> dict[str, Any]:
    try:
        parsed: dict[str, Any] = json.loads(line)
    except json.JSONDecodeError:
        return {"event": line}
    return parsed
