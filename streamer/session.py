"""One reader under byte credits: its grants are read while batches go out."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from types import TracebackType
from typing import Self

from protos.streamer.v1 import sample_service_pb2 as pb
from streamer.errors import GoingAwayError, IdleReaderError, InvalidPlanError, StreamerError
from streamer.flow import Credit

_HEAR_OUT_SECONDS = 0.5


async def opening(
    requests: AsyncIterator[pb.PullBatchesRequest], *, idle_seconds: float, draining: asyncio.Event
) -> pb.StreamBatchesRequest:
    """
    Return the request that a reader opens its stream with.

    Raises:
        InvalidPlanError: The first message is another, or there is none.
        IdleReaderError: It did not come in time.
        GoingAwayError: ``draining`` was set first.
    """
    reading = asyncio.ensure_future(anext(requests, None))
    drained = asyncio.create_task(draining.wait())
    try:
        await asyncio.wait((reading, drained), timeout=idle_seconds, return_when=asyncio.FIRST_COMPLETED)
        if not reading.done():
            raise GoingAwayError if draining.is_set() else IdleReaderError("open", idle_seconds)
        first = reading.result()
    finally:
        reading.cancel()
        drained.cancel()
    if first is None or first.WhichOneof("message") != "open":
        raise InvalidPlanError("open", "required as the first message")
    return first.open


async def hear_out(requests: AsyncIterator[pb.PullBatchesRequest]) -> None:
    """
    Wait a moment for the reader's next message before its stream is refused.

    Readers send their first grant together with ``open``. One that meets a call that has ended is INTERNAL at the
    reader, in grpc.aio, and the status it should have got is lost.
    """
    with suppress(TimeoutError):
        async with asyncio.timeout(_HEAR_OUT_SECONDS):
            await anext(requests, None)


class Grants:
    """
    What a reader grants, from the second message to its half-close; use as ``async with``, from one task.

    Args:
        requests: All that follows ``open``.
        credit: Grants are added to it as they come.
        idle_seconds: Longest wait for any of it.
    """

    def __init__(self, requests: AsyncIterator[pb.PullBatchesRequest], credit: Credit, *, idle_seconds: float) -> None:
        self._requests = requests
        self._credit = credit
        self._idle_seconds = idle_seconds
        self._changed = asyncio.Event()
        self._is_draining = False
        self._task: asyncio.Task[None] | None = None

    @property
    def let_send(self) -> bool:
        """Whether a batch may go now; where not, or not any more, :meth:`wait` says why."""
        return self._credit.lets_send and not self._is_draining and not self.is_closed

    @property
    def is_draining(self) -> bool:
        """Whether the reader is to be sent away."""
        return self._is_draining

    @property
    def is_closed(self) -> bool:
        """Whether the reader grants no more."""
        return self._task is not None and self._task.done()

    def drain(self) -> None:
        """Wake whoever waits for credit: none will be spent any more."""
        self._is_draining = True
        self._changed.set()

    async def __aenter__(self) -> Self:
        self._task = asyncio.create_task(self._read())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._task is not None
        self._task.cancel()
        await asyncio.wait((self._task,))
        # Marks the error as seen: the stream may have ended for another one.
        if not self._task.cancelled():
            self._task.exception()

    async def wait(self) -> None:
        """
        Wait until a batch may go, none ever will, or the reader is to be sent away.

        Raises:
            InvalidPlanError: A message was not a grant, or a bad one.
            IdleReaderError: Nothing of it happened in time.
        """
        await self._until(lambda: self._credit.lets_send or self.is_closed or self._is_draining, "grant")

    async def wait_closed(self) -> None:
        """Wait until the reader half-closes or is idle for too long; raises as :meth:`wait` does for bad messages."""
        with suppress(IdleReaderError):
            await self._until(lambda: self.is_closed, "half-close")

    async def hear_out(self) -> None:
        """Take the grants that are on their way before the stream is refused: see :func:`hear_out`."""
        with suppress(TimeoutError, StreamerError):
            async with asyncio.timeout(_HEAR_OUT_SECONDS):
                await self.wait_closed()

    async def _until(self, happened: Callable[[], bool], awaited: str) -> None:
        while True:
            # Before it is looked at: what changes in between then wakes at once.
            self._changed.clear()
            if self._task is not None and self._task.done():
                self._task.result()
            if happened():
                return
            try:
                async with asyncio.timeout(self._idle_seconds):
                    await self._changed.wait()
            except TimeoutError:
                raise IdleReaderError(awaited, self._idle_seconds) from None

    async def _read(self) -> None:
        try:
            async for message in self._requests:
                if message.WhichOneof("message") != "grant_bytes":
                    raise InvalidPlanError("grant_bytes", "required in every message after the first")
                self._credit.grant(message.grant_bytes)
                self._changed.set()
        finally:
            # The task is done only after this has returned.
            asyncio.get_running_loop().call_soon(self._changed.set)
