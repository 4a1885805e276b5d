"""
Load by h2load, of Debian's nghttp2-client: a program in C, so that the load takes little of the cores it is to measure.

It sends one body again and again, a number of times and not for a time: calls that the end of a time cuts off would be
cancelled, which this Triton may not survive (server#7368).
"""

import asyncio
import math
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

PROGRAM = "h2load"
GRPC_HEADERS = ("content-type: application/grpc", "te: trailers")

_FINISHED = re.compile(r"^finished in ([\d.]+)(us|ms|s|m|h), ([\d.]+) req/s", re.MULTILINE)
_REQUESTS = re.compile(r"^requests: (\d+) total, .*?(\d+) done, (\d+) succeeded", re.MULTILINE)
_STATUS = re.compile(r"^status codes: (\d+) 2xx", re.MULTILINE)
_TRAFFIC = re.compile(r"^traffic: .* \((\d+)\) data", re.MULTILINE)
_UNITS = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}


class H2loadError(RuntimeError):
    """h2load is missing or could not do its work; the message says what to do, or why."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Load:
    """What is sent, and by how many callers."""

    address: str
    """``host:port``."""
    path: str
    body: Path
    """File whose bytes each call sends."""
    connections: int
    streams: int = 1
    """Calls in flight on each connection."""
    headers: Sequence[str] = GRPC_HEADERS
    is_http1: bool = False
    """HTTP/1.1 in place of HTTP/2."""
    rate: float | None = None
    """Calls a second, whatever the answers do while there are callers left; None sends the next for each answer."""

    @property
    def callers(self) -> int:
        """Calls in flight."""
        return self.connections * self.streams


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """What h2load says it did."""

    seconds: float
    requests: int
    succeeded: int
    """Answered with a status 2xx, as every failed gRPC call is too."""
    data_bytes: int
    """Of all answers' bodies."""

    def answers(self, size: int) -> int:
        """
        Return how many answers of that size came: a gRPC call that fails has a body of no bytes.

        Args:
            size: Of each answer in bytes, as it is the same one each time; above 0.
        """
        return min(self.data_bytes // size, self.succeeded)


def parse(text: str) -> Report:
    """
    Read what h2load prints.

    Raises:
        H2loadError: It is no report.
    """
    finished, requests = _FINISHED.search(text), _REQUESTS.search(text)
    status, traffic = _STATUS.search(text), _TRAFFIC.search(text)
    if finished is None or requests is None or status is None or traffic is None:
        last = text.strip().splitlines()[-1:] or ["nothing"]
        raise H2loadError(f"{PROGRAM} did not report: {last[0]}")
    return Report(
        seconds=float(finished[1]) * _UNITS[finished[2]],
        requests=int(requests[1]),
        succeeded=min(int(requests[3]), int(status[1])),
        data_bytes=int(traffic[1]),
    )


def require() -> None:
    """
    Look whether h2load is there.

    Raises:
        H2loadError: It is not.
    """
    if shutil.which(PROGRAM) is None:
        raise H2loadError(f"{PROGRAM} is missing: on Debian, apt-get install nghttp2-client")


async def run(load: Load, *, calls: int, timeout_seconds: float) -> Report:
    """
    Send so many calls and wait for all their answers; cancelling this ends h2load.

    Args:
        load: What is sent; there are never more connections than calls, which h2load refuses.
        calls: At least 1.
        timeout_seconds: Longest it may take.

    Raises:
        H2loadError: It is missing, failed, or took too long.
    """
    require()
    connections = min(load.connections, calls)
    command = [
        *(PROGRAM, "-n", str(calls), "-c", str(connections), "-m", str(load.streams), "-d", str(load.body)),
        *(word for header in load.headers for word in ("-H", header)),
        *(["--h1"] if load.is_http1 else []),
        *([f"--rps={load.rate / connections:.3f}"] if load.rate is not None else []),
        f"http://{load.address}{load.path}",
    ]
    process = await asyncio.create_subprocess_exec(
        *command,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    try:
        async with asyncio.timeout(timeout_seconds):
            output, _ = await process.communicate()
    except TimeoutError as error:
        raise H2loadError(f"{load.address}{load.path}: {calls} calls took more than {timeout_seconds:g} s") from error
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if process.returncode:
        raise H2loadError(f"{PROGRAM} ended with status {process.returncode}: {output.decode(errors='replace')[-300:]}")
    return parse(output.decode(errors="replace"))


def calls_for(rate: float, seconds: float, callers: int) -> int:
    """
    Return how many calls take about that long, at least a few for each caller.

    Args:
        rate: Calls a second that were seen; above 0.
        seconds: Wanted.
        callers: Calls in flight.
    """
    return max(math.ceil(rate * seconds), 4 * callers)
