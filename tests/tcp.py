"""TCP servers that stand in a connection's way, and a proxy that counts what passes and may change it."""

import asyncio
import enum
from collections.abc import Callable, Coroutine
from contextlib import suppress
from types import TracebackType
from typing import Any, Self


class Way(enum.Enum):
    """Which way bytes go."""

    THERE = "from client to server"
    BACK = "from server to client"


Change = Callable[[Way, int, bytes], bytes]
"""From the way, how many bytes have gone that way before, and what goes now: as many bytes."""

_CHUNK_BYTES = 64 * 1024


class Listener:
    """
    Takes connections as :meth:`serve` says, and ends them all when its ``async with`` is left.

    Attributes:
        address: Where it listens.
    """

    def __init__(self) -> None:
        self.address = ""
        self._server: asyncio.Server | None = None
        self._connections: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0, limit=_CHUNK_BYTES)
        self.address = f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._server is not None
        self._server.close()
        for each in self._connections:
            each.cancel()
        if self._connections:
            await asyncio.wait(self._connections)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve one connection; it is closed afterwards."""
        raise NotImplementedError

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        try:
            # A task of asyncio's server that ends as cancelled is reported as an error by Python 3.11.
            with suppress(asyncio.CancelledError, OSError):
                await self.serve(reader, writer)
        finally:
            self._connections.discard(task)
            writer.transport.abort()


async def either(*passing: Coroutine[Any, Any, object]) -> None:
    """Do these at the same time until one of them is done, and end the others."""
    tasks = [asyncio.create_task(each) for each in passing]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for each in tasks:
            each.cancel()
        await asyncio.wait(tasks)


class TcpProxy(Listener):
    """
    Passes connections on to a server; holds at most a few chunks of each.

    Args:
        upstream: ``host:port`` of the server.
        change: What becomes of the bytes.

    Attributes:
        passed: Bytes so far, by way, over all connections.
        num_connections: So far.
    """

    def __init__(self, upstream: str, change: Change | None = None) -> None:
        super().__init__()
        self._host, _, port = upstream.rpartition(":")
        self._port = int(port)
        self._change = change
        self.passed = dict.fromkeys(Way, 0)
        self.num_connections = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Pass bytes until either end closes."""
        self.num_connections += 1
        up_reader, up_writer = await asyncio.open_connection(self._host, self._port, limit=_CHUNK_BYTES)
        try:
            await either(self._pass(Way.THERE, reader, up_writer), self._pass(Way.BACK, up_reader, writer))
        finally:
            up_writer.transport.abort()

    async def _pass(self, way: Way, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while data := await reader.read(_CHUNK_BYTES):
                before = self.passed[way]
                self.passed[way] += len(data)
                writer.write(data if self._change is None else self._change(way, before, data))
                await writer.drain()


def flip(way: Way, byte: int, bit: int) -> Change:
    """Turn one bit over: of the byte with that number among all that go that way."""

    def change(going: Way, before: int, data: bytes) -> bytes:
        place = byte - before
        if going is not way or not 0 <= place < len(data):
            return data
        return data[:place] + bytes((data[place] ^ 1 << bit,)) + data[place + 1 :]

    return change
