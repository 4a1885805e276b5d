"""The guard around every RPC, on a real server with raw-bytes methods."""

from __future__ import annotations  # grpc's classes are generic in their stubs alone

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from tempfile import TemporaryDirectory
from typing import Any

import grpc
import pytest
from structlog.testing import capture_logs

from rpc.interceptor import ALL_OTHERS, MAX_UNASKED, Guard
from rpc.shares import Shares

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
async def guarded(**options: Any) -> AsyncIterator[tuple[grpc.aio.Channel, grpc.aio.Channel]]:
    """Channels of two callers, who come different ways, to a guarded server with methods of each kind."""
    server = grpc.aio.server(interceptors=[Guard(**options)])
    handlers: dict[str, grpc.RpcMethodHandler[bytes, bytes]] = {
        "Echo": grpc.unary_unary_rpc_method_handler(_echo),
        "FailMidway": grpc.unary_stream_rpc_method_handler(_fail_midway),
        "Each": grpc.stream_stream_rpc_method_handler(_echo_each),
    }
    for service in ("Test", "grpc.reflection.Test"):
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, handlers),))
    with TemporaryDirectory() as folder:
        address, other = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}", f"unix:{folder}/socket"
        server.add_insecure_port(other)
        await server.start()
        async with grpc.aio.insecure_channel(address) as first, grpc.aio.insecure_channel(other) as second:
            yield first, second
        await server.stop(0)


@asynccontextmanager
async def impatient(request_seconds: float) -> AsyncIterator[grpc.aio.Channel]:
    """A channel to a server that waits for so long for requests."""
    async with guarded(request_seconds=request_seconds) as (channel, _):
        yield channel


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


async def test_stream_that_pauses_too_long_is_ended_and_one_that_talks_is_not() -> None:
    async with guarded(request_seconds=60, pause_seconds=0.3) as (channel, _):
        pausing, talking = silent(channel, "Test/Each"), silent(channel, "Test/Each")
        await pausing.write(b"first")
        await pausing.read()
        while not pausing.done():
            await talking.write(b"one more")
            assert await talking.read() == b"one more"
            await asyncio.sleep(0.01)

        assert await pausing.code() is grpc.StatusCode.ABORTED
        assert await pausing.details() == "no request came for 0.3 s; open the stream again when there is one"
        await talking.done_writing()
        assert await talking.code() is grpc.StatusCode.OK


# Rooms


async def test_streams_of_one_caller_take_neither_the_last_places_nor_those_of_other_methods() -> None:
    rooms = {"/Test/Each": Shares(32), ALL_OTHERS: Shares(32)}
    async with guarded(rooms=rooms) as (flood, other):
        held = [silent(flood, "Test/Each") for _ in range(30)]
        for call in held:
            await call.write(b"")
            await call.read()
        refused = silent(flood, "Test/Each")
        assert await refused.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "this caller has 30 calls in flight and its share is 16" in await refused.details()
        assert dict(await refused.trailing_metadata())["grpc-retry-pushback-ms"] == "1000"

        assert await unary(flood, "Echo")(b"call") == b"call"
        welcome = silent(other, "Test/Each")
        await welcome.write(b"stream")
        assert await welcome.read() == b"stream"

    async with asyncio.timeout(30):
        while any(room.taken for room in rooms.values()):  # noqa: ASYNC110 - grpc's own tasks end, and tell nobody
            await asyncio.sleep(0.01)


async def test_silent_calls_of_one_caller_hurry_no_other() -> None:
    async with guarded(request_seconds=3600) as (flood, other):
        # The one that has waited longest of all.
        slow: grpc.aio.StreamUnaryCall[bytes, bytes] = other.stream_unary("/Test/Echo")()
        await slow.wait_for_connection()
        calls = [silent(flood, "Test/Echo") for _ in range(MAX_UNASKED + 10)]
        ends = asyncio.as_completed([asyncio.create_task(call.code()) for call in calls])
        assert [await next(ends) for _ in range(11)] == [grpc.StatusCode.ABORTED] * 11

        await slow.write(b"at last")
        await slow.done_writing()
        assert await slow == b"at last"


async def test_silent_calls_hurry_none_in_another_room() -> None:
    rooms = {"/Test/": Shares(1000), "/grpc.reflection.Test/": Shares(1000)}
    async with guarded(request_seconds=3600, rooms=rooms) as (channel, _):
        slow = silent(channel, "Test/Each")
        await slow.wait_for_connection()
        calls = [silent(channel, "grpc.reflection.Test/Each") for _ in range(MAX_UNASKED + 10)]
        ends = asyncio.as_completed([asyncio.create_task(call.code()) for call in calls])
        assert [await next(ends) for _ in range(10)] == [grpc.StatusCode.ABORTED] * 10

        await slow.write(b"at last")
        assert await slow.read() == b"at last"
