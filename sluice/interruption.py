"""Ctrl-C and SIGTERM as cancellation: what runs cleans up after itself, and a second signal hurries it."""

import asyncio
import signal
import sys
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

_STOPPING = (signal.SIGINT, signal.SIGTERM)


async def run_until_stopped(work: Coroutine[Any, Any, None]) -> bool:
    """
    Run ``work`` to its end and return True, or until a signal and return False.

    The first SIGINT or SIGTERM cancels it, and what it cleans up is waited for; a second one cancels that too.

    Raises:
        Exception: What ``work`` raised.
    """
    loop = asyncio.get_running_loop()
    task = asyncio.ensure_future(work)
    for number in _STOPPING:
        loop.add_signal_handler(number, task.cancel)
    try:
        await asyncio.wait({task})
    finally:
        for number in _STOPPING:
            loop.remove_signal_handler(number)
        task.cancel()
    if task.cancelled():
        return False
    task.result()
    return True


def unwind_on_sigterm() -> None:
    """Have SIGTERM end this process as Ctrl-C does, cleaning up on the way, with the status that a shell expects."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))


@contextmanager
def asked_to_stop(report: Callable[[str], None]) -> Iterator[Callable[[], int | None]]:
    """
    Have the first SIGINT or SIGTERM only be noted, for a loop that asks; a second one ends the process' work at once.

    Args:
        report: Told at the first one.

    Yields:
        What returns the number of the first signal, None while there was none.
    """
    noted: list[int] = []

    def note(number: int, _: FrameType | None) -> None:
        if not noted:
            noted.append(number)
            report("stopping after this step; once more stops at once")
        elif number == signal.SIGTERM:
            sys.exit(128 + number)
        else:
            raise KeyboardInterrupt

    before = {number: signal.signal(number, note) for number in _STOPPING}
    try:
        yield lambda: noted[0] if noted else None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
