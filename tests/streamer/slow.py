"""A link to an object storage that is some way off, and counts what is asked for over it."""

import asyncio
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType
from typing import Self

_PIECE_BYTES = 256 * 1024


class SlowLink:
    """
    Passes HTTP/1.1 on to another address: each request begins some time after it was sent; answers pass at once.

    Attributes:
        num_gets: Requests to read something, so far.
        num_bytes: Of answers, so far.

    Args:
        endpoint: ``http://host:port``.
        seconds: By which each request is held up.
    """

    def __init__(self, endpoint: str, seconds: float = 0.0) -> None:
        self.num_gets = 0
        self.num_bytes = 0
        self._host, _, port = endpoint.removeprefix("http://").rpartition(":")
        self._port = int(port)
        self._seconds = seconds
        self._server: asyncio.Server | None = None
        self._links: set[asyncio.Task[None]] = set()

    @property
    def endpoint(self) -> str:
        assert self._server is not None
        return f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._connected, "127.0.0.1", 0)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._server is not None
        self._server.close()
        for each in self._links:
            each.cancel()
        await asyncio.gather(*self._links, return_exceptions=True)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._links.add(task)
        try:
            # A server that is down is one that resets.
            with suppress(OSError):
                await self._link(reader, writer)
        finally:
            self._links.discard(task)
            writer.transport.abort()

    async def _link(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        upstream, upward = await asyncio.open_connection(self._host, self._port)
        passing = [
            asyncio.create_task(_pass(reader, upward, self._seconds, self._asked)),
            asyncio.create_task(_pass(upstream, writer, 0.0, self._answered)),
        ]
        try:
            await asyncio.wait(passing, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for each in passing:
                each.cancel()
            await asyncio.gather(*passing, return_exceptions=True)
            upward.transport.abort()

    def _asked(self, piece: bytes) -> None:
        # A request without a body comes as one piece, and the next one after its answer.
        self.num_gets += piece.startswith(b"GET ")

    def _answered(self, piece: bytes) -> None:
        self.num_bytes += len(piece)


async def _pass(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, seconds: float, note: Callable[[bytes], None]
) -> None:
    with suppress(OSError):
        while piece := await reader.read(_PIECE_BYTES):
            note(piece)
            if seconds:
                await asyncio.sleep(seconds)
            writer.write(piece)
            await writer.drain()
