import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing

import pytest

from gateway.conversation import converse


async def numbers(count: int, read: list[int]) -> AsyncIterator[int]:
    for number in range(count):
        read.append(number)
        yield number


def taking(answer: Callable[[int], Awaitable[int]]) -> Callable[[int], Awaitable[Awaitable[int]]]:
    """Return what takes in each request at once."""

    async def take(number: int) -> Awaitable[int]:
        return answer(number)

    return take


async def test_answers_come_as_they_are_ready() -> None:
    first_is_late = asyncio.Event()

    async def answer(number: int) -> int:
        if number == 0:
            await first_is_late.wait()
        elif number == 4:
            first_is_late.set()
        return number

    assert [told async for told in converse(numbers(5, []), taking(answer), window=8)] == [1, 2, 3, 4, 0]


@pytest.mark.parametrize("window", [1, 3])
async def test_who_does_not_take_answers_is_not_read_any_further(window: int) -> None:
    read = list[int]()

    async def answer(number: int) -> int:
        return number

    async with aclosing(converse(numbers(100, read), taking(answer), window=window)) as answers:
        assert await anext(answers) == 0
        for _ in range(100):
            await asyncio.sleep(0)
        assert len(read) == window


async def test_nothing_is_read_while_a_request_waits_to_be_taken_in() -> None:
    read, has_room = list[int](), asyncio.Event()

    async def answer(number: int) -> int:
        return number

    async def take(number: int) -> Awaitable[int]:
        await has_room.wait()
        return answer(number)

    async with aclosing(converse(numbers(9, read), take, window=8)) as answers:
        first = asyncio.ensure_future(anext(answers))
        for _ in range(100):
            await asyncio.sleep(0)
        assert read == [0]
        has_room.set()
        assert [await first, *[told async for told in answers]] == list(range(9))


async def test_conversation_without_requests_ends() -> None:
    async def answer(number: int) -> int:
        return number

    assert [told async for told in converse(numbers(0, []), taking(answer), window=1)] == []


async def test_error_of_the_reader_ends_it_at_once() -> None:
    async def broken() -> AsyncIterator[int]:
        yield 1
        raise ConnectionError("cut")

    async def never(number: int) -> int:
        await asyncio.Event().wait()
        return number

    with pytest.raises(ConnectionError, match="cut"):
        await anext(converse(broken(), taking(never), window=4))


async def test_error_of_an_answer_ends_it() -> None:
    async def broken(number: int) -> int:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await anext(converse(numbers(3, []), taking(broken), window=4))


async def test_closing_cancels_what_is_under_way() -> None:
    ended = list[int]()

    async def hang(number: int) -> int:
        try:
            if number:
                await asyncio.Event().wait()
        finally:
            ended.append(number)
        return number

    async with aclosing(converse(numbers(3, []), taking(hang), window=4)) as answers:
        await anext(answers)

    assert sorted(ended) == [0, 1, 2]
