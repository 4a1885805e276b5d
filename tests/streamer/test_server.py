import asyncio
import os
import signal
import socket
import sys
from collections.abc import AsyncIterable, AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

import grpc
import numpy as np
import pytest
from google.protobuf.descriptor_pb2 import FileDescriptorProto
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from numpy.typing import NDArray
from structlog.testing import capture_logs

from protos import mnist_pb2, mnist_pb2_grpc
from protos.streamer.v1 import sample_service_pb2 as pb
from protos.streamer.v1.sample_service_pb2_grpc import SampleServiceStub
from rpc.lifecycle import PortTakenError
from streamer.client import Plan, SampleClient
from streamer.errors import DataLossError
from streamer.server import StreamerServer, serve
from streamer.settings import StreamerSettings
from streamer.sources.split import Dataset, MemoryDataset, MemorySplit, Samples
from tests.streamer.packed import write_packed
from tests.streamer.streams import streams_become

SERVICES = ["MnistService", "sluice.streamer.v1.SampleService"]
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
T = TypeVar("T")
ENDLESS = mnist_pb2.DataRequest(epochs=100_000)


@pytest.mark.parametrize("service", ["", *SERVICES])
async def test_health_serves_until_the_drain(server: StreamerServer, channel: grpc.aio.Channel, service: str) -> None:
    watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(service=service))
    assert (await watch.read()).status == SERVING

    server.drain()
    assert (await watch.read()).status == NOT_SERVING
    watch.cancel()


async def test_reflection_lists_and_describes_the_services(channel: grpc.aio.Channel) -> None:
    requests = [
        reflection_pb2.ServerReflectionRequest(list_services=""),
        reflection_pb2.ServerReflectionRequest(file_containing_symbol=SERVICES[1]),
    ]
    stub = reflection_pb2_grpc.ServerReflectionStub(channel)
    listed, described = [answer async for answer in stub.ServerReflectionInfo(iter(requests))]

    names = [service.name for service in listed.list_services_response.service]
    assert set(SERVICES) < set(names)
    (file, *_) = described.file_descriptor_response.file_descriptor_proto
    assert FileDescriptorProto.FromString(file).service[0].name == "SampleService"


async def test_taken_port_is_named_with_the_option_that_changes_it(server: StreamerServer) -> None:
    port = int(server.address.rpartition(":")[2])

    with pytest.raises(PortTakenError, match=f"127.0.0.1:{port}.*--port or SLUICE_STREAMER_PORT"):
        StreamerServer(StreamerSettings(port=port, metrics_port=0)).bind()


class Damaged(MemorySplit):
    """A split that cannot be read."""

    def gather(self, indices: NDArray[np.int64], gathered: NDArray[np.uint8]) -> Samples:
        raise DataLossError("/srv/own/train-00002.records", 7, 9, expected="what was written", found="other bytes")


async def test_reader_is_told_which_file_is_damaged_and_the_log_where_it_lies(dataset: MemoryDataset) -> None:
    train = dataset.splits["train"]
    damaged = Dataset("mnist", (), {"train": Damaged("train", train.images, train.labels, 10)})
    asked = pb.StreamBatchesRequest(plan=pb.Plan(dataset="mnist", batch_size=10))
    settings = StreamerSettings(port=0, metrics_port=0)
    async with StreamerServer(settings, [damaged]) as server, grpc.aio.insecure_channel(server.address) as channel:
        with capture_logs() as logs, pytest.raises(grpc.aio.AioRpcError) as caught:
            await SampleServiceStub(channel).StreamBatches(asked).read()

    told = "train-00002.records, bytes 7-9: expected what was written, found other bytes"
    assert (caught.value.code(), caught.value.details()) == (grpc.StatusCode.DATA_LOSS, told)
    assert [each["problem"] for each in logs if each["event"] == "stream fails"] == [f"/srv/own/{told}"]


# Readers that go away or stand still


async def test_cancelled_call_ends_its_stream(server: StreamerServer, channel: grpc.aio.Channel) -> None:
    call = mnist_pb2_grpc.MnistServiceStub(channel).GetTrainingSamples(ENDLESS)
    await call.read()
    assert server.active_streams == 1

    call.cancel()
    await streams_become(server, 0)


async def test_closed_connection_ends_its_streams(server: StreamerServer) -> None:
    async with grpc.aio.insecure_channel(server.address) as channel:
        for _ in range(5):
            await mnist_pb2_grpc.MnistServiceStub(channel).GetTrainingSamples(ENDLESS).read()
        assert server.active_streams == 5

    await streams_become(server, 0)


async def test_silent_calls_keep_no_reader_out(dataset: MemoryDataset) -> None:
    one = StreamerSettings(port=0, metrics_port=0, max_streams=1)
    async with StreamerServer(one, [dataset]) as server, grpc.aio.insecure_channel(server.address) as channel:
        stub, reflected = SampleServiceStub(channel), reflection_pb2_grpc.ServerReflectionStub(channel)
        silent = [stub.PullBatches() for _ in range(200)] + [reflected.ServerReflectionInfo() for _ in range(200)]
        # Without the request that it cannot do without.
        silent += [channel.stream_stream(f"/{SERVICES[1]}/StreamBatches")() for _ in range(200)]
        # On the same connection, and so after them.
        asked = pb.StreamBatchesRequest(plan=pb.Plan(dataset="mnist", batch_size=100))
        batches = [batch async for batch in stub.StreamBatches(asked)]
        for call in silent:
            call.cancel()

    assert sum(batch.num_samples for batch in batches) == 1000


async def test_connection_without_streams_is_closed(dataset: MemoryDataset) -> None:
    settings = StreamerSettings(port=0, metrics_port=0, idle_seconds=0.2)
    async with StreamerServer(settings, [dataset]) as server, grpc.aio.insecure_channel(server.address) as channel:
        await SampleServiceStub(channel).ListDatasets(pb.ListDatasetsRequest())
        assert channel.get_state() is grpc.ChannelConnectivity.READY
        await channel.wait_for_state_change(grpc.ChannelConnectivity.READY)
        assert channel.get_state() is grpc.ChannelConnectivity.IDLE


async def test_connection_whose_stream_stands_still_is_kept(
    dataset: MemoryDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("streamer.server._IDLE_CONNECTION", 0.01)
    settings = StreamerSettings(port=0, metrics_port=0, idle_seconds=100)
    async with StreamerServer(settings, [dataset]) as server, grpc.aio.insecure_channel(server.address) as channel:
        call: Any = SampleServiceStub(channel).PullBatches()
        plan = pb.Plan(dataset="mnist", batch_size=100)
        await call.write(pb.PullBatchesRequest(open=pb.StreamBatchesRequest(plan=plan)))
        await asyncio.sleep(2)  # twice as long as one without a stream would be kept
        await call.write(pb.PullBatchesRequest(grant_bytes=1))
        assert (await call.read()).num_samples == 100
        call.cancel()


async def test_reader_that_stands_still_holds_up_nobody_and_misses_nothing(large: StreamerServer) -> None:
    asked = pb.StreamBatchesRequest(plan=pb.Plan(dataset="mnist", batch_size=512))
    async with grpc.aio.insecure_channel(large.address) as channel, SampleClient(large.address) as fast:
        standing = aiter(SampleServiceStub(channel).StreamBatches(asked))
        batches = [await anext(standing)]
        read = sum([len(batch.labels) async for batch in fast.batches(Plan(dataset="mnist", batch_size=512))])
        assert read == 60_000
        assert large.active_streams == 1, "the streamer has not sent it all"
        batches += [batch async for batch in standing]

    assert [index for batch in batches for index in batch.indices] == list(range(60_000))


def resident_bytes() -> int:
    """Memory of this process now; its peak would hide what is below an earlier test's."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


async def test_readers_that_stand_still_cost_bounded_memory(large: StreamerServer) -> None:
    """20 of them: what the streamer holds for each is two batches; the rest is what HTTP/2 takes on its way."""
    options = [("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 65_536)]
    asked = pb.StreamBatchesRequest(plan=pb.Plan(dataset="mnist", batch_size=512))
    async with grpc.aio.insecure_channel(large.address, options=options) as channel:
        before = resident_bytes()
        calls = [SampleServiceStub(channel).StreamBatches(asked) for _ in range(20)]
        for call in calls:
            await call.read()
        await streams_become(large, 20)
        async with SampleClient(large.address) as fast:
            # Time enough to send it all, were nothing to hold it back.
            _ = [None async for _ in fast.batches(Plan(dataset="mnist", batch_size=512))]
        grown = resident_bytes() - before
        assert large.active_streams == 20
        for call in calls:
            call.cancel()

    assert grown < 100 * 1024**2, "20 whole epochs would be 940 MB"


async def test_drain_tells_readers_of_batches_where_to_go_on(large: StreamerServer) -> None:
    asked = pb.StreamBatchesRequest(plan=pb.Plan(dataset="mnist", batch_size=512))
    async with grpc.aio.insecure_channel(large.address) as channel:
        stream = SampleServiceStub(channel).StreamBatches(asked)
        received = []
        async for batch in stream:
            received.append(batch)
            large.drain()

    *batches, closing = received
    assert closing.draining
    assert not closing.end_of_epoch
    assert closing.num_samples == 0
    assert closing.position == closing.next_position == 512 * len(batches) < 60_000
    assert [batch.position for batch in batches] == list(range(0, closing.position, 512))


# The process


def assert_nobody_listens(address: str) -> None:
    host, port = address.split(":")
    with pytest.raises(ConnectionRefusedError), socket.create_connection((host, int(port))):
        pass


@asynccontextmanager
async def streamer_process(data: Path, **environment: str) -> AsyncIterator[tuple[asyncio.subprocess.Process, str]]:
    """A streamer of its own process and its address."""
    code = (
        "import asyncio; from rpc import log; from rpc.settings import load; from streamer.server import serve; "
        "from streamer.settings import StreamerSettings; log.configure(); "
        "settings = load(StreamerSettings, port=0, metrics_port=0); "
        "asyncio.run(serve(settings, on_ready=lambda address: print(address, flush=True)))"
    )
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", code),
        env={**os.environ, "SLUICE_DATA": str(data), **environment},
        stdout=asyncio.subprocess.PIPE,
    )
    assert process.stdout is not None
    try:
        yield process, (await process.stdout.readline()).decode().strip()
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


async def test_process_serves_the_folder_and_ends_cleanly_on_sigterm(
    mnist_folder: Path, dataset: MemoryDataset
) -> None:
    async with streamer_process(mnist_folder) as (process, address):
        async with SampleClient(address) as client:
            await client.wait_ready(timeout_seconds=10)
            (listed,) = await client.datasets()
        assert listed.splits["train"].fingerprint == dataset.splits["train"].fingerprint

        process.send_signal(signal.SIGTERM)
        assert await process.wait() == 0
    assert_nobody_listens(address)


async def test_process_serves_several_data_sets_from_their_places(
    mnist_folder: Path, dataset: MemoryDataset, tmp_path: Path
) -> None:
    await write_packed(tmp_path / "packed", dataset.splits["train"])
    wanted = {"SLUICE_STREAMER_DATASETS": f"mnist,own={tmp_path / 'packed'}", "SLUICE_STREAMER_MEMORY_BYTES": "0"}
    async with streamer_process(mnist_folder, **wanted) as (_, address), SampleClient(address) as client:
        listed = {one.name: one.splits["train"].fingerprint for one in await client.datasets()}
        batches = [batch async for batch in client.batches(Plan(dataset="own", seed=3, batch_size=128))]

    assert listed["mnist"] == listed["own"]
    for batch in batches:
        np.testing.assert_array_equal(batch.images, dataset.splits["train"].images[batch.indices])


async def interrupted(stream: AsyncIterable[T], process: asyncio.subprocess.Process) -> AsyncIterator[T]:
    """Send SIGTERM after the first message."""
    is_first = True
    async for message in stream:
        if is_first:
            process.send_signal(signal.SIGTERM)
        is_first = False
        yield message


async def test_stream_that_outlives_the_drain_is_cut(mnist_folder: Path) -> None:
    limits = {"SLUICE_STREAMER_DRAIN_SECONDS": "0.2"}
    served = streamer_process(mnist_folder, **limits)
    async with served as (process, address), grpc.aio.insecure_channel(address) as channel:
        stream = mnist_pb2_grpc.MnistServiceStub(channel).GetTrainingSamples(ENDLESS)
        with pytest.raises(grpc.aio.AioRpcError):
            _ = [None async for _ in interrupted(stream, process)]
        assert await process.wait() == 0


async def test_taken_port_is_said_before_any_data_is_fetched(server: StreamerServer, tmp_path: Path) -> None:
    port = int(server.address.rpartition(":")[2])

    with pytest.raises(PortTakenError):
        await serve(StreamerSettings(port=port, metrics_port=0, data=None, cache=tmp_path / "cache"))
    assert not (tmp_path / "cache").exists()


async def test_serve_stops_at_once_when_cancelled(mnist_folder: Path) -> None:
    ready = asyncio.get_running_loop().create_future()
    task = asyncio.create_task(
        serve(StreamerSettings(port=0, metrics_port=0, data=mnist_folder), on_ready=ready.set_result)
    )
    address = await ready
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task

    assert_nobody_listens(address)
