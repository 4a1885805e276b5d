"""A grpc.aio server with one method that does nothing: what a call costs in this language whatever it is for."""

import asyncio
import multiprocessing
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any

import grpc

from benchmarks.bare import BareServer

METHOD = "/Empty/Call"


@contextmanager
def empty_server() -> Iterator[BareServer]:
    """Run it in a process of its own; any request is answered with an empty message."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs,), daemon=True)
    process.start()
    try:
        address = f"127.0.0.1:{ours.recv()}"
        assert process.pid is not None
        yield BareServer(address=address, process_id=process.pid)
    finally:
        ours.close()  # which ends it, as the end of this process would
        process.join()


def _serve(pipe: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for who started this
    asyncio.run(_run(pipe))


async def _run(pipe: Connection) -> None:
    server = grpc.aio.server()
    service, method = METHOD.removeprefix("/").split("/")
    handlers: dict[str, Any] = {method: grpc.unary_unary_rpc_method_handler(_answer)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    pipe.send(port)
    closed = asyncio.Event()
    asyncio.get_running_loop().add_reader(pipe.fileno(), closed.set)
    await closed.wait()
    await server.stop(0)


async def _answer(_request: bytes, _context: object) -> bytes:
    return b""
