"""An event loop that waits for nothing: its clock jumps to the next moment that something was scheduled for."""

import asyncio
import selectors
from collections.abc import Callable, Coroutine
from typing import Any

InVirtualTime = Callable[[Coroutine[Any, Any, None]], None]


class _SkippingSelector(selectors.SelectSelector):
    """Passes the time that the loop would wait at once."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        assert timeout is not None, "everything waits for what will never happen"
        self.now += max(0.0, timeout)
        return super().select(0)


class VirtualLoop(asyncio.SelectorEventLoop):
    """Whose clock shows exactly the moments that something was scheduled for."""

    def __init__(self) -> None:
        self._skipping = _SkippingSelector()
        super().__init__(self._skipping)

    def time(self) -> float:
        return self._skipping.now

    def hang(self, seconds: float) -> None:
        """Let time pass as if a callback had taken so long."""
        self._skipping.now += seconds
