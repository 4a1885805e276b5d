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

from tests.children import children

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
