"""Batches that fail, or hang, and those who wait for them."""

import pytest

from gateway.errors import (
    UpstreamFailedError,
    UpstreamTimeoutError,
    UpstreamUnavailableError,
)
from tests.gateway.coalescing.line import POISON, TIMEOUT_SECONDS, Line, after, by_the_clock, settled, told


async def test_poisoned_image_fails_alone() -> None:
    line = Line()
    asks = [line.ask(pixels) for pixels in (b"\x01", POISON, b"\x02")]
    await settled()
    while line.model.batches:
        line.model.answer()
        await settled()

    assert [told(ask) for ask in asks] == [[2.0], ["poisoned"], [4.0]]
    assert line.model.sizes == [3, 1, 1, 1]
    assert line.room.num_taken == 0


async def test_model_that_fails_for_all_is_not_asked_for_each() -> None:
    line = Line(max_batch_size=16)
    asks = [line.ask(bytes([number])) for number in range(16)]
    await settled()
    while line.model.batches:
        line.model.answer(error=UpstreamFailedError("broken"))
        await settled()

    assert line.model.sizes == [16, 1, 1, 1]
    assert {tuple(told(ask)) for ask in asks} == {("broken",)}


async def test_image_whose_caller_has_gone_is_not_tried_again() -> None:
    line = Line()
    stays, goes = line.ask(b"\x01"), line.ask(b"\x02")
    await settled()
    line.lane.leave(goes)
    line.model.answer(error=UpstreamFailedError("broken"))
    await settled()
    line.model.answer()
    await settled()

    assert told(stays) == [2.0]
    assert line.model.sizes == [2, 1]
    assert line.room.num_taken == 0


async def test_model_out_of_reach_is_not_asked_again() -> None:
    line = Line()
    asks = [line.ask(b"\x01"), line.ask(b"\x02")]
    await settled()
    line.model.answer(error=UpstreamUnavailableError("out of reach"))
    await settled()

    assert [told(ask) for ask in asks] == [["out of reach"]] * 2
    assert line.model.sizes == [2]


async def test_error_of_ours_leaves_nobody_waiting() -> None:
    line = Line()
    ask = line.ask(b"\x01")
    await settled()
    line.model.answer(error=ZeroDivisionError())
    await settled()

    assert told(ask) == ["the gateway failed to ask the model"]


async def test_model_that_hangs_is_given_up_and_keeps_its_places() -> None:
    line = Line(batches_per_instance=1, timeout_seconds=0.01)
    hangs = line.ask(b"\x01")
    await settled()
    waits = line.ask(b"\x02")
    with pytest.raises(UpstreamTimeoutError, match=r"no answer from the model within 0.01 s"):
        await hangs.future
    assert told(waits) == ["no answer from the model within 0.01 s"]
    assert line.room.num_taken == 1

    # Nobody joins what hangs.
    again = line.ask(b"\x01")
    line.model.answer()
    await settled()
    assert line.room.num_taken == 1
    line.model.answer()
    assert [float(row[0]) for row in await again.future] == [2]  # type: ignore[index]  # a row
    assert line.room.num_taken == 0


@pytest.mark.parametrize("may_cancel", [False, True])
@by_the_clock
async def test_nobody_waits_for_ever_when_an_image_that_is_tried_again_hangs(may_cancel: bool) -> None:
    line = Line(may_cancel=may_cancel)
    hangs, *others = (line.ask(bytes([number])) for number in range(3))
    await settled()
    line.model.answer(error=UpstreamFailedError("broken"))
    others.append(line.ask(b"\x02"))
    await after(TIMEOUT_SECONDS)
    with pytest.raises(UpstreamTimeoutError):
        hangs.future.result()
    assert [told(other) for other in others] == [["no answer from the model within 60 s"]] * 3
    # What hangs keeps its place, and is not joined.
    assert line.room.num_taken == int(not may_cancel)
    again = line.ask(b"\x00", b"\x02")
    await settled()
    line.model.answer(-1)
    await settled()
    assert told(again) == [0.0, 4.0]


@by_the_clock
async def test_batch_that_hangs_holds_nobody_up_once_it_is_given_up() -> None:
    line = Line()
    hangs = line.ask(b"\x01", b"\x02", b"\x03")
    await settled()
    await after(TIMEOUT_SECONDS)
    assert isinstance(hangs.future.exception(), UpstreamTimeoutError)
    later = line.ask(b"\x04")
    await settled()
    line.model.answer(-1)
    await settled()
    assert told(later) == [8.0]

    # It is at Triton still, where shutting down waits for it.
    assert (line.lane.num_in_flight, line.lane.num_batches, line.lane.is_idle) == (3, 1, False)
    line.model.answer()
    await line.lane.drained()
    assert (line.lane.num_in_flight, line.room.num_taken) == (0, 0)


@by_the_clock
async def test_what_waits_leaves_when_another_batch_came_back_since_the_one_that_hangs() -> None:
    line = Line()
    line.ask(b"\x01", b"\x02", b"\x03")
    await settled()
    line.ask(b"\x04", b"\x05", b"\x06")
    await after(1)
    line.model.answer(-1)
    await after(1)
    line.ask(b"\x07")
    await after(TIMEOUT_SECONDS - 2)

    assert line.model.sizes == [3, 3, 1]


@by_the_clock
async def test_what_waits_is_given_up_with_a_batch_that_hangs_when_nothing_came_back_since() -> None:
    line = Line()
    line.ask(b"\x01", b"\x02", b"\x03")
    await settled()
    await after(1)
    waits = line.ask(b"\x07")
    await after(TIMEOUT_SECONDS - 1)

    assert line.model.sizes == [3]
    assert told(waits) == ["no answer from the model within 60 s"]


@by_the_clock
async def test_batch_that_fails_after_it_was_given_up_is_not_tried_again() -> None:
    line = Line()
    line.ask(b"\x01", b"\x02")
    await settled()
    await after(TIMEOUT_SECONDS)
    line.model.answer(error=UpstreamFailedError("broken"))
    await settled()

    assert line.model.sizes == [2]
    assert (line.room.num_taken, line.lane.is_idle) == (0, True)


@by_the_clock
async def test_image_that_no_batch_takes_in_time_is_given_up() -> None:
    line = Line(batches_per_instance=1, max_batch_size=1)
    busy, waits = line.ask(b"\x01"), line.ask(b"\x02", b"\x03")
    for _ in range(2):  # each batch is in time
        await after(TIMEOUT_SECONDS / 2)
        line.model.answer()
    await settled()

    assert told(busy) == [2.0]
    assert told(waits) == [4.0, "no answer from the model within 60 s"]
    assert (line.room.num_taken, line.lane.num_waiting) == (0, 0)
