"""What the suites of the gateway's benchmark measure with, and what each of them makes: a section of the page."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from benchmarks import sending
from benchmarks.contest import Pace
from benchmarks.interleaved import Spread
from benchmarks.plain_server import PlainServer
from benchmarks.sending import Sending
from benchmarks.serving import Front, Served
from benchmarks.window import Turn

DIRECT = "ModelInfer straight at Triton"
RAW = "Classify, pixels"
PNG = "Classify, PNG"

CONNECTIONS, STREAMS = 4, 16
"""64 calls in flight, as four programs of 16 callers would have them."""

Report = Callable[[str], None]
"""Told in lines how it goes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Bench:
    """What every suite measures with."""

    served: Served
    front: Front
    nothing: PlainServer
    images_NHW: NDArray[np.uint8]
    pace: Pace
    report: Report

    async def sending(
        self,
        name: str,
        address: str,
        path: str,
        message: bytes,
        *,
        servers: Sequence[int] = (),
        callers: tuple[int, int] = (CONNECTIONS, STREAMS),
        images: int = 1,
    ) -> Sending:
        """Return a contender as :func:`benchmarks.sending.sending` does; its body's file has that name."""
        return await sending.sending(
            self.served.folder / f"{name}.bin", address, path, message,
            pace=self.pace, callers=callers, images=images, servers=servers,
        )  # fmt: skip


@dataclass(slots=True)
class Section:
    """Of the page, by one suite."""

    lines: list[str]
    turns: list[Turn] = field(default_factory=list)
    failed: int = 0
    """Calls without an answer where none should fail."""


def rates_of(turns: dict[str, list[Turn]]) -> dict[str, Spread]:
    """Return the rate of each by name, over its turns."""
    return {name: Spread.of([turn.rate for turn in seen]) for name, seen in turns.items()}
