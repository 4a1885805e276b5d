"""Batches that many callers share; the model here doubles what the first byte of an image says."""

import asyncio
from collections.abc import Callable, Coroutine
from functools import wraps
from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from numpy.typing import NDArray

from gateway.cache import RowCache
from gateway.coalesce import Ask, BatchRecord, Lane, Rows
from gateway.errors import (
    GatewayError,
    TooLateError,
    UpstreamFailedError,
    UpstreamTimeoutError,
    UpstreamUnavailableError,
)

POISON = b"\xff"
TIMEOUT_SECONDS = 60.0
FAILED = UpstreamFailedError("failed")


class Clock(asyncio.SelectorEventLoop):
    """An event loop whose time is what it is told to be."""

    now = 1.0

    def time(self) -> float:
        return self.now


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
        self.sent_at: dict[asyncio.Future[None], float] = {}

    async def infer(self, pixels: bytes, num_images: int) -> Rows:
        assert len(pixels) == num_images
        self.sizes.append(num_images)
        loop = asyncio.get_running_loop()
        told = loop.create_future()
        self.sent_at[told] = loop.time()
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
        num_instances: int = 1,
        batches_per_instance: int = 2,
        timeout_seconds: float = TIMEOUT_SECONDS,
        joins: bool = True,
        cache: RowCache | None = None,
        may_cancel: bool = False,
    ) -> None:
        self.model, self.room = Model(), Room()
        self.records = list[BatchRecord]()
        self.lane = Lane(
            self.model.infer, holds, "numbers", max_batch_size=max_batch_size, num_instances=num_instances,
            batches_per_instance=batches_per_instance, timeout_seconds=timeout_seconds, may_cancel=lambda: may_cancel,
            joins=joins, cache=cache, on_batch=self.records.append,
        )  # fmt: skip

    def ask(self, *images: bytes, identity: str = "", deadline: float | None = None) -> Ask:
        return self.lane.ask(images, self.room.take(), identity=identity, deadline=deadline)


async def settled() -> None:
    """Let everything run that can."""
    for _ in range(10):
        await asyncio.sleep(0)


def told(ask: Ask) -> list[float | str]:
    return [float(one[0]) if not isinstance(one, GatewayError) else str(one) for one in ask.future.result()]


def by_the_clock(story: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Run a test where time passes when it says so."""

    @wraps(story)
    def run(**arguments: Any) -> None:
        with asyncio.Runner(loop_factory=Clock) as runner:
            runner.run(story(**arguments))

    return run


async def after(seconds: float) -> None:
    """Let time pass."""
    loop = asyncio.get_running_loop()
    assert isinstance(loop, Clock)
    loop.now += seconds
    await settled()


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


class Coalescing(RuleBasedStateMachine):
    """Random arrivals, cancels, deadlines, failures and hangs: nobody gets another's answer, nobody waits for ever."""

    @initialize(
        max_batch_size=st.integers(1, 4),
        num_instances=st.integers(1, 2),
        batches_per_instance=st.integers(1, 3),
        joins=st.booleans(),
        may_cancel=st.booleans(),
        fails_at_last=st.booleans(),
    )
    def begin(
        self,
        max_batch_size: int,
        num_instances: int,
        batches_per_instance: int,
        joins: bool,
        may_cancel: bool,
        fails_at_last: bool,
    ) -> None:
        self.loop = Clock()
        self.fails_at_last = fails_at_last
        self.asks: list[tuple[Ask, list[bytes]]] = []

        async def opened() -> Line:
            return Line(
                max_batch_size=max_batch_size, num_instances=num_instances, batches_per_instance=batches_per_instance,
                joins=joins, may_cancel=may_cancel,
            )  # fmt: skip

        self.line = self.run(opened())
        self.max_batch_size, self.max_batches = max_batch_size, num_instances * batches_per_instance

    def run(self, work: Coroutine[Any, Any, Any]) -> Any:
        return self.loop.run_until_complete(work)

    @rule(
        numbers=st.lists(st.integers(0, 255), min_size=1, max_size=6),
        who=st.sampled_from("abc"),
        late=st.sampled_from([False, False, True]),
    )
    def arrive(self, numbers: list[int], who: str, late: bool) -> None:
        images = [bytes([number]) for number in numbers]
        deadline = self.loop.time() - 1 if late else None
        self.asks.append((self.line.ask(*images, identity=who, deadline=deadline), images))

    @rule()
    def wait(self) -> None:
        self.run(settled())

    @rule(seconds=st.sampled_from([0.1, TIMEOUT_SECONDS / 2, TIMEOUT_SECONDS]))
    def hang(self, seconds: float) -> None:
        """Let time pass without an answer, be it to a batch or to an image that is tried again."""
        self.loop.now += seconds
        self.run(settled())

    @precondition(lambda self: self.asks)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        ask, _ = data.draw(st.sampled_from(self.asks))
        if not ask.future.done():
            self.line.lane.leave(ask)

    @precondition(lambda self: self.line.model.batches)
    @rule(data=st.data(), error=st.sampled_from([None, FAILED, FAILED, UpstreamUnavailableError("u")]))
    def answer(self, data: st.DataObject, error: GatewayError | None) -> None:
        self.line.model.answer(data.draw(st.integers(0, len(self.line.model.batches) - 1)), error)
        self.run(settled())

    @rule()
    def stop_serving(self) -> None:
        self.line.lane.fail_waiting(UpstreamUnavailableError("not serving"))

    @invariant()
    def answers_belong_to_their_images(self) -> None:
        for ask, images in self.asks:
            if ask.future.done() and not ask.future.cancelled() and ask.future.exception() is None:
                for image, row in zip(images, ask.future.result(), strict=True):
                    assert isinstance(row, GatewayError) or row.tolist() == [2 * image[0]]

    @invariant()
    def bounds_hold(self) -> None:
        if hasattr(self, "line"):
            model, now = self.line.model, self.loop.time()
            # Beside those which have taken so long that they do not count any more.
            assert sum(model.sent_at[told] == now and not told.done() for _, told in model.batches) <= self.max_batches
            assert max(model.sizes, default=0) <= self.max_batch_size

    def teardown(self) -> None:
        if not hasattr(self, "line"):
            return
        self.run(settled())
        if self.fails_at_last:
            for _ in range(len(self.line.model.batches)):
                self.line.model.answer(error=FAILED)
        # Whatever hangs: nobody waits longer than for a batch, and then for its answer.
        for _ in range(2):
            self.run(settled())
            self.loop.now += TIMEOUT_SECONDS
        self.run(settled())
        assert all(ask.future.done() for ask, _ in self.asks)
        while self.line.model.batches:
            self.line.model.answer()
            self.run(settled())
        assert self.line.room.num_taken == 0
        assert self.line.lane.is_idle
        assert self.line.lane.expected_seconds(1) == 0
        self.loop.close()


TestCoalescing = Coalescing.TestCase
TestCoalescing.settings = settings(max_examples=100, stateful_step_count=30, deadline=None)
