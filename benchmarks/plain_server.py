"""A grpc.aio server as one would write it, in a process of its own: what ours are held against."""

from __future__ import annotations  # grpc's classes are generic in their stubs alone

import asyncio
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import grpc

from benchmarks.processes import child

Methods = Mapping[str, "grpc.RpcMethodHandler[Any, Any]"]
"""Handlers of bytes, by ``package.Service/Method``."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PlainServer:
    """Where it is."""

    address: str
    process_id: int


@contextmanager
def plain_server(methods: Callable[..., Methods], *arguments: object) -> Iterator[PlainServer]:
    """
    Run one until this is left.

    Args:
        methods: Of a module; called in the server's process.
        arguments: What it gets; what can be pickled.
    """
    with child(_serve, methods, arguments) as server:
        yield PlainServer(address=f"127.0.0.1:{server.pipe.recv()}", process_id=server.process_id)


def _serve(pipe: Connection, methods: Callable[..., Methods], arguments: tuple[object, ...]) -> None:
    asyncio.run(_run(pipe, methods(*arguments)))


async def _run(pipe: Connection, methods: Methods) -> None:
    server = grpc.aio.server()
    for name, handler in methods.items():
        service, _, method = name.partition("/")
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, {method: handler}),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    pipe.send(port)
    closed = asyncio.Event()
    asyncio.get_running_loop().add_reader(pipe.fileno(), closed.set)
    await closed.wait()
    await server.stop(0)
