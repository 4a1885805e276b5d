"""Threads that decode images; callers who wait for one take turns, whatever each of them sends."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from gateway.turns import Turns

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
        self._turns = Turns(num_threads)

    async def run(self, work: Callable[[], Result], caller: str) -> Result:
        """
        Return what the work returns, or raise what it raises.

        Safe to cancel: what has not begun never does; what has keeps its thread to its end.

        Args:
            work: Done in a thread.
            caller: Whose it is.
        """
        await self._turns.take(caller, 1)
        working = asyncio.get_running_loop().run_in_executor(self._threads, work)
        working.add_done_callback(self._ended)
        return await asyncio.shield(working)

    def close(self) -> None:
        """Begin nothing any more; what has begun is not waited for."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _ended(self, working: asyncio.Future[Any]) -> None:
        if not working.cancelled():
            # Marks the error as seen: whoever waited may have left.
            working.exception()
        self._turns.give_back(1)
