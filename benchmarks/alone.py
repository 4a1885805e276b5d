"""What the gateway adds to the latency of one caller who is alone: its calls and those straight at Triton in turns."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import grpc
import numpy as np

from benchmarks import frames, report
from benchmarks.bench import DIRECT, RAW, Bench, Section
from benchmarks.interleaved import Spread
from benchmarks.versions import MODEL

CALLS = 500
"""To each, in a round."""

_ASKED_ADDED_MS = 1.0
# Calls in a row: long enough for caches and clocks to settle on one of the two, short beside what changes a machine.
_ROW = 25
_OPTIONS = (("grpc.enable_http_proxy", 0), ("grpc.use_local_subchannel_pool", 1))


@dataclass(frozen=True, kw_only=True, slots=True)
class Latency:
    """Medians of one round, in seconds."""

    direct: float
    gateway: float

    @property
    def added(self) -> float:
        """By the gateway."""
        return self.gateway - self.direct


async def measure(*, triton: str, infer: bytes, gateway: str, classify: bytes, calls: int) -> Latency:
    """
    Ask both, one call after the other, a few here and a few there.

    Args:
        triton: Address.
        infer: ModelInferRequest.
        gateway: Address.
        classify: ClassifyRequest for the same image.
        calls: To each, at least; those of the first row are not counted.
    """
    async with (
        grpc.aio.insecure_channel(triton, options=_OPTIONS) as straight,
        grpc.aio.insecure_channel(gateway, options=_OPTIONS) as through,
    ):
        # Bytes in, bytes out: neither is charged with its messages.
        asked: Sequence[tuple[Any, bytes]] = (
            (straight.unary_unary(frames.MODEL_INFER), infer),
            (through.unary_unary(frames.CLASSIFY), classify),
        )
        seconds: list[list[float]] = [[], []]
        while min(map(len, seconds)) < calls + _ROW:
            for place, (method, request) in enumerate(asked):
                for _ in range(_ROW):
                    started = time.perf_counter()
                    await method(request)
                    seconds[place].append(time.perf_counter() - started)
    direct, classified = (float(np.median(each[_ROW:])) for each in seconds)
    return Latency(direct=direct, gateway=classified)


async def lone_caller(bench: Bench) -> Section:
    """Compare the latency of one caller without company, of the very model that the gateway asks."""
    image_HW = bench.images_NHW[0]
    seen: list[Latency] = []
    for number in range(1, bench.pace.rounds + 1):
        latency = await measure(
            triton=bench.served.address,
            infer=frames.model_infer(image_HW, model=MODEL),
            gateway=bench.front.address,
            classify=frames.classify(image_HW, is_png=False),
            calls=CALLS,
        )
        seen.append(latency)
        bench.report(f"round {number}: one caller: {latency.added * 1000:.2f} ms added")
    added = Spread.of([each.added * 1000 for each in seen])
    rows = [
        [DIRECT, *report.figures(Spread.of([each.direct * 1000 for each in seen]), 2), ""],
        [RAW, *report.figures(Spread.of([each.gateway * 1000 for each in seen]), 2), ""],
        ["added", *report.figures(added, 2), report.met(added.median, most=_ASKED_ADDED_MS)],
    ]
    return Section(
        [
            "## One caller",
            "",
            f"A Python client (grpc.aio) asks both in turns, of the same model instance, {CALLS:,} times each a "
            "round; its medians, in ms:",
            "",
            report.table(("", "median of rounds", "lowest", "highest", "asked"), rows),
            "",
        ]
    )
