"""An asynchronous generator read in a plain ``for`` loop, some items ahead of it, by a thread of its own."""

import asyncio
import queue
import threading
import traceback
from collections.abc import AsyncGenerator, Callable, Generator
from contextlib import aclosing, suppress
from types import TracebackType
from typing import Generic, Self, TypeVar

from streamer.errors import ReaderError

Item = TypeVar("Item")


class Bridge(Generic[Item]):
    """
    Runs a generator in an event loop of its own; iterate over it once.

    Leaving the loop or the ``with`` in any way, KeyboardInterrupt included, closes the generator and ends the thread,
    which starts when the first item is asked for.

    Args:
        generate: Makes the generator, in the thread.
        ahead: Items that may wait in memory, at least 1.
    """

    def __init__(self, generate: Callable[[], AsyncGenerator[Item, None]], *, ahead: int) -> None:
        self._generate = generate
        self._ahead = ahead
        # When there is no more room, the thread is woken once half of it is free: a wake costs more than an item.
        self._low = ahead // 2
        self._is_full = False
        self._arrived: queue.SimpleQueue[tuple[Item] | BaseException | None] = queue.SimpleQueue()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._task: asyncio.Task[None] | None = None
        self._room: asyncio.Event | None = None
        self._started = threading.Event()
        self._thread: threading.Thread | None = None
        self._is_taken = False
        self._is_closing = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __iter__(self) -> Generator[Item, None, None]:
        """
        Read the items; what the generator raises is raised in the loop.

        Raises:
            ReaderError: It was read before, or, in the loop, the generator was cancelled by something but ``close``.
        """
        if self._is_taken:
            raise ReaderError("this was read already, and is read once: make another one for another pass")
        self._is_taken = True
        return self._take()

    def close(self) -> None:
        """Close the generator and end the thread; harmless when done already."""
        self._is_closing = True
        if self._thread is None or not self._thread.is_alive():
            return
        self._started.wait()
        if self._task is not None:
            self._tell(self._task.cancel)
        self._thread.join()

    def _take(self) -> Generator[Item, None, None]:
        # Not before: an iterator that nobody takes an item of runs no ``finally``, and would leave the thread behind.
        # Daemon: an interpreter that dies in the middle must not wait for it.
        self._thread = threading.Thread(target=self._run, name="sluice-batch-reader", daemon=True)
        try:
            self._thread.start()
            while (item := self._arrived.get()) is not None:
                if isinstance(item, BaseException):
                    raise item
                if self._is_full and self._arrived.qsize() <= self._low:
                    self._is_full = False
                    assert self._room is not None
                    self._tell(self._room.set)
                yield item[0]
        finally:
            self.close()

    def _tell(self, what: Callable[[], object]) -> None:
        assert self._loop is not None
        # Closed already: the thread has read all there was.
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(what)

    def _run(self) -> None:
        end: BaseException | None = None
        try:
            asyncio.run(self._pump())
        except BaseException as error:
            if not isinstance(error, asyncio.CancelledError):
                end = error
            elif not self._is_closing:
                end = ReaderError("reading was cancelled before its end, and not by who reads")
                end.__cause__ = error
            # Whoever keeps the error would keep the connections that its frames know of.
            cause: BaseException | None = error
            while cause is not None:
                traceback.clear_frames(cause.__traceback__)
                cause = cause.__cause__ or cause.__context__
        finally:
            self._started.set()
            self._arrived.put(end)

    async def _pump(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._task = asyncio.current_task()
        self._room = asyncio.Event()
        self._started.set()
        if self._is_closing:
            return
        async with aclosing(self._generate()) as items:
            async for item in items:
                self._arrived.put((item,))
                if self._arrived.qsize() >= self._ahead:
                    await self._wait_for_room()

    async def _wait_for_room(self) -> None:
        assert self._room is not None
        while self._arrived.qsize() > self._low:
            self._room.clear()
            self._is_full = True
            # Who took the last items before he could see that, tells nobody.
            if self._arrived.qsize() > self._low:
                await self._room.wait()
        self._is_full = False
