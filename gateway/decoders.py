"""Threads that decode images; callers who wait for one take turns, whatever each of them sends."""

import asyncio
from collections import OrderedDict, deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

Result = TypeVar("Result")


class Decoders:
    """
    A few threads, and a turn for each caller who waits for one. Belongs to one event loop.

    What waits is bounded by whoever lets callers in.

    Args:
        num_threads: At least 1.
    """

    def __init__(self, num_threads: int) -> None:
        self._threads = ThreadPoolExecutor(num_threads, thread_name_prefix="decode")
        self._num_free = num_threads
        self._waiting: OrderedDict[str, deque[asyncio.Future[None]]] = OrderedDict()

    async def run(self, work: Callable[[], Result], caller: str) -> Result:
        """
        Return what the work returns, or raise what it raises.

        Safe to cancel: what has not begun never does; what has keeps its thread to its end.

        Args:
            work: Done in a thread.
            caller: Whose it is.
        """
        if self._num_free:
            self._num_free -= 1
        else:
            await self._turn(caller)
        working = asyncio.get_running_loop().run_in_executor(self._threads, work)
        working.add_done_callback(self._ended)
        return await asyncio.shield(working)

    def close(self) -> None:
        """Begin nothing any more; what has begun is not waited for."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def _turn(self, caller: str) -> None:
        """Wait for a thread, which is then the caller's."""
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(caller, deque()).append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if not turn.cancelled():
                # It came as the caller left.
                self._pass_on()
            raise

    def _ended(self, working: asyncio.Future[Any]) -> None:
        if not working.cancelled():
            # Marks the error as seen: whoever waited may have left.
            working.exception()
        self._pass_on()

    def _pass_on(self) -> None:
        """Give a thread to who is next."""
        while self._waiting:
            caller, turns = self._waiting.popitem(last=False)
            turn = turns.popleft()
            if turns:
                self._waiting[caller] = turns
            if not turn.done():
                turn.set_result(None)
                return
        self._num_free += 1
