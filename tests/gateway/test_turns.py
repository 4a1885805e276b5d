import asyncio

import pytest

from gateway.turns import Turns


class Log:
    """Callers who take places one by one, and the order in which they got them."""

    def __init__(self, limit: int) -> None:
        self.turns = Turns(limit)
        self.came: list[str] = []

    def take(self, caller: str, num_places: int = 1) -> asyncio.Task[None]:
        return asyncio.create_task(self._take(caller, num_places))

    async def _take(self, caller: str, num_places: int) -> None:
        await self.turns.take(caller, num_places)
        self.came.append(caller)


async def settled() -> None:
    for _ in range(3):  # rounds of the loop: a task begins, its turn comes, it goes on
        await asyncio.sleep(0)


async def test_callers_take_turns_when_one_sends_many() -> None:
    log = Log(1)
    waiting = [log.take("many") for _ in range(4)]
    await settled()
    waiting += [log.take("few"), log.take("other")]
    await settled()
    for _ in range(6):
        log.turns.give_back(1)
        await settled()

    assert log.came == ["many", "many", "few", "other", "many", "many"]
    assert log.turns.num_taken == 0
    await asyncio.gather(*waiting)


async def test_no_more_are_let_in_than_there_are_places() -> None:
    log = Log(5)
    waiting = [log.take("a", 3), log.take("a", 3), log.take("b", 1)]
    await settled()
    # What is small does not go before what came first.
    assert log.came == ["a"]

    log.turns.give_back(3)
    await settled()
    assert (log.came, log.turns.num_taken) == (["a", "a", "b"], 4)
    await asyncio.gather(*waiting)


async def test_who_wants_more_than_there_is_goes_alone() -> None:
    log = Log(2)
    waiting = [log.take("a"), log.take("b", 9)]
    await settled()
    assert log.came == ["a"]
    log.turns.give_back(1)
    await asyncio.gather(*waiting)

    assert log.turns.num_taken == 9


@pytest.mark.parametrize("comes", [False, True])
async def test_turn_is_passed_on_when_who_waits_leaves(comes: bool) -> None:
    log = Log(1)
    await log.take("first")
    leaving, staying = log.take("a"), log.take("b")
    await settled()
    if comes:
        log.turns.give_back(1)
    leaving.cancel()
    await settled()
    if not comes:
        log.turns.give_back(1)
    await staying

    assert leaving.cancelled()
    assert (log.came, log.turns.num_taken) == (["first", "b"], 1)


async def test_who_comes_next_goes_on_when_the_one_it_waited_for_leaves() -> None:
    log = Log(5)
    waiting = [log.take("a", 3), log.take("a", 4), log.take("b", 2)]
    await settled()
    assert log.came == ["a"]
    waiting[1].cancel()
    await waiting[2]

    assert log.turns.num_taken == 5


async def test_expected_time_counts_what_goes_before_this_caller() -> None:
    log = Log(2)
    assert log.turns.expected_seconds("few", 1) == 0
    for _ in range(20):
        await log.take("many")
        log.turns.give_back(1, seconds=3)
    assert log.turns.expected_seconds("few", 1) == 0
    waiting = [log.take("many") for _ in range(102)]
    await settled()

    # Two are under way, and of those that wait one goes before.
    assert log.turns.expected_seconds("few", 1) == pytest.approx(3 * (1 + (2 + 1 + 1 - 2) / 2))
    assert log.turns.expected_seconds("many", 1) == pytest.approx(3 * (1 + (2 + 101 - 2) / 2))
    for one in waiting:
        one.cancel()
    await asyncio.wait(waiting)
