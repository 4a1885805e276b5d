"""In virtual time, so that every figure is exact."""

import asyncio
from collections.abc import Callable

import pytest

from loadtest.arrivals import ClosedLoop, OpenLoop, Pace
from loadtest.errors import CallError
from loadtest.runner import Ask, Runner
from loadtest.tally import DEADLINE_EXCEEDED, INTERRUPTED, NOT_SENT, OK, Verdict
from tests.loadtest.virtual_time import InVirtualTime, VirtualLoop

ANSWER = Verdict(images=1, judged=1, right=1)
SERVICE_SECONDS = 0.005


def runner_of(
    ask: Ask, pace: Pace, *, duration: float = 1.0, warm_up: float = 0.0, timeout: float = 5.0, may_cancel: bool = True
) -> Runner:
    return Runner(
        ask, pace, warm_up_seconds=warm_up, duration_seconds=duration, timeout_seconds=timeout, may_cancel=may_cancel
    )


def open_loop(rate: float, max_outstanding: int = 1000) -> OpenLoop:
    return OpenLoop(rate=rate, max_outstanding=max_outstanding)


def taking(seconds: Callable[[float], float]) -> Ask:
    """Answer a call that arrives at a moment after as long as that takes."""

    async def ask(number: int) -> Verdict:
        await asyncio.sleep(seconds(asyncio.get_running_loop().time()))
        return ANSWER

    return ask


def stalling(now: float) -> float:
    """From 1 s to 3 s nothing is answered."""
    return (3 - now if 1 <= now < 3 else 0) + SERVICE_SECONDS


def test_open_loop_charges_a_stall_to_every_call_that_was_due(in_virtual_time: InVirtualTime) -> None:
    runner = runner_of(taking(stalling), open_loop(100), duration=4)
    in_virtual_time(runner.run())

    latencies = runner.measured.succeeded_latencies
    # Of 400 calls 200 were due in the stall, at 1.00, 1.01, ...; the fourth slowest is the 99th percentile.
    assert latencies.count == 400
    assert latencies.slowest == pytest.approx(2 + SERVICE_SECONDS)
    assert latencies.at(99) == pytest.approx(1.96 + SERVICE_SECONDS, rel=0.005)
    assert latencies.at(90) == pytest.approx(1.6 + SERVICE_SECONDS, rel=0.01)


def test_closed_loop_hides_a_stall(in_virtual_time: InVirtualTime) -> None:
    runner = runner_of(taking(stalling), ClosedLoop(callers=1), duration=4)
    in_virtual_time(runner.run())

    latencies = runner.measured.succeeded_latencies
    assert latencies.slowest == pytest.approx(2 + SERVICE_SECONDS)
    assert latencies.at(99) == pytest.approx(SERVICE_SECONDS, rel=0.01)


def test_open_loop_is_not_held_back_by_slow_answers(in_virtual_time: InVirtualTime) -> None:
    sent: list[float] = []

    async def ask(number: int) -> Verdict:
        sent.append(asyncio.get_running_loop().time())
        await asyncio.sleep(10)
        return ANSWER

    in_virtual_time(runner_of(ask, open_loop(10), timeout=20).run())

    assert sent == pytest.approx([number / 10 for number in range(10)])


@pytest.mark.parametrize("callers", [1, 3, 64])
def test_closed_loop_has_as_many_in_flight_as_callers(callers: int, in_virtual_time: InVirtualTime) -> None:
    in_flight: set[int] = set()
    seen: list[int] = []

    async def ask(number: int) -> Verdict:
        in_flight.add(number)
        seen.append(len(in_flight))
        await asyncio.sleep(0.001 * (1 + number % 7))
        in_flight.remove(number)
        return ANSWER

    in_virtual_time(runner_of(ask, ClosedLoop(callers=callers)).run())

    assert max(seen) == callers
    assert len(seen) > 10 * callers


def test_calls_beyond_the_bound_are_counted_as_not_sent(in_virtual_time: InVirtualTime) -> None:
    runner = runner_of(taking(lambda now: 2 - now), open_loop(100, max_outstanding=3))
    in_virtual_time(runner.run())

    assert runner.measured.codes == {OK: 3, NOT_SENT: 97}


def test_warm_up_is_not_counted(in_virtual_time: InVirtualTime) -> None:
    """Its calls are slow; one of them ends when the measurement has begun."""
    measuring: list[float] = []
    runner = runner_of(taking(lambda now: 0.4 if now < 0.5 else 0.001), open_loop(10), warm_up=0.5)

    async def run() -> None:
        await runner.run(lambda: measuring.append(asyncio.get_running_loop().time()))

    in_virtual_time(run())
    assert measuring == [0.5]
    assert (runner.warm_up.count, runner.measured.count) == (5, 10)
    assert runner.measured.succeeded_latencies.slowest == pytest.approx(0.001)
    assert runner.elapsed_seconds == pytest.approx(1.0)


@pytest.mark.parametrize("pace", [open_loop(10), ClosedLoop(callers=1)], ids=["open", "closed"])
def test_failed_calls_are_counted_by_code_and_stop_nothing(pace: Pace, in_virtual_time: InVirtualTime) -> None:
    async def ask(number: int) -> Verdict:
        await asyncio.sleep(0.1)
        if number % 2:
            raise CallError("RESOURCE_EXHAUSTED", "full")
        return ANSWER

    runner = runner_of(ask, pace)
    in_virtual_time(runner.run())

    assert runner.measured.codes[OK] >= 5
    assert runner.measured.codes["RESOURCE_EXHAUSTED"] >= 5 - 1
    assert runner.measured.messages["RESOURCE_EXHAUSTED: full"] == runner.measured.codes["RESOURCE_EXHAUSTED"]


def test_latency_counts_from_the_due_moment_when_the_client_is_late(in_virtual_time: InVirtualTime) -> None:
    """It hangs from 0.15 s to 0.95 s: calls are sent late, and their lateness is part of their latency."""
    runner = runner_of(taking(lambda now: 0.001), open_loop(10))

    async def run() -> None:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualLoop)
        loop.call_at(0.15, loop.hang, 0.8)
        await runner.run()

    in_virtual_time(run())
    assert runner.measured.lateness.slowest == pytest.approx(0.75)
    assert runner.measured.succeeded_latencies.slowest == pytest.approx(0.751)
    assert runner.measured.codes == {OK: 10}


def test_interrupted_run_keeps_what_it_has(in_virtual_time: InVirtualTime) -> None:
    runner = runner_of(taking(lambda now: 0.05 if now < 0.5 else 60), open_loop(10), duration=60, timeout=100)

    async def run() -> None:
        running = asyncio.create_task(runner.run())
        asyncio.get_running_loop().call_at(1.0, running.cancel)
        with pytest.raises(asyncio.CancelledError):
            await running

    in_virtual_time(run())
    assert runner.measured.codes == {OK: 5, INTERRUPTED: 5}
    assert runner.elapsed_seconds == pytest.approx(1.0)
    assert runner.num_outstanding == 0


def test_interrupted_run_waits_for_calls_that_must_not_be_cancelled(in_virtual_time: InVirtualTime) -> None:
    runner = runner_of(taking(lambda now: 0.9), ClosedLoop(callers=2), duration=60, may_cancel=False)

    async def run() -> None:
        running = asyncio.create_task(runner.run())
        asyncio.get_running_loop().call_at(0.5, running.cancel)
        with pytest.raises(asyncio.CancelledError):
            await running

    in_virtual_time(run())
    assert runner.measured.codes == {OK: 2}


def test_answer_after_the_timeout_is_a_failure(in_virtual_time: InVirtualTime) -> None:
    """Of a call that has no deadline of its own."""
    runner = runner_of(taking(lambda now: 1.5), ClosedLoop(callers=2), timeout=1.0)
    in_virtual_time(runner.run())

    assert runner.measured.codes == {DEADLINE_EXCEEDED: 2}
    assert runner.measured.latencies[DEADLINE_EXCEEDED].slowest == pytest.approx(1.5)


def test_call_that_never_ends_is_left_after_the_timeout(in_virtual_time: InVirtualTime) -> None:
    runner = runner_of(taking(lambda now: 1e6), open_loop(1), timeout=1.0)
    in_virtual_time(runner.run())

    assert runner.measured.codes == {DEADLINE_EXCEEDED: 1}
    assert runner.elapsed_seconds < 10


def test_failure_of_ours_ends_the_run(in_virtual_time: InVirtualTime) -> None:
    async def ask(number: int) -> Verdict:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        in_virtual_time(runner_of(ask, ClosedLoop(callers=4)).run())
