"""Readers that go away without a word, and readers that cancel at any moment: places and memory come back."""

import asyncio
import random
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import grpc
import pytest

from protos.streamer.v1 import sample_service_pb2 as pb
from protos.streamer.v1.sample_service_pb2_grpc import SampleServiceStub
from sluice.readiness import environment
from streamer.client import Plan, SampleClient
from tests.faults.abandoning import abandon
from tests.scraping import scrape
from tests.streamer.process import ROOT, StreamerProcess, write_digits

MIB = 1024**2
IDLE_SECONDS = 2.0
IMPATIENT = {"idle_seconds": IDLE_SECONDS, "max_streams": 4000}
LONG = pytest.param(1000, 10, id="1000", marks=[pytest.mark.slow, pytest.mark.timeout(900)])
QUICK_AND_SLOW = [pytest.param(100, 1, id="100"), LONG]
# What our client does, and what generated code does, stand for the others in the quick tier.
WAYS = [
    pytest.param("stream", marks=pytest.mark.slow),
    "pull",
    pytest.param("samples", marks=pytest.mark.slow),
    "iterators",
]


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("digits")
    write_digits(folder, 20_000)
    return folder


@pytest.fixture(scope="module")
def shared_streamer(digits: Path) -> Iterator[StreamerProcess]:
    """A streamer with little patience."""
    with StreamerProcess(digits, **IMPATIENT) as process:
        yield process


@pytest.fixture
def new_streamer(digits: Path) -> Iterator[StreamerProcess]:
    """One that has taken no memory yet."""
    with StreamerProcess(digits, **IMPATIENT) as process:
        yield process


@pytest.fixture
def streamer(request: pytest.FixtureRequest) -> StreamerProcess:
    """A new one where the memory of ten rounds is held against each other, else one for all."""
    is_long = request.node.get_closest_marker("slow") is not None
    streamer: StreamerProcess = request.getfixturevalue("new_streamer" if is_long else "shared_streamer")
    return streamer


def in_flight(streamer: StreamerProcess) -> float:
    """Return how many streams are open, of whichever method."""
    return sum(
        sample.value
        for metric in scrape(streamer.metrics_url)
        for sample in metric.samples
        if sample.name == "streamer_streams_in_flight"
    )


async def ended(streamer: StreamerProcess) -> None:
    """Wait until no stream is open; the test's own timeout is the limit."""
    while await asyncio.to_thread(in_flight, streamer):  # noqa: ASYNC110 - a process that tells nobody
        await asyncio.sleep(0.05)


@asynccontextmanager
async def stopped_reader(streamer: StreamerProcess, how: str, count: int) -> AsyncIterator[None]:
    """Have another process open streams and stop it there: its connections stay, and nobody reads."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tests.faults.abandoning", streamer.address, how, str(count)),
        cwd=ROOT, env=environment(), stdout=subprocess.PIPE,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        assert await process.stdout.readline() == b"open\n"
        process.send_signal(signal.SIGSTOP)
        yield
    finally:
        process.kill()
        await process.wait()


async def flat(streamer: StreamerProcess, count: int, rounds: int, once: Callable[[], Awaitable[object]]) -> None:
    """
    Open ``count`` streams again and again: the streamer's memory has to be bounded, and to grow no more.

    What the first half of the rounds makes it take it keeps for the other half: threads of grpc's have heaps each.
    """
    before, taken = streamer.resident_bytes / MIB, []
    for _ in range(rounds):
        await once()
        await ended(streamer)
        taken.append(streamer.resident_bytes / MIB)
    print(f"MiB: {before:.0f} before, after each round", *(f"{each:.0f}" for each in taken), file=sys.stderr)

    assert taken[-1] - before < 2 * count
    # It goes up and down with what is under way.
    early, late = taken[: rounds // 2 + 1], taken[rounds // 2 :]
    assert max(late) < 1.1 * max(early), taken


@pytest.mark.parametrize(("count", "rounds"), QUICK_AND_SLOW)
@pytest.mark.parametrize("how", WAYS)
async def test_streams_of_a_reader_that_is_stopped_give_place_and_memory_back(
    streamer: StreamerProcess, how: str, count: int, rounds: int
) -> None:
    async def once() -> None:
        async with stopped_reader(streamer, how, count):
            # Though its connections are open all the time.
            async with asyncio.timeout(60 + IDLE_SECONDS):
                await ended(streamer)

    await flat(streamer, count, rounds, once)


@pytest.mark.parametrize(("count", "rounds"), QUICK_AND_SLOW)
@pytest.mark.parametrize("how", WAYS)
async def test_streams_that_are_dropped_without_a_word_end(
    streamer: StreamerProcess, how: str, count: int, rounds: int
) -> None:
    """Calls and iterators nobody cancels, closes or reads; their channels go with the last reference, or never."""

    async def once() -> None:
        kept = await abandon(streamer.address, how, count)
        for each in kept:
            if isinstance(each, SampleClient):
                await each.__aexit__(None, None, None)
        kept.clear()

    await flat(streamer, count, rounds, once)


@pytest.mark.parametrize(("count", "rounds"), QUICK_AND_SLOW)
async def test_cancels_at_random_points_leave_nothing(streamer: StreamerProcess, count: int, rounds: int) -> None:
    chance = random.Random(count)

    async def read(client: SampleClient) -> None:
        async for _ in client.batches(Plan(dataset="mnist", seed=1, batch_size=64)):
            # Of a second that the whole epoch takes.
            await asyncio.sleep(0)

    async def raw(channel: grpc.aio.Channel) -> None:
        asked = pb.StreamBatchesRequest(plan=pb.Plan(dataset="mnist", batch_size=64))
        call: Any = SampleServiceStub(channel).StreamBatches(asked)
        try:
            async for _ in call:
                pass
        finally:
            call.cancel()

    async def cancelled(reading: Any) -> None:
        task = asyncio.create_task(reading)
        await asyncio.wait((task,), timeout=chance.choice((0, 0.001, 0.01, 0.05)) * chance.random())
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task

    async def once() -> None:
        async with SampleClient(streamer.address) as client, grpc.aio.insecure_channel(streamer.address) as channel:
            for _ in range(count // 20):
                readings = [read(client) if chance.random() < 0.5 else raw(channel) for _ in range(20)]
                await asyncio.gather(*map(cancelled, readings))

    await flat(streamer, count, 10, once)
    async with SampleClient(streamer.address) as client:
        batches = [batch async for batch in client.batches(Plan(dataset="mnist", batch_size=64))]
        assert sum(len(batch.labels) for batch in batches) == 20_000
