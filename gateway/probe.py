"""Readiness that is proven: Triton says ready while every inference fails, so one is tried."""

import asyncio

import numpy as np
import structlog

from gateway.errors import GatewayError
from gateway.models import Catalog
from gateway.triton import PROBABILITIES, Inference, Triton, answer
from rpc.health import Health

log = structlog.get_logger(__name__)


class Probe:
    """
    Refreshes the catalog and infers a blank image on the default model, over and over, and reports to health.

    One probe at a time: one that takes too long means NOT_SERVING, and is waited for before the next.

    Args:
        catalog: Refreshed before each inference.
        triton: Where the inference goes.
        health: Told the outcome. If the probe itself dies, it is told NOT_SERVING.
        interval_seconds: Pause between two probes.
        timeout_seconds: What is too long.
    """

    def __init__(
        self,
        catalog: Catalog,
        triton: Triton,
        health: Health,
        *,
        interval_seconds: float,
        timeout_seconds: float,
    ) -> None:
        self._catalog = catalog
        self._triton = triton
        self._health = health
        self._interval_seconds = interval_seconds
        self._timeout_seconds = timeout_seconds
        self._wanted = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._was_reported = False
        self._last_reason: str | None = None

    def start(self) -> None:
        """Begin; the first probe goes out at once."""
        self._task = asyncio.create_task(self._run())
        self._task.add_done_callback(self._ended)

    def hasten(self) -> None:
        """Probe now instead of at the end of the pause, because a call just failed. No effect while NOT_SERVING."""
        if self._health.is_serving:
            self._wanted.set()

    async def stop(self) -> None:
        """End; an inference under way runs on in the adapter."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait((self._task,))

    async def _run(self) -> None:
        while True:
            self._wanted.clear()
            await self._probe()
            try:
                async with asyncio.timeout(self._interval_seconds):
                    await self._wanted.wait()
            except TimeoutError:
                pass

    async def _probe(self) -> None:
        call: Inference | None = None
        try:
            await self._catalog.refresh()
            model = self._catalog.known("", 0)
            call = self._triton.infer(
                model.name,
                model.version,
                np.zeros((1, 28, 28), np.uint8),
                PROBABILITIES,
                width=len(model.class_names),
                max_batch_size=model.max_batch_size,
            )
            await answer(call, self._timeout_seconds)
        except GatewayError as error:
            self._report(str(error))
            if call is not None and not call.done():
                await asyncio.wait((call,))
        else:
            self._report(None)

    def _report(self, reason: str | None) -> None:
        """``None``: an inference worked."""
        self._health.report(reason is None)
        if self._was_reported and reason == self._last_reason:
            return
        self._was_reported, self._last_reason = True, reason
        if reason is None:
            log.info("serving")
        else:
            log.warning("not serving", reason=reason)

    def _ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            self._health.report(False)
            log.error("probe died", exc_info=error)
