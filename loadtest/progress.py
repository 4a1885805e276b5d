"""A run as a line in the terminal."""

import asyncio
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from loadtest.plan import Plan
from loadtest.runner import Runner

_REDRAW_SECONDS = 0.5


class ProgressView:
    """
    Shows phase, rate, latency so far and failures; shows nothing where that is no terminal.

    Args:
        console: None is standard error.
    """

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(file=sys.stderr)

    @contextmanager
    def follow(self, plan: Plan, runner: Runner) -> Iterator[None]:
        """Show a run until left."""
        if not self._console.is_terminal:
            yield
            return
        progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            TimeRemainingColumn(),
            TextColumn("{task.fields[words]}"),
            console=self._console,
            # Its thread would take time from the sending.
            auto_refresh=False,
            transient=True,
        )
        task = progress.add_task("", total=plan.warm_up_seconds + plan.duration_seconds, words="")
        with progress:
            drawing = asyncio.create_task(_draw(progress, task, plan, runner))
            try:
                yield
            finally:
                drawing.cancel()


async def _draw(progress: Progress, task: TaskID, plan: Plan, runner: Runner) -> None:
    counted, at = 0, 0.0
    while True:
        await asyncio.sleep(_REDRAW_SECONDS)
        now = runner.now_seconds
        answered = runner.warm_up.succeeded + runner.measured.succeeded
        rate = (answered - counted) / (now - at)
        counted, at = answered, now
        fields: dict[str, Any] = {"description": _phase(plan, now), "words": _words(runner, rate)}
        progress.update(task, completed=now, refresh=True, **fields)


def _phase(plan: Plan, now: float) -> str:
    if now < plan.warm_up_seconds:
        return "warm-up"
    return "measuring" if now < plan.warm_up_seconds + plan.duration_seconds else "last answers"


def _words(runner: Runner, rate: float) -> str:
    measured = runner.measured
    latencies = measured.succeeded_latencies
    so_far = f"  p50 {latencies.at(50) * 1000:.1f}  p99 {latencies.at(99) * 1000:.1f} ms" if latencies.count else ""
    failed = measured.count - measured.succeeded
    return f"{rate:.0f}/s  {runner.num_outstanding} in flight{so_far}" + (f"  {failed} failed" if failed else "")
