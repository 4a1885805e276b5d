"""Batches that many callers share."""

import asyncio

import pytest

from gateway.errors import (
    TooLateError,
)
from tests.gateway.coalescing.line import (
    Line,
    after,
    by_the_clock,
    settled,
    told,
)


async def test_lone_image_leaves_in_the_round_in_which_it_came() -> None:
    line = Line()
    ask = line.ask(b"\x03")
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert line.model.sizes == [1]

    line.model.answer()
    assert [float(row[0]) for row in await ask.future] == [6]  # type: ignore[index]  # a row


async def test_those_who_wait_leave_together_and_never_more_than_the_model_takes() -> None:
    line = Line(batches_per_instance=1)
    asks = [line.ask(b"\x01")]
    await settled()
    asks += [line.ask(bytes([2 + number])) for number in range(6)]
    for _ in range(3):
        await settled()
        line.model.answer()
    await settled()

    assert line.model.sizes == [1, 4, 2]
    assert [told(ask) for ask in asks] == [[2 * (1 + number)] for number in range(7)]
    assert line.room.num_taken == 0


async def test_equal_images_are_asked_once_and_all_are_told() -> None:
    line = Line()
    asks = [line.ask(b"\x07") for _ in range(3)]
    await settled()
    asks.append(line.ask(b"\x07"))
    line.model.answer()
    await settled()

    assert line.model.sizes == [1]
    assert [told(ask) for ask in asks] == [[14.0]] * 4
    assert line.lane.num_joined == 3
    assert line.room.num_taken == 0


async def test_caller_that_goes_takes_nobody_with_it() -> None:
    line = Line(batches_per_instance=1)
    busy = line.ask(b"\x01")
    await settled()
    gone, stays, shares = line.ask(b"\x02"), line.ask(b"\x03"), line.ask(b"\x02")
    line.lane.leave(gone)
    line.model.answer()
    await settled()
    line.model.answer()
    await settled()

    assert [told(busy), told(stays), told(shares)] == [[2.0], [6.0], [4.0]]
    assert gone.future.cancelled()
    assert line.room.num_taken == 0


async def test_image_whose_callers_have_gone_never_reaches_the_model() -> None:
    line = Line(batches_per_instance=1)
    line.ask(b"\x01")
    await settled()
    gone = line.ask(b"\x02")
    line.lane.leave(gone)
    late = line.ask(b"\x03", deadline=asyncio.get_running_loop().time())
    assert (line.room.num_taken, line.lane.num_dropped) == (2, 1)
    line.model.answer()
    await settled()

    assert line.model.sizes == [1]
    assert told(late) == ["no time was left for the inference"]
    assert isinstance(late.future.result()[0], TooLateError)
    assert line.lane.num_dropped == 2


async def test_batch_that_nobody_waits_for_is_cancelled_where_triton_bears_it() -> None:
    line = Line(batches_per_instance=1, may_cancel=True)
    alone = line.ask(b"\x01")
    await settled()
    first, second, next_one = line.ask(b"\x02"), line.ask(b"\x03"), line.ask(b"\x04", b"\x05", b"\x06")
    line.lane.leave(alone)
    await settled()
    assert line.model.batches[0][1].cancelled()
    assert line.model.sizes == [1, 4]

    line.lane.leave(first)
    line.lane.leave(second)
    await settled()
    line.model.answer(index=1)
    await settled()
    assert line.lane.num_batches == 1
    line.model.answer(index=1)
    await settled()
    assert told(next_one) == [8.0, 10.0, 12.0]
    assert (line.room.num_taken, line.lane.num_in_flight, line.lane.is_idle) == (0, 0, True)


async def test_batch_that_nobody_waits_for_goes_on_where_triton_might_crash() -> None:
    line = Line()
    alone = line.ask(b"\x01")
    await settled()
    line.lane.leave(alone)
    await settled()
    assert (line.lane.num_in_flight, line.room.num_taken) == (1, 1)

    line.model.answer()
    await settled()
    assert (line.lane.num_in_flight, line.room.num_taken) == (0, 0)


async def test_image_that_could_not_be_answered_in_time_is_not_sent_behind_another() -> None:
    line = Line()
    loop = asyncio.get_running_loop()
    for number in range(50):
        line.ask(bytes([number]))
        await asyncio.sleep(0.004)  # what the model takes
        line.model.answer()
        await settled()
    line.ask(b"\xf0")
    await settled()
    hasty = line.ask(b"\xf1", deadline=loop.time() + 0.001)
    patient = line.ask(b"\xf2", deadline=loop.time() + 60)
    await settled()
    while line.model.batches:
        line.model.answer()
        await settled()

    assert told(hasty) == ["no time was left for the inference"]
    assert told(patient) == [2 * 0xF2]


@by_the_clock
async def test_image_is_not_sent_that_would_come_too_late_behind_the_one_before() -> None:
    line = Line()
    for number in range(20):
        line.ask(bytes([number]))
        await settled()
        await after(0.1)  # what the model takes for an image
        line.model.answer()
        await settled()
    line.ask(b"\xf0")
    await settled()
    await after(0.05)
    now = asyncio.get_running_loop().time()
    # Both would be answered 0.25 from now: the one before has half its time to go.
    hasty = line.ask(b"\xf1", deadline=now + 0.22)
    line.ask(b"\xf2", deadline=now + 0.28)
    await settled()

    assert told(hasty) == ["no time was left for the inference"]
    assert line.model.batches[-1][0] == b"\xf2"


async def test_image_leaves_at_once_beside_a_large_batch_when_an_instance_is_idle() -> None:
    line = Line(num_instances=2)
    line.ask(b"\x01", b"\x02", b"\x03", b"\x04")
    await settled()
    line.ask(b"\x05")
    await settled()
    assert line.model.sizes == [4, 1]

    # Beyond the instances one more has to be as large as what each of them has.
    line.ask(b"\x06", b"\x07")
    await settled()
    assert line.model.sizes == [4, 1]
    line.ask(b"\x08")
    await settled()
    assert line.model.sizes == [4, 1, 3]


async def test_expected_time_is_that_of_the_own_turn_when_another_floods() -> None:
    line = Line(max_batch_size=4, batches_per_instance=1)
    line.ask(b"\xf0")
    await settled()
    await asyncio.sleep(0.01)
    line.model.answer()
    await settled()
    line.ask(*(bytes([number]) for number in range(100)), identity="flood")
    line.ask(b"\xa0", b"\xa1", identity="third")
    await settled()

    # Two of each left. Of 98 and none no more go before than the caller's own.
    seconds = line.lane.expected_seconds(1, "flood") / (4 + 98 + 1)
    assert line.lane.expected_seconds(2, "other") == pytest.approx((4 + 2 + 2) * seconds)
    assert line.lane.expected_seconds(1, "third") == pytest.approx((4 + 1 + 1) * seconds)
    assert line.lane.expected_seconds(200, "other") == pytest.approx((4 + 98 + 200) * seconds)


async def test_caller_who_joins_an_image_that_has_left_knows_what_it_waited_for() -> None:
    line = Line()
    line.ask(b"\x01", b"\x02")
    await settled()
    joins = line.ask(b"\x02")

    assert joins.sent_at == joins.queued_at > 0
    assert joins.num_shared == 2


async def test_callers_take_turns() -> None:
    line = Line(batches_per_instance=1)
    line.ask(b"\x00")
    await settled()
    for number in range(1, 9):
        line.ask(bytes([number]), identity="flood")
    line.ask(b"\x10", identity="other")
    line.model.answer()
    await settled()

    assert line.model.batches[0][0] == b"\x01\x10\x02\x03"


async def test_second_batch_waits_until_it_is_worth_a_request() -> None:
    line = Line(max_batch_size=8)
    for number in range(4):
        line.ask(bytes([number]))
    await settled()
    for number in range(4, 7):
        line.ask(bytes([number]))
    await settled()
    assert line.model.sizes == [4]

    line.ask(b"\x07")
    await settled()
    assert line.model.sizes == [4, 4]
