"""
More calls than can be served: open-loop arrivals at several rates, and how soon all is well after the highest.

The load test's own parts send, in a process of their own: ``python -m benchmarks.surge ORDER``, which prints what
came of each rate. Calls are batches, as one caller has to send ten times what the gateway can serve.
"""

import asyncio
import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from loadtest.arrivals import OpenLoop
from loadtest.caller import Caller
from loadtest.images import Sample
from loadtest.runner import Runner, precise_event_loop
from loadtest.tally import DEADLINE_EXCEEDED, Tally, Verdict
from loadtest.targets import make

BATCH_SIZE = 16
DEADLINE_SECONDS = 1.0

_REFUSED = "RESOURCE_EXHAUSTED"
_MOST_OUTSTANDING = 10_000
_PAUSE_SECONDS = 1.5
_SLICE_SECONDS = 0.25
_SLICES = 4
_SLOWER = 2.0
_ROOT = Path(__file__).parent.parent


class SurgeError(RuntimeError):
    """The load generator failed; the message says why."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Order:
    """What the process is to do."""

    address: str
    images: str
    """File of :func:`numpy.save`, uint8 [N, 28, 28]."""
    rates: Sequence[float]
    """Calls a second, the highest last; all is well again when it is as at the first."""
    warm_seconds: float
    seconds: float
    """At each rate, after the warm-up."""
    recovery_seconds: float
    """At the first rate again, straight after the highest."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Arrivals:
    """What came of one rate; times in seconds, from when a call was due."""

    rate: float
    due: int
    answered: int
    refused: int
    expired: int
    """Admitted, or never looked at, and not answered in time."""
    failed: int
    """Anything else."""
    goodput: float
    """Calls a second that were answered in time."""
    median: float
    admitted_p99: float
    refused_median: float
    late_p99: float
    """By which the load generator itself was late."""
    busy: float
    """Share of the time its one thread was busy."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What one process saw."""

    arrivals: Sequence[Arrivals]
    recovered_seconds: float | None
    """After the last of the highest rate; None where it was not within the time."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Call:
    """One of those that followed the highest rate."""

    began: float
    """After the last call of the highest rate, in seconds."""
    seconds: float
    is_answered: bool


async def run(order: Order) -> Outcome:
    """
    Have a process of its own do it; cancelling this kills it.

    Raises:
        SurgeError: It could not.
    """
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "benchmarks.surge", json.dumps(asdict(order))),
        cwd=_ROOT,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
    )
    try:
        output, _ = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if process.returncode:
        raise SurgeError(f"the load generator ended with status {process.returncode}")
    answer: dict[str, Any] = json.loads(output)
    arrivals = [Arrivals(**each) for each in answer["arrivals"]]
    return Outcome(arrivals=arrivals, recovered_seconds=answer["recovered_seconds"])


def settled(calls: Sequence[Call], *, normal_seconds: float) -> float | None:
    """
    Return from when on all is well for a whole second; None where it never is.

    Well is a quarter of a second in which every call was answered, and half of them within twice the normal time.

    Args:
        calls: In any order.
        normal_seconds: Median latency of the same rate before.
    """
    slices: dict[int, list[Call]] = {}
    for call in calls:
        slices.setdefault(int(call.began / _SLICE_SECONDS), []).append(call)
    in_a_row = 0
    # The last is cut short.
    for number in range(max(slices, default=0)):
        in_a_row = in_a_row + 1 if _is_well(slices.get(number, []), _SLOWER * normal_seconds) else 0
        if in_a_row == _SLICES:
            return (number + 1 - _SLICES) * _SLICE_SECONDS
    return None


def arrivals_of(tally: Tally, *, rate: float, seconds: float, busy: float) -> Arrivals:
    """Return what a tally of calls that were due within so many seconds comes to."""
    answered, refused, expired = tally.succeeded, tally.codes[_REFUSED], tally.codes[DEADLINE_EXCEEDED]
    refusals = tally.latencies.get(_REFUSED)
    return Arrivals(
        rate=rate,
        due=tally.count,
        answered=answered,
        refused=refused,
        expired=expired,
        failed=tally.count - answered - refused - expired,
        goodput=answered / seconds,
        median=tally.succeeded_latencies.at(50),
        admitted_p99=_admitted_at(tally, 99),
        refused_median=refusals.at(50) if refusals else 0.0,
        late_p99=tally.lateness.at(99),
        busy=busy,
    )


def _admitted_at(tally: Tally, percentage: float) -> float:
    """Return a percentile of what was not refused: the answered, and behind them those whose time ran out."""
    answered, expired = tally.succeeded, tally.codes[DEADLINE_EXCEEDED]
    wanted = percentage / 100 * (answered + expired)
    if not wanted:
        return 0.0
    if wanted <= answered:
        return tally.succeeded_latencies.at(100 * wanted / answered)
    ran_out = tally.latencies.get(DEADLINE_EXCEEDED)
    return ran_out.at(100 * (wanted - answered) / expired) if ran_out else DEADLINE_SECONDS


def _is_well(calls: Sequence[Call], most_seconds: float) -> bool:
    return (
        bool(calls)
        and all(call.is_answered for call in calls)
        and statistics.median(call.seconds for call in calls) <= most_seconds
    )


async def _send(order: Order) -> Outcome:
    samples = [Sample(pixels, "0", 0) for pixels in np.load(order.images)]
    target = make("classify-batch", samples, image_format="raw", model="", batch_size=BATCH_SIZE, seed=0)
    async with Caller(order.address, target, timeout_seconds=DEADLINE_SECONDS) as caller:
        await caller.start()
        arrivals: list[Arrivals] = []
        for rate in order.rates[:-1]:
            runner = _runner(caller, order, rate)
            await runner.run()
            arrivals.append(_arrivals(runner, order, rate))
            await asyncio.sleep(_PAUSE_SECONDS)
        highest = _runner(caller, order, order.rates[-1])
        burst = asyncio.create_task(highest.run())
        # Not until its last call is answered: whoever comes next does not wait for that either.
        await asyncio.sleep(order.warm_seconds + order.seconds)
        calls = await _calls_after(caller, order)
        await burst
        arrivals.append(_arrivals(highest, order, order.rates[-1]))
    return Outcome(arrivals=arrivals, recovered_seconds=settled(calls, normal_seconds=arrivals[0].median))


def _runner(caller: Caller, order: Order, rate: float) -> Runner:
    return Runner(
        caller.ask,
        OpenLoop(rate=rate, max_outstanding=_MOST_OUTSTANDING),
        warm_up_seconds=order.warm_seconds,
        duration_seconds=order.seconds,
        timeout_seconds=DEADLINE_SECONDS,
    )


def _arrivals(runner: Runner, order: Order, rate: float) -> Arrivals:
    return arrivals_of(runner.measured, rate=rate, seconds=order.seconds, busy=runner.loop_share)


async def _calls_after(caller: Caller, order: Order) -> Sequence[Call]:
    loop, calls = asyncio.get_running_loop(), list[Call]()
    started = loop.time()

    async def ask(number: int) -> Verdict:
        began, is_answered = loop.time(), False
        try:
            verdict = await caller.ask(number)
            is_answered = True
            return verdict
        finally:
            calls.append(Call(began=began - started, seconds=loop.time() - began, is_answered=is_answered))

    runner = Runner(
        ask,
        OpenLoop(rate=order.rates[0], max_outstanding=_MOST_OUTSTANDING),
        warm_up_seconds=0.0,
        duration_seconds=order.recovery_seconds,
        timeout_seconds=DEADLINE_SECONDS,
    )
    await runner.run()
    return calls


def _main(order: Order) -> None:
    with asyncio.Runner(loop_factory=precise_event_loop) as runner:
        print(json.dumps(asdict(runner.run(_send(order)))))


if __name__ == "__main__":
    _main(Order(**json.loads(sys.argv[1])))
