import asyncio
import threading
import time
from collections.abc import Callable

import grpc
import numpy as np
import pytest

from protos.streamer.v1 import sample_service_pb2 as pb
from streamer.checksum import batch_checksum
from streamer.client import Batch, BatchReader, Plan, Remainder, Retry, SampleClient
from streamer.errors import (
    DataChangedError,
    ReaderError,
    RefusedError,
    SampleCorruptError,
    StreamerError,
    UnreachableError,
)
from streamer.server import StreamerServer
from streamer.settings import StreamerSettings
from streamer.sources.split import Dataset, MemoryDataset, MemorySplit
from tests.streamer.relay import Relay, Spoil
from tests.streamer.streams import streams_become

PLAN = Plan(dataset="mnist", seed=7, batch_size=64)
QUICK = Retry(max_attempts=4, first_batch_seconds=5, next_batch_seconds=5, first_delay_seconds=0.001)
NOWHERE = "127.0.0.1:1"


async def read(client: SampleClient, plan: Plan = PLAN, **options: int) -> list[Batch]:
    return [batch async for batch in client.batches(plan, **options)]


def assert_whole(batches: list[Batch], dataset: MemoryDataset) -> None:
    """Every sample of the training split once, in the order of PLAN, and each the file's own."""
    train = dataset.splits["train"]
    indices = np.concatenate([batch.indices for batch in batches])
    assert np.array_equal(np.sort(indices), np.arange(train.num_samples))
    assert np.array_equal(np.concatenate([batch.labels for batch in batches]), train.labels[indices])
    assert np.array_equal(np.concatenate([batch.images for batch in batches]), train.images[indices])


# A stream that goes well


async def test_batches_are_the_epoch_in_numpy(client: SampleClient, dataset: MemoryDataset) -> None:
    batches = await read(client)

    assert_whole(batches, dataset)
    assert {(batch.images.dtype, batch.labels.dtype, batch.indices.dtype) for batch in batches} == {
        (np.dtype(np.uint8), np.dtype(np.int64), np.dtype(np.int64))
    }
    assert batches[0].images.shape == (64, 28, 28)
    assert [batch.position for batch in batches] == [0, *(batch.next_position for batch in batches[:-1])]
    assert [batch.end_of_epoch for batch in batches].index(True) == len(batches) - 1


async def test_start_and_end_position_cut_the_same_epoch(client: SampleClient) -> None:
    whole = await read(client)
    part = await read(client, start_position=128, end_position=256)

    assert [batch.indices.tolist() for batch in part] == [batch.indices.tolist() for batch in whole[2:4]]


async def test_start_at_the_end_gives_no_batch(client: SampleClient) -> None:
    assert await read(client, start_position=1000) == []


async def test_rank_without_a_sample_left_ends_without_an_empty_batch(client: SampleClient) -> None:
    plan = Plan(dataset="mnist", split="test", world_size=11, rank=10, batch_size=9)

    assert [len(batch.labels) for batch in await read(client, plan)] == [9]


async def test_drop_gives_equal_batches(client: SampleClient) -> None:
    batches = await read(client, Plan(dataset="mnist", batch_size=300, remainder=Remainder.DROP))

    assert [len(batch.labels) for batch in batches] == [300, 300, 300]


async def test_datasets_say_what_is_served(client: SampleClient, dataset: MemoryDataset) -> None:
    (listed,) = await client.datasets()

    assert (listed.name, listed.class_names) == ("mnist", ())
    assert listed.splits["train"].num_samples == 1000
    assert listed.splits["test"].image_shape == (28, 28)
    assert listed.splits["test"].fingerprint == dataset.splits["test"].fingerprint


async def test_many_streams_share_one_client(client: SampleClient, dataset: MemoryDataset) -> None:
    for batches in await asyncio.gather(*(read(client) for _ in range(8))):
        assert_whole(batches, dataset)


# Refusals


@pytest.mark.parametrize("rank", range(4))
async def test_last_batch_of_a_rank_says_so_where_others_get_one_more(client: SampleClient, rank: int) -> None:
    """1,000 samples are 35 global batches of 28, and 20 are left: of 4 ranks all get 5; of 2 that are left only two."""
    for start in (0, 982):
        plan = Plan(dataset="mnist", world_size=4, rank=rank, batch_size=4)
        batches = await read(client, plan, start_position=start)
        assert [batch.end_of_epoch for batch in batches] == [False] * (len(batches) - 1) + [True]


@pytest.mark.parametrize(
    ("plan", "start", "status", "words"),
    [
        (Plan(dataset="cifar"), 0, "NOT_FOUND", "no 'cifar'; known are mnist"),
        (Plan(dataset="mnist", split="dev"), 0, "INVALID_ARGUMENT", "plan.split"),
        (Plan(dataset="mnist", batch_size=9000), 0, "INVALID_ARGUMENT", "plan.batch_size: 9000; 1 to 8192"),
        (Plan(dataset="mnist"), 1001, "OUT_OF_RANGE", "start_position: 1001"),
    ],
)
async def test_refused_plan_is_an_error_at_once(
    client: SampleClient, plan: Plan, start: int, status: str, words: str
) -> None:
    with pytest.raises(RefusedError, match=words) as caught:
        await read(client, plan, start_position=start)

    assert caught.value.status == status


async def test_data_other_than_the_plans_is_refused(client: SampleClient) -> None:
    with pytest.raises(DataChangedError, match="this replica serves"):
        await read(client, Plan(dataset="mnist", fingerprint=b"other"))


async def test_client_outside_its_block_says_so() -> None:
    with pytest.raises(ReaderError, match="async with"):
        await SampleClient(NOWHERE).datasets()


# A stream that goes wrong


async def broken_at(
    server: StreamerServer, spoil: Spoil, *, code: grpc.StatusCode = grpc.StatusCode.UNAVAILABLE
) -> tuple[list[Batch], int]:
    """Read an epoch through a relay; return it and how many streams that took."""
    async with Relay(server.address, spoil, code=code) as relay, SampleClient(relay.address, retry=QUICK) as client:
        return await read(client), relay.num_calls


@pytest.mark.parametrize("code", [grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED, grpc.StatusCode.OK])
async def test_stream_that_breaks_is_continued_and_nothing_comes_twice(
    server: StreamerServer, dataset: MemoryDataset, code: grpc.StatusCode
) -> None:
    batches, num_calls = await broken_at(server, lambda call, number, raw: raw if number < 3 else None, code=code)

    assert_whole(batches, dataset)
    assert num_calls == 6, "16 batches, 3 a stream"


def flipped(raw: bytes) -> bytes:
    """Flip a pixel; the streamer writes them first."""
    return raw[:100] + bytes([raw[100] ^ 1]) + raw[101:]


async def test_damaged_batch_is_read_again(server: StreamerServer, dataset: MemoryDataset) -> None:
    batches, num_calls = await broken_at(
        server, lambda call, number, raw: flipped(raw) if (call, number) == (1, 5) else raw
    )
    assert_whole(batches, dataset)
    assert num_calls == 2


async def test_batch_damaged_every_time_is_an_error_that_names_its_position(server: StreamerServer) -> None:
    with pytest.raises(SampleCorruptError, match="batch at position 64: CRC-32C") as caught:
        await broken_at(server, lambda call, number, raw: flipped(raw) if call > 1 or number == 1 else raw)

    assert caught.value.position == 64


async def test_missing_batch_is_read_again(server: StreamerServer, dataset: MemoryDataset) -> None:
    held: list[bytes] = []

    def swap(call: int, number: int, raw: bytes) -> bytes:
        held.append(raw)
        return held[-2] if (call, number) == (1, 4) else raw

    batches, num_calls = await broken_at(server, swap)
    assert_whole(batches, dataset)
    assert num_calls == 2


async def test_batch_with_too_few_pixels_is_refused_though_its_checksum_fits(server: StreamerServer) -> None:
    def cut(call: int, number: int, raw: bytes) -> bytes:
        batch = pb.Batch.FromString(raw)
        batch.images = batch.images[:-1]
        batch.crc32c = batch_checksum(
            PLAN,
            position=batch.position,
            next_position=batch.next_position,
            indices=np.array(batch.indices, np.uint64),
            images=batch.images,
            labels=batch.labels,
        )
        return batch.SerializeToString()

    with pytest.raises(SampleCorruptError, match="50175 bytes of images and 64 of labels for 64 samples"):
        await broken_at(server, cut)


async def test_draining_replica_is_left_and_read_again(server: StreamerServer, dataset: MemoryDataset) -> None:
    async with StreamerServer(StreamerSettings(port=0, metrics_port=0), [dataset]) as other:

        def drain_after_four(call: int, number: int, raw: bytes) -> bytes:
            if (call, number) == (1, 3):
                server.drain()
                relay.upstream = other.address
            return raw

        relay = Relay(server.address, drain_after_four)
        # So little that the epoch has not been sent when the drain begins.
        async with relay, SampleClient(relay.address, retry=QUICK, window_bytes=100_000) as client:
            assert_whole(await read(client), dataset)
    assert relay.num_calls == 2


async def test_replica_with_other_data_is_refused_in_the_middle(server: StreamerServer, dataset: MemoryDataset) -> None:
    train = dataset.splits["train"]
    changed = MemorySplit("train", train.images[::-1].copy(), train.labels.copy(), num_classes=10)
    async with StreamerServer(
        StreamerSettings(port=0, metrics_port=0), [Dataset("mnist", (), {"train": changed})]
    ) as other:

        def break_after_two(call: int, number: int, raw: bytes) -> bytes | None:
            relay.upstream = other.address
            return raw if number < 2 else None

        relay = Relay(server.address, break_after_two)
        async with relay, SampleClient(relay.address, retry=QUICK) as client:
            with pytest.raises(DataChangedError, match="this replica serves"):
                await read(client)


async def test_connection_that_breaks_as_the_epoch_ends_costs_nothing(
    client: SampleClient, dataset: MemoryDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def broken(call: object) -> None:
        raise grpc.aio.InternalError("what grpc.aio raises when the connection goes as it half-closes the call")

    monkeypatch.setattr("grpc.aio._call.StreamStreamCall.done_writing", broken)

    assert_whole(await read(client), dataset)


async def test_streamer_that_is_killed_and_comes_back_continues_the_stream(dataset: MemoryDataset) -> None:
    first = StreamerServer(StreamerSettings(port=0, metrics_port=0), [dataset])
    async with first, SampleClient(first.address) as client:
        batches, second = [], None
        async for batch in client.batches(PLAN):
            batches.append(batch)
            if len(batches) == 3:
                await first.stop()
                port = int(first.address.rpartition(":")[2])
                second = StreamerServer(StreamerSettings(port=port, metrics_port=0), [dataset])
                await second.__aenter__()
        assert_whole(batches, dataset)
        assert second is not None
        await second.stop()


async def test_nobody_at_the_address_is_named_with_what_to_check() -> None:
    async with SampleClient(NOWHERE, retry=QUICK) as client:
        for attempt in (read(client), client.datasets(), client.wait_ready(timeout_seconds=0.2)):
            with pytest.raises(UnreachableError, match=r"no streamer answers at 127.0.0.1:1.*refused.*sluice streamer"):
                await attempt


async def test_streamer_that_never_comes_back_is_given_up_after_max_attempts(dataset: MemoryDataset) -> None:
    server = StreamerServer(StreamerSettings(port=0, metrics_port=0), [dataset])
    async with server, SampleClient(server.address, retry=QUICK) as client:
        await client.datasets()
        await server.stop()
        with pytest.raises(UnreachableError, match=r"\(4 attempts\)"):
            await read(client)


async def test_stream_that_stalls_is_opened_again(server: StreamerServer, dataset: MemoryDataset) -> None:
    retry = Retry(first_delay_seconds=0.001, stall_seconds=0.3)

    relay = Relay(server.address, lambda call, number, raw: raw, stalls_first=True)
    async with relay, SampleClient(relay.address, retry=retry) as client:
        assert_whole(await read(client), dataset)
    assert relay.num_calls == 2


def test_delays_grow_to_a_bound() -> None:
    retry = Retry(first_delay_seconds=1, max_delay_seconds=5)

    for attempt, longest in ((2, 1), (3, 2), (4, 4), (5, 5), (5000, 5)):
        assert longest / 2 <= retry.delay_seconds(attempt) <= longest


# Readiness


async def test_wait_ready_returns_once_the_streamer_serves(dataset: MemoryDataset) -> None:
    server = StreamerServer(StreamerSettings(port=0, metrics_port=0))
    server.bind()
    async with SampleClient(server.address) as client:
        waiting = asyncio.create_task(client.wait_ready(timeout_seconds=10))
        await server.start([dataset])
        await waiting
        assert len(await client.datasets()) == 1
    await server.stop()


async def test_streamer_on_this_machine_is_reached_without_the_proxy(server: StreamerServer, dead_proxy: None) -> None:
    async with SampleClient(server.address) as client:
        assert len(await client.datasets()) == 1


async def test_wait_ready_gives_up_on_a_streamer_that_drains(server: StreamerServer, client: SampleClient) -> None:
    server.drain()

    with pytest.raises(UnreachableError, match=r"not ready after 0\.2 s"):
        await client.wait_ready(timeout_seconds=0.2)


# Leaving


async def test_leaving_the_loop_ends_the_stream(large: StreamerServer) -> None:
    async with SampleClient(large.address) as client:
        async for _ in client.batches(PLAN):
            assert large.active_streams == 1
            break

        await streams_become(large, 0)


async def test_transformed_images_arrive_in_their_shape_and_type(client: SampleClient, dataset: MemoryDataset) -> None:
    plan = Plan(dataset="mnist", batch_size=400, transform="crop(height=20,width=10,at=centre)|normalise(mean=0,std=1)")
    batches = [batch async for batch in client.batches(plan)]

    assert {(batch.images.dtype.name, batch.images.shape[1:]) for batch in batches} == {("float32", (20, 10))}
    images = np.concatenate([batch.images for batch in batches])
    np.testing.assert_allclose(images, dataset.splits["train"].images[:, 4:24, 9:19] / 255, atol=1e-6)


async def test_closing_the_generator_ends_the_stream(large: StreamerServer) -> None:
    async with SampleClient(large.address) as client:
        batches = client.batches(PLAN)
        await anext(batches)
        await batches.aclose()

        await streams_become(large, 0)


async def test_cancelled_reader_ends_the_stream(large: StreamerServer) -> None:
    begun = asyncio.Event()

    async def consume(client: SampleClient) -> None:
        async for _ in client.batches(PLAN):
            begun.set()
            await asyncio.Event().wait()

    async with SampleClient(large.address) as client:
        task = asyncio.create_task(consume(client))
        await begun.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await streams_become(large, 0)


# The bridge to a plain loop


def reader_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name == "sluice-batch-reader"]


async def test_reader_gives_the_epoch_in_a_plain_loop(server: StreamerServer, dataset: MemoryDataset) -> None:
    def work() -> tuple[list[Batch], float]:
        with BatchReader(server.address, PLAN) as reader:
            return list(reader), reader.report().waited_seconds

    batches, waited = await asyncio.to_thread(work)
    assert_whole(batches, dataset)
    assert waited > 0
    assert reader_threads() == []


async def test_reader_goes_on_from_a_cursor(server: StreamerServer) -> None:
    def work(start: int) -> list[int]:
        return [batch.position for batch in BatchReader(server.address, PLAN, start_position=start)]

    assert await asyncio.to_thread(work, 896) == [896, 960]


@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
async def test_reader_leaves_no_thread_and_no_stream_behind(
    large: StreamerServer, error: type[BaseException] | None
) -> None:
    def work() -> None:
        for _ in BatchReader(large.address, PLAN, prefetch_batches=2):
            assert reader_threads()
            if error is not None:
                raise error
            break

    caught = await asyncio.to_thread(catch, work)
    assert caught is None if error is None else isinstance(caught, error)
    assert reader_threads() == []
    await streams_become(large, 0)


def catch(work: Callable[[], None]) -> BaseException | None:
    try:
        work()
    except BaseException as error:
        return error
    return None


async def test_reader_holds_no_more_than_it_may_prefetch(server: StreamerServer) -> None:
    def work() -> int:
        with BatchReader(server.address, Plan(dataset="mnist", batch_size=1), prefetch_batches=3) as reader:
            most = 0
            for _, _ in zip(range(50), reader, strict=False):
                # Arrivals wake only who takes them; the assertion below fails on one too few or too many.
                time.sleep(0.01)
                most = max(most, reader._bridge._arrived.qsize())
            return most

    assert await asyncio.to_thread(work) == 3


async def test_reader_raises_in_the_loop_what_the_client_raises(server: StreamerServer) -> None:
    def work() -> None:
        for _ in BatchReader(server.address, Plan(dataset="cifar")):
            pytest.fail("there is no batch")

    with pytest.raises(StreamerError, match="no 'cifar'"):
        await asyncio.to_thread(work)
    assert reader_threads() == []


def test_reader_of_nobody_names_the_address() -> None:
    with pytest.raises(UnreachableError, match=NOWHERE), BatchReader(NOWHERE, PLAN, retry=QUICK) as reader:
        list(reader)


def test_reader_is_read_once() -> None:
    with BatchReader(NOWHERE, PLAN) as reader:
        iter(reader)
        with pytest.raises(ReaderError, match="read once"):
            iter(reader)


def test_reader_never_read_leaves_nothing() -> None:
    with BatchReader(NOWHERE, PLAN):
        pass

    assert reader_threads() == []


def test_reader_without_room_is_refused() -> None:
    with pytest.raises(ValueError, match="prefetch_batches: 0; at least 1"):
        BatchReader(NOWHERE, PLAN, prefetch_batches=0)
