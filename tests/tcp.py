"""A TCP proxy that counts what passes and may change it."""

import asyncio
import enum
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType
from typing import Self


class Way(enum.Enum):
    """Which way bytes go."""

    THERE = "from client to server"
    BACK = "from server to client"


Change = Callable[[Way, int, bytes], bytes]
"""From the way, how many bytes have gone that way before, and what goes now: as many bytes."""

_CHUNK_BYTES = 64 * 1024


class TcpProxy:
    """
    Passes connections on to a server; holds at most a few chunks of each.

    Args:
        upstream: ``host:port`` of the server.
        change: What becomes of the bytes.

    Attributes:
        address: Where it listens.
        passed: Bytes so far, by way, over all connections.
        num_connections: So far.
    """

    def __init__(self, upstream: str, change: Change | None = None) -> None:
        self._host, _, port = upstream.rpartition(":")
        self._port = int(port)
        self._change = change
        self._connections: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None
        self.address = ""
        self.passed = dict.fromkeys(Way, 0)
        self.num_connections = 0

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

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        self.num_connections += 1
        up_writer: asyncio.StreamWriter | None = None
        try:
            up_reader, up_writer = await asyncio.open_connection(self._host, self._port, limit=_CHUNK_BYTES)
            passing = {
                asyncio.create_task(self._pass(Way.THERE, reader, up_writer)),
                asyncio.create_task(self._pass(Way.BACK, up_reader, writer)),
            }
            try:
                await asyncio.wait(passing, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for each in passing:
                    each.cancel()
                await asyncio.wait(passing)
        except (OSError, asyncio.CancelledError):
            # A task of asyncio's server that ends as cancelled is reported as an error by Python 3.11.
            pass
        finally:
            for each_writer in (writer, up_writer):
                if each_writer is not None:
                    each_writer.transport.abort()
            self._connections.discard(task)

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
