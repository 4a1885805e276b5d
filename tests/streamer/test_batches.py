import asyncio
import struct
from collections.abc import AsyncGenerator, Iterable, Iterator

import google_crc32c
import numpy as np
import pytest

from streamer import batches
from streamer.batches import AssembledBatch
from streamer.errors import StorageError
from streamer.order import Order, Share, shares
from streamer.plan import Plan
from streamer.sources.split import MemorySplit
from streamer.transforms.pool import TransformPool
from streamer.transforms.transform import parse

PLAN = Plan(dataset="mnist", seed=9, epoch=2, batch_size=30)
AS_STORED = parse("", image_shape=(4, 5))


def assemble(data: MemorySplit, plan: Plan, wanted: Iterable[Share]) -> AsyncGenerator[AssembledBatch, None]:
    return batches.assemble(data, plan, wanted, AS_STORED, None)


def split(num_samples: int = 100) -> MemorySplit:
    images = np.random.default_rng(1).integers(0, 256, (num_samples, 4, 5), dtype=np.uint8)
    return MemorySplit("train", images, np.arange(num_samples, dtype=np.uint8) % 10, num_classes=10)


async def test_batches_hold_the_samples_of_the_order() -> None:
    data = split()
    order = Order(100, fingerprint=data.fingerprint, seed=9, epoch=2).indices(np.arange(100))

    assembled = [batch async for batch in assemble(data, PLAN, shares(PLAN, 100))]
    assert [len(batch.indices) for batch in assembled] == [30, 30, 30, 10]
    assert np.concatenate([batch.indices for batch in assembled]).tolist() == order.tolist()
    for batch in assembled:
        assert np.array_equal(batch.images, data.images[batch.indices])
        assert np.array_equal(batch.labels, data.labels[batch.indices])


async def test_blocks_of_positions_do_not_show() -> None:
    """9,000 samples are more than one block of look-ups."""
    data = split(9000)
    plan = Plan(dataset="mnist", seed=9, batch_size=1000)

    indices = np.concatenate([batch.indices async for batch in assemble(data, plan, shares(plan, 9000))])
    assert np.array_equal(np.sort(indices), np.arange(9000))


async def test_checksum_is_the_one_of_the_contract() -> None:
    data = split()
    plan = Plan(dataset="mnist", epoch=3, world_size=2, rank=1, batch_size=20)

    first = await anext(assemble(data, plan, shares(plan, 100)))
    header = struct.pack("<7Q", 0, 3, 2, 1, 0, 40, 20) + struct.pack("<20Q", *range(20, 40))
    content = header + data.images[20:40].tobytes() + data.labels[20:40].tobytes()
    assert first.crc32c == google_crc32c.value(content)


async def test_nothing_is_gathered_before_it_is_asked_for() -> None:
    taken = []

    def watched() -> Iterator[Share]:
        for share in shares(PLAN, 10_000):
            taken.append(share)
            yield share

    assembled = assemble(split(10_000), PLAN, watched())
    assert taken == []
    await anext(assembled)
    assert len(taken) * PLAN.batch_size <= 8192


def test_batch_of_the_largest_size_fits_its_message() -> None:
    assert batches.max_samples(split(), AS_STORED, 256) == 0
    assert batches.max_samples(split(), AS_STORED, 256 + 26 * 7) == 7
    as_floats = parse("normalise(mean=0,std=1)", image_shape=(4, 5))
    assert batches.max_samples(split(), as_floats, 256 + (20 * 4 + 1 + 5) * 7) == 7


async def test_transformed_images_are_what_the_checksum_is_of() -> None:
    data, transform = split(), parse("normalise(mean=0,std=1)", image_shape=(4, 5))
    async with TransformPool(0) as pool:
        first = await anext(batches.assemble(data, PLAN, shares(PLAN, 100), transform, pool))

    expected = transform.apply(data.images[first.indices], first.indices.astype(np.int64), seed=9, epoch=2)
    np.testing.assert_array_equal(first.images, expected)
    header = struct.pack("<7Q", 9, 2, 1, 0, 0, 30, 30) + first.indices.tobytes()
    assert first.crc32c == google_crc32c.value(header + expected.tobytes() + data.labels[first.indices].tobytes())


async def test_ahead_makes_what_was_not_asked_for_yet_and_no_more() -> None:
    made = []

    async def items() -> AsyncGenerator[int, None]:
        for number in range(10):
            made.append(number)
            yield number

    found = batches.ahead(items(), 2)
    assert await anext(found) == 0
    await asyncio.sleep(0)
    # One taken, two that wait, one in the maker's hands.
    assert len(made) <= 4
    assert [number async for number in found] == list(range(1, 10))


async def test_ahead_passes_an_error_on_in_its_place_and_closes_its_items() -> None:
    closed = asyncio.Event()

    async def items() -> AsyncGenerator[int, None]:
        try:
            yield 1
            raise LookupError
        finally:
            closed.set()

    found = batches.ahead(items(), 2)
    assert await anext(found) == 1
    with pytest.raises(LookupError):
        await anext(found)
    assert closed.is_set()


async def test_ahead_closed_early_closes_its_items() -> None:
    closed = asyncio.Event()

    async def items() -> AsyncGenerator[int, None]:
        try:
            while True:
                yield 1
        finally:
            closed.set()

    found = batches.ahead(items(), 2)
    await anext(found)
    await found.aclose()
    assert closed.is_set()


async def test_ahead_does_not_wait_for_items_that_were_cut_off() -> None:
    async def items() -> AsyncGenerator[int, None]:
        yield 1
        raise asyncio.CancelledError  # as a closed pool of threads does

    found = batches.ahead(items(), 2)
    assert await anext(found) == 1
    with pytest.raises(StorageError, match="was closed"):
        await anext(found)
