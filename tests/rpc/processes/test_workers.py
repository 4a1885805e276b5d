"""Processes that serve nothing; with something to serve they are tested where gateway and streamer are."""

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from prometheus_client import Counter, Gauge

from rpc.processes.errors import WorkerError
from rpc.processes.workers import Workers
from rpc.telemetry import Registry
from tests.children import Watched, children

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux spreads connections over processes")


class Own:
    """The metrics of the process that starts the workers."""

    def __init__(self) -> None:
        self.registry = Registry("test")
        self.worker_restarts = 0
        Counter("test_calls", "Calls.", registry=self.registry)
        Gauge("test_limit", "Limit.", registry=self.registry).set(100)


@asynccontextmanager
async def two() -> AsyncIterator[Workers]:
    """Give two workers, not started; they are ended."""
    workers = Workers("tests.rpc.processes.plain", 2, hang_seconds=60, own=Own(), told=["test_limit"])
    try:
        yield workers
    finally:
        await workers.stop(0)


async def value(workers: Workers, name: str) -> float:
    def collect() -> float:
        (found,) = [each.value for metric in workers.collect() for each in metric.samples if each.name == name]
        return found

    return await asyncio.to_thread(collect)


ORDERS = [{"calls": 3, "limit": 10}, {"calls": 4, "limit": 20}]


async def test_metrics_are_those_of_the_workers_once_there_are_any() -> None:
    async with two() as workers:
        assert await value(workers, "test_limit") == 100
        assert await value(workers, "test_calls_total") == 0

        await workers.start(ORDERS)
        assert await value(workers, "test_limit") == 30
        assert await value(workers, "test_calls_total") == 7


async def test_end_of_a_worker_is_told_and_what_it_counted_stays() -> None:
    ended: asyncio.Queue[int] = asyncio.Queue()
    async with two() as workers:
        others = set(children(os.getpid()))
        await workers.start(ORDERS)
        assert await value(workers, "test_calls_total") == 7
        running = asyncio.create_task(workers.run(grace_seconds=0, on_end=ended.put_nowait))
        try:
            os.kill(sorted(set(children(os.getpid())) - others)[0], signal.SIGKILL)
            number = await ended.get()
            assert await value(workers, "test_calls_total") >= 7
        finally:
            running.cancel()
            await asyncio.wait((running,))
    assert number in (0, 1)


async def test_stopped_workers_are_gone() -> None:
    async with two() as workers:
        others = set(children(os.getpid()))
        await workers.start(ORDERS)
        watched = Watched(sorted(set(children(os.getpid())) - others))
        await workers.stop(0)
        await watched.ended()


async def test_problem_of_all_workers_is_said_in_their_words() -> None:
    async with two() as workers:
        with pytest.raises(WorkerError, match="worker 0: the certificate is missing"):
            await workers.start([order | {"problem": "the certificate is missing"} for order in ORDERS])
