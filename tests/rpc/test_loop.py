import asyncio
import gc
import sys
from collections.abc import Iterator
from types import SimpleNamespace

import pytest

from rpc.loop import run


class Loop(asyncio.SelectorEventLoop):
    """What stands in for uvloop's."""


@pytest.fixture(autouse=True)
def own_collector() -> Iterator[None]:
    """What a process sets for itself stays in it."""
    before = gc.get_threshold()
    yield
    gc.set_threshold(*before)
    gc.unfreeze()


async def note(seen: list[type[asyncio.AbstractEventLoop]]) -> None:
    seen.append(type(asyncio.get_running_loop()))


def test_uvloop_is_used_where_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "uvloop", SimpleNamespace(new_event_loop=Loop))
    seen: list[type[asyncio.AbstractEventLoop]] = []
    run(note(seen))
    assert seen == [Loop]


def test_loop_is_pythons_own_where_it_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "uvloop", None)
    seen: list[type[asyncio.AbstractEventLoop]] = []
    run(note(seen))
    assert seen != [Loop]
