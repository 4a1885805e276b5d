"""A TCP relay that resets connections in the middle of what they carry."""

import asyncio
import socket
import struct
from collections.abc import Iterator
from contextlib import suppress

from tests.tcp import Listener

_PIECE_BYTES = 64 * 1024


class Cutter(Listener):
    """
    Passes bytes to another address and back, and resets each connection after so many bytes of answers.

    Attributes:
        num_resets: Connections cut so far.

    Args:
        upstream: ``host:port``.
        lengths: How far each connection gets, in bytes; those after the last one are not cut.
    """

    def __init__(self, upstream: str, lengths: Iterator[int]) -> None:
        super().__init__()
        self.num_resets = 0
        self._upstream = upstream
        self._lengths = lengths

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Pass bytes as far as this connection gets."""
        host, _, port = self._upstream.rpartition(":")
        upstream, upward = await asyncio.open_connection(host, int(port))
        asking = asyncio.create_task(_pass(reader, upward, None))
        try:
            self.num_resets += await _pass(upstream, writer, next(self._lengths, None))
        finally:
            asking.cancel()
            _reset(writer)
            upward.transport.abort()


async def _pass(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, length: int | None) -> bool:
    """Pass bytes on until either end closes, or so many; tell whether these were all."""
    with suppress(ConnectionError):
        while length is None or length > 0:
            piece = await reader.read(_PIECE_BYTES if length is None else min(length, _PIECE_BYTES))
            if not piece:
                return False
            writer.write(piece)
            await writer.drain()
            if length is not None:
                length -= len(piece)
        return True
    return False


def _reset(writer: asyncio.StreamWriter) -> None:
    """Close with RST: the peer learns that it is over, and not that all was said."""
    connection = writer.get_extra_info("socket")
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()
