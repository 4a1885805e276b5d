"""What the gateway answers in time when more comes than it can serve."""

import math
import statistics
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks import curves, frames, report, sending, surge
from benchmarks.bench import Bench, Section
from benchmarks.interleaved import Spread
from benchmarks.report import met
from benchmarks.window import Turn

FACTORS = (0.5, 1.0, 2.0, 5.0, 10.0)
"""Arrivals, in times of what can be served."""

_ASKED_SHARE, _ASKED_REFUSAL_MS, _ASKED_RECOVERY_SECONDS = 0.85, 20.0, 5.0
# Connections, and calls in flight on each: enough to keep it busy, few enough to be admitted.
_CALLERS = (4, 8)


async def beyond_capacity(bench: Bench, pictures: Path | None) -> Section:
    """Send more than can be served."""
    size = surge.BATCH_SIZE
    chosen_NHW = bench.images_NHW[:256]
    images = bench.served.folder / "overload.npy"
    np.save(images, chosen_NHW)
    message = frames.classify_batch(chosen_NHW[:size], is_png=False)
    capacity = await bench.sending("capacity", bench.front.address, frames.CLASSIFY_BATCH, message, callers=_CALLERS)
    body = bench.served.folder / "overload.bin"
    body.write_bytes(frames.framed(message))
    answer_bytes = await sending.answer_bytes(bench.front.address, frames.CLASSIFY_BATCH, message)
    outcomes: list[surge.Outcome] = []
    turns: list[Turn] = []
    for number in range(1, bench.pace.rounds + 1):
        turns.append(await capacity())
        rate = turns[-1].rate
        outcome = await surge.run(
            surge.Order(
                address=bench.front.address,
                body=str(body),
                answer_bytes=answer_bytes,
                images=str(images),
                rates=[rate * factor for factor in FACTORS],
                # What waits when they begin is gone, and what waits then is as long as the deadline lets it be.
                warm_seconds=2 * bench.pace.warm_seconds,
                seconds=bench.pace.seconds,
                recovery_seconds=2 + 2 * bench.pace.seconds,
            )
        )
        outcomes.append(outcome)
        told = ", ".join(f"{each.goodput * size:,.0f}" for each in outcome.arrivals)
        bench.report(f"round {number}: capacity {rate * size:,.0f}; answered {told} images a second")
    arrivals = [[outcome.arrivals[place] for outcome in outcomes] for place in range(len(FACTORS))]
    goodputs = [Spread.of([each.goodput * size for each in seen]) for seen in arrivals]
    capacities = [turn.rate for turn in turns]
    if pictures is not None:
        _draw(pictures / "gateway-overload.png", goodputs, capacities)
    lines = _overload_lines(arrivals, goodputs, outcomes, Spread.of(capacities), is_drawn=pictures is not None)
    return Section(lines, turns, capacity.failed)


def _draw(path: Path, goodputs: Sequence[Spread], capacities: Sequence[float]) -> None:
    offered = [Spread.of([min(factor, 1.0) * rate * surge.BATCH_SIZE for rate in capacities]) for factor in FACTORS]
    lines = [
        curves.Line(name="answered in time", values=goodputs),
        curves.Line(name="arrivals, up to what can be served", values=offered),
    ]
    curves.draw_overload(path, FACTORS, lines)


def _overload_lines(
    arrivals: Sequence[Sequence[surge.Arrivals]],
    goodputs: Sequence[Spread],
    outcomes: Sequence[surge.Outcome],
    capacity: Spread,
    *,
    is_drawn: bool,
) -> list[str]:
    peak = max(goodput.median for goodput in goodputs)
    rows = []
    for factor, seen, goodput in zip(FACTORS, arrivals, goodputs, strict=True):
        due = sum(each.due for each in seen)
        share = goodput.median / peak
        refused = [each.refused_median * 1000 for each in seen if each.refused]
        rows.append(
            [
                f"{factor:g}",
                *report.figures(goodput),
                f"{share:.0%}" + (f" ({met(share, least=_ASKED_SHARE, form='.0%')})" if factor >= 5 else ""),
                f"{sum(each.refused for each in seen) / due:.1%}",
                f"{statistics.median(refused):.1f}" if refused else "-",
                f"{sum(each.expired + each.failed for each in seen) / due:.2%}",
                f"{statistics.median(each.admitted_p99 for each in seen) * 1000:,.0f}",
                f"{statistics.median(each.late_p99 for each in seen) * 1000:.1f}",
                f"{statistics.median(each.busy for each in seen):.0%}",
            ]
        )
    header = (
        *("arrivals, times capacity", "images/s in time, median", "lowest", "highest", "of peak"),
        *("refused", "after ms, median", "late or failed", "p99 of the admitted, ms"),
        *("sent late, p99 ms", "asyncio client busy"),
    )
    refusals = [each.refused_median * 1000 for seen in arrivals[-2:] for each in seen if each.refused]
    slowest = max(statistics.median(each.admitted_p99 for each in seen) for seen in arrivals)
    recovered = [outcome.recovered_seconds for outcome in outcomes]
    times = [seconds for seconds in recovered if seconds is not None]
    told = f"{statistics.median(times):.2f} s, {max(times):.2f} s at most" if times else "never"
    is_back = len(times) == len(recovered) and max(times) <= _ASKED_RECOVERY_SECONDS
    return [
        "## More than can be served",
        "",
        f"ClassifyBatch of {surge.BATCH_SIZE} images as pixels, arriving at a fixed rate whatever the answers do "
        f"(open loop), each with {surge.DEADLINE_SECONDS:g} s to be answered in. Capacity, asked by "
        f"{math.prod(_CALLERS)} callers who wait: {capacity.median * surge.BATCH_SIZE:,.0f} images/s. The calls are "
        "h2load's, which tells how many were answered; up to 25 a second among them come from an asyncio client and "
        "tell, in all other columns, how they fared. Load generators, gateway and Triton share the cores; times count "
        "from when a call was due.",
        "",
        report.table(header, rows),
        "",
        "- Refused, at 5 and 10 times the capacity: after "
        + (
            f"{statistics.median(refusals):.1f} ms ({met(statistics.median(refusals), most=_ASKED_REFUSAL_MS)})."
            if refusals
            else "none."
        ),
        f"- p99 of the admitted, at its worst rate: {slowest * 1000:,.0f} ms "
        f"({met(slowest * 1000, most=surge.DEADLINE_SECONDS * 1000)}).",
        f"- Normal again after the highest rate: {told}, within {_ASKED_RECOVERY_SECONDS:g} s in every round: "
        f"{'met' if is_back else 'missed'}"
        + (
            f"; not in {len(recovered) - len(times)} of {len(recovered)} rounds."
            if len(times) < len(recovered)
            else "."
        ),
        "",
        *(["![images answered in time over arrivals](gateway-overload.png)", ""] if is_drawn else []),
    ]
