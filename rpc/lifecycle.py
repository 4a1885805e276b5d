"""The life of a gRPC process: bind, report ready, drain on the first signal, stop on the second."""

import asyncio
import signal
import socket
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import grpc
import structlog

from rpc.address import joined

log = structlog.get_logger(__name__)

_SETTLING_SECONDS = 0.5
_STOPPING = (signal.SIGTERM, signal.SIGINT)
# What grpc.aio calls the task in which a server takes calls.
_SERVING = "_server_main_loop"
_SERVER = "the gRPC server"


class PortTakenError(OSError):
    """Something else listens where this server should; the message names the address and the option."""


class ServerDiedError(Exception):
    """grpc.aio takes no more calls, or something else is gone that serving needs; only a new process serves again."""


class Stoppable(Protocol):
    """A server, as far as :func:`run_until_signalled` needs one; grpc.aio's is."""

    async def stop(self, grace: float | None) -> None:
        """Refuse new calls, and end those in flight after ``grace`` seconds; 0, at any time, ends them at once."""


def bind(
    server: grpc.aio.Server,
    host: str,
    port: int,
    *,
    option: str,
    is_reserved: bool = False,
    credentials: grpc.ServerCredentials | None = None,
) -> int:
    """
    Listen on ``host:port`` and return the port, which differs from the given one only when that is 0.

    Args:
        server: Not yet started.
        host: Name or address; an IPv6 address without brackets.
        port: 0..65535, 0 for any free one.
        option: What the user changes to get another port, e.g. ``--port or SLUICE_GATEWAY_PORT``.
        is_reserved: Whether this is one of several processes on a port that :func:`reserve` holds for them; the
            server needs the option ``grpc.so_reuseport`` then.
        credentials: For TLS, as of :func:`rpc.tls.server_credentials`; None is without.

    Raises:
        PortTakenError: The address cannot be bound.
    """
    try:
        # Let go again: grpc would say that a port is taken on standard error, in its own words, before it raises.
        if not is_reserved:
            _bound(host, port).close()
        address = joined(host, port)
        return server.add_secure_port(address, credentials) if credentials else server.add_insecure_port(address)
    except (OSError, RuntimeError) as error:
        raise _taken(host, port, option) from error


def reserve(host: str, port: int, *, option: str) -> socket.socket:
    """
    Return a socket that holds ``host:port`` for processes of this user that share it by SO_REUSEPORT; Linux only.

    It takes no connections itself: the kernel spreads them over those who listen.

    Args:
        host: As of :func:`bind`, and so are the others.
        port: As said.
        option: As said.

    Raises:
        PortTakenError: Somebody listens there, or holds it for others.
    """
    try:
        # Those who share it would be let in beside each other, strangers too; who does not is refused.
        _bound(host, port).close()
        try:
            # Whoever looks as above while nobody listens yet finds it taken by this.
            return _bound(host, port, options=(socket.SO_REUSEPORT,))
        except OSError:
            # Connections of a server before this one have not run out.
            return _bound(host, port, options=(socket.SO_REUSEPORT, socket.SO_REUSEADDR))
    except OSError as error:
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


def _bound(
    host: str, port: int, *, is_listening: bool = False, options: Sequence[int] = (socket.SO_REUSEADDR,)
) -> socket.socket:
    (family, kind, protocol, _, place), *_others = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    bound = socket.socket(family, kind, protocol)
    try:
        for option in options:
            bound.setsockopt(socket.SOL_SOCKET, option, 1)
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
    server: Stoppable,
    *,
    grace_seconds: float,
    on_drain: Callable[[], object] | None = None,
    wait_idle: Callable[[], Coroutine[Any, Any, None]] | None = None,
    vital: Mapping[str, asyncio.Task[Any]] | None = None,
) -> None:
    """
    Serve until SIGTERM or SIGINT, then refuse new calls and let those in flight finish.

    A second signal, or ``grace_seconds``, ends what is left. Cancelling this stops the server at once.

    Args:
        server: Already started.
        grace_seconds: How long calls in flight may take after the first signal.
        on_drain: Called at the first signal, before new calls are refused; tell health NOT_SERVING here.
        wait_idle: Waits until no call is in flight. gRPC itself goes on waiting for every connection to answer its
            goodbye, which a peer that hangs never does.
        vital: What serving is nothing without, by name: a task that fails ends it at once.

    Raises:
        ServerDiedError: The server, or something vital, ended by itself.
    """
    first, second = asyncio.Event(), asyncio.Event()
    with _signals(lambda: (second if first.is_set() else first).set()), _deaths(vital or {}) as died:
        signalled = asyncio.create_task(first.wait())
        try:
            await asyncio.wait((signalled, died), return_when=asyncio.FIRST_COMPLETED)
            if died.done():
                what, error = died.result()
                raise ServerDiedError(
                    f"{what} ended by itself: {error}; its process has to be started again"
                ) from error
            log.info("draining", grace_seconds=grace_seconds)
            if on_drain is not None:
                on_drain()
            stopping = asyncio.create_task(server.stop(grace_seconds))
            sooner: list[asyncio.Task[Any]] = [asyncio.create_task(second.wait())]
            if wait_idle is not None:
                sooner.append(asyncio.create_task(_settled(wait_idle)))
            await asyncio.wait((stopping, *sooner), return_when=asyncio.FIRST_COMPLETED)
            for each in sooner:
                each.cancel()
        finally:
            signalled.cancel()
            # One that has died cannot be stopped: grpc.aio says that it was cancelled.
            if not died.done() or died.result()[0] != _SERVER:
                await server.stop(0)
    log.info("stopped")


async def _settled(wait_idle: Callable[[], Coroutine[Any, Any, None]]) -> None:
    await wait_idle()
    # What was answered last is on its way.
    await asyncio.sleep(_SETTLING_SECONDS)


@contextmanager
def _deaths(vital: Mapping[str, asyncio.Task[Any]]) -> Iterator[asyncio.Future[tuple[str, BaseException]]]:
    """
    Give a future that gets the error with which a server of this loop stops taking calls, or something vital ends.

    grpc.aio tells nobody: the port closes, calls under way hang, and wait_for_termination goes on waiting. A request
    whose path is not UTF-8 is enough (grpcio 1.85), so whoever reaches the port can do that.
    """
    died: asyncio.Future[tuple[str, BaseException]] = asyncio.get_running_loop().create_future()
    watched = {task: what for what, task in vital.items()}
    watched |= {
        task: _SERVER for task in asyncio.all_tasks() if _SERVING in getattr(task.get_coro(), "__qualname__", "")
    }

    def look(ended: asyncio.Task[Any]) -> None:
        error = None if ended.cancelled() else ended.exception()
        if error is not None and not died.done():
            died.set_result((watched[ended], error))

    for task in watched:
        task.add_done_callback(look)
    try:
        yield died
    finally:
        for task in watched:
            task.remove_done_callback(look)


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
