"""Batches that many callers share; the model here doubles what the first byte of an image says."""

import asyncio
from collections.abc import Coroutine
from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from numpy.typing import NDArray

from gateway.cache import RowCache
from gateway.coalesce import Ask, BatchRecord, Lane, Rows
from gateway.errors import GatewayError, UpstreamFailedError, UpstreamTimeoutError, UpstreamUnavailableError

POISON = b"\xff"


class Room:
    """How many places are taken."""

    def __init__(self) -> None:
        self.num_taken = 0

    def take(self) -> "Room":
        self.num_taken += 1
        return self

    def release(self) -> None:
        self.num_taken -= 1
        assert self.num_taken >= 0


class Model:
    """Answers a batch when it is told to; fails with what is poisoned."""

    def __init__(self) -> None:
        self.batches: list[tuple[bytes, asyncio.Future[None]]] = []
        self.sizes: list[int] = []

    async def infer(self, pixels: bytes, num_images: int) -> Rows:
        assert len(pixels) == num_images
        self.sizes.append(num_images)
        told = asyncio.get_running_loop().create_future()
        self.batches.append((pixels, told))
        await told
        if POISON in pixels:
            raise UpstreamFailedError("poisoned")
        return np.frombuffer(pixels, np.uint8).astype(np.float32).reshape(-1, 1) * 2

    def answer(self, index: int = 0, error: Exception | None = None) -> None:
        _, told = self.batches.pop(index)
        if told.cancelled():
            return  # nobody waited for it any more
        if error is None:
            told.set_result(None)
        else:
            told.set_exception(error)


def holds(rows: Rows) -> NDArray[np.bool_]:
    return ~np.isnan(rows[:, 0])


class Line:
    """A lane, the model behind it, and the room before it."""

    def __init__(
        self,
        *,
        max_batch_size: int = 4,
        max_batches: int = 2,
        timeout_seconds: float = 60.0,
        joins: bool = True,
        cache: RowCache | None = None,
        may_cancel: bool = False,
    ) -> None:
        self.model, self.room = Model(), Room()
        self.records = list[BatchRecord]()
        self.lane = Lane(
            self.model.infer, holds, "numbers", max_batch_size=max_batch_size, max_batches=max_batches,
            timeout_seconds=timeout_seconds, may_cancel=lambda: may_cancel, joins=joins, cache=cache,
            on_batch=self.records.append,
        )  # fmt: skip

    def ask(self, *images: bytes, identity: str = "", deadline: float | None = None) -> Ask:
        return self.lane.ask(images, self.room.take(), identity=identity, deadline=deadline)


async def settled() -> None:
    """Let everything run that can."""
    for _ in range(10):
        await asyncio.sleep(0)


def told(ask: Ask) -> list[float | str]:
    return [float(one[0]) if not isinstance(one, GatewayError) else str(one) for one in ask.future.result()]


async def test_lone_image_leaves_in_the_round_in_which_it_came() -> None:
    line = Line()
    ask = line.ask(b"\x03")
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert line.model.sizes == [1]

    line.model.answer()
    assert [float(row[0]) for row in await ask.future] == [6]  # type: ignore[index]  # a row


async def test_those_who_wait_leave_together_and_never_more_than_the_model_takes() -> None:
    line = Line(max_batches=1)
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
    line = Line(max_batches=1)
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
    line = Line(max_batches=1)
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
    assert line.lane.num_dropped == 2


async def test_batch_that_nobody_waits_for_is_cancelled_where_triton_bears_it() -> None:
    line = Line(max_batches=1, may_cancel=True)
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
    line = Line(max_batches=1, timeout_seconds=0.01)
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


async def test_callers_take_turns() -> None:
    line = Line(max_batches=1)
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


class Coalescing(RuleBasedStateMachine):
    """Random arrivals, cancels, deadlines and failures: nobody gets another's answer, and nobody waits for ever."""

    @initialize(
        max_batch_size=st.integers(1, 4), max_batches=st.integers(1, 3), joins=st.booleans(), may_cancel=st.booleans()
    )
    def begin(self, max_batch_size: int, max_batches: int, joins: bool, may_cancel: bool) -> None:
        self.loop = asyncio.new_event_loop()
        self.asks: list[tuple[Ask, list[bytes]]] = []

        async def opened() -> Line:
            return Line(max_batch_size=max_batch_size, max_batches=max_batches, joins=joins, may_cancel=may_cancel)

        self.line = self.run(opened())
        self.max_batch_size, self.max_batches = max_batch_size, max_batches

    def run(self, work: Coroutine[Any, Any, Any]) -> Any:
        return self.loop.run_until_complete(work)

    @rule(numbers=st.lists(st.integers(0, 255), min_size=1, max_size=6), who=st.sampled_from("abc"), late=st.booleans())
    def arrive(self, numbers: list[int], who: str, late: bool) -> None:
        images = [bytes([number]) for number in numbers]
        deadline = self.loop.time() - 1 if late else None
        self.asks.append((self.line.ask(*images, identity=who, deadline=deadline), images))

    @rule()
    def wait(self) -> None:
        self.run(settled())

    @precondition(lambda self: self.asks)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        ask, _ = data.draw(st.sampled_from(self.asks))
        if not ask.future.done():
            self.line.lane.leave(ask)

    @precondition(lambda self: self.line.model.batches)
    @rule(data=st.data(), error=st.sampled_from([None, None, UpstreamFailedError("f"), UpstreamUnavailableError("u")]))
    def answer(self, data: st.DataObject, error: GatewayError | None) -> None:
        self.line.model.answer(data.draw(st.integers(0, len(self.line.model.batches) - 1)), error)
        self.run(settled())

    @rule()
    def stop_serving(self) -> None:
        self.line.lane.fail_waiting(UpstreamUnavailableError("not serving"))

    @invariant()
    def answers_belong_to_their_images(self) -> None:
        for ask, images in self.asks:
            if ask.future.done() and not ask.future.cancelled():
                for image, row in zip(images, ask.future.result(), strict=True):
                    assert isinstance(row, GatewayError) or row.tolist() == [2 * image[0]]

    @invariant()
    def bounds_hold(self) -> None:
        if hasattr(self, "line"):
            assert sum(not told.done() for _, told in self.line.model.batches) <= self.max_batches
            assert max(self.line.model.sizes, default=0) <= self.max_batch_size

    def teardown(self) -> None:
        if not hasattr(self, "line"):
            return
        self.run(settled())
        while self.line.model.batches:
            self.line.model.answer()
            self.run(settled())
        assert all(ask.future.done() for ask, _ in self.asks)
        assert self.line.room.num_taken == 0
        assert self.line.lane.is_idle
        self.loop.close()


TestCoalescing = Coalescing.TestCase
TestCoalescing.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
