"""Several processes as one streamer: real ones, and real signals."""

import asyncio
import os
import shutil
import signal
import sys
import time
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from protos import mnist_pb2, mnist_pb2_grpc
from protos.streamer.v1 import sample_service_pb2 as pb
from protos.streamer.v1.sample_service_pb2_grpc import SampleServiceStub
from rpc.lifecycle import PortTakenError
from streamer.client import Plan, SampleClient
from streamer.processes import workers
from streamer.server import StreamerServer
from streamer.settings import StreamerSettings
from streamer.sources.objects import ObjectStore
from streamer.sources.packing import StoreTarget
from streamer.sources.split import MemoryDataset
from streamer.sources.tally import Tally
from tests.children import Watched, children
from tests.scraping import becomes, documented, faults, scrape, shown, value
from tests.streamer.hosts import host
from tests.streamer.packed import random_split, write_packed
from tests.streamer.sources.test_cache import size_of
from tests.streamer.storage import S3Server

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux spreads connections over processes")

PLAN = Plan(dataset="mnist", seed=1, batch_size=10)
ENDLESS = mnist_pb2.DataRequest(epochs=100_000)
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


def port_of(address: str) -> int:
    return int(address.rpartition(":")[2])


async def read_epoch(
    address: str, plan: Plan = PLAN, held: asyncio.Barrier | None = None, go_on: asyncio.Event | None = None
) -> bytes:
    """Read an epoch in small steps, and stop after the first batch until told to go on; return its indices."""
    indices = []
    async with SampleClient(address, window_bytes=1) as client:
        async for batch in client.batches(plan):
            indices.append(batch.indices)
            if len(indices) == 1 and held is not None and go_on is not None:
                await held.wait()
                await go_on.wait()
    assert sorted(np.concatenate(indices)) == list(range(1000)), "each sample once"
    return np.concatenate(indices).tobytes()


async def test_readers_are_spread_and_read_the_same(mnist_folder: Path, tmp_path: Path) -> None:
    async with host(tmp_path, SLUICE_DATA=str(mnist_folder)) as two:
        epochs = await asyncio.gather(*(read_epoch(two.address) for _ in range(16)))

        assert len(set(epochs)) == 1
        # By chance, once in 32,768 times all come to one.
        assert {event["worker"] for event in two.events() if event["event"] == "rpc"} == {0, 1}
        assert value(two.metrics_url, "streamer_sent_samples_total", dataset="mnist") == 16 * 1000


async def test_killed_worker_is_replaced_and_nobody_misses_a_sample(mnist_folder: Path, tmp_path: Path) -> None:
    async with host(tmp_path, SLUICE_DATA=str(mnist_folder)) as two:
        held, go_on = asyncio.Barrier(9), asyncio.Event()
        async with asyncio.TaskGroup() as readers:
            for _ in range(8):
                readers.create_task(read_epoch(two.address, PLAN, held, go_on))
            await held.wait()
            before = value(two.metrics_url, "streamer_sent_samples_total", dataset="mnist")
            os.kill(two.workers()[0], signal.SIGKILL)
            await becomes(1, two.metrics_url, "streamer_worker_restarts_total")
            assert value(two.metrics_url, "streamer_sent_samples_total", dataset="mnist") >= before > 0
            go_on.set()

        await becomes(2, two.metrics_url, "streamer_workers")
        assert len(two.workers()) == 2


STUCK_WHEN_TOLD = "import signal, time; signal.signal(signal.SIGUSR1, lambda *_: time.sleep(3600))"


def run_first(code: str, folder: Path) -> dict[str, str]:
    """Return an environment in which each process begins with this code."""
    (folder / "sitecustomize.py").write_text(code)
    return {"PYTHONPATH": str(folder)}


@pytest.mark.parametrize(
    "how",
    [pytest.param(signal.SIGSTOP, id="stopped", marks=pytest.mark.slow), pytest.param(signal.SIGUSR1, id="stuck")],
)
async def test_hanging_worker_is_replaced_and_nobody_misses_a_sample(
    how: signal.Signals, mnist_folder: Path, tmp_path: Path
) -> None:
    settings = {"SLUICE_DATA": str(mnist_folder), "SLUICE_STREAMER_HANG_SECONDS": "3"}
    async with host(tmp_path, **settings, **run_first(STUCK_WHEN_TOLD, tmp_path)) as two:
        held, go_on = asyncio.Barrier(9), asyncio.Event()
        async with asyncio.TaskGroup() as readers:
            for _ in range(8):
                readers.create_task(read_epoch(two.address, PLAN, held, go_on))
            await held.wait()
            hanging = two.workers()[0]
            os.kill(hanging, how)
            go_on.set()

        await becomes(1, two.metrics_url, "streamer_worker_restarts_total")
        await becomes(2, two.metrics_url, "streamer_workers")
        assert hanging not in two.workers()
        (died,) = [event for event in two.events() if event["event"] == "worker died"]
        assert died["cause"] == "killed, as its event loop stood still for 3 s"


async def test_sum_does_not_fall_while_workers_die(mnist_folder: Path, tmp_path: Path) -> None:
    async with host(tmp_path, SLUICE_DATA=str(mnist_folder)) as two:
        for deaths in (1, 2):
            await read_epoch(two.address)
            assert value(two.metrics_url, "streamer_sent_samples_total", dataset="mnist") == deaths * 1000
            os.kill(two.workers()[deaths % 2], signal.SIGKILL)
            await becomes(deaths, two.metrics_url, "streamer_worker_restarts_total")
            assert value(two.metrics_url, "streamer_sent_samples_total", dataset="mnist") == deaths * 1000
            await becomes(2, two.metrics_url, "streamer_workers")


async def test_sigterm_sends_readers_away_and_leaves_nothing(mnist_folder: Path, tmp_path: Path) -> None:
    async with host(tmp_path, SLUICE_DATA=str(mnist_folder)) as two, grpc.aio.insecure_channel(two.address) as channel:
        watched = Watched(two.workers())
        calls: Any = SampleServiceStub(channel).PullBatches()
        plan = pb.Plan(dataset="mnist", batch_size=10)
        await calls.write(pb.PullBatchesRequest(open=pb.StreamBatchesRequest(plan=plan)))
        await calls.write(pb.PullBatchesRequest(grant_bytes=1))
        assert not (await calls.read()).draining

        two.process.send_signal(signal.SIGTERM)
        assert (await calls.read()).draining
        await calls.done_writing()
        assert await two.process.wait() == 0
        await watched.ended()


async def test_second_signal_ends_all_at_once(mnist_folder: Path, tmp_path: Path) -> None:
    patient = {"SLUICE_DATA": str(mnist_folder), "SLUICE_STREAMER_DRAIN_SECONDS": "3600"}
    async with host(tmp_path, **patient) as two, grpc.aio.insecure_channel(two.address) as channel:
        await mnist_pb2_grpc.MnistServiceStub(channel).GetTrainingSamples(ENDLESS).read()
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
        await watch.read()
        two.process.send_signal(signal.SIGINT)
        assert (await watch.read()).status == NOT_SERVING

        two.process.send_signal(signal.SIGINT)
        assert await two.process.wait() == 0


async def test_workers_end_when_their_parent_is_killed(mnist_folder: Path, tmp_path: Path) -> None:
    async with host(tmp_path, SLUICE_DATA=str(mnist_folder)) as two, grpc.aio.insecure_channel(two.address) as channel:
        await mnist_pb2_grpc.MnistServiceStub(channel).GetTrainingSamples(ENDLESS).read()
        watched = Watched(two.workers())
        two.process.kill()
        await watched.ended()


async def test_stuck_worker_ends_when_its_parent_is_killed(mnist_folder: Path, tmp_path: Path) -> None:
    async with host(tmp_path, SLUICE_DATA=str(mnist_folder), **run_first(STUCK_WHEN_TOLD, tmp_path)) as two:
        watched = Watched(two.workers())
        for worker in two.workers():
            os.kill(worker, signal.SIGUSR1)
        two.process.kill()
        await watched.ended()


# Ports


async def test_port_of_another_streamer_is_refused(server: StreamerServer, tmp_path: Path) -> None:
    port = port_of(server.address)

    with pytest.raises(PortTakenError, match=f"127.0.0.1:{port}.*--port or SLUICE_STREAMER_PORT"):
        await workers.serve(StreamerSettings(port=port, metrics_port=0, workers=2, cache=tmp_path / "cache"))
    assert not (tmp_path / "cache").exists(), "no data was fetched"


async def test_port_of_several_workers_is_refused_to_all_others(mnist_folder: Path, tmp_path: Path) -> None:
    async with host(tmp_path, SLUICE_DATA=str(mnist_folder)) as two:
        taken = StreamerSettings(port=port_of(two.address), metrics_port=0, workers=2)
        with pytest.raises(PortTakenError, match="--port"):
            await workers.serve(taken)
        with pytest.raises(PortTakenError, match="--port"):
            StreamerServer(taken).bind()


async def test_taken_metrics_port_is_refused(server: StreamerServer, mnist_folder: Path) -> None:
    taken = port_of(server.metrics_url.removesuffix("/metrics"))

    with pytest.raises(PortTakenError, match="--metrics-port or SLUICE_STREAMER_METRICS_PORT"):
        await workers.serve(StreamerSettings(port=0, metrics_port=taken, workers=2, data=mnist_folder))


# Data and limits


async def test_data_too_large_for_memory_is_read_by_each_worker_where_it_lies(tmp_path: Path) -> None:
    split = random_split()
    await write_packed(tmp_path / "packed", split)
    places = {"SLUICE_STREAMER_DATASETS": f"own={tmp_path / 'packed'}", "SLUICE_STREAMER_MEMORY_BYTES": "0"}
    async with host(tmp_path, **places) as two, SampleClient(two.address) as client:
        batches = [batch async for batch in client.batches(Plan(dataset="own", seed=3, batch_size=128))]

    for batch in batches:
        np.testing.assert_array_equal(batch.images, split.images[batch.indices])


async def test_workers_share_the_cache_and_its_limit_at_every_moment(s3: S3Server, tmp_path: Path) -> None:
    split, url = random_split(seed=time.monotonic_ns()), f"s3://workers/{tmp_path.name}"
    await write_packed(StoreTarget(ObjectStore(url, tally=Tally())), split)
    # Of 63 blocks of 400 bytes.
    limit, blocks, seen = 20 * 400, tmp_path / "cache" / "blocks", [0]
    places = {"SLUICE_STREAMER_DATASETS": f"own={url}", "SLUICE_STREAMER_MEMORY_BYTES": "0"}

    async def watch() -> None:
        while True:
            seen[0] = max(seen[0], await asyncio.to_thread(size_of, blocks))

    async def read(number: int) -> None:
        async with SampleClient(two.address) as client:
            async for batch in client.batches(Plan(dataset="own", seed=number, batch_size=50)):
                np.testing.assert_array_equal(batch.images, split.images[batch.indices])

    async with host(tmp_path, SLUICE_STREAMER_CACHE_BYTES=str(limit), **places) as two:
        watching = asyncio.create_task(watch())
        # All that the first ones want may be asked for before any of it is in the cache.
        for first in (0, 12):
            await asyncio.gather(*(read(number) for number in range(first, first + 12)))
        watching.cancel()
        url = two.metrics_url
        assert 0 < seen[0] <= limit
        assert 0 < value(url, "streamer_cache_bytes") <= limit == value(url, "streamer_cache_limit_bytes")
        for name in ("cache_hits", "cache_misses", "storage_answers", "storage_received_bytes"):
            assert value(url, f"streamer_{name}_total") > 0


# Workers that do not start


class FailingStarts:
    """Ends the next workers that start, as many as were called for, by a file for each, which it takes away."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder / "failing"
        self._folder.mkdir()
        code = f"""
import os, sys
if "streamer.processes.worker" in sys.orig_argv:
    for file in os.scandir({str(self._folder)!r}):
        try:
            os.unlink(file)
        except FileNotFoundError:
            continue
        os._exit(3)
"""
        self.environment = run_first(code, folder)

    def call_for(self, count: int) -> None:
        for number in range(count):
            (self._folder / str(number)).touch()


@pytest.mark.slow
async def test_worker_that_cannot_start_again_is_tried_on_while_the_other_serves(
    mnist_folder: Path, tmp_path: Path
) -> None:
    starts = FailingStarts(tmp_path)
    async with host(tmp_path, SLUICE_DATA=str(mnist_folder), **starts.environment) as two:
        # As many as it takes to give up where none serves.
        starts.call_for(5)
        os.kill(two.workers()[0], signal.SIGKILL)
        await becomes(5, two.metrics_url, "streamer_worker_restarts_total")
        assert value(two.metrics_url, "streamer_workers") == 1
        await read_epoch(two.address)

        await becomes(2, two.metrics_url, "streamer_workers")


@pytest.mark.slow
async def test_streamer_none_of_whose_workers_starts_again_ends_with_the_reason(tmp_path: Path) -> None:
    await write_packed(tmp_path / "packed", random_split())
    places = {"SLUICE_STREAMER_DATASETS": f"own={tmp_path / 'packed'}", "SLUICE_STREAMER_MEMORY_BYTES": "0"}
    async with host(tmp_path, **places) as two:
        watched = Watched(two.workers())
        shutil.rmtree(tmp_path / "packed")
        for worker in two.workers():
            os.kill(worker, signal.SIGKILL)
        assert await two.process.wait() == 1
        await watched.ended()

    assert "WorkerError: worker" in two.log.read_text()
    assert "no such folder; 5 times in a row, and no other serves" in two.log.read_text()


async def test_streamer_none_of_whose_workers_starts_at_first_ends_at_once(mnist_folder: Path, tmp_path: Path) -> None:
    starts = FailingStarts(tmp_path)
    starts.call_for(2)
    async with host(tmp_path, SLUICE_DATA=str(mnist_folder), **starts.environment) as none:
        assert not none.address
        assert await none.process.wait() == 1
    assert "WorkerError: worker 0 ended before it was ready" in none.log.read_text()


async def test_worker_that_does_not_start_at_first_is_tried_again(mnist_folder: Path, tmp_path: Path) -> None:
    starts = FailingStarts(tmp_path)
    starts.call_for(1)
    async with host(tmp_path, SLUICE_DATA=str(mnist_folder), **starts.environment) as two:
        await read_epoch(two.address)
        await becomes(2, two.metrics_url, "streamer_workers")
        assert value(two.metrics_url, "streamer_worker_restarts_total") == 1


async def test_data_that_is_not_there_is_said_as_by_one_process(tmp_path: Path) -> None:
    async with host(tmp_path, SLUICE_STREAMER_DATASETS=f"own={tmp_path / 'none'}") as none:
        assert not none.address
        assert await none.process.wait() == 1
    assert "found no such folder" in none.log.read_text()


async def open_stream(address: str, stack: AsyncExitStack) -> None:
    options = [("grpc.use_local_subchannel_pool", 1)]
    channel = await stack.enter_async_context(grpc.aio.insecure_channel(address, options=options))
    await mnist_pb2_grpc.MnistServiceStub(channel).GetTrainingSamples(ENDLESS).read()


async def test_limit_of_streams_is_that_of_all_workers_together(mnist_folder: Path, tmp_path: Path) -> None:
    limits = {"SLUICE_STREAMER_WORKERS": "3", "SLUICE_STREAMER_MAX_STREAMS": "7"}
    async with host(tmp_path, SLUICE_DATA=str(mnist_folder), **limits) as three, AsyncExitStack() as stack:
        url = three.metrics_url
        assert value(url, "streamer_streams_in_flight_limit") == 7
        assert value(url, "streamer_workers") == value(url, "streamer_serving") * 3 == 3
        for _ in range(7):
            await open_stream(three.address, stack)
        with pytest.raises(grpc.aio.AioRpcError, match="serves 7 streams at once and all are taken"):
            await open_stream(three.address, stack)
        method = "MnistService/GetTrainingSamples"
        assert value(url, "streamer_streams_in_flight", method=method) == 7
        os.kill(three.workers()[1], signal.SIGKILL)
        await becomes(1, url, "streamer_worker_restarts_total")
        await becomes(3, url, "streamer_workers")
        await stack.aclose()
        await becomes(0, url, "streamer_streams_in_flight", method=method)
        for _ in range(7):
            await open_stream(three.address, stack)


async def test_places_of_a_dead_worker_are_free_before_there_is_another(mnist_folder: Path, tmp_path: Path) -> None:
    starts, limit = FailingStarts(tmp_path), {"SLUICE_STREAMER_MAX_STREAMS": "8", "SLUICE_DATA": str(mnist_folder)}
    async with host(tmp_path, **limit, **starts.environment) as two, AsyncExitStack() as stack:
        for _ in range(8):
            await open_stream(two.address, stack)
        starts.call_for(100)
        os.kill(two.workers()[0], signal.SIGKILL)
        await becomes(1, two.metrics_url, "streamer_workers")

        # How many of them it had is a matter of chance.
        left = value(two.metrics_url, "streamer_streams_in_flight", method="MnistService/GetTrainingSamples")
        for _ in range(8 - int(left)):
            await open_stream(two.address, stack)
        with pytest.raises(grpc.aio.AioRpcError, match="serves 8 streams at once and all are taken"):
            await open_stream(two.address, stack)


async def test_processes_for_transforms_are_divided_among_the_workers(mnist_folder: Path, tmp_path: Path) -> None:
    limits = {"SLUICE_STREAMER_TRANSFORM_WORKERS": "3"}
    async with host(tmp_path, SLUICE_DATA=str(mnist_folder), **limits) as two, asyncio.TaskGroup() as readers:
        # Until both workers have them, which is a matter of chance.
        while value(two.metrics_url, "streamer_transform_workers") < 3:
            await readers.create_task(read_epoch(two.address, replace(PLAN, transform="augment-v1")))
        assert [len(children(worker)) for worker in two.workers()] in ([1, 2], [2, 1])


async def test_metrics_of_all_workers_look_like_those_of_one_process(
    mnist_folder: Path, tmp_path: Path, server: StreamerServer
) -> None:
    async with host(tmp_path, SLUICE_DATA=str(mnist_folder)) as two:
        assert shown(two.metrics_url) == shown(server.metrics_url) == documented("streamer")
        assert faults(two.metrics_url) == []
        types = {metric.name: metric.type for metric in scrape(server.metrics_url)}
        assert {metric.name: metric.type for metric in scrape(two.metrics_url)} == types


async def test_stopped_worker_does_not_hold_up_the_metrics(mnist_folder: Path, tmp_path: Path) -> None:
    """Only who asks first waits for it, 2 s: thirty who did would take a minute."""
    async with host(tmp_path, SLUICE_DATA=str(mnist_folder), SLUICE_STREAMER_HANG_SECONDS="3600") as two:
        await read_epoch(two.address)
        before = value(two.metrics_url, "streamer_sent_samples_total", dataset="mnist")
        for worker in two.workers():
            os.kill(worker, signal.SIGSTOP)
        began = time.monotonic()
        for _ in range(30):
            assert value(two.metrics_url, "streamer_sent_samples_total", dataset="mnist") == before == 1000
        assert time.monotonic() - began < 30
        for worker in two.workers():
            os.kill(worker, signal.SIGCONT)


async def test_cancelled_serve_ends_its_workers(mnist_folder: Path) -> None:
    ready, others = asyncio.get_running_loop().create_future(), set(children(os.getpid()))
    settings = StreamerSettings(port=0, metrics_port=0, workers=2, data=mnist_folder)
    task = asyncio.create_task(workers.serve(settings, on_ready=ready.set_result))
    await ready
    started = set(children(os.getpid())) - others
    assert len(started) == 2
    watched = Watched(sorted(started))
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await watched.ended()


async def test_what_is_served_is_the_data_set(mnist_folder: Path, tmp_path: Path, dataset: MemoryDataset) -> None:
    async with host(tmp_path, SLUICE_DATA=str(mnist_folder)) as two, SampleClient(two.address) as client:
        (listed,) = await client.datasets()
        batches = [batch async for batch in client.batches(PLAN)]

    assert listed.splits["train"].fingerprint == dataset.splits["train"].fingerprint
    for batch in batches:
        np.testing.assert_array_equal(batch.images, dataset.splits["train"].images[batch.indices])
