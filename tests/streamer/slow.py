"""A link to an object storage that is some way off, and counts what is asked for over it."""

import asyncio
from collections.abc import Callable
from contextlib import suppress

from tests.tcp import Listener, either

_PIECE_BYTES = 256 * 1024


class SlowLink(Listener):
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
        super().__init__()
        self.num_gets = 0
        self.num_bytes = 0
        self._host, _, port = endpoint.removeprefix("http://").rpartition(":")
        self._port = int(port)
        self._seconds = seconds

    @property
    def endpoint(self) -> str:
        return f"http://{self.address}"

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Pass requests and answers on until either end closes; a server that is down is one that resets."""
        upstream, upward = await asyncio.open_connection(self._host, self._port)
        try:
            await either(
                _pass(reader, upward, self._seconds, self._asked), _pass(upstream, writer, 0.0, self._answered)
            )
        finally:
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
