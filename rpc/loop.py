"""The event loop that a process runs on."""

import asyncio
import gc
from collections.abc import Callable, Coroutine
from importlib import import_module
from typing import Any

# New objects beyond those that are gone again, before the garbage collector looks for circles among them; Python's own
# number, 700, is reached whenever a few dozen calls come at once, which leave circles of a few small objects each.
_NEW_OBJECTS = 10_000


def run(main: Coroutine[Any, Any, None]) -> None:
    """
    Do what :func:`asyncio.run` does, with less CPU for each call.

    On uvloop where that is installed; and the garbage collector looks more seldom, and never at what was imported.
    """
    gc.freeze()
    gc.set_threshold(_NEW_OBJECTS)
    with asyncio.Runner(loop_factory=_factory()) as runner:
        runner.run(main)


def _factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    try:
        factory: Callable[[], asyncio.AbstractEventLoop] = import_module("uvloop").new_event_loop
    except ModuleNotFoundError:
        return None
    return factory
