"""A bottleneck is put into each stage in turn, in a real reading, and the report has to name it."""

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Generator
from operator import attrgetter
from typing import Any, cast

import google_crc32c
import numpy as np
import pytest
from numpy.typing import NDArray

from streamer.client import Batch, BatchReader, Plan, SampleClient
from streamer.reading.stalls import Stage, StallReport, Stalls, Timings
from streamer.server import StreamerServer
from streamer.settings import StreamerSettings
from streamer.sources.split import Dataset, MemorySplit, Samples, Split
from tests.streamer.relay import Relay

PLAN = Plan(dataset="mnist", seed=7, batch_size=20)
SLOW_SECONDS = 0.02
NUM_BATCHES = 20


class SlowSplit:
    """As from a slow disk."""

    def __init__(self, fast: MemorySplit) -> None:
        self._fast = fast

    def __getattr__(self, name: str) -> Any:
        return getattr(self._fast, name)

    async def read(self, indices: NDArray[np.int64]) -> Samples:
        """Return samples late."""
        await asyncio.sleep(SLOW_SECONDS)
        return await self._fast.read(indices)


def split() -> MemorySplit:
    size = PLAN.batch_size * NUM_BATCHES
    images = np.random.default_rng(1).integers(0, 256, (size, 28, 28), dtype=np.uint8)
    return MemorySplit("train", images, np.zeros(size, np.uint8), num_classes=10)


def serving(split: Split) -> StreamerServer:
    return StreamerServer(StreamerSettings(port=0, metrics_port=0), [Dataset("mnist", (), {"train": split})])


async def report_of(
    address: str, plan: Plan = PLAN, *, train: Callable[[], None] = lambda: None, cpus: int | None = None
) -> StallReport:
    def work() -> StallReport:
        with BatchReader(address, plan, prefetch_batches=1) as reader:
            for _ in reader:
                train()
            return reader.report(cpus=cpus)

    return await asyncio.to_thread(work)


@pytest.fixture
async def server() -> AsyncIterator[StreamerServer]:
    async with serving(split()) as server:
        yield server


def steady(seconds: float) -> Callable[[], None]:
    return lambda: time.sleep(seconds)


async def test_slow_source_is_named() -> None:
    async with serving(cast(Split, SlowSplit(split()))) as server:
        report = await report_of(server.address, train=steady(SLOW_SECONDS / 10))

    assert report.bottleneck is Stage.READ
    assert "of the wait is read" in str(report)


async def test_slow_transform_is_named_with_what_it_takes(server: StreamerServer) -> None:
    plan = Plan(dataset="mnist", seed=7, batch_size=20, transform="|".join(["elastic(pixels=2)"] * 20))
    await report_of(server.address, plan)  # its processes start with the first pass
    report = await report_of(server.address, plan, train=steady(0.001), cpus=1)

    assert report.bottleneck is Stage.TRANSFORM
    assert f"of the wait is transform: {report.more(1)} more CPU" in str(report)


async def test_slow_network_is_named(server: StreamerServer) -> None:
    def late(call: int, number: int, message: bytes) -> bytes:
        time.sleep(SLOW_SECONDS)
        return message

    async with Relay(server.address, late) as relay:
        report = await report_of(relay.address, train=steady(SLOW_SECONDS / 10))

    assert report.bottleneck is Stage.NETWORK


async def test_slow_decoding_is_named(server: StreamerServer, monkeypatch: pytest.MonkeyPatch) -> None:
    extend = google_crc32c.extend

    def slow(crc: int, data: Any) -> int:
        # The streamer, in the same process here, is as fast as ever.
        if threading.current_thread().name == "sluice-batch-reader":
            time.sleep(SLOW_SECONDS)
        return int(extend(crc, data))

    monkeypatch.setattr(google_crc32c, "extend", slow)
    report = await report_of(server.address, train=steady(SLOW_SECONDS / 10))

    assert report.bottleneck is Stage.DECODE
    assert "num_workers" in str(report)


async def test_slow_trainer_is_named(server: StreamerServer) -> None:
    def work() -> StallReport:
        stalls = Stalls()
        with BatchReader(server.address, PLAN) as reader:
            batches = iter(reader)
            # In a pass so short its start alone may be a notable wait.
            next(batches)
            time.sleep(0.3)
            for _ in stalls.watch((batch for batch in batches), attrgetter("timings")):
                time.sleep(0.1)
        return stalls.report()

    report = await asyncio.to_thread(work)

    assert report.bottleneck is Stage.TRAIN
    assert report.total_seconds > 0.1 * (NUM_BATCHES - 1)


async def test_report_adds_up_to_the_time_of_the_loop(server: StreamerServer) -> None:
    started = time.perf_counter()
    report = await report_of(server.address, train=steady(SLOW_SECONDS))
    elapsed = time.perf_counter() - started

    assert NUM_BATCHES * SLOW_SECONDS < report.total_seconds < elapsed
    assert sum(report.shares.values()) == pytest.approx(1)


async def test_batch_tells_where_its_time_went(server: StreamerServer) -> None:
    async with SampleClient(server.address) as client:
        batches = [batch async for batch in client.batches(PLAN)]

    assert all(batch.timings.read_seconds > 0 and batch.timings.decode_seconds > 0 for batch in batches)


def test_batch_made_by_hand_took_no_time() -> None:
    nothing = np.empty(0, np.int64)
    batch = Batch(images=nothing, labels=nothing, indices=nothing, position=0, next_position=0, end_of_epoch=True)

    assert batch.timings == Timings()


# The arithmetic


def test_wait_is_followed_back_from_the_arrival() -> None:
    stalls = Stalls()
    stalls.trained(10)
    stalls.waited(10, Timings(decode_seconds=1, held_seconds=2, transform_seconds=4, read_seconds=100))
    report = stalls.report()

    assert {stage: share for stage, share in report.shares.items() if share} == {
        Stage.DECODE: 0.1,
        Stage.NETWORK: 0.2,
        Stage.TRANSFORM: 0.4,
        Stage.READ: pytest.approx(0.3),
    }


def test_what_nobody_accounts_for_is_the_way() -> None:
    stalls = Stalls()
    stalls.waited(10, Timings(transform_seconds=1))

    assert stalls.report().shares[Stage.NETWORK] == pytest.approx(0.9)


@pytest.mark.parametrize(("trained", "cpus", "more"), [(5.0, 1, 2), (5.0, 4, 8), (10.0, 1, 1), (100.0, 1, 1)])
def test_more_cpus_are_what_the_wanted_rate_takes(trained: float, cpus: int, more: int) -> None:
    """A trainer that could go three times as fast needs three times the CPUs."""
    stalls = Stalls()
    stalls.trained(trained)
    stalls.waited(10, Timings(transform_seconds=10))
    report = stalls.report(cpus=cpus)

    assert report.more(cpus) == more
    assert str(report).endswith(f"100% of the wait is transform: {more} more CPU{'s' * (more > 1)} on the streamers")


def test_bottleneck_needs_what_its_own_wait_takes() -> None:
    """Without the other waits it would have more time already: three times as much is enough, and not four."""
    stalls = Stalls()
    stalls.trained(5)
    stalls.waited(5, Timings(transform_seconds=5))
    stalls.waited(10, Timings(decode_seconds=10))
    report = stalls.report(cpus=4)

    assert (report.bottleneck, report.factor, report.more(1)) == (Stage.DECODE, 3, 2)


def test_end_of_a_pass_is_no_wait_for_the_network() -> None:
    def ending_slowly() -> Generator[int, None, None]:
        yield from range(3)
        time.sleep(SLOW_SECONDS)

    stalls = Stalls()
    for _ in stalls.watch(ending_slowly(), lambda _: Timings()):
        pass
    report = stalls.report()

    assert report.shares[Stage.START] * report.waited_seconds >= SLOW_SECONDS


def test_advice_on_the_network_can_be_followed() -> None:
    stalls = Stalls()
    stalls.trained(5)
    stalls.waited(5, Timings())

    assert str(stalls.report()).endswith("network: 2.0 times the bandwidth, by more readers or a nearer streamer")


def test_loop_that_does_nothing_takes_any_rate() -> None:
    stalls = Stalls()
    stalls.waited(10, Timings(transform_seconds=10))

    assert stalls.report().more(1) is None
    assert str(stalls.report(cpus=1)).endswith("more CPUs on the streamers")


def test_trainer_that_hardly_waits_sets_the_pace() -> None:
    stalls = Stalls()
    stalls.trained(1000)
    stalls.waited(4, Timings())

    assert str(stalls.report()) == "0.4% of the time was spent waiting for data; the trainer sets the pace"
    assert str(Stalls().report()).startswith("0.0% of the time")
