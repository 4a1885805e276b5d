"""A streamer of several processes, and what can be seen of it from outside."""

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_CODE = (
    "import asyncio; from rpc import log; from rpc.settings import load; from streamer.processes.workers import serve; "
    "from streamer.settings import StreamerSettings; log.configure(); "
    "asyncio.run(serve(load(StreamerSettings), on_ready=lambda address: print(address, flush=True)))"
)


@dataclass(frozen=True)
class Host:
    """A running streamer."""

    process: asyncio.subprocess.Process
    address: str
    """Empty where it ended before it was ready."""
    log: Path

    def events(self) -> list[dict[str, Any]]:
        """Return what it has logged, without traces of errors."""
        return [json.loads(line) for line in self.log.read_text().splitlines() if line.startswith("{")]

    @property
    def metrics_url(self) -> str:
        """Where its metrics are."""
        (url,) = [str(event["metrics"]) for event in self.events() if event["event"] == "serving"]
        return url

    def workers(self) -> list[int]:
        """Return the process ids of its workers."""
        return children(self.process.pid)


def children(process_id: int) -> list[int]:
    """Return the process ids of all that a process has started and that still run."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            state, parent, *_ = (folder / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue  # it ended meanwhile
        if state != "Z" and int(parent) == process_id:
            found.append(int(folder.name))
    return sorted(found)


@asynccontextmanager
async def host(folder: Path, **environment: str) -> AsyncIterator[Host]:
    """Run a streamer of two workers on free ports; it is killed in the end, if it runs still."""
    settings = {
        "SLUICE_STREAMER_WORKERS": "2",
        "SLUICE_STREAMER_PORT": "0",
        "SLUICE_STREAMER_METRICS_PORT": "0",
        "SLUICE_CACHE": str(folder / "cache"),
    }
    log = folder / "host.log"
    with log.open("wb") as stderr:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", _CODE),
            env=os.environ | settings | environment,
            stdout=asyncio.subprocess.PIPE,
            stderr=stderr,
        )
    assert process.stdout is not None
    try:
        yield Host(process, (await process.stdout.readline()).decode().strip(), log)
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


class Watched:
    """Processes whose end can be waited for, though they are nobody's children here."""

    def __init__(self, process_ids: list[int]) -> None:
        self._descriptors = [os.pidfd_open(each) for each in process_ids]

    async def ended(self) -> None:
        """Wait until all have; the test's own timeout is the limit."""
        loop = asyncio.get_running_loop()
        for descriptor in self._descriptors:
            ended = asyncio.Event()
            loop.add_reader(descriptor, ended.set)
            try:
                await ended.wait()
            finally:
                loop.remove_reader(descriptor)
                os.close(descriptor)
