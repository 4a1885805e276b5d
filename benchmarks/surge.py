"""
More calls than can be served: open-loop arrivals at several rates, and how soon all is well after the highest.

A crowd comes from h2load, which takes little of the cores that it shares with what it asks, and tells how much was
answered. Among it are callers of the load test's own, a few each second, who see how they fare: whether they are
refused, and after what time. In a process of their own: ``python -m benchmarks.surge ORDER``, which prints what came of
each rate. Calls are batches: ten times as many single images as can be served are more than one connection carries.
"""

import asyncio
import json
import math
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import h2load
from benchmarks.frames import CLASSIFY_BATCH
from benchmarks.h2load import GRPC_HEADERS, Load, Report
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
# Callers of our own a second, and the most of all calls that they are.
_WITNESSES, _WITNESSES_SHARE = 25.0, 0.5
# Connections of the crowd, and calls in flight on each: more than are admitted in a second.
_CONNECTIONS, _STREAMS = 8, 256
_CROWD_SECONDS = 120.0
_ROOT = Path(__file__).parent.parent


class SurgeError(RuntimeError):
    """The load generator failed; the message says why."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Order:
    """What the process is to do."""

    address: str
    body: str
    """File with what each of the crowd sends, framed for gRPC."""
    answer_bytes: int
    """Of the answer to it."""
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
    """
    What came of one rate; times in seconds, from when a call was due.

    All but the goodput is of the callers of our own.
    """

    rate: float
    due: int
    answered: int
    refused: int
    expired: int
    """Admitted, or never looked at, and not answered in time."""
    failed: int
    """Anything else."""
    goodput: float
    """Calls a second that were answered in time, those of the crowd among them."""
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


def arrivals_of(tally: Tally, *, rate: float, seconds: float, busy: float, crowd_goodput: float = 0.0) -> Arrivals:
    """Return what a tally of calls that were due within so many seconds comes to, beside a crowd's goodput."""
    answered, refused, expired = tally.succeeded, tally.codes[_REFUSED], tally.codes[DEADLINE_EXCEEDED]
    refusals = tally.latencies.get(_REFUSED)
    return Arrivals(
        rate=rate,
        due=tally.count,
        answered=answered,
        refused=refused,
        expired=expired,
        failed=tally.count - answered - refused - expired,
        goodput=crowd_goodput + answered / seconds,
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
            arrivals.append(await _arrivals(caller, order, rate))
            await asyncio.sleep(_PAUSE_SECONDS)
        highest = asyncio.create_task(_arrivals(caller, order, order.rates[-1]))
        # Not until its last call is answered: whoever comes next does not wait for that either.
        await asyncio.sleep(order.warm_seconds + order.seconds)
        calls = await _calls_after(caller, order)
        arrivals.append(await highest)
    return Outcome(arrivals=arrivals, recovered_seconds=settled(calls, normal_seconds=arrivals[0].median))


async def _arrivals(caller: Caller, order: Order, rate: float) -> Arrivals:
    witnesses = min(_WITNESSES, _WITNESSES_SHARE * rate)
    runner = Runner(
        caller.ask,
        OpenLoop(rate=witnesses, max_outstanding=_MOST_OUTSTANDING),
        warm_up_seconds=order.warm_seconds,
        duration_seconds=order.seconds,
        timeout_seconds=DEADLINE_SECONDS,
    )
    crowd, _ = await asyncio.gather(_crowd(order, rate - witnesses), runner.run())
    goodput = crowd.answers(order.answer_bytes) / crowd.seconds
    return arrivals_of(runner.measured, rate=rate, seconds=order.seconds, busy=runner.loop_share, crowd_goodput=goodput)


async def _crowd(order: Order, rate: float) -> Report:
    load = Load(
        address=order.address,
        path=CLASSIFY_BATCH,
        body=Path(order.body),
        connections=_CONNECTIONS,
        streams=_STREAMS,
        headers=(*GRPC_HEADERS, f"grpc-timeout: {round(DEADLINE_SECONDS * 1000)}m"),
        rate=rate,
    )
    calls = math.ceil(rate * (order.warm_seconds + order.seconds))
    return await h2load.run(load, calls=calls, timeout_seconds=_CROWD_SECONDS)


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
