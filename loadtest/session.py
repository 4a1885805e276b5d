"""A load test from its first call to its report."""

import asyncio
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from datetime import UTC, datetime
from typing import Protocol

from loadtest.batches import Counts, TritonCounters, difference
from loadtest.caller import Caller
from loadtest.images import Sample
from loadtest.plan import Plan
from loadtest.report import Report
from loadtest.runner import Runner
from loadtest.targets import make
from rpc.tls import ClientTls


class Display(Protocol):
    """Shows a run while it goes on; it is entered when the first call was answered."""

    def follow(self, plan: Plan, runner: Runner) -> AbstractContextManager[object]:
        """Return what to enter for the time of the run."""
        ...


class Session:
    """
    One load test.

    Args:
        plan: What to do.
        samples: Images to send.
        display: Shows how it goes.
        tls: As of :class:`gateway.client.ImageClient`, and so is ``api_key``.
        api_key: As said.
    """

    def __init__(
        self,
        plan: Plan,
        samples: Sequence[Sample],
        *,
        display: Display | None = None,
        tls: ClientTls | None = None,
        api_key: str | None = None,
    ) -> None:
        self._plan = plan
        self._samples = samples
        self._display = display
        self._tls = tls
        self._api_key = api_key
        self._runner: Runner | None = None
        self._model = ""
        self._started = datetime.now(UTC)
        self._is_complete = False
        self._batches: Counts | None = None
        self._before: asyncio.Task[Counts | None] | None = None

    async def run(self) -> None:
        """
        Run it.

        Cancelling it stops sending; :meth:`report` then tells what was measured so far.

        Raises:
            StartError: The server did not answer the first call.
            NoImagesError: The images do not fit the target.
        """
        plan = self._plan
        target = await asyncio.to_thread(
            make,
            plan.target,
            self._samples,
            image_format=plan.image_format,
            model=plan.model,
            batch_size=plan.batch_size,
            seed=plan.seed,
        )
        async with (
            Caller(
                plan.address, target, timeout_seconds=plan.timeout_seconds, tls=self._tls, api_key=self._api_key
            ) as caller,
            TritonCounters(plan.triton, plan.triton_metrics) as counters,
        ):
            self._model = await caller.start()
            runner = self._runner = Runner(
                caller.ask,
                plan.pace,
                warm_up_seconds=plan.warm_up_seconds,
                duration_seconds=plan.duration_seconds,
                timeout_seconds=plan.timeout_seconds,
                may_cancel=target.may_cancel,
            )
            self._started = datetime.now(UTC)
            with self._display.follow(plan, runner) if self._display else nullcontext():
                await self._measure(runner, counters)

    async def _measure(self, runner: Runner, counters: TritonCounters) -> None:
        def begin() -> None:
            self._before = asyncio.create_task(counters.read())

        try:
            await runner.run(begin)
            self._is_complete = True
        finally:
            if self._before is not None:
                before = await self._before
                after = await counters.read()
                if before is not None and after is not None:
                    self._batches = difference(before, after)

    def report(self) -> Report | None:
        """Return what was measured so far; None where the measurement did not begin."""
        if self._runner is None or self._before is None:
            return None
        return Report(
            plan=self._plan,
            model=self._model,
            num_samples=len(self._samples),
            started=self._started,
            is_complete=self._is_complete,
            elapsed_seconds=self._runner.elapsed_seconds,
            tally=self._runner.measured,
            batches=self._batches,
            cpu_share=self._runner.cpu_share,
            loop_share=self._runner.loop_share,
        )
