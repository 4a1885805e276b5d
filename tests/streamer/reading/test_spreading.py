"""One epoch from several replicas: whole, in order and bounded, whatever becomes of them."""

import asyncio
import socket
import time
from collections.abc import AsyncIterator
from dataclasses import replace

import numpy as np
import pytest

from streamer.client import Batch, Plan, Remainder, Retry, SampleClient
from streamer.errors import DataChangedError, RefusedError, SampleCorruptError, UnreachableError
from streamer.server import StreamerServer
from streamer.settings import StreamerSettings
from streamer.sources.split import Dataset, MemoryDataset, MemorySplit
from tests.streamer.relay import Relay
from tests.streamer.streams import streams_become

PLAN = Plan(dataset="mnist", seed=3, batch_size=20)
# 20 batches of 20 samples: 2.5 ranges of two batches.
RANGE_BYTES = 2 * 20 * 785
QUICK = Retry(first_delay_seconds=0.01, max_delay_seconds=0.05, stall_seconds=2, max_attempts=4)
NOWHERE = "127.0.0.1:1"


def reader(*addresses: str, retry: Retry = QUICK) -> SampleClient:
    return SampleClient(addresses, retry=retry, range_bytes=RANGE_BYTES)


async def read(client: SampleClient, plan: Plan = PLAN, start: int = 0, end: int = 0) -> list[Batch]:
    async with client:
        return [batch async for batch in client.batches(plan, start_position=start, end_position=end)]


def assert_equal(batches: list[Batch], others: list[Batch]) -> None:
    assert [batch.position for batch in batches] == [batch.position for batch in others]
    for batch, other in zip(batches, others, strict=True):
        np.testing.assert_array_equal(batch.indices, other.indices)
        np.testing.assert_array_equal(batch.images, other.images)
        np.testing.assert_array_equal(batch.labels, other.labels)
        assert (batch.next_position, batch.end_of_epoch) == (other.next_position, other.end_of_epoch)


@pytest.fixture
async def second(dataset: MemoryDataset) -> AsyncIterator[StreamerServer]:
    """Another replica of the server's data."""
    async with StreamerServer(StreamerSettings(port=0, metrics_port=0), [dataset]) as server:
        yield server


@pytest.fixture
async def expected(server: StreamerServer) -> list[Batch]:
    """The epoch as one replica sends it."""
    return await read(reader(server.address))


def as_is(call: int, number: int, raw: bytes) -> bytes:
    return raw


async def test_epoch_of_two_replicas_is_that_of_one(
    server: StreamerServer, second: StreamerServer, expected: list[Batch]
) -> None:
    async with Relay(server.address, as_is) as one, Relay(second.address, as_is) as two:
        assert_equal(await read(reader(one.address, two.address)), expected)

    assert min(one.num_calls, two.num_calls) > 3, "both took part"
    assert one.num_calls + two.num_calls == 25, "each range once"


@pytest.mark.parametrize("remainder", Remainder)
@pytest.mark.parametrize(("world_size", "rank"), [(1, 0), (3, 1), (64, 63)])
@pytest.mark.parametrize(("start", "end"), [(0, 0), (137, 0), (137, 500), (990, 0), (1000, 0), (500, 500)])
async def test_every_share_of_two_replicas_is_that_of_one(
    server: StreamerServer,
    second: StreamerServer,
    remainder: Remainder,
    world_size: int,
    rank: int,
    start: int,
    end: int,
) -> None:
    plan = Plan(dataset="mnist", seed=1, batch_size=9, world_size=world_size, rank=rank, remainder=remainder)

    spread = await read(reader(server.address, second.address), plan, start, end)
    assert_equal(spread, await read(reader(server.address), plan, start, end))


async def test_replica_that_dies_in_the_middle_costs_no_batch_and_repeats_none(
    server: StreamerServer, second: StreamerServer, expected: list[Batch]
) -> None:
    received = []
    async with reader(server.address, second.address) as client:
        async for batch in client.batches(PLAN):
            received.append(batch)
            if len(received) == 5:
                await second.grpc_server.stop(0)

    assert_equal(received, expected)


async def test_draining_replica_is_left_for_the_other(
    server: StreamerServer, second: StreamerServer, expected: list[Batch]
) -> None:
    second.drain()
    assert_equal(await read(reader(server.address, second.address)), expected)


async def test_replica_that_was_never_there_is_done_without(server: StreamerServer, expected: list[Batch]) -> None:
    assert_equal(await read(reader(NOWHERE, server.address)), expected)


def spoiled(call: int, number: int, raw: bytes) -> bytes:
    """Flip a bit in the middle: most of a message are pixels."""
    middle = len(raw) // 2
    return raw[:middle] + bytes([raw[middle] ^ 1]) + raw[middle + 1 :]


async def test_damaged_batches_of_one_replica_come_from_the_other(
    server: StreamerServer, second: StreamerServer, expected: list[Batch]
) -> None:
    async with Relay(second.address, spoiled) as broken:
        assert_equal(await read(reader(server.address, broken.address)), expected)

    assert broken.num_calls > 0


async def test_late_range_is_asked_of_the_other_replica(
    server: StreamerServer, second: StreamerServer, expected: list[Batch]
) -> None:
    patient = Retry(first_delay_seconds=0.01, stall_seconds=60)
    async with Relay(second.address, as_is, stalls_first=True) as stalled:
        started = time.monotonic()
        assert_equal(await read(reader(server.address, stalled.address, retry=patient)), expected)

    assert stalled.num_calls > 0
    assert time.monotonic() - started < 30, "half of the time after which a silent stream counts as broken"


@pytest.mark.parametrize("num_samples", [1000, 900])
async def test_replica_with_other_data_is_left_out(
    server: StreamerServer, dataset: MemoryDataset, expected: list[Batch], num_samples: int
) -> None:
    train = dataset.splits["train"]
    images, labels = train.images[:num_samples][::-1].copy(), train.labels[:num_samples].copy()
    changed = Dataset("mnist", (), {"train": MemorySplit("train", images, labels, num_classes=10)})
    pinned = replace(PLAN, fingerprint=train.fingerprint)
    async with StreamerServer(StreamerSettings(port=0, metrics_port=0), [changed]) as stranger:
        assert_equal(await read(reader(server.address, stranger.address)), expected)
        assert_equal(await read(reader(server.address, stranger.address), pinned), expected)
        assert_equal(await read(reader(stranger.address, server.address), pinned), expected)

        await server.stop()
        with pytest.raises(DataChangedError, match="this replica serves"):
            await read(reader(server.address, stranger.address), pinned)


async def test_plan_that_no_replica_serves_is_refused(server: StreamerServer, second: StreamerServer) -> None:
    for plan, told in (
        (Plan(dataset="pets"), "no 'pets'"),
        (Plan(dataset="mnist", batch_size=9999), "batch_size: 9999"),
    ):
        with pytest.raises(RefusedError, match=told):
            await read(reader(server.address, second.address), plan)
    with pytest.raises(RefusedError, match="start_position: 1001"):
        await read(reader(server.address, second.address), start=1001)


async def test_batch_that_is_damaged_everywhere_is_an_error(server: StreamerServer, second: StreamerServer) -> None:
    async with Relay(server.address, spoiled) as one, Relay(second.address, spoiled) as two:
        with pytest.raises(SampleCorruptError, match="CRC-32C"):
            await read(reader(one.address, two.address))


async def test_all_replicas_gone_are_named(server: StreamerServer, second: StreamerServer) -> None:
    async with reader(server.address, second.address) as client:
        stream = client.batches(PLAN)
        await anext(stream)
        await server.grpc_server.stop(0)
        await second.grpc_server.stop(0)
        with pytest.raises(UnreachableError, match=rf"{server.address}, {second.address}"):
            _ = [batch async for batch in stream]


async def test_reader_that_pauses_for_longer_than_it_waits_goes_on(
    server: StreamerServer, second: StreamerServer, expected: list[Batch]
) -> None:
    received = []
    async with reader(server.address, second.address, retry=Retry(next_batch_seconds=0.3)) as client:
        async for batch in client.batches(PLAN):
            received.append(batch)
            if len(received) in (1, 20):
                await asyncio.sleep(0.5)  # a validation run

    assert_equal(received, expected)


async def test_replica_that_takes_connections_and_answers_nothing_is_done_without(
    server: StreamerServer, expected: list[Batch]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as hung:
        address = "{}:{}".format(*hung.getsockname())
        started = time.monotonic()
        assert_equal(await read(reader(address, server.address, retry=Retry(stall_seconds=60))), expected)

    assert time.monotonic() - started < 30, "half of the time after which a silent stream counts as broken"


async def test_leaving_the_loop_ends_every_call(server: StreamerServer, second: StreamerServer) -> None:
    async with reader(server.address, second.address) as client:
        stream = client.batches(PLAN)
        await anext(stream)
        await stream.aclose()
        await streams_become(server, 0)
        await streams_become(second, 0)
        assert len(asyncio.all_tasks()) < 20


async def test_reader_that_stops_is_sent_no_more_than_its_window(
    server: StreamerServer, second: StreamerServer
) -> None:
    async with (
        Relay(server.address, as_is) as one,
        Relay(second.address, as_is) as two,
        reader(one.address, two.address) as client,
    ):
        stream = client.batches(PLAN)
        await anext(stream)
        while one.num_calls + two.num_calls < 5:  # noqa: ASYNC110 - the relays count, and tell nobody
            await asyncio.sleep(0)
        await streams_become(server, 0)
        await streams_become(second, 0)
        assert one.num_calls + two.num_calls == 5, "2n + 1 ranges, and no more"
        await stream.aclose()
