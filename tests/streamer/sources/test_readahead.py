import asyncio
from collections.abc import AsyncGenerator, Iterator

import pytest

from streamer.errors import StorageError
from streamer.sources.readahead import Allowance, read_ahead


class Reads:
    """Reads of ten bytes each that end when told to, and who began which."""

    def __init__(self) -> None:
        self.begun: list[tuple[int, int]] = []
        self.ended: list[int] = []
        self.may_end = asyncio.Event()

    async def read(self, item: int, ahead_bytes: int) -> str:
        self.begun.append((item, ahead_bytes))
        try:
            await self.may_end.wait()
        finally:
            self.ended.append(item)
        if item < 0:
            raise StorageError("s3://b/x", "gone")
        return str(item)

    def of(self, items: Iterator[int], allowance: Allowance) -> AsyncGenerator[tuple[int, str], None]:
        return read_ahead(items, self.read, size_of=lambda item: 10, allowance=allowance)


@pytest.mark.parametrize("max_bytes", [0, 9, 10, 35, 1000])
async def test_items_come_in_order_with_what_was_read(max_bytes: int) -> None:
    reads, allowance = Reads(), Allowance(max_bytes)
    reads.may_end.set()

    assert [item async for item in reads.of(iter(range(9)), allowance)] == [(n, str(n)) for n in range(9)]
    assert allowance.held_bytes == 0
    assert [item async for item in reads.of(iter(()), allowance)] == []


async def test_as_many_are_begun_as_are_allowed_beside_the_one_that_is_wanted() -> None:
    reads, allowance = Reads(), Allowance(35)
    each = reads.of(iter(range(9)), allowance)
    first = asyncio.ensure_future(anext(each))
    for _ in range(5):
        await asyncio.sleep(0)
    assert reads.begun == [(0, 0), (1, 10), (2, 20), (3, 30)]
    assert allowance.held_bytes == 30

    reads.may_end.set()
    assert await first == (0, "0")
    assert await anext(each) == (1, "1")
    assert allowance.held_bytes == 30
    await each.aclose()


async def test_streams_share_what_is_allowed() -> None:
    reads, allowance = Reads(), Allowance(100)
    reads.may_end.set()
    first, second = reads.of(iter(range(99)), allowance), reads.of(iter(range(100, 199)), allowance)
    await anext(first)
    assert allowance.held_bytes == 100
    await anext(second)
    assert allowance.held_bytes <= 100

    for _ in range(20):
        await anext(first)
        await anext(second)
        assert allowance.held_bytes <= 100
    # The last ones are tasks that have not run yet.
    await asyncio.sleep(0)
    begun = [item for item, _ in reads.begun]
    assert max(item for item in begun if item < 100) == 20 + 5
    assert max(begun) == 120 + 5
    await first.aclose()
    await second.aclose()
    assert allowance.held_bytes == 0


async def test_closing_ends_what_was_begun() -> None:
    reads, allowance = Reads(), Allowance(35)
    each = reads.of(iter([0, 1, -2, 3, 4]), allowance)
    waiting = asyncio.ensure_future(anext(each))
    for _ in range(5):
        await asyncio.sleep(0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting

    assert sorted(reads.ended) == [-2, 0, 1, 3]
    assert allowance.held_bytes == 0


async def test_error_comes_up_in_its_turn() -> None:
    reads, allowance = Reads(), Allowance(1000)
    reads.may_end.set()
    each = reads.of(iter([0, 1, -2, 3]), allowance)

    assert [await anext(each), await anext(each)] == [(0, "0"), (1, "1")]
    with pytest.raises(StorageError, match="gone"):
        await anext(each)
    assert allowance.held_bytes == 0
