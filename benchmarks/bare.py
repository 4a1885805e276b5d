"""
A plain grpc.aio server, as one would write it: the bytes lie ready, it yields them and does nothing else.

It sends exactly the messages that a streamer sends, recorded beforehand.
"""

import asyncio
import mmap
import multiprocessing
import signal
import struct
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import grpc

_LENGTH = struct.Struct("<I")


@dataclass(frozen=True, kw_only=True, slots=True)
class BareServer:
    """Where it is."""

    address: str
    process_id: int


@contextmanager
def bare_server(recordings: Mapping[str, Path]) -> Iterator[BareServer]:
    """
    Run it in a process of its own.

    Args:
        recordings: By ``package.Service/Method``: a file that :func:`write_recording` wrote, sent whole on each call.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs, dict(recordings)), daemon=True)
    process.start()
    try:
        address = f"127.0.0.1:{ours.recv()}"
        assert process.pid is not None
        yield BareServer(address=address, process_id=process.pid)
    finally:
        ours.close()  # which ends it, as the end of this process would
        process.join()


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


def _serve(pipe: Connection, recordings: Mapping[str, Path]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for who started this
    asyncio.run(_run(pipe, recordings))


async def _run(pipe: Connection, recordings: Mapping[str, Path]) -> None:
    server = grpc.aio.server()
    for name, path in recordings.items():
        service, _, method = name.partition("/")
        handler = _handler(_read_recording(path))
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, {method: handler}),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    pipe.send(port)
    closed = asyncio.Event()
    asyncio.get_running_loop().add_reader(pipe.fileno(), closed.set)
    await closed.wait()
    await server.stop(0)


def _handler(messages: list[bytes]) -> "grpc.RpcMethodHandler[bytes, bytes]":
    async def stream(_request: bytes, _context: object) -> AsyncIterator[bytes]:
        for message in messages:
            yield message

    return grpc.unary_stream_rpc_method_handler(stream)
