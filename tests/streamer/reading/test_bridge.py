import asyncio
import threading
import time
from collections.abc import AsyncGenerator, Callable

import pytest

from streamer.errors import ReaderError
from streamer.reading.bridge import Bridge


def counting(made: list[int], size: int = 1000) -> Callable[[], AsyncGenerator[int, None]]:
    async def count() -> AsyncGenerator[int, None]:
        for number in range(size):
            made.append(number)
            yield number

    return count


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name == "sluice-batch-reader"]


@pytest.mark.parametrize("ahead", [1, 2, 3, 8])
def test_items_come_in_order_and_never_too_many_ahead(ahead: int) -> None:
    made: list[int] = []
    taken = 0
    for item in Bridge(counting(made), ahead=ahead):
        assert item == taken
        taken += 1
        # One is made before it is seen that there is no room.
        assert len(made) - taken <= ahead + 1

    assert (taken, threads()) == (1000, [])


def test_full_bridge_goes_on_once_there_is_room() -> None:
    made: list[int] = []
    with Bridge(counting(made), ahead=4) as bridge:
        items = iter(bridge)
        assert next(items) == 0
        deadline = time.monotonic() + 10
        while len(made) < 4 and time.monotonic() < deadline:
            time.sleep(0.001)
        assert len(made) in (4, 5)

        assert list(items) == list(range(1, 1000))


def test_closing_closes_the_generator() -> None:
    closed = threading.Event()

    async def endless() -> AsyncGenerator[int, None]:
        try:
            while True:
                yield 1
        finally:
            closed.set()

    for _ in Bridge(endless, ahead=2):
        break

    assert closed.wait(10)
    assert threads() == []


def test_error_comes_after_what_was_made_before_it() -> None:
    async def failing() -> AsyncGenerator[int, None]:
        yield 1
        raise ValueError("enough")

    items = iter(Bridge(failing, ahead=8))

    assert next(items) == 1
    with pytest.raises(ValueError, match="enough"):
        next(items)
    assert threads() == []


def test_bridge_that_nobody_steps_on_has_no_thread() -> None:
    made: list[int] = []
    items = iter(Bridge(counting(made), ahead=8))

    assert (threads(), made) == ([], [])
    assert next(items) == 0
    assert threads() == ["sluice-batch-reader"]
    items.close()
    assert threads() == []


def test_bridge_closed_before_the_first_step_makes_nothing() -> None:
    made: list[int] = []
    with Bridge(counting(made), ahead=8) as bridge:
        items = iter(bridge)

    assert (list(items), made, threads()) == ([], [], [])


def test_cancellation_that_nobody_asked_for_is_no_end() -> None:
    async def cancelled() -> AsyncGenerator[int, None]:
        yield 1
        raise asyncio.CancelledError

    items = iter(Bridge(cancelled, ahead=8))

    assert next(items) == 1
    with pytest.raises(ReaderError, match="reading was cancelled before its end"):
        next(items)
    assert threads() == []


def test_bridge_is_crossed_once() -> None:
    with Bridge(counting([]), ahead=1) as bridge:
        iter(bridge)
        with pytest.raises(ReaderError, match="read once"):
            iter(bridge)
