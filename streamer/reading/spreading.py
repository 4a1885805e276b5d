"""
One epoch read from several replicas at once, in order.

The epoch is cut into ranges of positions. Whichever replica is free reads the next one; what has arrived waits in a
window until its turn. A range that breaks goes to another replica where it broke, and one that is late, while the
reader waits for it, is asked of a second replica as well: whichever is first counts. Batches are addressed by position,
so what comes is the same, byte for byte, whoever sends it.
"""

import asyncio
import math
import statistics
import time
from collections import deque
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass, field

import structlog

from streamer.errors import RefusedError, SampleCorruptError, UnreachableError
from streamer.plan import Plan, Remainder
from streamer.reading.answers import Batch, BrokenError, SplitInfo
from streamer.reading.replica import Replica
from streamer.reading.retry import Retry

log = structlog.get_logger(__name__)

# So that a replica is never without work while a call is opened.
_RANGES_PER_REPLICA = 2
# Late is what takes this many times as long as ranges usually do, and never less than so many seconds.
_LATE_FACTOR = 4.0
_LATE_SECONDS = 0.25
_REMEMBERED = 16


@dataclass(eq=False, slots=True)
class _Range:
    """Consecutive global batches."""

    cursor: int
    """Position of the next batch to arrive."""
    end: int
    arrived: deque[Batch] = field(default_factory=deque)
    is_done: bool = False
    readers: dict[asyncio.Task[None], Replica] = field(default_factory=dict)


class Spreading:
    """
    Reads one epoch, or a part of it, from several replicas; used once.

    Args:
        replicas: Two or more, open.
        plan: With the fingerprint of the data.
        info: Of the plan's split.
        retry: How long to go on when nothing comes.
        start_position: Of the first global batch.
        end_position: Only global batches that begin before it; 0 means to the end of the epoch.
        range_bytes: About what is asked of one replica at once, stored images and labels.
    """

    def __init__(
        self,
        replicas: Sequence[Replica],
        plan: Plan,
        info: SplitInfo,
        retry: Retry,
        *,
        start_position: int,
        end_position: int,
        range_bytes: int,
    ) -> None:
        self._replicas = list(replicas)
        self._plan = plan
        self._info = info
        self._retry = retry
        self._ranges = _ranges(plan, info, start_position, end_position, range_bytes)
        self._window: deque[_Range] = deque()
        self._changed = asyncio.Event()
        self._late: _Range | None = None
        self._durations: deque[float] = deque(maxlen=_REMEMBERED)
        # One bit makes a good request one that is refused: a refusal counts when it comes again.
        self._doubted: set[Replica] = set()
        self._num_failures = 0
        self._problem: Exception = BrokenError("no answer")
        self._deadline = time.monotonic() + retry.first_batch_seconds

    async def batches(self) -> AsyncGenerator[Batch, None]:
        """
        Yield every batch once and in order; closing it ends all calls.

        Raises:
            RefusedError: No replica serves the plan.
            UnreachableError: None answers, for longer than :class:`Retry` allows.
            SampleCorruptError: The same batch arrived damaged at every attempt.
        """
        self._fill()
        workers = [
            asyncio.create_task(self._work(replica)) for replica in self._replicas for _ in range(_RANGES_PER_REPLICA)
        ]
        waiting_since = time.monotonic()
        try:
            while self._window:
                head = self._window[0]
                if head.arrived:
                    yield head.arrived.popleft()
                    # What the reader did meanwhile is no time in which nothing came.
                    waiting_since = time.monotonic()
                    self._deadline = waiting_since + self._retry.next_batch_seconds
                elif head.is_done:
                    self._window.popleft()
                    self._fill()
                    self._tell()
                else:
                    await self._wait_for(head, waiting_since)
        finally:
            for worker in workers:
                worker.cancel()
            await asyncio.wait(workers)

    def _fill(self) -> None:
        while len(self._window) < _RANGES_PER_REPLICA * len(self._replicas) + 1:
            following = next(self._ranges, None)
            if following is None:
                return
            self._window.append(following)

    async def _wait_for(self, head: _Range, since: float) -> None:
        """Wait until something has come or failed; call the range whose turn it is late when it is, or give up."""
        if not self._replicas:
            raise self._problem
        now = time.monotonic()
        if now >= self._deadline or self._num_failures >= self._retry.max_attempts * len(self._replicas):
            self._give_up()
        typical = statistics.median(self._durations) if self._durations else 0.0
        late_at = since + max(_LATE_SECONDS, _LATE_FACTOR * typical)
        if now >= late_at and len(head.readers) == 1 and self._late is not head:
            self._late = head
            self._tell()
        until = min(self._deadline, late_at) if now < late_at else self._deadline
        with suppress(TimeoutError):
            async with asyncio.timeout(until - now):
                await self._changed.wait()

    def _give_up(self) -> None:
        if isinstance(self._problem, SampleCorruptError):
            raise self._problem
        addresses = ", ".join(replica.address for replica in self._replicas)
        raise UnreachableError(addresses, f"{self._problem} ({self._num_failures} attempts)")

    def _tell(self) -> None:
        # Everyone who waits looks for himself; those who come later find a new event.
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    async def _work(self, replica: Replica) -> None:
        failures = 0
        while replica in self._replicas:
            wanted = self._pick(replica)
            if wanted is None:
                await self._changed.wait()
                continue
            reading = asyncio.create_task(self._read(replica, wanted))
            wanted.readers[reading] = replica
            try:
                await asyncio.wait((reading,))
            finally:
                reading.cancel()
                await asyncio.wait((reading,))
                del wanted.readers[reading]
            failures = await self._judge(replica, wanted, reading, failures)

    def _pick(self, replica: Replica) -> _Range | None:
        late = self._late
        if late is not None and replica not in late.readers.values():
            self._late = None
            if not late.is_done:
                log.info("late range asked of a second replica", position=late.cursor, address=replica.address)
                return late
        return next((each for each in self._window if not each.is_done and not each.readers), None)

    async def _read(self, replica: Replica, wanted: _Range) -> None:
        started = time.monotonic()
        async with aclosing(replica.read(self._plan, self._info, wanted.cursor, wanted.end)) as batches:
            async for batch in batches:
                # Of two readers the one behind brings what has come already.
                if batch.position == wanted.cursor and not wanted.is_done:
                    self._take(wanted, batch)
        self._durations.append(time.monotonic() - started)

    def _take(self, wanted: _Range, batch: Batch) -> None:
        wanted.cursor = batch.next_position
        if len(batch.labels):
            wanted.arrived.append(batch)
        if batch.end_of_epoch or 0 < wanted.end <= wanted.cursor:
            wanted.is_done = True
            # Who also reads it would bring nothing new.
            current = asyncio.current_task()
            for reader in wanted.readers:
                if reader is not current:
                    reader.cancel()
        self._num_failures = 0
        self._deadline = time.monotonic() + self._retry.next_batch_seconds
        self._tell()

    async def _judge(self, replica: Replica, wanted: _Range, reading: asyncio.Task[None], failures: int) -> int:
        """Let a replica that failed pause, or go without it; return how often it has failed in a row."""
        # Cancelled by the one that was faster: it is slow, not broken, but gets a pause too.
        error = BrokenError("slower than another replica") if reading.cancelled() else reading.exception()
        self._tell()
        if error is None:
            self._doubted.discard(replica)
            return 0
        if isinstance(error, RefusedError) and error.status != "RESOURCE_EXHAUSTED" and replica in self._doubted:
            if replica in self._replicas:
                self._replicas.remove(replica)
                log.warning("replica left out", address=replica.address, problem=str(error))
            self._problem = error
            return failures
        if not isinstance(error, BrokenError | SampleCorruptError | RefusedError):
            self._replicas.clear()
            self._problem = error if isinstance(error, Exception) else BrokenError(str(error))
            return failures
        if isinstance(error, RefusedError):
            self._doubted.add(replica)
        if not reading.cancelled():
            self._num_failures += 1
            self._problem = error
            log.warning("stream broke", address=replica.address, cursor=wanted.cursor, problem=str(error))
        await replica.pause(self._retry.delay_seconds(failures + 2))
        return failures + 1


def _ranges(plan: Plan, info: SplitInfo, start: int, end: int, range_bytes: int) -> Iterator[_Range]:
    """Cut what is to be read; boundaries lie between global batches, as counted from the start."""
    full = plan.world_size * plan.batch_size
    last = min(end, info.num_samples) if end else info.num_samples
    if plan.remainder is Remainder.DROP:
        # What does not fill a global batch is nobody's.
        last = min(last, start + (info.num_samples - start) // full * full)
    sample_bytes = math.prod(info.image_shape) + info.label_bytes
    length = full * max(1, range_bytes // (plan.batch_size * sample_bytes))
    if start >= last:
        # One that tells that nothing is left, or what is wrong with the start.
        yield _Range(start, end)
        return
    for position in range(start, last, length):
        yield _Range(position, min(position + length, last))
