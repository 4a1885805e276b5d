"""The life of a gRPC process: bind, report ready, drain on the first signal, stop on the second."""

import asyncio
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import grpc
import structlog

from rpc.address import joined

log = structlog.get_logger(__name__)

_STOPPING = (signal.SIGTERM, signal.SIGINT)


class PortTakenError(OSError):
    """Something else listens where this server should; the message names the address and the option."""


def bind(server: grpc.aio.Server, host: str, port: int, *, option: str) -> int:
    """
    Listen on ``host:port`` without TLS and return the port, which differs from the given one only when that is 0.

    Args:
        server: Not yet started.
        host: Name or address; an IPv6 address without brackets.
        port: 0..65535, 0 for any free one.
        option: What the user changes to get another port, e.g. ``--port or SLUICE_GATEWAY_PORT``.

    Raises:
        PortTakenError: The address cannot be bound.
    """
    try:
        # Let go again: grpc would say that a port is taken on standard error, in its own words, before it raises.
        _bound(host, port).close()
        return server.add_insecure_port(joined(host, port))
    except (OSError, RuntimeError) as error:
        raise _taken(host, port, option) from error


def listen(host: str, port: int, *, option: str) -> socket.socket:
    """
    Return a socket that listens on ``host:port``, for what is not gRPC; arguments and errors as of :func:`bind`.

    A name with several addresses is listened to on its first.
    """
    try:
        return _bound(host, port, is_listening=True)
    except OSError as error:
        raise _taken(host, port, option) from error


def _bound(host: str, port: int, *, is_listening: bool = False) -> socket.socket:
    (family, kind, protocol, _, place), *_others = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    bound = socket.socket(family, kind, protocol)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(place)
        if is_listening:
            bound.listen()
    except BaseException:
        bound.close()
        raise
    return bound


def _taken(host: str, port: int, option: str) -> PortTakenError:
    return PortTakenError(
        f"cannot listen on {joined(host, port)}: it is taken or not an address of this machine; "
        f"choose another with {option}"
    )


async def run_until_signalled(
    server: grpc.aio.Server, *, grace_seconds: float, on_drain: Callable[[], object] | None = None
) -> None:
    """
    Serve until SIGTERM or SIGINT, then refuse new calls and let those in flight finish.

    A second signal, or ``grace_seconds``, ends what is left. Cancelling this stops the server at once.

    Args:
        server: Already started.
        grace_seconds: How long calls in flight may take after the first signal.
        on_drain: Called at the first signal, before new calls are refused; tell health NOT_SERVING here.
    """
    first, second = asyncio.Event(), asyncio.Event()
    with _signals(lambda: (second if first.is_set() else first).set()):
        try:
            await first.wait()
            log.info("draining", grace_seconds=grace_seconds)
            if on_drain is not None:
                on_drain()
            stopping = asyncio.create_task(server.stop(grace_seconds))
            impatient = asyncio.create_task(second.wait())
            await asyncio.wait({stopping, impatient}, return_when=asyncio.FIRST_COMPLETED)
            impatient.cancel()
        finally:
            await server.stop(0)
    log.info("stopped")


@contextmanager
def _signals(react: Callable[[], None]) -> Iterator[None]:
    loop = asyncio.get_running_loop()
    for number in _STOPPING:
        loop.add_signal_handler(number, react)
    try:
        yield
    finally:
        for number in _STOPPING:
            loop.remove_signal_handler(number)
