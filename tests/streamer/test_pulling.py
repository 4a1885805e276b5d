"""PullBatches as its contract has it, on a real server, without our client."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import numpy as np
import pytest
from numpy.typing import NDArray

from protos.streamer.v1 import sample_service_pb2 as pb
from protos.streamer.v1.sample_service_pb2_grpc import SampleServiceStub
from streamer.client import SampleClient
from streamer.errors import DataLossError
from streamer.plan import Plan
from streamer.server import StreamerServer
from streamer.settings import StreamerSettings
from streamer.sources.split import Dataset, MemoryDataset, MemorySplit, Samples
from tests.scraping import becomes, value
from tests.streamer.streams import streams_become

BATCH_BYTES = 300 * 785
"""Images and labels of a batch of :func:`opened`."""


class Reader:
    """A call of PullBatches, message by message."""

    def __init__(self, channel: grpc.aio.Channel, *messages: pb.PullBatchesRequest) -> None:
        self._call: Any = SampleServiceStub(channel).PullBatches()
        self._messages = messages

    async def __aenter__(self) -> "Reader":
        for message in self._messages:
            await self.send(message)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._call.cancel()

    async def send(self, message: pb.PullBatchesRequest) -> None:
        await self._call.write(message)

    async def grant(self, num_bytes: int) -> None:
        await self.send(pb.PullBatchesRequest(grant_bytes=num_bytes))

    async def half_close(self) -> None:
        await self._call.done_writing()

    async def read(self) -> pb.Batch:
        message = await self._call.read()
        assert isinstance(message, pb.Batch), "the stream has ended"
        return message

    async def read_rest(self) -> list[pb.Batch]:
        """Read to the end, which has to be a good one."""
        rest = []
        while (message := await self._call.read()) is not grpc.aio.EOF:
            rest.append(message)
        assert await self._call.code() is grpc.StatusCode.OK
        return rest

    async def sends_nothing_more(self) -> bool:
        """Tell whether nothing comes although the server has had turns of its loop to send it."""
        reading = asyncio.ensure_future(self._call.read())
        done, _ = await asyncio.wait((reading,), timeout=0.1)
        reading.cancel()
        return not done

    async def refusal(self) -> tuple[str, str]:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await self.read_rest()
        return caught.value.code().name, caught.value.details() or ""


def opened(*, start: int = 0, end: int = 0, **plan: Any) -> pb.PullBatchesRequest:
    fields: dict[str, Any] = {"dataset": "mnist", "batch_size": 300} | plan
    asked = pb.StreamBatchesRequest(plan=pb.Plan(**fields), start_position=start, end_position=end)
    return pb.PullBatchesRequest(open=asked)


async def test_an_epoch_under_credit_is_the_one_of_stream_batches(channel: grpc.aio.Channel) -> None:
    streamed = [one async for one in SampleServiceStub(channel).StreamBatches(opened(seed=3).open)]
    async with Reader(channel, opened(seed=3)) as reader:
        await reader.grant(10**8)
        pulled = [await reader.read() for _ in streamed]
        await reader.half_close()
        assert await reader.read_rest() == []

    for one, other in zip(pulled, streamed, strict=True):
        one.ClearField("timings")
        other.ClearField("timings")
        assert one == other


async def test_nothing_is_sent_before_the_first_grant(channel: grpc.aio.Channel) -> None:
    async with Reader(channel, opened()) as reader:
        assert await reader.sends_nothing_more()


async def test_batch_goes_while_the_balance_is_above_zero_and_none_after(channel: grpc.aio.Channel) -> None:
    async with Reader(channel, opened()) as reader:
        await reader.grant(BATCH_BYTES + 1)
        assert [(await reader.read()).position for _ in range(2)] == [0, 300]
        assert await reader.sends_nothing_more()


async def test_grant_that_only_pays_the_debt_sends_nothing_and_one_byte_more_does(channel: grpc.aio.Channel) -> None:
    async with Reader(channel, opened()) as reader:
        await reader.grant(1)
        await reader.read()
        await reader.grant(BATCH_BYTES - 1)
        await reader.grant(1)
        assert (await reader.read()).position == 300


async def test_half_close_spends_what_is_left_and_ends_well(channel: grpc.aio.Channel) -> None:
    async with Reader(channel, opened()) as reader:
        await reader.grant(2 * BATCH_BYTES)
        await reader.half_close()
        assert [batch.position for batch in await reader.read_rest()] == [0, 300]


async def test_stream_stays_open_after_the_last_batch_until_the_reader_half_closes(
    channel: grpc.aio.Channel, server: StreamerServer
) -> None:
    async with Reader(channel, opened()) as reader:
        await reader.grant(10**8)
        while not (await reader.read()).end_of_epoch:
            pass
        # A grant that was on its way meets a living call.
        await reader.grant(10**8)
        assert server.active_streams == 1
        await reader.half_close()
        assert await reader.read_rest() == []
    await streams_become(server, 0)


async def test_range_ends_without_a_closing_message(channel: grpc.aio.Channel) -> None:
    async with Reader(channel, opened(start=300, end=900)) as reader:
        await reader.grant(10**8)
        await reader.half_close()
        assert [batch.position for batch in await reader.read_rest()] == [300, 600]


GRANT = pb.PullBatchesRequest(grant_bytes=1)


@pytest.mark.parametrize(
    ("messages", "told"),
    [
        ([GRANT], "open: required as the first message"),
        ([pb.PullBatchesRequest()], "open: required as the first message"),
        ([opened(), GRANT, opened()], "grant_bytes: required in every message after the first"),
        ([opened(), pb.PullBatchesRequest(grant_bytes=0)], "grant_bytes: 0; grant 1 or more"),
        ([opened(), pb.PullBatchesRequest(grant_bytes=2**60)], "a balance of at most 1073741824 is allowed"),
        ([opened(batch_size=0)], "plan.batch_size: 0; 1 to 8192 are allowed"),
    ],
)
async def test_message_that_breaks_the_contract_is_refused_by_name(
    channel: grpc.aio.Channel, messages: list[pb.PullBatchesRequest], told: str
) -> None:
    async with Reader(channel, *messages) as reader:
        code, details = await reader.refusal()

    assert code == "INVALID_ARGUMENT"
    assert told in details


async def test_draining_replica_sends_its_readers_on_with_or_without_credit(
    channel: grpc.aio.Channel, server: StreamerServer
) -> None:
    async with Reader(channel, opened(), GRANT) as reader:
        await reader.read()
        server.drain()
        closing = await reader.read()
        await reader.half_close()
        assert await reader.read_rest() == []

    assert (closing.draining, closing.position, closing.num_samples) == (True, 300, 0)


async def test_draining_replica_refuses_a_reader_that_has_not_begun(
    channel: grpc.aio.Channel, server: StreamerServer
) -> None:
    async with Reader(channel, opened()) as reader:
        await streams_become(server, 1)
        server.drain()
        code, details = await reader.refusal()

    assert (code, "on another" in details) == ("UNAVAILABLE", True)


async def test_draining_replica_refuses_a_reader_that_has_not_even_opened(
    channel: grpc.aio.Channel, server: StreamerServer
) -> None:
    async with Reader(channel) as reader:
        asyncio.get_running_loop().call_later(0.05, server.drain)
        code, _ = await reader.refusal()

    assert code == "UNAVAILABLE"


@pytest.mark.parametrize("first", [[], [opened()], [opened(), GRANT]], ids=len)
async def test_bytes_that_are_no_message_end_the_stream_wherever_they_come(
    channel: grpc.aio.Channel, first: list[pb.PullBatchesRequest]
) -> None:
    pull: Any = channel.stream_stream("/sluice.streamer.v1.SampleService/PullBatches")
    call = pull()
    for message in first:
        await call.write(message.SerializeToString())
    await call.write(b"\xff\xff\xff")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        _ = [message async for message in call]

    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_range_of_nothing_ends_without_a_message(channel: grpc.aio.Channel) -> None:
    async with Reader(channel, opened(start=300, end=300), GRANT) as reader, asyncio.timeout(5):
        assert await reader.read_rest() == []


class Damaged(MemorySplit):
    """A split whose fourth batch is lost."""

    def gather(self, indices: NDArray[np.int64], gathered: NDArray[np.uint8]) -> Samples:
        if 900 in indices:
            raise DataLossError("shard", 7, 9, expected="what was written", found="other bytes")
        return super().gather(indices, gathered)


async def test_loss_in_the_middle_keeps_its_status_while_grants_come(dataset: MemoryDataset) -> None:
    train = dataset.splits["train"]
    damaged = Dataset("mnist", (), {"train": Damaged("train", train.images, train.labels, 10)})
    async with (
        StreamerServer(StreamerSettings(port=0, metrics_port=0), [damaged]) as server,
        grpc.aio.insecure_channel(server.address) as channel,
    ):
        for _ in range(5):
            async with Reader(channel, opened()) as reader:
                await reader.grant(10**6)
                for _ in range(3):
                    await reader.read()
                    await reader.grant(BATCH_BYTES)
                code, details = await reader.refusal()
            assert (code, "shard" in details) == ("DATA_LOSS", True)


# Readers that do nothing


@pytest.fixture
async def impatient(dataset: MemoryDataset) -> AsyncIterator[StreamerServer]:
    """A streamer that ends a stream after a tenth of a second of nothing."""
    settings = StreamerSettings(port=0, metrics_port=0, idle_seconds=0.1)
    async with StreamerServer(settings, [dataset]) as server:
        yield server


@pytest.fixture
async def to_impatient(impatient: StreamerServer) -> AsyncIterator[grpc.aio.Channel]:
    options = [("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 65_536)]
    async with grpc.aio.insecure_channel(impatient.address, options=options) as channel:
        yield channel


@pytest.mark.parametrize(("messages", "awaited"), [([], "open"), ([opened()], "grant"), ([opened(), GRANT], "grant")])
async def test_reader_that_stops_talking_is_ended(
    to_impatient: grpc.aio.Channel,
    impatient: StreamerServer,
    messages: list[pb.PullBatchesRequest],
    awaited: str,
) -> None:
    async with Reader(to_impatient, *messages) as reader:
        code, details = await reader.refusal()

    assert code == "ABORTED"
    assert f"no {awaited} within 0.1 s" in details
    await streams_become(impatient, 0)


async def test_stream_is_ended_well_when_nobody_half_closes_it(to_impatient: grpc.aio.Channel) -> None:
    async with Reader(to_impatient, opened()) as reader:
        await reader.grant(10**8)
        assert (await reader.read_rest())[-1].end_of_epoch


async def test_stream_that_nobody_reads_gives_its_place_back(
    to_impatient: grpc.aio.Channel, impatient: StreamerServer
) -> None:
    abandoned = [SampleServiceStub(to_impatient).StreamBatches(opened().open) for _ in range(5)]
    await abandoned[0].read()
    await streams_become(impatient, 5)
    await streams_become(impatient, 0)
    method, url = "sluice.streamer.v1.SampleService/StreamBatches", impatient.metrics_url
    await becomes(5, url, "streamer_streams_total", method=method, code="ABORTED")
    assert value(url, "streamer_streams_in_flight", method=method) == 0

    # Who reads after all gets whole batches and is told.
    with pytest.raises(grpc.aio.AioRpcError, match=r"nothing was taken for 0\.1 s; open the stream again"):
        _ = [batch async for batch in abandoned[1]]


async def test_clients_stream_that_was_ended_as_idle_goes_on_where_it_was(impatient: StreamerServer) -> None:
    async with SampleClient(impatient.address) as client:
        indices: list[int] = []
        async for batch in client.batches(Plan(dataset="mnist", seed=1, batch_size=10)):
            if not indices:
                await streams_become(impatient, 0)
            indices += batch.indices.tolist()

    assert sorted(indices) == list(range(1000))


# Transforms


async def test_transform_is_applied_and_its_shape_and_type_are_told(
    channel: grpc.aio.Channel, dataset: MemoryDataset
) -> None:
    asked = opened(transform="crop(height=20,width=10,at=centre)|normalise(mean=0,std=1)", batch_size=1000).open
    (batch,) = [one async for one in SampleServiceStub(channel).StreamBatches(asked)]

    assert (list(batch.image_shape), batch.data_type) == ([20, 10], pb.DATA_TYPE_FLOAT32)
    images = np.frombuffer(batch.images, "<f4").reshape(1000, 20, 10)
    np.testing.assert_allclose(images, dataset.splits["train"].images[:, 4:24, 9:19] / 255, atol=1e-6)


async def test_augmented_stream_is_the_same_bytes_whatever_its_batches(channel: grpc.aio.Channel) -> None:
    async def pixels(batch_size: int, start: int = 0) -> bytes:
        asked = opened(transform="augment-v1(rotate=10,shift=2)", seed=4, batch_size=batch_size, start=start).open
        return b"".join([batch.images async for batch in SampleServiceStub(channel).StreamBatches(asked)])

    whole = await pixels(1000)
    assert await pixels(70) == whole
    assert await pixels(300, start=333) == whole[333 * 784 :]
