"""One long conversation: requests are read as far ahead as a window allows, answers told as they are ready."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from typing import Any, Generic, TypeVar

Request = TypeVar("Request")
Answer = TypeVar("Answer")


async def converse(
    requests: AsyncIterator[Request], take: Callable[[Request], Awaitable[Awaitable[Answer]]], *, window: int
) -> AsyncGenerator[Answer]:
    """
    Yield the answer to each request, in whatever order they are ready.

    At most ``window`` requests are read that were not yielded yet: who does not take answers is not read any further.
    Ends when the requests have ended and all are answered. Closing or cancelling it cancels the answers under way.

    Args:
        requests: Read by one task.
        take: Takes one of them in, and returns what is to become its answer. While it waits for room no other is
            read. What it raises, and what its answer raises, ends the conversation.
        window: At least 1.

    Raises:
        Exception: What reading or answering raised; nothing is yielded after it.
    """
    conversation = _Conversation(requests, take, window)
    try:
        async for told in conversation.answers():
            yield told
    finally:
        await conversation.close()


class _Conversation(Generic[Request, Answer]):
    def __init__(
        self, requests: AsyncIterator[Request], take: Callable[[Request], Awaitable[Awaitable[Answer]]], window: int
    ) -> None:
        self._requests = requests
        self._take = take
        self._room = asyncio.Semaphore(window)
        # Bounded by the room.
        self._ended: asyncio.Queue[asyncio.Future[Answer] | None] = asyncio.Queue()
        self._answering: set[asyncio.Future[Answer]] = set()
        self._reading = asyncio.create_task(self._read())
        self._reading.add_done_callback(lambda _: self._end_if_done())

    async def answers(self) -> AsyncIterator[Answer]:
        while (ended := await self._ended.get()) is not None:
            yield ended.result()
            # Only now: what was handed over is no burden any more.
            self._room.release()
        self._reading.result()

    async def close(self) -> None:
        tasks: list[asyncio.Future[Any]] = [self._reading, *self._answering]
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        for task in tasks:
            if not task.cancelled():
                task.exception()

    async def _read(self) -> None:
        await self._room.acquire()
        async for request in self._requests:
            task = asyncio.ensure_future(await self._take(request))
            self._answering.add(task)
            task.add_done_callback(self._put)
            # Not to be kept while the next one is waited for.
            del request, task
            await self._room.acquire()

    def _put(self, task: asyncio.Future[Answer]) -> None:
        self._answering.discard(task)
        if not task.cancelled():
            # Marks an error as seen: after the first one nobody looks.
            task.exception()
            self._ended.put_nowait(task)
        self._end_if_done()

    def _end_if_done(self) -> None:
        # Reading that failed ends it at once.
        failed = self._reading.done() and not self._reading.cancelled() and self._reading.exception() is not None
        if failed or (self._reading.done() and not self._answering):
            self._ended.put_nowait(None)
