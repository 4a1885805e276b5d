"""Several processes as one gateway: real ones, and real signals."""

import asyncio
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from gateway import workers
from gateway.client import ImageClient
from gateway.server import GatewayServer
from gateway.settings import GatewaySettings
from rpc.lifecycle import PortTakenError, reserve
from rpc.settings import SettingsError
from tests.children import Watched, children
from tests.faults.gateway.process import Gateway
from tests.gateway.fake_triton import FakeTriton, label_of
from tests.scraping import becomes, documented, faults, shown, value

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux spreads connections over processes")


@asynccontextmanager
async def started(triton: FakeTriton, folder: Path, *options: str) -> AsyncIterator[Gateway]:
    """Run ``sluice gateway --workers 2``; it is killed in the end, if it runs still."""
    arguments = ("--model-repository", str(folder), "--workers", "2", *options)
    gateway = Gateway(triton.address, folder / "gateway.log", *arguments)
    try:
        await gateway.start()
        yield gateway
    finally:
        gateway.close()


def events(gateway: Gateway, name: str) -> list[dict[str, object]]:
    return [line for line in gateway.lines() if line["event"] == name]


def metrics_url(gateway: Gateway) -> str:
    (listening,) = events(gateway, "listening")
    return str(listening["metrics"])


async def ask(address: str, seed: int, count: int = 1) -> None:
    """Classify images over a connection of its own, one after another, and check each answer."""
    images = np.random.default_rng(seed).integers(0, 256, (count, 28, 28), np.uint8)
    async with ImageClient(address, timeout_seconds=60) as client:
        for image in images:
            assert (await client.classify(image, polarity="light_on_dark")).label == label_of(image)


async def test_two_workers_answer_and_look_like_one_gateway(triton: FakeTriton, tmp_path: Path) -> None:
    async with started(triton, tmp_path) as two:
        before = value(url := metrics_url(two), "gateway_images_admitted_total")
        await asyncio.gather(*(ask(two.address, seed) for seed in range(16)))

        # By chance, once in 32,768 times all come to one.
        classified = [event for event in events(two, "rpc") if str(event["method"]).endswith("/Classify")]
        assert {event["worker"] for event in classified[-16:]} == {0, 1}
        assert value(url, "gateway_images_admitted_total") == before + 16
        assert value(url, "gateway_workers") == value(url, "gateway_serving") * 2 == 2
        assert value(url, "gateway_images_in_flight_limit") == GatewaySettings().max_in_flight
        assert shown(url) == documented("gateway")
        assert faults(url) == []


async def test_killed_worker_is_replaced_and_no_caller_notices(triton: FakeTriton, tmp_path: Path) -> None:
    async with started(triton, tmp_path) as two:
        url = metrics_url(two)
        asking = [asyncio.create_task(ask(two.address, seed, count=100)) for seed in range(8)]
        await becomes(2, url, "gateway_workers")
        first, _ = children(two.pid)
        os.kill(first, signal.SIGKILL)
        await becomes(1, url, "gateway_worker_restarts_total")

        await asyncio.gather(*asking)
        await becomes(2, url, "gateway_workers")
        assert first not in children(two.pid)
        assert [event["cause"] for event in events(two, "worker died")] == ["SIGKILL"]


@pytest.mark.slow
async def test_stopped_worker_is_replaced(triton: FakeTriton, tmp_path: Path) -> None:
    async with started(triton, tmp_path, "--hang-seconds", "3") as two:
        stopped, _ = children(two.pid)
        os.kill(stopped, signal.SIGSTOP)

        await becomes(1, metrics_url(two), "gateway_worker_restarts_total")
        await becomes(2, metrics_url(two), "gateway_workers")
        assert stopped not in children(two.pid)
        await asyncio.gather(*(ask(two.address, seed) for seed in range(8)))


async def test_sigterm_drains_all_workers(triton: FakeTriton, tmp_path: Path) -> None:
    async with started(triton, tmp_path, "--probe-timeout-seconds", "60") as two, AsyncExitStack() as stack:
        watched = Watched(children(two.pid))
        images = np.random.default_rng(1).integers(0, 256, (8, 28, 28), np.uint8)
        clients = [await stack.enter_async_context(ImageClient(two.address, timeout_seconds=60)) for _ in images]
        triton.gate.clear()
        calls = [
            asyncio.create_task(client.classify(image, polarity="light_on_dark"))
            for client, image in zip(clients, images, strict=True)
        ]
        await becomes(len(calls), url := metrics_url(two), "gateway_images_in_flight")
        os.kill(two.pid, signal.SIGTERM)
        await becomes(0, url, "gateway_workers")
        triton.gate.set()

        assert [(await call).label for call in calls] == [label_of(image) for image in images]
        assert await two.ended_within(60) == 0
        await watched.ended()


async def test_second_signal_ends_all_workers_at_once(triton: FakeTriton, tmp_path: Path) -> None:
    async with (
        started(triton, tmp_path, "--drain-seconds", "3600") as two,
        grpc.aio.insecure_channel(two.address) as channel,
    ):
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
        await watch.read()
        watched, image = Watched(children(two.pid)), np.zeros((28, 28), np.uint8) + 7
        triton.gate.clear()
        async with ImageClient(two.address) as client:
            held = asyncio.create_task(client.classify(image, polarity="light_on_dark"))
            await triton.arrival_of(image)
            os.kill(two.pid, signal.SIGTERM)
            assert (await watch.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
            os.kill(two.pid, signal.SIGTERM)

            assert await two.ended_within(60) == 0
            await watched.ended()
            held.cancel()
            await asyncio.wait((held,))


async def test_workers_end_when_their_parent_is_killed(triton: FakeTriton, tmp_path: Path) -> None:
    async with started(triton, tmp_path) as two:
        watched = Watched(children(two.pid))
        two.close()
        await watched.ended()


# One worker


def is_open(settings: GatewaySettings) -> bool:
    with socket.socket() as caller:
        return caller.connect_ex((settings.host, settings.port)) == 0


async def test_worker_takes_no_callers_before_its_first_inference(
    settings: GatewaySettings, triton: FakeTriton, digit: NDArray[np.uint8]
) -> None:
    with reserve(settings.host, 0, option="--port") as reserved:
        patient = settings.model_copy(update={"port": reserved.getsockname()[1], "probe_timeout_seconds": 60})
        triton.gate.clear()
        worker = GatewayServer(patient, is_worker=True)
        starting = asyncio.create_task(worker.__aenter__())
        await triton.arrived.wait()
        assert not is_open(patient)
        triton.gate.set()

        async with await starting, ImageClient(worker.address) as client:
            assert (await client.classify(digit)).label == label_of(digit)


async def test_worker_says_that_it_does_not_serve_where_triton_does_not_answer(
    settings: GatewaySettings, triton: FakeTriton
) -> None:
    triton.gate.clear()
    with reserve(settings.host, 0, option="--port") as reserved:
        hasty = settings.model_copy(update={"port": reserved.getsockname()[1], "probe_timeout_seconds": 0.1})
        async with GatewayServer(hasty, is_worker=True) as worker, grpc.aio.insecure_channel(worker.address) as channel:
            told = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
            triton.gate.set()

    assert told.status == health_pb2.HealthCheckResponse.NOT_SERVING


# Settings


@given(
    count=st.integers(1, 16),
    max_in_flight=st.integers(2, 10_000),
    max_in_flight_bytes=st.integers(1 << 20, 1 << 36),
    cache_rows=st.integers(0, 1000),
)
def test_limits_are_those_of_all_workers_together(
    count: int, max_in_flight: int, max_in_flight_bytes: int, cache_rows: int
) -> None:
    whole = GatewaySettings(
        max_batch_images=2,
        max_in_flight=max_in_flight,
        max_in_flight_bytes=max_in_flight_bytes,
        cache_rows=cache_rows,
    )
    parts = [workers.part(whole, number, count) for number in range(count)]

    assert sum(part.max_in_flight for part in parts) == max(max_in_flight, 2 * count)
    assert sum(part.max_in_flight_bytes for part in parts) == max_in_flight_bytes
    assert (sum(part.cache_rows for part in parts) == 0) == (cache_rows == 0)
    assert all(part.decode_threads >= 1 for part in parts)
    assert sum(part.max_streams for part in parts) == whole.max_streams


def test_each_worker_has_room_for_the_largest_batch() -> None:
    whole = GatewaySettings(max_in_flight=1000, max_batch_images=1000)
    parts = [GatewaySettings(**workers.part(whole, number, 4).model_dump()) for number in range(4)]
    assert [part.max_in_flight for part in parts] == [1000] * 4


async def test_plaintext_beyond_loopback_is_refused_before_any_process_starts(settings: GatewaySettings) -> None:
    before = children(os.getpid())
    with pytest.raises(SettingsError, match="beyond loopback"):
        await workers.serve(settings.model_copy(update={"host": "0.0.0.0", "workers": 2}))
    assert children(os.getpid()) == before


async def test_port_of_another_gateway_is_refused(gateway: GatewayServer, settings: GatewaySettings) -> None:
    port = int(gateway.address.rpartition(":")[2])
    with pytest.raises(PortTakenError, match=f"{gateway.address}.*--port or SLUICE_GATEWAY_PORT"):
        await workers.serve(settings.model_copy(update={"port": port, "workers": 2}))
