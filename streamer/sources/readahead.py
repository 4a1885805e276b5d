"""Reads that are begun before their samples are wanted, within a number of bytes that all streams share."""

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator
from typing import Any, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


class Allowance:
    """
    Bytes that reads begun early may hold, finished or not; those that are wanted now are not counted.

    Each of n streams may take an n-th: one that came first gives way as its reads are used up.

    Args:
        max_bytes: Of all streams together; 0 reads nothing early.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self._num_streams = 0
        self._held_bytes = 0

    @property
    def held_bytes(self) -> int:
        """Taken at this moment."""
        return self._held_bytes


class _Window:
    """What one stream has taken of an allowance."""

    def __init__(self, allowance: Allowance) -> None:
        self._allowance = allowance
        self.held_bytes = 0
        allowance._num_streams += 1

    def take(self, size: int) -> bool:
        """Take ``size`` bytes, if they are to be had."""
        allowance = self._allowance
        share = allowance.max_bytes // allowance._num_streams
        if self.held_bytes + size > share or allowance._held_bytes + size > allowance.max_bytes:
            return False
        self.held_bytes += size
        allowance._held_bytes += size
        return True

    def give_back(self, size: int) -> None:
        self.held_bytes -= size
        self._allowance._held_bytes -= size

    def close(self) -> None:
        self.give_back(self.held_bytes)
        self._allowance._num_streams -= 1


async def read_ahead(
    items: Iterator[Item],
    read: Callable[[Item, int], Coroutine[Any, Any, Result]],
    *,
    size_of: Callable[[Item], int],
    allowance: Allowance,
) -> AsyncGenerator[tuple[Item, Result], None]:
    """
    Yield each item with what was read for it, in order, while those after it are being read.

    Closing this ends the reads that are not wanted any more. The error of a read comes up in its turn.

    Args:
        items: What to read; taken only as far as reads are begun, and one more.
        read: From an item and the bytes that this stream wants before or with it; 0 where it is wanted now.
        size_of: Bytes that the read of an item holds, until it is yielded.
        allowance: Bounds what is begun before it is wanted; the item that is wanted now is read in any case.
    """
    window = _Window(allowance)
    begun: deque[tuple[Item, asyncio.Task[Result], int]] = deque()
    following = next(items, None)
    try:
        while begun or following is not None:
            if begun:
                # Wanted now.
                window.give_back(begun[0][2])
            while following is not None:
                size = size_of(following) if begun else 0
                if not window.take(size) and begun:
                    break
                task = asyncio.create_task(read(following, window.held_bytes))
                begun.append((following, task, size))
                following = next(items, None)
            item, task, _ = begun[0]
            result = await task
            begun.popleft()
            yield item, result
    finally:
        for _, task, _ in begun:
            task.cancel()
        if begun:
            await asyncio.wait([task for _, task, _ in begun])
        for _, task, _ in begun:
            # Marks an error as seen that nobody will ask for.
            if not task.cancelled():
                task.exception()
        window.close()
