"""How late an event loop is: what holds it up holds up every call."""

import asyncio
from collections.abc import Callable

_INTERVAL_SECONDS = 0.1


class LagWatch:
    """
    Sets a timer over and over and tells how late the loop came to it; :meth:`stop` ends it.

    Args:
        observe: Told seconds, ten times a second.
    """

    def __init__(self, observe: Callable[[float], None]) -> None:
        self._observe = observe
        self._loop = asyncio.get_running_loop()
        self._set()

    def stop(self) -> None:
        """Set no timer any more."""
        self._timer.cancel()

    def _set(self) -> None:
        self._timer = self._loop.call_at(self._loop.time() + _INTERVAL_SECONDS, self._look)

    def _look(self) -> None:
        self._observe(max(self._loop.time() - self._timer.when(), 0.0))
        self._set()
