import asyncio
import os
import re
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from protos import mnist_pb2, mnist_pb2_grpc
from protos.streamer.v1 import sample_service_pb2 as pb
from protos.streamer.v1.sample_service_pb2_grpc import SampleServiceStub
from rpc.lifecycle import PortTakenError
from streamer.client import Plan, SampleClient
from streamer.metrics import Durations, Sending
from streamer.server import StreamerServer, serve
from streamer.settings import StreamerSettings
from streamer.sources.cache import BlockCache, Reservation
from streamer.sources.places import Reading, open_dataset
from streamer.sources.split import MemoryDataset
from streamer.sources.tally import Tally
from tests.scraping import PAGE, becomes, documented, faults, scrape, shown, value
from tests.streamer.packed import flip, random_split, write_packed

SAMPLES, BATCHES = "MnistService/GetTrainingSamples", "sluice.streamer.v1.SampleService/StreamBatches"
BATCHES_OF_300 = pb.StreamBatchesRequest(plan=pb.Plan(dataset="mnist", batch_size=300))
Read = Callable[[grpc.aio.Channel], grpc.aio.UnaryStreamCall[bytes, bytes]]


def samples(channel: grpc.aio.Channel) -> grpc.aio.UnaryStreamCall[bytes, bytes]:
    method: grpc.aio.UnaryStreamMultiCallable[bytes, bytes] = channel.unary_stream(f"/{SAMPLES}")
    return method(mnist_pb2.DataRequest(limit=250, start=900, epochs=2).SerializeToString())


def batches(channel: grpc.aio.Channel) -> grpc.aio.UnaryStreamCall[bytes, bytes]:
    method: grpc.aio.UnaryStreamMultiCallable[bytes, bytes] = channel.unary_stream(f"/{BATCHES}")
    return method(BATCHES_OF_300.SerializeToString())


def port_of(url: str) -> int:
    return int(url.removesuffix("/metrics").rpartition(":")[2])


@pytest.mark.parametrize(("read", "method", "num_samples"), [(samples, SAMPLES, 250), (batches, BATCHES, 1000)])
async def test_samples_and_bytes_are_what_the_reader_got(
    server: StreamerServer, channel: grpc.aio.Channel, read: Read, method: str, num_samples: int
) -> None:
    messages = [message async for message in read(channel)]

    url = server.metrics_url
    await becomes(1, url, "streamer_streams_total", method=method, code="OK")
    assert value(url, "streamer_sent_samples_total", dataset="mnist") == num_samples
    assert value(url, "streamer_sent_bytes_total", dataset="mnist") == sum(map(len, messages))
    assert value(url, "streamer_stream_seconds_count", method=method) == 1


async def test_stream_that_goes_on_is_counted_as_it_goes(large: StreamerServer) -> None:
    async with grpc.aio.insecure_channel(large.address) as channel:
        call = mnist_pb2_grpc.MnistServiceStub(channel).GetTrainingSamples(mnist_pb2.DataRequest(epochs=1000))
        for _ in range(5000):
            await call.read()

        assert value(large.metrics_url, "streamer_sent_samples_total", dataset="mnist") >= 5000
        assert value(large.metrics_url, "streamer_streams_in_flight", method=SAMPLES) == 1


async def test_reader_that_stands_still_shows_while_it_does(large: StreamerServer) -> None:
    wait = ("streamer_send_wait_seconds_total",)
    async with grpc.aio.insecure_channel(large.address) as channel:
        call = SampleServiceStub(channel).StreamBatches(BATCHES_OF_300)
        await call.read()
        # Nothing runs here between the two, so that no message can be taken.
        first = value(large.metrics_url, *wait, dataset="mnist")
        second = value(large.metrics_url, *wait, dataset="mnist")
        call.cancel()
        await becomes(0, large.metrics_url, "streamer_streams_in_flight", method=BATCHES)

    assert 0 < first < second <= value(large.metrics_url, *wait, dataset="mnist")


async def test_cancelled_stream_keeps_what_it_sent(large: StreamerServer) -> None:
    async with grpc.aio.insecure_channel(large.address) as channel:
        call = SampleServiceStub(channel).StreamBatches(BATCHES_OF_300)
        for _ in range(3):
            await call.read()
        call.cancel()
        await becomes(1, large.metrics_url, "streamer_streams_total", method=BATCHES, code="CANCELLED")

    assert value(large.metrics_url, "streamer_streams_in_flight", method=BATCHES) == 0
    assert value(large.metrics_url, "streamer_sent_samples_total", dataset="mnist") >= 600


async def test_refused_streams_are_counted_and_send_nothing(server: StreamerServer, channel: grpc.aio.Channel) -> None:
    for plan in (pb.Plan(), pb.Plan(dataset="cifar", batch_size=1)):
        with pytest.raises(grpc.aio.AioRpcError):
            await SampleServiceStub(channel).StreamBatches(pb.StreamBatchesRequest(plan=plan)).read()

    url = server.metrics_url
    for code in ("INVALID_ARGUMENT", "NOT_FOUND"):
        await becomes(1, url, "streamer_streams_total", method=BATCHES, code=code)
    (sent,) = [metric for metric in scrape(url) if metric.name == "streamer_sent_bytes"]
    assert [(sample.labels, sample.value) for sample in sent.samples] == [({"dataset": "mnist"}, 0)]


async def test_stopped_streamer_has_nothing_in_flight(server: StreamerServer, channel: grpc.aio.Channel) -> None:
    await mnist_pb2_grpc.MnistServiceStub(channel).GetTrainingSamples(mnist_pb2.DataRequest(epochs=9999)).read()
    await server.grpc_server.stop(0)

    await becomes(1, server.metrics_url, "streamer_streams_total", method=SAMPLES, code="CANCELLED")
    assert value(server.metrics_url, "streamer_streams_in_flight", method=SAMPLES) == 0


async def test_metrics_are_there_before_the_data_and_gone_after_the_end(dataset: MemoryDataset) -> None:
    server = StreamerServer(StreamerSettings(port=0, metrics_port=0))
    server.bind()
    assert value(server.metrics_url, "streamer_serving") == 0
    await server.start([dataset])
    assert value(server.metrics_url, "streamer_serving") == 1
    await server.stop()

    with pytest.raises(OSError, match="refused"):
        scrape(server.metrics_url)


async def test_taken_metrics_port_is_said_before_any_data_is_fetched(server: StreamerServer, tmp_path: Path) -> None:
    port = port_of(server.metrics_url)

    with pytest.raises(PortTakenError, match=f"127.0.0.1:{port}.*--metrics-port or SLUICE_STREAMER_METRICS_PORT"):
        await serve(StreamerSettings(port=0, metrics_port=port, cache=tmp_path / "cache"))
    assert not (tmp_path / "cache").exists()


async def test_taken_port_leaves_the_metrics_port_free(server: StreamerServer) -> None:
    other = StreamerServer(StreamerSettings(port=0, metrics_port=0))
    other.bind()
    port = port_of(other.metrics_url)
    await other.stop()
    taken = StreamerSettings(port=int(server.address.rpartition(":")[2]), metrics_port=port)
    for _ in range(2):
        with pytest.raises(PortTakenError, match="--port"):
            StreamerServer(taken).bind()


async def test_page_names_every_metric_and_no_other(server: StreamerServer) -> None:
    assert documented("streamer") == shown(server.metrics_url)


async def test_metrics_are_named_and_explained_as_prometheus_asks(server: StreamerServer) -> None:
    assert faults(server.metrics_url) == []


def test_amounts_never_shrink_while_they_are_read() -> None:
    """Prometheus would take one that does for a restart, and count all of it again."""
    stream, done = Sending(), threading.Event()

    def send() -> None:
        while not done.is_set():
            stream.ask()
            stream.go_on()
            stream.offer()
            stream.count(1, 800)

    sending = threading.Thread(target=send)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        sending.start()
        seen = [stream.amounts() for _ in range(50_000)]
    finally:
        done.set()
        sending.join()
        sys.setswitchinterval(interval)

    assert seen[-1][0] > seen[0][0]
    for amounts in zip(*seen, strict=True):
        assert list(amounts) == sorted(amounts)


# What it takes to make batches


async def test_each_batch_is_timed_and_transforms_only_where_there_are_some(
    server: StreamerServer, channel: grpc.aio.Channel
) -> None:
    num_batches = len([message async for message in batches(channel)])

    assert value(server.metrics_url, "streamer_batch_read_seconds_count", dataset="mnist") == num_batches == 4
    assert value(server.metrics_url, "streamer_batch_read_seconds_sum", dataset="mnist") > 0
    assert value(server.metrics_url, "streamer_batch_transform_seconds_count", dataset="mnist") == 0


async def test_transforms_are_timed_and_a_process_that_died_at_them_shows(dataset: MemoryDataset) -> None:
    settings = StreamerSettings(port=0, metrics_port=0, transform_workers=1)
    plan = Plan(dataset="mnist", batch_size=100, transform="augment-v1")
    async with StreamerServer(settings, [dataset]) as server, SampleClient(server.address) as client:
        url = server.metrics_url
        assert value(url, "streamer_transform_workers") == 0
        _ = [None async for _ in client.batches(plan)]
        assert value(url, "streamer_batch_transform_seconds_count", dataset="mnist") == 10
        assert value(url, "streamer_transform_workers") == 1

        assert server.metrics.pool is not None
        os.kill(server.metrics.pool.process_ids[0], signal.SIGKILL)
        _ = [None async for _ in client.batches(plan)]
        assert value(url, "streamer_transform_worker_restarts_total") == 1


async def test_wait_for_credit_shows_while_it_lasts(server: StreamerServer, channel: grpc.aio.Channel) -> None:
    url, wait = server.metrics_url, "streamer_credit_wait_seconds_total"
    call: Any = SampleServiceStub(channel).PullBatches()
    await call.write(pb.PullBatchesRequest(open=BATCHES_OF_300))
    await call.write(pb.PullBatchesRequest(grant_bytes=1))
    await call.read()
    while not value(url, wait, dataset="mnist"):  # noqa: ASYNC110 - what the server waits for is told to nobody else
        await asyncio.sleep(0)
    first = value(url, wait, dataset="mnist")
    second = value(url, wait, dataset="mnist")
    call.cancel()

    assert 0 < first < second <= value(url, "streamer_send_wait_seconds_total", dataset="mnist")


async def test_damage_on_disk_is_counted(tmp_path: Path) -> None:
    await write_packed(tmp_path / "packed", random_split())
    (shard, *_) = sorted((tmp_path / "packed").glob("*.records"))
    shard.write_bytes(flip(shard.read_bytes(), 0))
    reading = Reading(cache=tmp_path / "cache", memory_bytes=0)
    damaged = await open_dataset("own", str(tmp_path / "packed"), reading, report=print)
    settings = StreamerSettings(port=0, metrics_port=0)
    async with (
        StreamerServer(settings, [damaged], tally=reading.tally) as server,
        grpc.aio.insecure_channel(server.address) as channel,
    ):
        asked = pb.StreamBatchesRequest(plan=pb.Plan(dataset="own", batch_size=1000))
        with pytest.raises(grpc.aio.AioRpcError):
            await SampleServiceStub(channel).StreamBatches(asked).read()
        assert value(server.metrics_url, "streamer_checksum_failures_total") == 1
    await damaged.close()


async def test_cache_shows_what_it_holds_whoever_filled_it(dataset: MemoryDataset, tmp_path: Path) -> None:
    settings = StreamerSettings(port=0, metrics_port=0, cache=tmp_path, cache_bytes=5000)
    async with StreamerServer(settings, [dataset]) as server:
        assert value(server.metrics_url, "streamer_cache_bytes") == 0
        cache = BlockCache(tmp_path / "blocks", max_bytes=5000, tally=Tally())
        room = Reservation(cache, "0" * 64, 1000)
        room.take()

        assert value(server.metrics_url, "streamer_cache_bytes") == cache.used_bytes > 1000
        assert value(server.metrics_url, "streamer_cache_limit_bytes") == 5000
        room.release()
        cache.close()


@given(st.lists(st.floats(0, 100), max_size=20))
def test_buckets_hold_all_durations_up_to_their_bound(seconds: list[float]) -> None:
    durations = Durations()
    for each in seconds:
        durations.add(each)

    for bound, count in durations.buckets():
        assert count == sum(each <= float(bound) for each in seconds)
    assert durations.seconds == pytest.approx(sum(seconds), abs=1e-7)


def test_examples_on_the_page_ask_for_metrics_that_there_are() -> None:
    examples = re.findall(r"```promql\n(.*?)```", PAGE.read_text(), re.DOTALL)
    asked = {name for each in examples for name in re.findall(r"\b(?:gateway|streamer|process)_\w+", each)}

    known = set(documented("gateway") | documented("streamer"))
    assert asked <= known | {f"{name}_{part}" for name in known for part in ("bucket", "sum", "count")}
    assert len(examples) == 11
