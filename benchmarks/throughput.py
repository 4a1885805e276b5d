"""Images a second: single calls beside Triton asked directly, many images beside the bare model, and many callers."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks import curves, empty, frames, grid, looping, report, sending
from benchmarks.bench import CONNECTIONS, DIRECT, PNG, RAW, STREAMS, Bench, Report, Section, rates_of
from benchmarks.contest import Comparison, Outcome, Pace, turn_at
from benchmarks.interleaved import Spread
from benchmarks.sending import Take, in_turns
from benchmarks.serving import Served
from benchmarks.turn import Program

EMPTY = "empty grpc.aio server"
LOOP = "bare TorchScript in a loop, batches of 64"
RAW_BATCH = "ClassifyBatch of 64, pixels"
PNG_BATCH = "ClassifyBatch of 64, PNG"
RAW_STREAM = "ClassifyStream, pixels, Python client"
PNG_STREAM = "ClassifyStream, PNG, Python client"

CALLERS = (1, 4, 16, 64, 256, 1024)

_ASKED_CPU, _ASKED_FALL = 1.6, 0.10
_BATCH_SIZE = 64
_BATCHES_IN_FLIGHT = 4
_STREAM_IN_FLIGHT = 256
_GRID_ROUNDS = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class Trials:
    """How fast Triton answers directly, by how it runs the model."""

    rates: Mapping[grid.Way, float]
    """Calls a second."""

    @property
    def best(self) -> grid.Way:
        """The fastest."""
        return max(self.rates, key=lambda way: self.rates[way])

    @property
    def outcome(self) -> Outcome:
        """The same in words."""
        rates = {str(way): rate for way, rate in self.rates.items()}
        return Outcome(trials={DIRECT: rates}, chosen={DIRECT: str(self.best)})


async def ways(served: Served, image_HW: NDArray[np.uint8], pace: Pace, say: Report) -> Trials:
    """
    Ask Triton directly in each way, while nothing else does.

    Raises:
        H2loadError: h2load could not.
        ControlError: Triton does not load one.
    """
    rates: dict[grid.Way, float] = {}
    for way in grid.WAYS:
        async with grid.loaded(served, way) as model:
            message = frames.model_infer(image_HW, model=model)
            take = await sending.sending(
                served.folder / "trial.bin",
                served.address,
                frames.MODEL_INFER,
                message,
                pace=pace,
                callers=(CONNECTIONS, STREAMS),
            )
            turns = await in_turns({f"{DIRECT}, {way}": take}, min(_GRID_ROUNDS, pace.rounds), say)
        rates[way] = statistics.mean(turn.rate for seen in turns.values() for turn in seen)
    return Trials(rates=rates)


async def unary(bench: Bench, trials: Trials) -> Section:
    """Compare single calls, and what they cost the gateway's process."""
    image_HW = bench.images_NHW[0]
    raw, png = frames.classify(image_HW, is_png=False), frames.classify(image_HW, is_png=True)
    gateway, nothing = bench.front, bench.nothing
    async with grid.loaded(bench.served, trials.best) as model:
        infer = frames.model_infer(image_HW, model=model)
        contenders = {
            DIRECT: await bench.sending("infer", bench.served.address, frames.MODEL_INFER, infer),
            RAW: await bench.sending("raw", gateway.address, frames.CLASSIFY, raw, servers=[gateway.process_id]),
            PNG: await bench.sending("png", gateway.address, frames.CLASSIFY, png, servers=[gateway.process_id]),
            EMPTY: await bench.sending("empty", nothing.address, empty.METHOD, raw, servers=[nothing.process_id]),
        }
        turns = await in_turns(contenders, bench.pace.rounds, bench.report)
    outcome = trials.outcome
    outcome.turns |= turns
    asked = [Comparison(ours=RAW, theirs=DIRECT, asked=0.95), Comparison(ours=PNG, theirs=DIRECT, asked=0.85)]
    costs = {
        name: [turn.server_cpu_seconds / max(turn.items, 1) * 1e6 for turn in turns[name]] for name in (RAW, PNG, EMPTY)
    }
    return Section(
        [
            f"## One image a call, {CONNECTIONS * STREAMS} calls in flight",
            "",
            report.factors_table(outcome, asked),
            "",
            report.rates_table(rates_of(turns)),
            "",
            "Triton asked directly is at its best of these, tried first in the same run; the gateway's Triton is as "
            f"`sluice up` starts it, with {bench.served.threads} threads:",
            "",
            report.trials_table(outcome),
            "",
            "CPU time of the process, user and system, for each call:",
            "",
            _costs_table(costs),
            "",
        ],
        [turn for seen in turns.values() for turn in seen],
        sum(contender.failed for contender in contenders.values()),
    )


async def batches(bench: Bench) -> Section:
    """Compare many images a call, and streams, with the model alone."""
    chosen_NHW = bench.images_NHW[:_BATCH_SIZE]
    images = bench.served.folder / "batch.npy"
    np.save(images, chosen_NHW)
    raw, png = frames.classify_batch(chosen_NHW, is_png=False), frames.classify_batch(chosen_NHW, is_png=True)
    address, in_flight = bench.front.address, (_BATCHES_IN_FLIGHT, 1)
    callers = {
        RAW_BATCH: await bench.sending(
            "raw-batch", address, frames.CLASSIFY_BATCH, raw, callers=in_flight, images=_BATCH_SIZE
        ),
        PNG_BATCH: await bench.sending(
            "png-batch", address, frames.CLASSIFY_BATCH, png, callers=in_flight, images=_BATCH_SIZE
        ),
    }
    loop = {"model": str(bench.served.version.file), "images": str(images), "threads": bench.served.threads}
    stream = {"address": address, "images": str(images), "in_flight": _STREAM_IN_FLIGHT}
    contenders: dict[str, Take] = {
        LOOP: _program(bench, looping.torchscript, loop),
        **callers,
        RAW_STREAM: _program(bench, looping.classify_stream, {**stream, "is_png": False}),
        PNG_STREAM: _program(bench, looping.classify_stream, {**stream, "is_png": True}),
    }
    turns = await in_turns(contenders, bench.pace.rounds, bench.report)
    wanted = {RAW_BATCH: 0.80, PNG_BATCH: 0.70, RAW_STREAM: 0.40, PNG_STREAM: None}
    comparisons = [Comparison(ours=name, theirs=LOOP, asked=least) for name, least in wanted.items()]
    return Section(
        [
            "## Many images",
            "",
            f"{_BATCHES_IN_FLIGHT} batches, or {_STREAM_IN_FLIGHT} images of one stream, in flight; items are images. "
            f"The bare model runs alone in one process with {bench.served.threads} threads.",
            "",
            report.factors_table(Outcome(turns=turns), comparisons),
            "",
            report.rates_table(rates_of(turns)),
            "",
        ],
        [turn for seen in turns.values() for turn in seen],
        sum(caller.failed for caller in callers.values()),
    )


async def callers_curve(bench: Bench, pictures: Path | None) -> Section:
    """Ask with more and more callers."""
    raw = frames.classify(bench.images_NHW[0], is_png=False)
    contenders = {
        f"{callers:,}": await bench.sending(
            "raw", bench.front.address, frames.CLASSIFY, raw, callers=spread(callers), servers=[bench.front.process_id]
        )
        for callers in CALLERS
    }
    turns = await in_turns(
        {f"callers {name}": each for name, each in contenders.items()}, bench.pace.rounds, bench.report
    )
    rates = [Spread.of([turn.rate for turn in seen]) for seen in turns.values()]
    if pictures is not None:
        curves.draw_callers(pictures / "gateway-callers.png", CALLERS, [curves.Line(name=RAW, values=rates)])
    fall = largest_fall([rate.median for rate in rates])
    return Section(
        [
            "## From one caller to many",
            "",
            f"{RAW}. Largest fall behind the peak: {fall:.1%} ({report.met(fall, most=_ASKED_FALL, form='.0%')}).",
            "",
            report.table(
                ("callers", *report.RATES),
                ([f"{callers:,}", *report.figures(rate)] for callers, rate in zip(CALLERS, rates, strict=True)),
            ),
            "",
            *(["![calls a second over callers](gateway-callers.png)", ""] if pictures is not None else []),
        ],
        [turn for seen in turns.values() for turn in seen],
        sum(contender.failed for contender in contenders.values()),
    )


def spread(callers: int) -> tuple[int, int]:
    """Return over how many connections so many callers go, and how many share each."""
    connections = min(callers, CONNECTIONS)
    return connections, callers // connections


def largest_fall(rates: Sequence[float]) -> float:
    """Return the largest fall behind the peak, as a share of the peak: 0 where it is last."""
    peak = max(rates)
    return 1 - min(rates[list(rates).index(peak) :]) / peak


def _costs_table(costs: dict[str, list[float]]) -> str:
    factors = [ours / theirs for ours, theirs in zip(costs[RAW], costs[EMPTY], strict=True)]
    rows = [[name, *report.figures(Spread.of(seen)), ""] for name, seen in costs.items()]
    factor = Spread.of(factors)
    rows.append([f"{RAW} / {EMPTY}", *report.figures(factor, 2), report.met(factor.median, most=_ASKED_CPU)])
    return report.table(("", "CPU µs a call, median", "lowest", "highest", "asked"), rows)


def _program(bench: Bench, work: Callable[..., object], options: dict[str, object]) -> Take:
    program = Program(target=f"{work.__module__}:{work.__name__}", options=options)
    return partial(turn_at, bench.pace, program, temporary=bench.served.folder)
