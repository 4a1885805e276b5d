"""The contract's own words, on a real server, without our client."""

import asyncio
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import google_crc32c
import grpc
import numpy as np
import pytest

from protos import mnist_pb2, mnist_pb2_grpc
from protos.streamer.v1 import sample_service_pb2 as pb
from protos.streamer.v1.sample_service_pb2_grpc import SampleServiceStub
from rpc.health import Health
from streamer.batches import AssembledBatch
from streamer.metrics import StreamerMetrics
from streamer.order import Share
from streamer.plan import Plan
from streamer.server import StreamerServer
from streamer.servicer import StreamerServicer, _Wanted, _Writing
from streamer.settings import StreamerSettings
from streamer.sources.split import MemoryDataset
from streamer.sources.tally import Tally
from streamer.transforms.transform import parse
from streamer.wire import pack_indices
from tests.streamer.streams import streams_become

AS_STORED = parse("", image_shape=(28, 28))

SEED_PROTO = """
syntax = "proto3";
service MnistService { rpc GetTrainingSamples(DataRequest) returns (stream Sample) {} }
message DataRequest {}
message Sample { bytes image = 1; int64 label = 2; }
"""

SEED_CLIENT = """
import sys
from grpc_tools import protoc
protoc.main(["protoc", "-I.", "--python_out=.", "--grpc_python_out=.", "seed.proto"])
import grpc, seed_pb2, seed_pb2_grpc
with grpc.insecure_channel(sys.argv[1]) as channel:
    stream = seed_pb2_grpc.MnistServiceStub(channel).GetTrainingSamples(seed_pb2.DataRequest())
    with open("images", "wb") as images, open("labels", "wb") as labels:
        for sample in stream:
            assert len(sample.image) == 784
            images.write(sample.image)
            labels.write(bytes([sample.label]))
"""


def request(*, start: int = 0, end: int = 0, **plan: Any) -> pb.StreamBatchesRequest:
    fields: dict[str, Any] = {"dataset": "mnist", "batch_size": 300} | plan
    return pb.StreamBatchesRequest(plan=pb.Plan(**fields), start_position=start, end_position=end)


async def stream(channel: grpc.aio.Channel, asked: pb.StreamBatchesRequest) -> list[pb.Batch]:
    return [batch async for batch in SampleServiceStub(channel).StreamBatches(asked)]


async def samples(channel: grpc.aio.Channel, **fields: Any) -> list[mnist_pb2.Sample]:
    stub = mnist_pb2_grpc.MnistServiceStub(channel)
    return [sample async for sample in stub.GetTrainingSamples(mnist_pb2.DataRequest(**fields))]


# MnistService


async def test_seed_client_reads_every_sample_once_in_file_order(
    server: StreamerServer, dataset: MemoryDataset, tmp_path: Path
) -> None:
    (tmp_path / "seed.proto").write_text(SEED_PROTO)
    (tmp_path / "seed.py").write_text(SEED_CLIENT)
    process = await asyncio.create_subprocess_exec(sys.executable, "seed.py", server.address, cwd=tmp_path)

    assert await process.wait() == 0
    assert (tmp_path / "images").read_bytes() == dataset.splits["train"].images.tobytes()
    assert (tmp_path / "labels").read_bytes() == dataset.splits["train"].labels.tobytes()


async def test_samples_carry_image_label_and_index(channel: grpc.aio.Channel, dataset: MemoryDataset) -> None:
    test = dataset.splits["test"]
    received = await samples(channel, split="test")

    assert [sample.index for sample in received] == list(range(100))
    assert [sample.label for sample in received] == test.labels.tolist()
    assert b"".join(sample.image for sample in received) == test.images.tobytes()


async def test_seed_shuffles_each_epoch_anew(channel: grpc.aio.Channel) -> None:
    indices = [sample.index for sample in await samples(channel, split="test", seed=0, epochs=2)]

    first, second = indices[:100], indices[100:]
    assert sorted(first) == sorted(second) == list(range(100))
    assert len({tuple(first), tuple(second), tuple(range(100))}) == 3


@pytest.mark.parametrize(("start", "limit", "expected"), [(0, 7, (0, 7)), (95, 10, (95, 105)), (150, 0, (150, 200))])
async def test_start_and_limit_cut_the_same_stream(
    channel: grpc.aio.Channel, start: int, limit: int, expected: tuple[int, int]
) -> None:
    whole = await samples(channel, split="test", seed=3, epochs=2)

    assert await samples(channel, split="test", seed=3, epochs=2, start=start, limit=limit) == whole[slice(*expected)]


async def test_start_at_the_end_ends_at_once(channel: grpc.aio.Channel) -> None:
    assert await samples(channel, split="test", start=100) == []


@pytest.mark.parametrize(
    ("fields", "code", "words"),
    [
        ({"dataset": "cifar"}, "NOT_FOUND", "there is no 'cifar'; known are mnist"),
        ({"split": "dev"}, "INVALID_ARGUMENT", "split: 'dev' is no split; allowed are train and test"),
        ({"start": 2001, "epochs": 2}, "OUT_OF_RANGE", "start: 2001 lies past the end; 0 to 2000 are allowed"),
    ],
)
async def test_bad_data_request_is_refused_by_name(
    channel: grpc.aio.Channel, fields: dict[str, object], code: str, words: str
) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await samples(channel, **fields)

    assert caught.value.code().name == code
    assert words in str(caught.value.details())
    assert len(await samples(channel, limit=1)) == 1, "the next good request succeeds"


# SampleService


async def test_list_datasets_describes_what_is_served(channel: grpc.aio.Channel, dataset: MemoryDataset) -> None:
    answer = await SampleServiceStub(channel).ListDatasets(pb.ListDatasetsRequest())

    (listed,) = answer.datasets
    assert listed.name == "mnist"
    assert list(listed.class_names) == []
    assert [(split.name, split.num_samples) for split in listed.splits] == [("train", 1000), ("test", 100)]
    for split in listed.splits:
        assert list(split.image_shape) == [28, 28]
        assert (split.num_classes, split.label_bytes) == (10, 1)
        assert split.fingerprint == dataset.splits[split.name].fingerprint


async def test_batches_cover_the_epoch_in_file_order(channel: grpc.aio.Channel, dataset: MemoryDataset) -> None:
    batches = await stream(channel, request())

    assert [(batch.position, batch.next_position) for batch in batches] == [
        (0, 300),
        (300, 600),
        (600, 900),
        (900, 1000),
    ]
    assert [batch.end_of_epoch for batch in batches] == [False, False, False, True]
    assert [index for batch in batches for index in batch.indices] == list(range(1000))
    assert b"".join(batch.images for batch in batches) == dataset.splits["train"].images.tobytes()
    assert b"".join(batch.labels for batch in batches) == dataset.splits["train"].labels.tobytes()


async def test_first_message_alone_says_shape_and_type(channel: grpc.aio.Channel) -> None:
    first, *others = await stream(channel, request())

    assert list(first.image_shape) == [28, 28]
    assert first.data_type == pb.DATA_TYPE_UINT8
    assert all(not batch.image_shape and batch.data_type == pb.DATA_TYPE_UNSPECIFIED for batch in others)


async def test_every_batch_says_where_its_time_went(channel: grpc.aio.Channel) -> None:
    for batch in await stream(channel, request()):
        assert 0 < batch.timings.read.ToNanoseconds() < 10**9
        assert batch.timings.HasField("transform")
        assert batch.timings.wait.ToNanoseconds() >= 0


class Context:
    """Of a call without metadata."""

    def invocation_metadata(self) -> tuple[tuple[str, str], ...]:
        return ()


def test_indices_of_a_batch_are_its_own_where_those_of_the_one_before_were_too_large_to_be_packed(
    dataset: MemoryDataset,
) -> None:
    writing = _Writing(_Wanted(Plan(dataset="mnist"), dataset.splits["train"], AS_STORED, iter(())))
    for wanted in ([1, 2], [2**28, 3], [5, 6]):
        indices = np.array(wanted)
        share, nothing = Share(0, 2, 0, 2, end_of_epoch=False), np.zeros(2, np.uint8)
        batch = AssembledBatch(share, indices, pack_indices(indices), nothing, nothing, 0, 0.0, 0.0, 0.0)
        assert list(pb.Batch.FromString(writing.message(batch)).indices) == wanted


async def test_wait_is_how_long_a_ready_batch_was_held_up(dataset: MemoryDataset) -> None:
    metrics = StreamerMetrics([], health=Health([]), settings=StreamerSettings(), tally=Tally())
    servicer: Any = StreamerServicer(StreamerSettings(), {"mnist": dataset}, metrics, pool=NotImplemented)
    messages = servicer.StreamBatches(request(), context=Context())
    await anext(messages)
    # From here on the second one is ready, and nobody takes it.
    started = time.perf_counter()
    await asyncio.sleep(0.01)
    held_up = time.perf_counter() - started

    second = pb.Batch.FromString(await anext(messages))
    assert second.timings.wait.ToNanoseconds() >= held_up * 10**9
    await messages.aclose()


async def test_seed_shuffles_and_zero_is_a_seed(channel: grpc.aio.Channel) -> None:
    orders = [
        [index for batch in await stream(channel, request(**plan)) for index in batch.indices]
        for plan in ({}, {"seed": 0}, {"seed": 0}, {"seed": 1}, {"seed": 0, "epoch": 1})
    ]

    assert all(sorted(order) == list(range(1000)) for order in orders)
    assert orders[1] == orders[2]
    assert len({tuple(order) for order in orders}) == 4


async def test_stream_resumed_at_a_position_continues_it(channel: grpc.aio.Channel) -> None:
    whole = await stream(channel, request(seed=5))
    resumed = await stream(channel, request(seed=5, start=300))

    assert [list(batch.indices) for batch in resumed] == [list(batch.indices) for batch in whole[1:]]
    assert [batch.crc32c for batch in resumed] == [batch.crc32c for batch in whole[1:]]


async def test_end_position_ends_the_range_without_ending_the_epoch(channel: grpc.aio.Channel) -> None:
    batches = await stream(channel, request(end=301))

    assert [batch.position for batch in batches] == [0, 300]
    assert not any(batch.end_of_epoch for batch in batches)


async def test_ranks_share_each_global_batch(channel: grpc.aio.Channel) -> None:
    plan: dict[str, Any] = {"seed": 4, "world_size": 3, "batch_size": 110, "split": "train"}
    ranks = [await stream(channel, request(rank=rank, **plan)) for rank in range(3)]
    alone = await stream(channel, request(seed=4, batch_size=330))

    for shares, whole in zip(zip(*ranks, strict=True), alone, strict=True):
        assert [index for share in shares for index in share.indices] == list(whole.indices)
        assert {(share.position, share.next_position) for share in shares} == {(whole.position, whole.next_position)}
        assert {share.end_of_epoch for share in shares} == {whole.end_of_epoch}
    assert [share.num_samples for share in (rank[-1] for rank in ranks)] == [4, 3, 3]


async def test_rank_left_without_a_sample_gets_a_closing_message(channel: grpc.aio.Channel) -> None:
    *_, last = await stream(channel, request(split="test", world_size=11, rank=10, batch_size=9))

    assert (last.position, last.next_position, last.num_samples) == (99, 100, 0)
    assert last.end_of_epoch
    assert last.crc32c


async def test_remainder_drop_sends_full_global_batches_alone(channel: grpc.aio.Channel) -> None:
    for rank in (0, 1):
        batches = await stream(channel, request(world_size=2, rank=rank, batch_size=150, remainder=pb.REMAINDER_DROP))
        assert [batch.num_samples for batch in batches] == [150, 150, 150]
        assert [batch.end_of_epoch for batch in batches] == [False, False, True]


@pytest.mark.parametrize("plan", [{"start": 1000}, {"start": 900, "remainder": pb.REMAINDER_DROP}])
async def test_end_of_the_epoch_is_one_closing_message(channel: grpc.aio.Channel, plan: dict[str, int]) -> None:
    (closing,) = await stream(channel, request(**plan))

    assert closing.end_of_epoch
    assert (closing.num_samples, closing.images, closing.next_position) == (0, b"", plan["start"])
    assert list(closing.image_shape) == [28, 28]


async def test_checksum_covers_request_and_content(channel: grpc.aio.Channel) -> None:
    batches = await stream(channel, request(seed=2**64 - 1, epoch=6, split="test", world_size=2, rank=1, batch_size=25))

    for batch in batches:
        header = np.array(
            [2**64 - 1, 6, 2, 1, batch.position, batch.next_position, batch.num_samples, *batch.indices], "<u8"
        )
        assert batch.crc32c == google_crc32c.value(header.tobytes() + batch.images + batch.labels)


async def test_fingerprint_of_the_data_is_accepted(channel: grpc.aio.Channel, dataset: MemoryDataset) -> None:
    assert await stream(channel, request(fingerprint=dataset.splits["train"].fingerprint))


@pytest.mark.parametrize(
    ("asked", "code", "words"),
    [
        (request(dataset="cifar"), "NOT_FOUND", "there is no 'cifar'; known are mnist"),
        (request(dataset=""), "INVALID_ARGUMENT", "plan.dataset: required"),
        (pb.StreamBatchesRequest(), "INVALID_ARGUMENT", "plan.dataset: required"),
        (request(split="dev"), "INVALID_ARGUMENT", "plan.split: 'dev' is no split; allowed are train and test"),
        (request(rank=1), "INVALID_ARGUMENT", "plan.rank: 1; 0 to 0 are allowed with plan.world_size 1"),
        (request(rank=4, world_size=4), "INVALID_ARGUMENT", "plan.rank: 4; 0 to 3"),
        (request(batch_size=0), "INVALID_ARGUMENT", "plan.batch_size: 0; 1 to 8192 are allowed"),
        (request(batch_size=8193), "INVALID_ARGUMENT", "plan.batch_size: 8193; 1 to 8192 are allowed"),
        (request(remainder=9), "INVALID_ARGUMENT", "plan.remainder: 9; 0, 1 and 2 are allowed"),
        (request(transform="augment"), "INVALID_ARGUMENT", "plan.transform: there is no 'augment'; known are"),
        (
            request(transform="shift(pixels=9000)"),
            "INVALID_ARGUMENT",
            "plan.transform: shift: pixels is '9000'; allowed",
        ),
        (request(fingerprint=b"other"), "FAILED_PRECONDITION", "plan.fingerprint: this replica serves"),
        (request(start=1001), "OUT_OF_RANGE", "start_position: 1001 lies past the end; 0 to 1000 are allowed"),
    ],
)
async def test_bad_request_for_batches_is_refused_by_name(
    channel: grpc.aio.Channel, asked: pb.StreamBatchesRequest, code: str, words: str
) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stream(channel, asked)

    assert caught.value.code().name == code
    assert words in str(caught.value.details())
    assert len(await stream(channel, request())) == 4, "the next good request succeeds"


LONG = "x" * 50_000


@pytest.mark.parametrize("asked", [request(dataset=LONG), request(split=LONG), request(transform=LONG[:500])])
async def test_refusal_does_not_echo_more_than_fits_a_status(
    channel: grpc.aio.Channel, asked: pb.StreamBatchesRequest
) -> None:
    with pytest.raises(grpc.aio.AioRpcError, match=r"x{64}'") as caught:
        await stream(channel, asked)

    assert len(str(caught.value.details())) < 200


@pytest.mark.parametrize(
    "method", ["/sluice.streamer.v1.SampleService/StreamBatches", "/MnistService/GetTrainingSamples"]
)
async def test_bytes_that_are_no_request_are_invalid(channel: grpc.aio.Channel, method: str) -> None:
    call: grpc.aio.UnaryStreamMultiCallable[bytes, bytes] = channel.unary_stream(method)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        _ = [message async for message in call(b"\x0a\xff\xff")]

    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert method in str(caught.value.details())


# Limits


@pytest.fixture
async def narrow(dataset: MemoryDataset) -> AsyncIterator[StreamerServer]:
    """A streamer of one stream at a time and messages of at most 10 samples."""
    settings = StreamerSettings(port=0, metrics_port=0, max_streams=1, max_message_bytes=790 * 10 + 256)
    async with StreamerServer(settings, [dataset]) as server:
        yield server


async def test_batch_above_the_message_limit_is_refused_and_the_largest_fits(narrow: StreamerServer) -> None:
    async with grpc.aio.insecure_channel(narrow.address) as channel:
        with pytest.raises(grpc.aio.AioRpcError, match=r"plan\.batch_size: 11; 1 to 10 are allowed"):
            await stream(channel, request(batch_size=11))
        assert len(await stream(channel, request(batch_size=10, seed=1))) == 100


async def test_stream_above_the_limit_is_refused_until_one_ends(narrow: StreamerServer) -> None:
    async with grpc.aio.insecure_channel(narrow.address) as channel:
        # Far more than HTTP/2 takes on its way, so it stays open unread.
        held = mnist_pb2_grpc.MnistServiceStub(channel).GetTrainingSamples(mnist_pb2.DataRequest(epochs=1000))
        await held.read()
        for refused in (stream(channel, request(batch_size=1)), samples(channel)):
            with pytest.raises(grpc.aio.AioRpcError, match="serves 1 streams at once") as caught:
                await refused
            assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        held.cancel()
        await streams_become(narrow, 0)
        assert len(await samples(channel, limit=5)) == 5
