import asyncio
import io
import re

from rich.console import Console

from loadtest.errors import CallError
from loadtest.progress import ProgressView
from loadtest.runner import Runner
from loadtest.tally import Verdict
from tests.loadtest.plans import plan_of
from tests.loadtest.virtual_time import InVirtualTime


def shown(in_virtual_time: InVirtualTime, *, terminal: bool) -> str:
    """Return what a run of 4 s shows whose every fourth call fails."""
    console = Console(file=io.StringIO(), force_terminal=terminal, width=120)
    plan = plan_of(warm_up_seconds=2, duration_seconds=2)

    async def ask(number: int) -> Verdict:
        await asyncio.sleep(0.1)
        if number % 4 == 0:
            raise CallError("INTERNAL", "")
        return Verdict(images=1)

    runner = Runner(ask, plan.pace, warm_up_seconds=2, duration_seconds=2, timeout_seconds=5)

    async def run() -> None:
        with ProgressView(console).follow(plan, runner):
            await runner.run()

    in_virtual_time(run())
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_terminal_sees_phase_rate_latency_and_failures(in_virtual_time: InVirtualTime) -> None:
    text = shown(in_virtual_time, terminal=True)

    for words in ("warm-up", "measuring", "2 in flight", "p50 100.0  p99 100.0 ms", "10 failed"):
        assert words in text
    # Three in four of twenty a second.
    assert re.search(r" 1[4-6]/s", text)


def test_file_sees_nothing(in_virtual_time: InVirtualTime) -> None:
    assert shown(in_virtual_time, terminal=False) == ""
