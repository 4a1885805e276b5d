"""A grpc.aio server with one method that does nothing: what a call costs in this language whatever it is for."""

from collections.abc import Iterator
from contextlib import contextmanager

import grpc

from benchmarks.plain_server import Methods, PlainServer, plain_server

METHOD = "/Empty/Call"


@contextmanager
def empty_server() -> Iterator[PlainServer]:
    """Run it in a process of its own; any request is answered with an empty message."""
    with plain_server(_methods) as server:
        yield server


def _methods() -> Methods:
    return {METHOD.removeprefix("/"): grpc.unary_unary_rpc_method_handler(_answer)}


async def _answer(_request: bytes, _context: object) -> bytes:
    return b""
