"""
A fake Triton as a process of its own, which can be killed, stopped, and put on a machine of its own.

``python -m tests.faults.gateway.standin HOST PORT BATCH_SECONDS MAX_BATCH_SIZE`` runs one until it is killed.
"""

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from sluice.readiness import announce, end_with_parent, environment
from tests.faults.gateway.process import ROOT
from tests.gateway.fake_triton import Context, FakeTriton


class StandIn:
    """
    ``mnist`` version 1, in a process; keeps its port through all its lives.

    Args:
        host: Address that it listens on.
        within: What its command line begins with: ``ip netns exec ...``.
        batch_seconds: How long it takes for a batch, one after the other.
        max_batch_size: Most images in one.
    """

    def __init__(
        self,
        host: str = "127.0.0.1",
        *,
        within: Sequence[str] = (),
        batch_seconds: float = 0.0,
        max_batch_size: int = 64,
    ) -> None:
        self._host = host
        self._port = 0
        self._within = within
        self._numbers = (str(batch_seconds), str(max_batch_size))
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def address(self) -> str:
        """``host:port``, once it was started."""
        return f"{self._host}:{self._port}"

    async def start(self) -> None:
        """Start it, from the main thread, on the port that it had, and wait until it answers."""
        with os.fdopen(self._launch()) as pipe:
            line = await asyncio.to_thread(pipe.readline)
        assert line, "it ended"
        self._port = int(line.rpartition(":")[2])

    def _launch(self) -> int:
        """Start it, and return where it will announce its address."""
        reader, writer = os.pipe()
        module = ("-m", "tests.faults.gateway.standin", self._host, str(self._port), *self._numbers)
        self._process = subprocess.Popen(
            [*self._within, sys.executable, *module], cwd=ROOT, env=environment(writer), pass_fds=(writer,)
        )
        os.close(writer)
        return reader

    def send(self, number: signal.Signals) -> None:
        """Send it a signal."""
        assert self._process is not None
        self._process.send_signal(number)

    def close(self) -> None:
        """SIGKILL, and wait until it is gone; nothing where it is gone already."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()


class _Slow(FakeTriton):
    def __init__(self, host: str, port: int, batch_seconds: float, max_batch_size: int) -> None:
        super().__init__(host=host, port=port, max_batch_size=max_batch_size)
        self._batch_seconds = batch_seconds
        self._instance = asyncio.Lock()

    async def ModelInfer(self, request: Any, context: Context) -> Any:
        """Answer after the batches before it."""
        async with self._instance:
            await asyncio.sleep(self._batch_seconds)  # what an inference takes
            response = await super().ModelInfer(request, context)
        # What a test in this process would look at would only grow here.
        self.received.clear()
        self.requests.clear()
        return response


async def _run(host: str, port: str, batch_seconds: str, max_batch_size: str) -> None:
    async with _Slow(host, int(port), float(batch_seconds), int(max_batch_size)) as triton:
        announce(triton.address)
        await asyncio.Event().wait()


if __name__ == "__main__":
    end_with_parent()
    asyncio.run(_run(*sys.argv[1:]))
