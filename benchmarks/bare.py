"""
A server whose bytes lie ready: it yields them and does nothing else.

It sends exactly the messages that a streamer sends, recorded beforehand.
"""

import mmap
import struct
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import grpc

from benchmarks.plain_server import Methods, PlainServer, plain_server

_LENGTH = struct.Struct("<I")


@contextmanager
def bare_server(recordings: Mapping[str, Path]) -> Iterator[PlainServer]:
    """
    Run it in a process of its own.

    Args:
        recordings: By ``package.Service/Method``: a file that :func:`write_recording` wrote, sent whole on each call.
    """
    with plain_server(_methods, dict(recordings)) as server:
        yield server


def write_recording(path: Path, messages: Sequence[bytes]) -> None:
    """Write messages, each behind its length."""
    with path.open("wb") as file:
        for message in messages:
            file.write(_LENGTH.pack(len(message)))
            file.write(message)


def _read_recording(path: Path) -> list[bytes]:
    messages, place = [], 0
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        while place < len(content):
            (size,) = _LENGTH.unpack_from(content, place)
            place += _LENGTH.size + size
            messages.append(content[place - size : place])
    return messages


def _methods(recordings: Mapping[str, Path]) -> Methods:
    return {name: _handler(_read_recording(path)) for name, path in recordings.items()}


def _handler(messages: list[bytes]) -> "grpc.RpcMethodHandler[bytes, bytes]":
    async def stream(_request: bytes, _context: object) -> AsyncIterator[bytes]:
        for message in messages:
            yield message

    return grpc.unary_stream_rpc_method_handler(stream)
