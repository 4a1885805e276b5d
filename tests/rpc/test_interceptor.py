"""The guard around every RPC, on a real server with raw-bytes methods."""

from __future__ import annotations  # grpc's classes are generic in their stubs alone

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc
import pytest
from structlog.testing import capture_logs

from rpc.interceptor import MAX_UNASKED, Guard

SECRET = "the password is 1234"


def unary(channel: grpc.aio.Channel, method: str) -> grpc.aio.UnaryUnaryMultiCallable[bytes, bytes]:
    return channel.unary_unary(f"/Test/{method}")


async def _fail(request: bytes, context: object) -> bytes:
    raise ValueError(SECRET)


async def _fail_midway(request: bytes, context: object) -> AsyncIterator[bytes]:
    yield b"one"
    raise ValueError(SECRET)


async def _abort(request: bytes, context: grpc.aio.ServicerContext[bytes, bytes]) -> bytes:
    await context.abort(grpc.StatusCode.NOT_FOUND, "no such thing")


async def _echo(request: bytes, context: object) -> bytes:
    return request


@pytest.fixture
async def channel() -> AsyncIterator[grpc.aio.Channel]:
    server = grpc.aio.server(interceptors=[Guard()])
    handlers: dict[str, grpc.RpcMethodHandler[bytes, bytes]] = {
        "Fail": grpc.unary_unary_rpc_method_handler(_fail),
        "FailMidway": grpc.unary_stream_rpc_method_handler(_fail_midway),
        "Abort": grpc.unary_unary_rpc_method_handler(_abort),
        "Echo": grpc.unary_unary_rpc_method_handler(_echo),
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("Test", handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield channel
    await server.stop(0)


async def test_unexpected_exception_reaches_the_log_and_not_the_caller(channel: grpc.aio.Channel) -> None:
    with capture_logs() as logs, pytest.raises(grpc.aio.AioRpcError) as caught:
        await unary(channel, "Fail")(b"")

    assert caught.value.code() is grpc.StatusCode.INTERNAL
    assert SECRET not in str(caught.value.details())
    (record,) = [entry for entry in logs if entry["event"] == "rpc failed"]
    assert record["incident"] in str(caught.value.details())


async def test_exception_in_the_middle_of_a_stream_is_neutral_too(channel: grpc.aio.Channel) -> None:
    method: grpc.aio.UnaryStreamMultiCallable[bytes, bytes] = channel.unary_stream("/Test/FailMidway")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        _ = [message async for message in method(b"")]

    assert caught.value.code() is grpc.StatusCode.INTERNAL
    assert SECRET not in str(caught.value.details())


async def test_status_chosen_by_the_handler_passes(channel: grpc.aio.Channel) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await unary(channel, "Abort")(b"")

    assert (caught.value.code(), caught.value.details()) == (grpc.StatusCode.NOT_FOUND, "no such thing")


@pytest.mark.parametrize(("method", "code"), [("Echo", "OK"), ("Abort", "NOT_FOUND"), ("Fail", "INTERNAL")])
async def test_each_call_is_one_line_with_its_code(channel: grpc.aio.Channel, method: str, code: str) -> None:
    with capture_logs() as logs:
        call = unary(channel, method)(b"")
        await asyncio.wait({asyncio.ensure_future(call.code())})
        # The caller may know the status before the handler has ended.
        while not any(entry["event"] == "rpc" for entry in logs):  # noqa: ASYNC110 - nothing tells of the handler's end
            await asyncio.sleep(0)

    assert [(entry["method"], entry["code"]) for entry in logs if entry["event"] == "rpc"] == [
        (f"/Test/{method}", code)
    ]


# Calls whose request does not come


async def _echo_each(requests: AsyncIterator[bytes], context: object) -> AsyncIterator[bytes]:
    async for request in requests:
        yield request


@asynccontextmanager
async def impatient(request_seconds: float) -> AsyncIterator[grpc.aio.Channel]:
    """A channel to a server that waits for so long for requests; it has methods of each kind."""
    server = grpc.aio.server(interceptors=[Guard(request_seconds=request_seconds)])
    handlers: dict[str, grpc.RpcMethodHandler[bytes, bytes]] = {
        "Echo": grpc.unary_unary_rpc_method_handler(_echo),
        "FailMidway": grpc.unary_stream_rpc_method_handler(_fail_midway),
        "Each": grpc.stream_stream_rpc_method_handler(_echo_each),
    }
    for service in ("Test", "grpc.reflection.Test"):
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield channel
    await server.stop(0)


def silent(channel: grpc.aio.Channel, method: str) -> grpc.aio.StreamStreamCall[bytes, bytes]:
    return channel.stream_stream(f"/{method}")()


@pytest.mark.parametrize("method", ["Echo", "FailMidway", "Each"])
async def test_call_that_sends_no_request_is_ended(method: str) -> None:
    async with impatient(0.05) as channel:
        call = silent(channel, f"Test/{method}")

        assert await call.code() is grpc.StatusCode.ABORTED
        assert await call.details() == "no request came within 0.05 s, or less where many calls wait for theirs"


async def test_call_that_ends_without_a_request_is_malformed() -> None:
    async with impatient(60) as channel:
        call = silent(channel, "Test/Echo")
        await call.done_writing()

        assert await call.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_longest_of_too_many_silent_calls_make_room_and_the_others_wait_on() -> None:
    async with impatient(3600) as channel:
        calls = [silent(channel, "Test/Each") for _ in range(MAX_UNASKED + 10)]

        # Calls of one moment arrive in any order.
        ends = asyncio.as_completed([asyncio.create_task(call.code()) for call in calls])
        assert [await next(ends) for _ in range(10)] == [grpc.StatusCode.ABORTED] * 10
        waiting = [call for call in calls if not call.done()]
        assert len(waiting) == MAX_UNASKED
        for call in waiting:
            await call.write(b"late")
            assert await call.read() == b"late"
            await call.done_writing()
        assert [await end for end in ends] == [grpc.StatusCode.OK] * MAX_UNASKED


@pytest.mark.parametrize(
    ("service", "ended"), [("Test", grpc.StatusCode.OK), ("grpc.reflection.Test", grpc.StatusCode.ABORTED)]
)
async def test_messages_after_the_first_may_take_their_time_but_for_reflection(
    service: str, ended: grpc.StatusCode
) -> None:
    async with impatient(0.5) as channel:
        call = silent(channel, f"{service}/Each")
        await call.write(b"first")
        assert await call.read() == b"first"

        await asyncio.sleep(0.8)  # longer than a first one may take
        await call.done_writing()
        assert await call.code() is ended
