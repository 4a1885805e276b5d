"""A reader that stops: what is on its way to it, what it holds, and what it costs the streamer."""

import asyncio
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AsyncExitStack, aclosing
from pathlib import Path
from typing import Any

import grpc
import pytest

from protos.streamer.v1 import sample_service_pb2 as pb
from protos.streamer.v1.sample_service_pb2_grpc import SampleServiceStub
from streamer.client import Plan, SampleClient
from streamer.server import StreamerServer
from streamer.settings import StreamerSettings
from streamer.sources.split import Dataset
from tests.scraping import becomes, value
from tests.streamer.process import StreamerProcess, write_digits
from tests.tcp import TcpProxy, Way

BATCH_SIZE = 128
BATCH_BYTES = BATCH_SIZE * 785
PLAN = Plan(dataset="mnist", seed=1, batch_size=BATCH_SIZE)
UNACKNOWLEDGED = "streamer_unacknowledged_bytes"
MIB = 1024**2


async def pulled(channel: grpc.aio.Channel, window_bytes: int) -> Any:
    """Open a call of PullBatches that grants once."""
    call: Any = SampleServiceStub(channel).PullBatches()
    asked = pb.StreamBatchesRequest(plan=pb.Plan(dataset="mnist", seed=1, batch_size=BATCH_SIZE))
    await call.write(pb.PullBatchesRequest(open=asked))
    await call.write(pb.PullBatchesRequest(grant_bytes=window_bytes))
    return call


@pytest.mark.parametrize("window_bytes", [1, BATCH_BYTES, BATCH_BYTES + 1, 3_000_000])
async def test_reader_that_grants_no_more_has_its_credit_and_one_batch_at_most(
    large: StreamerServer, window_bytes: int
) -> None:
    """Exactly as many batches come as it takes to use the credit up: by the server's count and on the wire."""
    num_batches = -(-window_bytes // BATCH_BYTES)
    async with TcpProxy(large.address) as proxy, grpc.aio.insecure_channel(proxy.address) as channel:
        call = await pulled(channel, window_bytes)
        for _ in range(num_batches):
            assert (await call.read()).num_samples == BATCH_SIZE
        await becomes(num_batches * BATCH_BYTES, large.metrics_url, UNACKNOWLEDGED, dataset="mnist")
        # Whoever else reads has all that the event loop could have sent.
        await pulled(channel, 1)
        await becomes((num_batches + 1) * BATCH_BYTES, large.metrics_url, UNACKNOWLEDGED, dataset="mnist")
        on_the_wire = proxy.passed[Way.BACK]

    assert num_batches * BATCH_BYTES < window_bytes + BATCH_BYTES
    sent = (num_batches + 1) * BATCH_BYTES
    assert on_the_wire <= sent * 1.01 + 64 * 1024


async def test_grants_take_what_was_read_off_the_count(large: StreamerServer) -> None:
    async with grpc.aio.insecure_channel(large.address) as channel:
        call = await pulled(channel, 2 * BATCH_BYTES)
        await call.read()
        await becomes(2 * BATCH_BYTES, large.metrics_url, UNACKNOWLEDGED, dataset="mnist")
        await call.write(pb.PullBatchesRequest(grant_bytes=BATCH_BYTES))
        for _ in range(2):
            await call.read()
        await becomes(2 * BATCH_BYTES, large.metrics_url, UNACKNOWLEDGED, dataset="mnist")
        call.cancel()
        await becomes(0, large.metrics_url, UNACKNOWLEDGED, dataset="mnist")


async def test_client_whose_consumer_stops_has_its_window_and_one_batch_on_the_way(large: StreamerServer) -> None:
    window_bytes = 350_000
    async with (
        TcpProxy(large.address) as proxy,
        SampleClient(proxy.address, window_bytes=window_bytes) as client,
        aclosing(client.batches(PLAN)) as batches,
    ):
        await anext(batches)
        # The fourth is the one that the window's last bytes let go.
        await becomes(4 * BATCH_BYTES, large.metrics_url, UNACKNOWLEDGED, dataset="mnist")
        assert proxy.passed[Way.BACK] <= (window_bytes + BATCH_BYTES) * 1.01 + 64 * 1024
        # It has only stopped.
        assert [(await anext(batches)).position for _ in range(9)] == [n * BATCH_SIZE for n in range(1, 10)]


async def test_client_of_several_replicas_holds_its_ranges_and_no_more(large: StreamerServer, dataset: Dataset) -> None:
    """Of n replicas 2n + 1 ranges: what all of them sent is what is waiting."""
    async with AsyncExitStack() as stack:
        others = [
            await stack.enter_async_context(
                StreamerServer(StreamerSettings(port=0, metrics_port=0), [Dataset("mnist", (), large_splits(large))])
            )
            for _ in range(2)
        ]
        servers = [large, *others]
        range_bytes = 5 * BATCH_BYTES
        client = await stack.enter_async_context(
            SampleClient([each.address for each in servers], range_bytes=range_bytes)
        )
        batches = await stack.enter_async_context(aclosing(client.batches(PLAN)))
        await anext(batches)
        await sent_become(servers, 7 * 5 * BATCH_SIZE)
        # One range is used up: one more may come.
        for _ in range(5):
            await anext(batches)
        await sent_become(servers, 8 * 5 * BATCH_SIZE)


def large_splits(server: StreamerServer) -> Any:
    """Return what the server serves."""
    return server._datasets[0].splits


async def sent_become(servers: Sequence[StreamerServer], count: int) -> None:
    """Wait until they have sent so many samples together, and see that they send no more."""

    def sent() -> float:
        return sum(value(each.metrics_url, "streamer_sent_samples_total", dataset="mnist") for each in servers)

    while sent() < count:  # noqa: ASYNC110 - what was sent is told to nobody else
        await asyncio.sleep(0)
    # Turns of the loop in which more could be sent: each takes far less.
    for _ in range(200):
        await asyncio.sleep(0)
    assert sent() == count


# What it costs the streamer


# 47 MB. gRPC's guess at the link lets 4 MB come, and on a busy machine now and then 8, or all of 16: such a stream has
# ended, and stalls no more.
NUM_SAMPLES = 60_000


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """More than HTTP/2 takes for a reader that does not read."""
    folder = tmp_path_factory.mktemp("digits")
    write_digits(folder, NUM_SAMPLES)
    return folder


@pytest.fixture
def process(digits: Path) -> Iterator[StreamerProcess]:
    """A streamer of them; a new one for each test, as memory is kept."""
    with StreamerProcess(digits) as process:
        yield process


async def stalled_pull(address: str, stack: AsyncExitStack) -> None:
    client = await stack.enter_async_context(SampleClient(address))
    batches = await stack.enter_async_context(aclosing(client.batches(PLAN)))
    await anext(batches)


def stalled_stream(options: Sequence[tuple[str, int]]) -> Callable[[str, AsyncExitStack], Any]:
    async def stall(address: str, stack: AsyncExitStack) -> None:
        own = ("grpc.use_local_subchannel_pool", 1)
        channel = await stack.enter_async_context(grpc.aio.insecure_channel(address, options=[*options, own]))
        asked = pb.StreamBatchesRequest(plan=pb.Plan(dataset="mnist", batch_size=BATCH_SIZE))
        call = SampleServiceStub(channel).StreamBatches(asked)
        stack.callback(call.cancel)
        await call.read()

    return stall


SMALL = [("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 512 * 1024)]


@pytest.mark.parametrize(
    ("stall", "method"),
    [
        pytest.param(stalled_pull, "PullBatches", id="our client"),
        pytest.param(stalled_stream(SMALL), "StreamBatches", id="StreamBatches, small windows"),
        pytest.param(stalled_stream(()), "StreamBatches", id="StreamBatches, grpc's defaults"),
    ],
)
async def test_stalled_reader_costs_the_streamer_less_than_2_mib(
    process: StreamerProcess, stall: Callable[[str, AsyncExitStack], Any], method: str
) -> None:
    labels = {"method": f"sluice.streamer.v1.SampleService/{method}"}
    # The first one brings what is there once.
    for count in (1, 100):
        before = process.resident_bytes
        async with AsyncExitStack() as stack:
            await asyncio.gather(*(stall(process.address, stack) for _ in range(count)))
            await settled(process)
            # With gRPC's own guess at the link one or two have ended, now and then: an epoch of 16 MB came whole once.
            stalled = value(process.metrics_url, "streamer_streams_in_flight", **labels)
            assert count == 1 or stalled >= 0.9 * count
            grown = process.resident_bytes - before
            # Another one still gets its epoch.
            async with SampleClient(process.address) as client:
                assert sum([len(batch.labels) async for batch in client.batches(PLAN)]) == NUM_SAMPLES
        await becomes(0, process.metrics_url, "streamer_streams_in_flight", **labels)
    print(f"{method}: {grown / 100 / 1024:.0f} KiB for each of 100 stalled readers", file=sys.stderr)

    assert grown / 100 < 2 * MIB


async def settled(process: StreamerProcess) -> None:
    """Wait until nothing is sent any more."""
    before = -1.0
    while before != (now := value(process.metrics_url, "streamer_sent_bytes_total", dataset="mnist")):
        before = now
        await asyncio.sleep(0.2)
