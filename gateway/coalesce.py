"""
Callers that wait for the same model share its batches.

What waits leaves together in the next request to Triton. There is no timer: an image that finds an instance of the
model idle leaves at the end of the event loop's round in which it came, and others gather while batches are in flight.
A caller that goes takes nobody with it, and a batch that fails is tried again image by image, so that what is poisoned
fails alone.

Pure: no gRPC and no messages; one event loop.
"""

import asyncio
import math
from collections import OrderedDict, deque
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, Protocol

import numpy as np
import structlog
from numpy.typing import NDArray

from gateway.cache import RowCache
from gateway.errors import (
    GatewayError,
    TooLateError,
    UpstreamContractError,
    UpstreamFailedError,
    UpstreamTimeoutError,
)
from gateway.pace import Pace

log = structlog.get_logger(__name__)

Rows = NDArray[np.float32]
Infer = Callable[[bytes, int], Awaitable[Rows]]
"""Pixels of N images behind each other, and N, to rows, shape (N, width). Raises :class:`GatewayError`."""
Holds = Callable[[Rows], NDArray[np.bool_]]
"""Rows, shape (N, width), to whether each is an answer at all, shape (N,)."""

OF_ONE_IMAGE = (UpstreamFailedError, UpstreamContractError)
"""What may lie at one image of a batch; whatever else went wrong is of the batch, and would go wrong again."""

# Images that fail by themselves, one after the other and none in between that does not: it is the model.
_MODEL_FAILS = 3


class Place(Protocol):
    """What an image in here takes of the room that admission has."""

    def release(self) -> None:
        """Give it back."""
        ...


class Traces(Protocol):
    """Who follows calls into their batches."""

    def call(self) -> Any:
        """Return what the calling task works for."""
        ...

    def batch(self, calls: Sequence[Any], num_images: int) -> AbstractContextManager[None]:
        """Follow a batch that works for these for as long as the block lasts."""
        ...


@dataclass(frozen=True, slots=True)
class BatchRecord:
    """What became of one batch."""

    num_images: int
    seconds: float
    """From the request to Triton to its answer."""
    expected_seconds: float
    """What :class:`Pace` expected of the time since the model was last known to be free; 0 without experience."""
    busy_seconds: float
    """That time."""
    waited_seconds: float
    """How long the image waited that had waited longest."""
    failed: bool


class Ask:
    """
    What one caller asks: some images, and a place for the answer to each.

    Attributes:
        future: Resolves to an answer for each image, a row or why there is none; fails where time ran out.
        queued_at: When it came, on the event loop's clock.
        sent_at: When its last image left for Triton, or joined one that had left; 0 before.
        num_shared: Images in the batch that its last image left with.
        origin: What :class:`Traces` said it works for.
    """

    __slots__ = (
        "_answers", "_num_missing", "_place", "deadline", "future", "images", "num_shared", "origin", "queued_at",
        "sent_at",
    )  # fmt: skip

    def __init__(self, num_images: int, place: Place, deadline: float | None, loop: asyncio.AbstractEventLoop) -> None:
        self._answers: list[Rows | GatewayError] = [_NO_ANSWER] * num_images
        self._num_missing = num_images
        self._place = place
        self.deadline = deadline
        self.images: list[_Image] = []
        self.future: asyncio.Future[list[Rows | GatewayError]] = loop.create_future()
        self.origin: Any = None
        self.queued_at = loop.time()
        self.sent_at = 0.0
        self.num_shared = 0

    def settle(self, index: int, answer: Rows | GatewayError) -> None:
        """Take the answer to one image; with the last one the place is free and the caller goes on."""
        self._answers[index] = answer
        self._num_missing -= 1
        if self._num_missing == 0:
            self._place.release()
            if not self.future.done():
                self.future.set_result(self._answers)

    def give_up(self, error: GatewayError) -> None:
        """Send the caller away; the place stays taken for as long as the images burden Triton."""
        if not self.future.done():
            self.future.set_exception(error)
            # Marks it as seen: the caller may be on its way out already.
            self.future.exception()


_NO_ANSWER = GatewayError("no answer")


class _Image:
    """Pixels that were not answered yet, and everybody who asks for them."""

    __slots__ = ("asks", "identity", "num_shared", "pixels", "queued_at")

    def __init__(self, pixels: bytes, identity: str, queued_at: float) -> None:
        self.pixels = pixels
        self.identity = identity
        self.queued_at = queued_at
        self.asks: list[tuple[Ask, int]] = []
        # Images in the batch that it left with; 0 before.
        self.num_shared = 0

    @property
    def is_sent(self) -> bool:
        return self.num_shared > 0

    def is_wanted(self, when: float) -> bool:
        """Tell whether anybody is left who can use an answer at that time."""
        return any(not ask.future.done() and (ask.deadline is None or ask.deadline > when) for ask, _ in self.asks)

    def settle(self, answer: Rows | GatewayError) -> None:
        for ask, index in self.asks:
            ask.settle(index, answer)
        self.asks = []


class _FairQueue:
    """Images by who sent them; those who wait take turns, an image each."""

    def __init__(self) -> None:
        self._by_identity: OrderedDict[str, OrderedDict[int, _Image]] = OrderedDict()
        self._length = 0
        # How many of them are the first of their sender, the second and so on: those of one round of turns.
        self._rounds: list[int] = []

    def __len__(self) -> int:
        return self._length

    def num_until(self, identity: str, num_images: int) -> int:
        """Return how many leave until so many more of one sender have left, these included."""
        num_rounds = len(self._by_identity.get(identity, ())) + num_images
        num_waiting = self._length if num_rounds >= len(self._rounds) else sum(self._rounds[:num_rounds])
        return num_waiting + num_images

    def push(self, image: _Image) -> None:
        queue = self._by_identity.get(image.identity)
        if queue is None:
            queue = self._by_identity[image.identity] = OrderedDict()
        if len(queue) == len(self._rounds):
            self._rounds.append(0)
        self._rounds[len(queue)] += 1
        queue[id(image)] = image
        self._length += 1

    def pop(self) -> _Image:
        identity, queue = next(iter(self._by_identity.items()))
        image = next(iter(queue.values()))
        self.remove(image)
        if queue and len(self._by_identity) > 1:
            self._by_identity.move_to_end(identity)
        return image

    def remove(self, image: _Image) -> None:
        queue = self._by_identity[image.identity]
        del queue[id(image)]
        self._length -= 1
        self._rounds[len(queue)] -= 1
        if not queue:
            del self._by_identity[image.identity]
        if not self._rounds[-1]:
            self._rounds.pop()

    def waiting_for(self, seconds: float, now: float) -> list[_Image]:
        """Return what has waited so long."""

        def has(image: _Image) -> bool:
            # As timers are set: a difference may be rounded to less.
            return image.queued_at + seconds <= now

        return [image for queue in self._by_identity.values() for image in takewhile(has, queue.values())]

    def oldest(self) -> float:
        """Return when the first of them came; infinity where there is none."""
        firsts = (next(iter(queue.values())) for queue in self._by_identity.values())
        return min((image.queued_at for image in firsts), default=math.inf)


class _Batch:
    """Images that left for Triton together, and what is known of their answers."""

    __slots__ = ("asked", "later", "num_counted", "overdue", "sent_at")

    def __init__(self, images: list[_Image], sent_at: float) -> None:
        # In the request under way.
        self.asked = images
        # Those that failed with others, to be tried again by themselves.
        self.later: deque[_Image] = deque()
        self.sent_at = sent_at
        # Images that it counts for as the model's work; 0 is none, though it may be at Triton still.
        self.num_counted = 0
        self.overdue: asyncio.TimerHandle | None = None


class Lane:
    """
    All that goes to one output of one version of a model.

    Args:
        infer: One request to Triton. Cancelled where nobody waits for it any more and ``may_cancel`` says yes.
        holds: Which rows of its answer are answers.
        promise: What ``holds`` tells, in words.
        max_batch_size: Most images in one request, at least 1.
        num_instances: Requests that run at once, at least 1; while fewer are in flight, nobody waits.
        batches_per_instance: Most requests in flight for each of them, at least 1.
        timeout_seconds: Longest that an image waits for its batch, and from then on for its answer. What waits is given
            up with a batch of which nothing was heard, nor since of any other.
        may_cancel: Whether Triton bears that.
        joins: Whether equal images that are under way at the same time are asked once.
        cache: Looked into first, and told each answer. Of what is in there only this lane's own answers count.
        traces: Told of each batch before it leaves.
        on_batch: Told of each batch that ended.

    Attributes:
        max_batch_size: The same; may be changed.
        num_instances: The same; may be changed.
        num_joined: Images so far that were answered together with an equal one.
        num_dropped: Images so far whose callers had gone before they left for Triton.
        num_retried: Images so far that were tried again by themselves.
    """

    def __init__(
        self,
        infer: Infer,
        holds: Holds,
        promise: str,
        *,
        max_batch_size: int,
        num_instances: int = 1,
        batches_per_instance: int,
        timeout_seconds: float,
        may_cancel: Callable[[], bool] = lambda: False,
        joins: bool = True,
        cache: RowCache | None = None,
        traces: Traces | None = None,
        on_batch: Callable[[BatchRecord], None] = lambda record: None,
    ) -> None:
        self._infer = infer
        self._holds = holds
        self._promise = promise
        self.max_batch_size = max_batch_size
        self.num_instances = num_instances
        self._batches_per_instance = batches_per_instance
        self._timeout_seconds = timeout_seconds
        self._may_cancel = may_cancel
        self._joins = joins
        self._cache = cache if cache is not None and cache.max_rows else None
        self._answerer = object()
        self._traces = traces
        self._on_batch = on_batch
        self._loop = asyncio.get_running_loop()
        self._pace = Pace()
        self._waiting = _FairQueue()
        self._open: dict[bytes, _Image] = {}
        # All that are at Triton, and how many of them, and of their images, keep the model busy as far as is known.
        self._batches: dict[asyncio.Task[None], _Batch] = {}
        self._num_busy = 0
        self._num_sent = 0
        self._free_at = 0.0
        self._pumps = False
        self._sweeps = False
        self.num_joined = 0
        self.num_dropped = 0
        self.num_retried = 0

    @property
    def is_idle(self) -> bool:
        """Whether nothing waits and nothing is in flight."""
        return not self._batches and not len(self._waiting)

    @property
    def num_waiting(self) -> int:
        """Images that have not left yet."""
        return len(self._waiting)

    @property
    def num_in_flight(self) -> int:
        """Images at Triton."""
        return sum(len(batch.asked) for batch in self._batches.values())

    @property
    def num_batches(self) -> int:
        """Requests at Triton."""
        return len(self._batches)

    def expected_seconds(self, num_images: int, identity: str = "") -> float:
        """Return how long an answer to so many more images of a caller would take; 0 where nothing is under way."""
        if not self._num_busy and not len(self._waiting):
            return 0.0
        full, rest = divmod(self._num_sent + self._waiting.num_until(identity, num_images), self.max_batch_size)
        return full * self._pace.seconds(self.max_batch_size) + (self._pace.seconds(rest) if rest else 0.0)

    def ask(self, images: Sequence[bytes], place: Place, *, identity: str = "", deadline: float | None = None) -> Ask:
        """
        Queue images; wait for ``ask.future``, and hand the ask to :meth:`leave` where the wait was cancelled.

        Args:
            images: Pixels of each, uint8, 784 bytes.
            place: Given back when the last of them has been answered.
            identity: Who asks; those who wait take turns.
            deadline: On the event loop's clock: what has not left by then does not leave.
        """
        ask = Ask(len(images), place, deadline, self._loop)
        if self._traces is not None:
            ask.origin = self._traces.call()
        for index, pixels in enumerate(images):
            if self._cache is not None and (row := self._cache.get(self._answerer, pixels)) is not None:
                ask.settle(index, row)
                continue
            image = self._open.get(pixels)
            if image is None:
                image = _Image(pixels, identity, ask.queued_at)
                if self._joins:
                    self._open[pixels] = image
                self._waiting.push(image)
            else:
                self.num_joined += 1
                if image.is_sent:
                    ask.sent_at, ask.num_shared = ask.queued_at, image.num_shared
            image.asks.append((ask, index))
            ask.images.append(image)
        if len(self._waiting):
            if not self._pumps:
                # At the end of this round of the loop, with all that came in it.
                self._pumps = True
                self._loop.call_soon(self._pump)
            if not self._sweeps:
                # Left to run when nothing waits any more: one for all that come until then.
                self._sweeps = True
                self._loop.call_at(ask.queued_at + self._timeout_seconds, self._sweep)
        return ask

    def leave(self, ask: Ask) -> None:
        """Forget a caller that has gone: what only it waited for and has not left yet gives its place back."""
        ask.future.cancel()
        now = self._loop.time()
        for image in ask.images:
            # Each once, also where one caller sent it twice.
            if image.asks and not image.is_sent and not image.is_wanted(now):
                self._waiting.remove(image)
                self._drop(image)
        self._abandon_unwanted()

    def fail_waiting(self, error: GatewayError) -> None:
        """Answer all that have not left yet with an error."""
        while len(self._waiting):
            self._close(self._waiting.pop(), error)

    async def drained(self) -> None:
        """Wait until all requests in flight have ended."""
        while self._batches:
            await asyncio.wait(self._batches)

    def _pump(self) -> None:
        self._pumps = False
        while len(self._waiting) and self._may_send():
            images = self._take()
            if images:
                self._send(images)

    def _may_send(self) -> bool:
        if self._num_busy < self.num_instances:
            return True
        # One more is to keep the model busy while the answers before it are told and their callers come again. A small
        # one beside large ones would not, and most of what a batch costs it costs whatever its size.
        return self._num_busy < self._batches_per_instance * self.num_instances and len(self._waiting) >= min(
            self._num_sent / self.num_instances, self.max_batch_size
        )

    def _take(self) -> list[_Image]:
        images = list[_Image]()
        answered_at = self._loop.time()
        if self._num_busy:
            # An answer that comes too late costs as much as one in time. Beside nothing all are tried, or a model that
            # was slow once would never show that it is no more.
            answered_at = self._free_from(answered_at)
            answered_at += self._pace.seconds(min(len(self._waiting), self.max_batch_size))
        while len(self._waiting) and len(images) < self.max_batch_size:
            image = self._waiting.pop()
            if image.is_wanted(answered_at):
                images.append(image)
            else:
                self._drop(image)
        return images

    def _free_from(self, now: float) -> float:
        """Return when an instance is expected to be free of what is in flight."""
        if self._num_busy < self.num_instances:
            return now
        per_image, per_batch = self._pace.coefficients()
        work = (per_image * self._num_sent + per_batch * self._num_busy) / self.num_instances
        began = min(batch.sent_at for batch in self._batches.values() if batch.num_counted)
        return max(now, max(began, self._free_at) + work)

    def _send(self, images: list[_Image]) -> None:
        now = self._loop.time()
        for image in images:
            image.num_shared = len(images)
            for ask, _ in image.asks:
                ask.sent_at = now
                ask.num_shared = len(images)
        batch = _Batch(images, now)
        self._count(batch, len(images))
        task = self._loop.create_task(self._run(batch))
        self._batches[task] = batch
        task.add_done_callback(self._ended)
        batch.overdue = self._loop.call_later(self._timeout_seconds, self._give_up, batch)

    def _count(self, batch: _Batch, num_images: int) -> None:
        self._num_busy += bool(num_images) - bool(batch.num_counted)
        self._num_sent += num_images - batch.num_counted
        batch.num_counted = num_images

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._batches.pop(task, None)

    def _abandon_unwanted(self) -> None:
        """Cancel requests whose callers have all gone, where Triton bears that; their places are free."""
        if not self._may_cancel():
            return
        now = self._loop.time()
        for task, batch in list(self._batches.items()):
            images = [*batch.asked, *batch.later]
            if any(image.is_wanted(now) for image in images):
                continue
            task.cancel()
            del self._batches[task]
            self._leave_room(batch)
            for image in images:
                self._close(image, UpstreamTimeoutError("nobody waits for it any more"))
        self._pump()

    async def _run(self, batch: _Batch) -> None:
        images = batch.asked
        expected = self._pace.seconds(len(images))
        answers = await self._answers(images)
        failed = [image for image, answer in zip(images, answers, strict=True) if isinstance(answer, OF_ONE_IMAGE)]
        self._note(batch, expected, bool(failed))
        if len(images) > 1 and failed:
            for image, answer in zip(images, answers, strict=True):
                if not isinstance(answer, OF_ONE_IMAGE):
                    self._close(image, answer)
            await self._retry(batch, failed)
            self._leave_room(batch)
            self._pump()
            return
        # First the next batch, then the answers to this one: the model should not wait for them.
        self._leave_room(batch)
        self._pump()
        for image, answer in zip(images, answers, strict=True):
            self._close(image, answer)

    def _note(self, batch: _Batch, expected: float, failed: bool) -> None:
        now, images, sent_at = self._loop.time(), batch.asked, batch.sent_at
        busy = now - max(sent_at, self._free_at)
        if batch.num_counted:
            # Of one that was given up, others may have been answered beside it all the time.
            self._free_at = now
            if not failed:
                self._pace.observe(len(images), busy)
        came = min((ask.queued_at for image in images for ask, _ in image.asks[:1]), default=sent_at)
        self._on_batch(BatchRecord(len(images), now - sent_at, expected, busy, sent_at - came, failed))

    def _leave_room(self, batch: _Batch) -> None:
        if batch.overdue is not None:
            batch.overdue.cancel()
        self._count(batch, 0)

    async def _retry(self, batch: _Batch, images: Sequence[_Image]) -> None:
        """Ask again for each by itself; an image that fails alone cannot be what failed the others."""
        num_failed = 0
        batch.later.extend(images)
        # Empty too where the batch has taken too long.
        while batch.later:
            batch.asked = [image] = [batch.later.popleft()]
            if not image.is_wanted(self._loop.time()):
                # Its callers have gone, or were sent away.
                self._drop(image)
                continue
            self._count(batch, 1)
            self.num_retried += 1
            (answer,) = await self._answers(batch.asked)
            self._close(image, answer)
            num_failed = num_failed + 1 if isinstance(answer, GatewayError) else 0
            if num_failed == _MODEL_FAILS:
                self._close_later(batch, answer)

    async def _answers(self, images: list[_Image]) -> list[Rows | GatewayError]:
        """Return a row for each image of one request to Triton, or why there is none; never raises."""
        try:
            with self._followed(images):
                rows = await self._infer(b"".join([image.pixels for image in images]), len(images))
            good = self._holds(rows)
            if good.all():
                return list(rows)
            broken = UpstreamContractError(f"the model did not answer with {self._promise}")
            return [row if is_good else broken for row, is_good in zip(rows, good, strict=True)]
        except GatewayError as error:
            return [error] * len(images)
        except Exception:
            # Ours to fix; but whoever waits is not to wait for ever.
            log.exception("batch failed")
            return [UpstreamFailedError("the gateway failed to ask the model")] * len(images)

    def _followed(self, images: list[_Image]) -> AbstractContextManager[None]:
        if self._traces is None:
            return nullcontext()
        return self._traces.batch([ask.origin for image in images for ask, _ in image.asks], len(images))

    def _give_up(self, batch: _Batch) -> None:
        """Send the callers of a batch away that takes too long, and others in its place: it may never end."""
        error = self._too_long()
        for image in batch.asked:
            # The request may go on; but nobody shall join it any more.
            self._forget(image)
            for ask, _ in image.asks:
                ask.give_up(error)
        self._close_later(batch, error)
        self._leave_room(batch)
        if self._free_at <= batch.sent_at:
            self.fail_waiting(error)
        self._abandon_unwanted()
        self._pump()

    def _sweep(self) -> None:
        """Give up what has waited too long for its batch."""
        error = self._too_long()
        for image in self._waiting.waiting_for(self._timeout_seconds, self._loop.time()):
            self._waiting.remove(image)
            self._close(image, error)
        self._sweeps = bool(len(self._waiting))
        if self._sweeps:
            self._loop.call_at(self._waiting.oldest() + self._timeout_seconds, self._sweep)

    def _too_long(self) -> UpstreamTimeoutError:
        return UpstreamTimeoutError(f"no answer from the model within {self._timeout_seconds:.3g} s")

    def _drop(self, image: _Image) -> None:
        self.num_dropped += 1
        self._close(image, TooLateError("no time was left for the inference"))

    def _close_later(self, batch: _Batch, answer: Rows | GatewayError) -> None:
        while batch.later:
            self._close(batch.later.popleft(), answer)

    def _close(self, image: _Image, answer: Rows | GatewayError) -> None:
        self._forget(image)
        if self._cache is not None and not isinstance(answer, GatewayError):
            self._cache.put(self._answerer, image.pixels, answer)
        image.settle(answer)

    def _forget(self, image: _Image) -> None:
        if self._open.get(image.pixels) is image:
            del self._open[image.pixels]
