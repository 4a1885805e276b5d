import asyncio
from collections.abc import Iterator
from threading import Event
from typing import Any

import pytest

from gateway.decoders import Decoders


@pytest.fixture
def decoders() -> Iterator[Decoders]:
    opened = Decoders(1)
    yield opened
    opened.close()


@pytest.fixture
def hold() -> Iterator[Event]:
    """What work waits for; set in the end."""
    event = Event()
    yield event
    event.set()


def begun(decoders: Decoders, work: Any, caller: str) -> "asyncio.Task[Any]":
    return asyncio.create_task(decoders.run(work, caller))


async def test_caller_with_one_image_waits_for_no_flood(decoders: Decoders, hold: Event) -> None:
    done = list[str]()
    work = [begun(decoders, hold.wait, "flood")]
    work += [begun(decoders, lambda: done.append("flood"), "flood") for _ in range(50)]
    await asyncio.sleep(0)  # all of the flood waits
    work.append(begun(decoders, lambda: done.append("other"), "other"))
    await asyncio.sleep(0)
    hold.set()
    await asyncio.gather(*work)

    # At its first turn, behind one of the flood's.
    assert done.index("other") == 1


async def test_work_of_a_caller_who_left_is_not_done(decoders: Decoders, hold: Event) -> None:
    done = list[str]()
    running = begun(decoders, hold.wait, "a")
    waiting = begun(decoders, lambda: done.append("left"), "a")
    await asyncio.sleep(0)
    waiting.cancel()
    running.cancel()
    await asyncio.wait((running, waiting))
    last = begun(decoders, lambda: done.append("last"), "b")
    await asyncio.sleep(0)
    assert not last.done()  # the thread is busy, whoever waits for it
    hold.set()
    await last

    assert done == ["last"]


async def test_work_that_fails_fails_its_caller_and_the_next_goes_on(decoders: Decoders) -> None:
    with pytest.raises(ValueError, match="invalid literal"):
        await decoders.run(lambda: int("no number"), "a")

    assert await decoders.run(lambda: 7, "a") == 7
