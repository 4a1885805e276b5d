from __future__ import annotations  # grpc's classes are generic in their stubs alone

import asyncio
import os
import signal
import socket
from typing import Any

import grpc
import pytest

from rpc.interceptor import Guard
from rpc.lifecycle import PortTakenError, ServerDiedError, bind, listen, reserve, run_until_signalled


class Slow:
    """A method that answers when it is told to."""

    def __init__(self) -> None:
        self.entered = asyncio.Event()
        self.answer = asyncio.Event()

    async def respond(self, request: bytes, context: object) -> bytes:
        self.entered.set()
        await self.answer.wait()
        return b"done"


async def _serve(slow: Slow, *interceptors: grpc.aio.ServerInterceptor) -> tuple[grpc.aio.Server, int]:
    server = grpc.aio.server(interceptors=interceptors)
    handler = grpc.method_handlers_generic_handler("Test", {"Slow": grpc.unary_unary_rpc_method_handler(slow.respond)})
    server.add_generic_rpc_handlers((handler,))
    port = bind(server, "127.0.0.1", 0, option="--port")
    await server.start()
    return server, port


async def test_call_in_flight_finishes_after_the_first_signal() -> None:
    slow, drained = Slow(), asyncio.Event()
    server, port = await _serve(slow)
    running = asyncio.create_task(run_until_signalled(server, grace_seconds=30, on_drain=drained.set))
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        method: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary("/Test/Slow")
        call = method(b"")
        await slow.entered.wait()
        os.kill(os.getpid(), signal.SIGTERM)
        await drained.wait()
        slow.answer.set()

        assert await call == b"done"
        await running


async def test_second_signal_ends_at_once() -> None:
    slow, drained = Slow(), asyncio.Event()
    server, port = await _serve(slow)
    running = asyncio.create_task(run_until_signalled(server, grace_seconds=1000, on_drain=drained.set))
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        method: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary("/Test/Slow")
        call = method(b"")
        await slow.entered.wait()
        os.kill(os.getpid(), signal.SIGTERM)
        await drained.wait()
        os.kill(os.getpid(), signal.SIGTERM)
        await running

        with pytest.raises(grpc.aio.AioRpcError):
            await call


async def test_taken_port_is_named_with_the_option() -> None:
    server, port = await _serve(Slow())
    other = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
    try:
        with pytest.raises(PortTakenError, match=rf"127.0.0.1:{port}.*--port or SLUICE_PORT"):
            bind(other, "127.0.0.1", port, option="--port or SLUICE_PORT")
    finally:
        await other.stop(0)
        await server.stop(0)


def test_reserved_port_is_shared_by_those_meant_to_and_taken_for_all_others() -> None:
    with reserve("127.0.0.1", 0, option="--port") as reserved:
        port = reserved.getsockname()[1]
        for _ in range(2):
            with pytest.raises(PortTakenError, match=f"127.0.0.1:{port}.*--port"):
                reserve("127.0.0.1", port, option="--port").close()
        with pytest.raises(PortTakenError, match=f"127.0.0.1:{port}.*--port"):
            listen("127.0.0.1", port, option="--port").close()


async def test_servers_share_a_reserved_port_and_take_all_its_connections() -> None:
    with reserve("127.0.0.1", 0, option="--port") as reserved:
        port = reserved.getsockname()[1]
        servers = [grpc.aio.server(options=[("grpc.so_reuseport", 1)]) for _ in range(2)]
        try:
            for server in servers:
                assert bind(server, "127.0.0.1", port, option="--port", is_reserved=True) == port
                await server.start()
            for _ in range(20):
                async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
                    await channel.channel_ready()
        finally:
            for server in servers:
                await server.stop(0)


def test_port_is_reserved_while_connections_of_a_server_before_run_out() -> None:
    with listen("127.0.0.1", 0, option="--port") as before:
        port = before.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port)) as reader:
            # Who closes first keeps the connection for a minute.
            before.accept()[0].close()
            assert reader.recv(1) == b""
    reserve("127.0.0.1", port, option="--port").close()


def test_taken_port_is_not_reserved() -> None:
    with listen("127.0.0.1", 0, option="--port") as taken:
        port = taken.getsockname()[1]
        with pytest.raises(PortTakenError, match=f"127.0.0.1:{port}.*--port"):
            reserve("127.0.0.1", port, option="--port").close()


async def test_peer_that_never_answers_the_goodbye_holds_nothing_up() -> None:
    """GRPC waits for every connection's answer: this one speaks HTTP/2 as far as its preface."""
    guard = Guard()
    slow = Slow()
    server, port = await _serve(slow, guard)
    _, peer = await asyncio.open_connection("127.0.0.1", port)
    peer.write(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\4\0\0\0\0\0")
    running = asyncio.create_task(run_until_signalled(server, grace_seconds=1000, wait_idle=guard.wait_idle))
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        method: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary("/Test/Slow")
        call = method(b"")
        await slow.entered.wait()
        os.kill(os.getpid(), signal.SIGTERM)
        slow.answer.set()

        assert await call == b"done"
    await running
    peer.close()


async def test_failure_of_something_vital_ends_the_server() -> None:
    server, port = await _serve(Slow())
    failing: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def wait() -> None:
        await failing

    vital = {"the heart": asyncio.create_task(wait())}
    running = asyncio.create_task(run_until_signalled(server, grace_seconds=30, vital=vital))
    failing.set_exception(ZeroDivisionError("stopped"))

    with pytest.raises(ServerDiedError, match=r"^the heart ended by itself: stopped; its process"):
        await asyncio.wait_for(running, 30)
    with pytest.raises(ConnectionRefusedError):
        await asyncio.open_connection("127.0.0.1", port)


async def test_server_that_died_ends_its_process() -> None:
    """A path that is not UTF-8 ends the loop in which grpc.aio takes calls, and it tells nobody."""
    server, port = await _serve(Slow())
    running = asyncio.create_task(run_until_signalled(server, grace_seconds=30))
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        path: Any = b"/a\xafb/c"
        method: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(path)
        call = method(b"")
        try:
            with pytest.raises(ServerDiedError, match="started again"):
                await asyncio.wait_for(running, 30)
        finally:
            call.cancel()
