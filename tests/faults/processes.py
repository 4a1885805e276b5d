"""Streamers as processes of their own, which die, hang and come back on the port they had."""

import asyncio
import os
import random
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from sluice.readiness import environment

ROOT = Path(__file__).resolve().parents[2]

_SLUICE = ("-m", "sluice")
# Below those that Linux gives to connections: nobody takes one while its streamer is down.
_PORTS = range(20_000, 32_000)


class Streamer:
    """
    ``sluice streamer``; keeps its port through all its lives.

    Args:
        data: What it serves, as ``--datasets`` takes it.
        log: Where what it prints goes.
        program: What Python runs in place of ``sluice``.
        options: Further ones of ``sluice streamer``.
    """

    def __init__(self, data: str, log: Path, *, program: Sequence[str] = _SLUICE, options: Sequence[str] = ()) -> None:
        self._port = _free_port()
        self._arguments = (*program, "streamer", "--datasets", data, "--port", str(self._port), "--metrics-port", "0")
        self._arguments += tuple(options)
        self._log = log
        self._process: subprocess.Popen[bytes] | None = None
        self._announced = -1

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self._port}"

    @property
    def is_alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def launch(self) -> None:
        """Start the process. From the main thread: it ends with the thread that started it."""
        assert not self.is_alive
        reader, writer = os.pipe()
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, *self._arguments],
                cwd=ROOT, env=_environment(writer), stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                pass_fds=(writer,), start_new_session=True,
            )  # fmt: skip
        os.close(writer)
        self._announced = reader

    async def ready(self) -> None:
        """Wait until it has said that it serves, or died."""
        await asyncio.to_thread(self.wait_ready)

    def wait_ready(self) -> None:
        with os.fdopen(self._announced) as pipe:
            assert pipe.readline(), self._log.read_text()[-2000:]

    async def start(self) -> None:
        self.launch()
        await self.ready()

    def kill(self) -> None:
        """SIGKILL, and wait until it is gone."""
        self.send(signal.SIGKILL)
        self._reap()

    async def terminate(self) -> int:
        """SIGTERM, and return its status once it has ended."""
        self.send(signal.SIGTERM)
        return await asyncio.to_thread(self._reap)

    def send(self, number: signal.Signals) -> None:
        assert self._process is not None
        self._process.send_signal(number)

    def close(self) -> None:
        if self.is_alive:
            self.kill()

    def _reap(self) -> int:
        assert self._process is not None
        return self._process.wait()


def _environment(ready: int) -> dict[str, str]:
    announcing = {"SLUICE_READY_FD", "SLUICE_PARENT_PID", "SLUICE_CACHE"}
    return {
        name: value
        for name, value in environment(ready).items()
        if name in announcing or not name.startswith("SLUICE_")
    }


def _free_port() -> int:
    for port in random.SystemRandom().sample(_PORTS, len(_PORTS)):
        with socket.socket() as tried:
            tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                tried.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise AssertionError("no port is free")
