import asyncio
from collections.abc import AsyncIterator, Iterable

import pytest

from protos.streamer.v1 import sample_service_pb2 as pb
from streamer.errors import IdleReaderError, InvalidPlanError
from streamer.flow import Credit
from streamer.session import Grants, opening

OPEN = pb.PullBatchesRequest(open=pb.StreamBatchesRequest(start_position=3))


def grant(num_bytes: int) -> pb.PullBatchesRequest:
    return pb.PullBatchesRequest(grant_bytes=num_bytes)


async def sent(
    messages: Iterable[pb.PullBatchesRequest], *, stays_open: bool = False
) -> AsyncIterator[pb.PullBatchesRequest]:
    for message in messages:
        yield message
    if stays_open:
        await asyncio.Event().wait()


async def opened(messages: AsyncIterator[pb.PullBatchesRequest], idle_seconds: float = 5) -> pb.StreamBatchesRequest:
    return await opening(messages, idle_seconds=idle_seconds, draining=asyncio.Event())


async def test_stream_is_opened_by_its_first_message() -> None:
    assert (await opened(sent([OPEN, grant(1)]))).start_position == 3


@pytest.mark.parametrize("messages", [[], [grant(1)], [pb.PullBatchesRequest()]], ids=["none", "grant", "empty"])
async def test_stream_opened_by_anything_else_is_refused(messages: list[pb.PullBatchesRequest]) -> None:
    with pytest.raises(InvalidPlanError, match=r"^open: required as the first message"):
        await opened(sent(messages))


async def test_reader_that_never_opens_is_idle() -> None:
    with pytest.raises(IdleReaderError, match=r"no open within 0\.01 s"):
        await opened(sent([], stays_open=True), 0.01)


async def test_grant_wakes_who_waits() -> None:
    credit = Credit(100)
    async with Grants(sent([grant(7)], stays_open=True), credit, idle_seconds=5) as grants:
        await grants.wait()
        assert (credit.balance, grants.is_closed) == (7, False)


async def test_half_close_wakes_who_waits_with_what_is_left() -> None:
    credit = Credit(100)
    async with Grants(sent([]), credit, idle_seconds=5) as grants:
        await grants.wait()
        assert grants.is_closed
        assert not credit.lets_send
        await grants.wait_closed()


async def test_drain_wakes_who_waits_without_credit() -> None:
    async with Grants(sent([], stays_open=True), Credit(100), idle_seconds=5) as grants:
        asyncio.get_running_loop().call_soon(grants.drain)
        await grants.wait()
        assert grants.is_draining


@pytest.mark.parametrize(
    ("message", "told"),
    [
        (OPEN, "grant_bytes: required in every message after the first"),
        (pb.PullBatchesRequest(), "grant_bytes: required in every"),
        (grant(0), "grant_bytes: 0; grant 1 or more"),
        (grant(101), "grant_bytes: 101 on top of the 0 left; a balance of at most 100"),
    ],
)
async def test_message_that_is_no_good_grant_is_refused(message: pb.PullBatchesRequest, told: str) -> None:
    async with Grants(sent([message], stays_open=True), Credit(100), idle_seconds=5) as grants:
        with pytest.raises(InvalidPlanError, match=told):
            await grants.wait()


async def test_bad_message_is_refused_even_after_the_last_batch() -> None:
    async with Grants(sent([grant(0)]), Credit(100), idle_seconds=5) as grants:
        with pytest.raises(InvalidPlanError, match="grant_bytes: 0"):
            await grants.wait_closed()


async def test_idle_reader_is_told_what_was_awaited_but_not_after_the_last_batch() -> None:
    async with Grants(sent([], stays_open=True), Credit(100), idle_seconds=0.01) as grants:
        with pytest.raises(IdleReaderError, match=r"no grant within 0\.01 s"):
            await grants.wait()
        await grants.wait_closed()
