"""Sends calls at their pace and counts what comes of them; knows nothing of gRPC."""

import asyncio
import selectors
import time
from collections.abc import Awaitable, Callable
from itertools import count

from loadtest.arrivals import ClosedLoop, OpenLoop, Pace
from loadtest.errors import CallError
from loadtest.tally import DEADLINE_EXCEEDED, INTERRUPTED, Tally, Verdict

Ask = Callable[[int], Awaitable[Verdict]]
"""Sends the call with this number and judges its answer; raises CallError."""

# Calls end by their own deadline; this is for one whose deadline does not.
_MARGIN_SECONDS = 2.0


def precise_event_loop() -> asyncio.AbstractEventLoop:
    """
    Return an event loop that wakes within about 0.1 ms of the moment asked for.

    asyncio's default rounds up to epoll's whole milliseconds, which would make every scheduled call late by half of
    one. The few descriptors of a load test are no work for select.
    """
    return asyncio.SelectorEventLoop(selectors.SelectSelector())


class Runner:
    """
    One run of calls: a warm-up that is not counted, the measurement, and the wait for what is still outstanding.

    Args:
        ask: Sends a call.
        pace: When calls begin.
        warm_up_seconds: Calls due before this are not counted; at least 0.
        duration_seconds: How long calls are sent and counted after it; above 0.
        timeout_seconds: An answer that comes later than this counts as DEADLINE_EXCEEDED.
        may_cancel: Whether a run that is cancelled may cancel its calls; else it waits for them, up to the timeout.

    Attributes:
        warm_up: Counts of the warm-up.
        measured: Counts of the measurement, complete when :meth:`run` has ended in whatever way.
        elapsed_seconds: From the start of the measurement to the last answer, at least to the end of sending.
        cpu_share: Cores this process used meanwhile.
        loop_share: Share of that time in which the event loop's thread, which one core runs, was busy.
    """

    def __init__(
        self,
        ask: Ask,
        pace: Pace,
        *,
        warm_up_seconds: float,
        duration_seconds: float,
        timeout_seconds: float,
        may_cancel: bool = True,
    ) -> None:
        self.warm_up, self.measured = Tally(), Tally()
        self.elapsed_seconds = self.cpu_share = self.loop_share = 0.0
        self._ask = ask
        self._pace = pace
        self._warm_up_seconds = warm_up_seconds
        self._end_seconds = warm_up_seconds + duration_seconds
        self._timeout_seconds = timeout_seconds
        self._may_cancel = may_cancel
        self._outstanding: set[asyncio.Task[None]] = set()
        self._room = asyncio.Semaphore(pace.callers if isinstance(pace, ClosedLoop) else pace.max_outstanding)
        self._numbers = count()
        self._started: float | None = None
        self._used: tuple[float, float] | None = None
        self._failure: BaseException | None = None

    @property
    def num_outstanding(self) -> int:
        """Calls sent and not answered yet."""
        return len(self._outstanding)

    @property
    def now_seconds(self) -> float:
        """Time since the start, in seconds; 0 before it."""
        return 0.0 if self._started is None else asyncio.get_running_loop().time() - self._started

    async def run(self, on_measuring: Callable[[], object] = lambda: None) -> None:
        """
        Run once, to the end.

        Cancelling it stops sending; what was counted by then stays, and calls that were still outstanding count as
        INTERRUPTED.

        Args:
            on_measuring: Called when the warm-up is over; must not block.
        """
        loop = asyncio.get_running_loop()
        self._started = loop.time()
        measuring = loop.call_at(self._started + self._warm_up_seconds, self._begin_measuring, on_measuring)
        left_code = INTERRUPTED
        try:
            await (self._send_open(self._pace) if isinstance(self._pace, OpenLoop) else self._send_closed())
            await self._wait_for_outstanding(self._timeout_seconds + _MARGIN_SECONDS)
            if self._failure is not None:
                raise self._failure
            left_code = DEADLINE_EXCEEDED
        finally:
            measuring.cancel()
            try:
                await self._leave_outstanding()
            finally:
                self.measured.close(left_code)
                self._end_measuring()

    async def _send_open(self, pace: OpenLoop) -> None:
        for due in pace.due(self._end_seconds):
            # Also where the call is late already: what has arrived meanwhile is read before the next one is sent.
            await asyncio.sleep(max(0.0, due - self.now_seconds))
            if self._room.locked():
                self._tally(due).skip()
            else:
                await self._begin(due)
        await asyncio.sleep(max(0.0, self._end_seconds - self.now_seconds))

    async def _send_closed(self) -> None:
        assert self._started is not None
        try:
            async with asyncio.timeout_at(self._started + self._end_seconds):
                while True:
                    await self._begin(None)
        except TimeoutError:
            return

    async def _begin(self, due: float | None) -> None:
        """Send the next call as soon as there is room; one that is due at no certain moment is due then."""
        await self._room.acquire()
        if self._failure is not None:
            raise self._failure
        call = asyncio.create_task(self._call(next(self._numbers), self.now_seconds if due is None else due))
        self._outstanding.add(call)
        call.add_done_callback(self._landed)

    async def _call(self, number: int, due: float) -> None:
        tally = self._tally(due)
        sent = self.now_seconds
        tally.begin(sent - due)
        try:
            verdict = await self._ask(number)
        except CallError as error:
            tally.fail(self.now_seconds - due, error.code, error.details)
            return
        ended = self.now_seconds
        if ended - sent > self._timeout_seconds:
            tally.fail(ended - due, DEADLINE_EXCEEDED, f"answered after more than {self._timeout_seconds:g} s")
        else:
            tally.succeed(ended - due, verdict)

    def _tally(self, due: float) -> Tally:
        return self.measured if due >= self._warm_up_seconds else self.warm_up

    def _landed(self, call: asyncio.Task[None]) -> None:
        self._outstanding.discard(call)
        self._room.release()
        # Not a failed call, which is counted, but a failure of ours.
        if not call.cancelled() and (error := call.exception()) is not None:
            self._failure = error

    async def _wait_for_outstanding(self, seconds: float) -> None:
        if self._outstanding:
            await asyncio.wait(self._outstanding, timeout=seconds)

    async def _leave_outstanding(self) -> None:
        if not self._may_cancel:
            await self._wait_for_outstanding(self._timeout_seconds)
        for call in self._outstanding:
            call.cancel()
        await asyncio.gather(*self._outstanding, return_exceptions=True)

    def _begin_measuring(self, on_measuring: Callable[[], object]) -> None:
        self._used = time.process_time(), time.thread_time()
        on_measuring()

    def _end_measuring(self) -> None:
        if self._used is None:
            return
        self.elapsed_seconds = self.now_seconds - self._warm_up_seconds
        cpu, loop = self._used
        self.cpu_share = (time.process_time() - cpu) / self.elapsed_seconds
        self.loop_share = (time.thread_time() - loop) / self.elapsed_seconds
