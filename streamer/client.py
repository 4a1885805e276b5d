"""
The clients of the streamer: in asyncio, and in a plain ``for`` loop.

::

    async with SampleClient("localhost:50052") as client:
        async for batch in client.batches(Plan(dataset="mnist", seed=7, epoch=0)):
            train_on(batch.images, batch.labels)
"""

import asyncio
import itertools
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Sequence
from contextlib import aclosing, suppress
from dataclasses import replace
from operator import attrgetter
from types import TracebackType
from typing import Self, TypeVar

import structlog

from streamer.errors import DataChangedError, RefusedError, SampleCorruptError, UnreachableError
from streamer.order import ends_at
from streamer.plan import Plan, Remainder
from streamer.reading import forking
from streamer.reading.answers import Batch, BrokenError, DatasetInfo, SplitInfo
from streamer.reading.bridge import Bridge
from streamer.reading.replica import WINDOW_BYTES, Replica
from streamer.reading.retry import Retry
from streamer.reading.spreading import Spreading
from streamer.reading.stalls import StallReport, Stalls

__all__ = [
    "Batch",
    "BatchReader",
    "DatasetInfo",
    "Plan",
    "Remainder",
    "Retry",
    "SampleClient",
    "SplitInfo",
]

log = structlog.get_logger(__name__)

Answer = TypeVar("Answer")

# Of several replicas the first one's word counts, where it is not much slower than the others'.
_GRACE_SECONDS = 0.2


class SampleClient:
    """
    Reads samples from one streamer, or from several that serve the same data; use as ``async with``.

    Any number of streams may be open at once; they share one connection to each streamer. In each, at most
    ``window_bytes`` and one batch are on their way. Of several replicas, up to 2n + 1 ranges of ``range_bytes`` wait in
    memory for their turn.

    Args:
        address: ``host:port``, or several, separated by commas or in a sequence.
        retry: What to do about streams that break.
        max_message_bytes: Largest message accepted; at least what the streamer sends (32 MiB by default).
        window_bytes: Images and labels granted in advance in each stream, at least 1.
        range_bytes: About what is asked of one of several replicas at once, stored images and labels.
    """

    def __init__(
        self,
        address: str | Sequence[str],
        *,
        retry: Retry | None = None,
        max_message_bytes: int = 32 * 1024**2,
        window_bytes: int = WINDOW_BYTES,
        range_bytes: int = 4 * 1024**2,
    ) -> None:
        addresses = address.split(",") if isinstance(address, str) else list(address)
        if not addresses or not all(each.strip() for each in addresses):
            raise ValueError(f"address: {address!r}; host:port is allowed, or several of them")
        if window_bytes < 1:
            raise ValueError(f"window_bytes: {window_bytes}; at least 1 is allowed")
        self._retry = retry or Retry()
        self._range_bytes = range_bytes
        self._replicas = [
            Replica(
                each.strip(),
                max_message_bytes=max_message_bytes,
                window_bytes=window_bytes,
                stall_seconds=self._retry.stall_seconds,
            )
            for each in addresses
        ]
        self._address = ", ".join(replica.address for replica in self._replicas)
        # By data set and split, so that only the first epoch begins with a question.
        self._splits: dict[tuple[str, str], SplitInfo] = {}

    async def __aenter__(self) -> Self:
        forking.watch()
        forking.check()
        for each in self._replicas:
            each.open()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await asyncio.gather(*(each.close() for each in self._replicas))

    async def wait_ready(self, timeout_seconds: float) -> None:
        """
        Wait until the streamer, or one of them, says that it serves, through ``grpc.health.v1``.

        Raises:
            UnreachableError: None does within ``timeout_seconds``.
        """
        problems: dict[str, str] = {}

        async def serves(replica: Replica) -> None:
            for attempt in itertools.count(1):
                try:
                    # The first attempt fails at once where nothing listens, and says why.
                    return await replica.wait_serving(wait_for_connection=attempt > 1)
                except BrokenError as error:
                    problems[replica.address] = str(error)
                await asyncio.sleep(self._retry.delay_seconds(attempt + 1))

        waiting = [asyncio.create_task(serves(each)) for each in self._replicas]
        try:
            done, _ = await asyncio.wait(waiting, timeout=timeout_seconds, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for each in waiting:
                each.cancel()
            await asyncio.wait(waiting)
        if not done:
            problem = "; ".join(dict.fromkeys(problems.values())) or "no answer"
            raise UnreachableError(self._address, f"not ready after {timeout_seconds:g} s ({problem})")
        for each in done:
            each.result()

    async def datasets(self) -> list[DatasetInfo]:
        """
        List what the streamer serves, or the first of them that answers.

        Raises:
            UnreachableError: Nothing answers within 10 s.
            RefusedError: The streamer answers with an error.
        """
        try:
            return await self._ask(lambda replica: replica.datasets())
        except BrokenError as error:
            raise UnreachableError(self._address, str(error)) from error

    async def split(self, plan: Plan) -> SplitInfo:
        """
        Describe the split that a plan reads, as the first replica does that has the plan's data.

        Raises:
            DataChangedError: None has the data whose fingerprint the plan names.
            RefusedError: There is none of that name.
            UnreachableError: Nothing answers, for longer than :class:`Retry` allows for a first batch.
        """
        deadline = time.monotonic() + self._retry.first_batch_seconds
        was_refused = False
        for attempts in itertools.count(1):
            try:
                info = await self._ask(lambda replica: replica.split_info(plan))
                self._splits[plan.dataset, plan.split] = info
                return info
            except (BrokenError, RefusedError) as error:
                # As below: it counts when it comes again.
                if isinstance(error, RefusedError) and was_refused:
                    raise
                was_refused = isinstance(error, RefusedError)
                await self._pause(error, attempts, deadline, 0)
        raise AssertionError("the count has no end")

    async def batches(
        self, plan: Plan, *, start_position: int = 0, end_position: int = 0
    ) -> AsyncGenerator[Batch, None]:
        """
        Read one rank's batches of an epoch, in order, from ``start_position`` on.

        A stream that breaks is opened again where it broke, with several replicas on another one: no batch comes
        twice or not at all, and none that is damaged. The data is pinned at the start: a replica with other data is
        refused, not read; among several it is left out.
        Closing the generator, cancelling its task, or leaving the loop ends the calls. To be sure when, wrap it
        in ``contextlib.aclosing``.

        Args:
            plan: The order and this rank's share of it.
            start_position: The cursor: ``next_position`` of the last batch consumed.
            end_position: Only global batches that begin before it; 0 means to the end of the epoch.

        Raises:
            RefusedError: The plan or the position cannot be served; the message names the field.
            DataChangedError: The streamer has other data than the plan, or than at the start.
            UnreachableError: Nothing answers, for longer than :class:`Retry` allows.
            SampleCorruptError: The same batch arrived damaged at every attempt.
        """
        if 0 < end_position <= start_position:
            return
        key, has_begun = (plan.dataset, plan.split), False
        while True:
            known = self._splits.get(key)
            if known is not None and plan.fingerprint not in (b"", known.fingerprint):
                known = None
            info = known or await self.split(plan)
            try:
                async with aclosing(self._read(plan, info, start_position, end_position)) as batches:
                    async for batch in batches:
                        has_begun = True
                        if not batch.end_of_epoch and ends_at(plan, info.num_samples, batch.next_position):
                            # What follows is the empty batch of a rank that gets nothing of the last ones.
                            batch = replace(batch, end_of_epoch=True)
                        yield batch
                return
            except DataChangedError:
                # What was known may be out of date, and nobody has said which data it is to be.
                if known is None or has_begun or plan.fingerprint:
                    raise
                del self._splits[key]

    def _read(self, plan: Plan, info: SplitInfo, start_position: int, end_position: int) -> AsyncGenerator[Batch, None]:
        plan = replace(plan, fingerprint=plan.fingerprint or info.fingerprint)
        if len(self._replicas) == 1:
            return self._read_one(plan, info, start_position, end_position)
        return Spreading(
            self._replicas,
            plan,
            info,
            self._retry,
            start_position=start_position,
            end_position=end_position,
            range_bytes=self._range_bytes,
        ).batches()

    async def _read_one(
        self, plan: Plan, info: SplitInfo, cursor: int, end_position: int
    ) -> AsyncGenerator[Batch, None]:
        """Read from the only replica, with a new call whenever one breaks."""
        (replica,) = self._replicas
        attempts, deadline = 0, time.monotonic() + self._retry.first_batch_seconds
        was_refused = False
        while True:
            try:
                async with aclosing(replica.read(plan, info, cursor, end_position)) as stream:
                    async for batch in stream:
                        attempts, cursor, was_refused = 0, batch.next_position, False
                        if len(batch.labels):
                            yield batch
                        deadline = time.monotonic() + self._retry.next_batch_seconds
                return
            except (BrokenError, SampleCorruptError, RefusedError) as error:
                # One bit makes a good request one that is refused: a refusal counts when it comes again.
                if isinstance(error, RefusedError) and was_refused:
                    raise
                was_refused = isinstance(error, RefusedError)
                if 0 < end_position <= cursor:
                    return
                attempts += 1
                await self._pause(error, attempts, deadline, cursor)

    async def _ask(self, question: Callable[[Replica], Awaitable[Answer]]) -> Answer:
        """
        Ask all replicas at once and return the answer of the first in their order that answers about as soon as any.

        Where none does, raise a refusal, or why not.
        """
        asking = [asyncio.ensure_future(question(replica)) for replica in self._replicas]
        try:
            for each in asyncio.as_completed(asking):
                with suppress(BrokenError, RefusedError):
                    await each
                    await asyncio.wait(asking, timeout=_GRACE_SECONDS)
                    break
            answered = [each for each in asking if each.done() and each.exception() is None]
            if answered:
                return answered[0].result()
        finally:
            for each in asking:
                each.cancel()
            await asyncio.wait(asking)
        errors = [error for each in asking if (error := each.exception()) is not None]
        raise next((error for error in errors if isinstance(error, RefusedError)), errors[0])

    async def _pause(self, error: Exception, attempts: int, deadline: float, cursor: int) -> None:
        """Wait for another attempt, unless there were enough of them."""
        remaining = deadline - time.monotonic()
        if attempts >= self._retry.max_attempts or remaining <= 0:
            if not isinstance(error, BrokenError):
                raise error
            raise UnreachableError(self._address, f"{error} ({attempts} attempts)") from error
        delay = min(remaining, self._retry.delay_seconds(attempts + 1))
        log.warning("stream broke", address=self._address, cursor=cursor, problem=str(error), retry_in=round(delay, 2))
        pausing = [asyncio.create_task(each.pause(delay)) for each in self._replicas]
        try:
            await asyncio.wait(pausing, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for each in pausing:
                each.cancel()
            await asyncio.wait(pausing)


class BatchReader:
    """
    Reads one rank's batches of an epoch in a plain ``for`` loop, some of them ahead of it.

    A thread of its own runs the client; at most ``prefetch_batches`` wait in memory. Leaving the loop or the ``with``
    in any way, KeyboardInterrupt included, ends the call and the thread. One reader is one pass.

    ::

        with BatchReader("localhost:50052", Plan(dataset="mnist", seed=7)) as reader:
            for batch in reader:
                train_on(batch.images, batch.labels)

    Args:
        address: ``host:port`` of the streamer, or several, separated by commas.
        plan: The order and this rank's share of it.
        start_position: The cursor to go on from.
        end_position: Only global batches that begin before it; 0 means to the end of the epoch.
        prefetch_batches: At least 1.
        window_bytes: Images and labels that may be on their way in each stream, beside one batch; at least 1. There
            is one stream from a single streamer, and two from each of several.
        retry: What to do about streams that break.
    """

    def __init__(
        self,
        address: str,
        plan: Plan,
        *,
        start_position: int = 0,
        end_position: int = 0,
        prefetch_batches: int = 8,
        window_bytes: int = WINDOW_BYTES,
        retry: Retry | None = None,
    ) -> None:
        if prefetch_batches < 1:
            raise ValueError(f"prefetch_batches: {prefetch_batches}; at least 1 is allowed")
        self._client = SampleClient(address, window_bytes=window_bytes, retry=retry)
        self._plan = plan
        self._start_position = start_position
        self._end_position = end_position
        self._bridge = Bridge(self._read, ahead=prefetch_batches)
        self._stalls = Stalls()

    def report(self, *, cpus: int | None = None) -> StallReport:
        """
        Say what the loop has waited for so far.

        Args:
            cpus: What the streamers have for transforms, if known: then the advice is a number of CPUs.
        """
        return self._stalls.report(cpus=cpus)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __iter__(self) -> Iterator[Batch]:
        """
        Read the batches, once.

        Raises:
            StreamerError: What :meth:`SampleClient.batches` raises.
        """
        return self._stalls.watch(iter(self._bridge), attrgetter("timings"))

    def close(self) -> None:
        """End the call and the thread; harmless when done already."""
        self._bridge.close()

    async def _read(self) -> AsyncGenerator[Batch, None]:
        batches = self._client.batches(self._plan, start_position=self._start_position, end_position=self._end_position)
        async with self._client, aclosing(batches):
            async for batch in batches:
                yield batch
