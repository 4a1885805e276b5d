"""Somebody else's calls, which a fault must not harm."""

import asyncio
import statistics
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self
from weakref import WeakKeyDictionary

import grpc

from protos.gateway.v1 import image_service_pb2 as pb
from protos.gateway.v1.image_service_pb2_grpc import ImageServiceStub
from tests.digits import seven
from tests.faults.gateway.process import PATIENCE_SECONDS, Cost, Gateway, Meter
from tests.faults.report import Row

_PER_SECOND = 50
_DEADLINE_SECONDS = 1.0
# So few would say nothing of a fault that is over at once.
_LEAST_CALLS = 25


@dataclass(frozen=True, slots=True)
class Quality:
    """What callers got over some time."""

    num_calls: int
    success: float
    """Share that was answered in time, 0..1."""
    median_seconds: float
    p99_seconds: float
    """Of all calls; one that failed took as long as it took."""

    def __str__(self) -> str:
        return f"{self.success:.1%} of {self.num_calls}, p99 {self.p99_seconds * 1000:.0f} ms"


class Live:
    """
    A caller that asks 50 times a second, whatever becomes of what it asked, each within 1 s.

    Use as ``async with``.

    Attributes:
        failures: Statuses of the calls that failed, with their texts.
    """

    def __init__(self, address: str) -> None:
        self.failures: list[str] = []
        self._channel = grpc.aio.insecure_channel(address, options=[("grpc.use_local_subchannel_pool", 1)])
        pixels = seven().tobytes()
        raw = pb.RawImage(height=28, width=28, pixels=pixels)
        self._request = pb.ClassifyRequest(image=pb.Image(raw=raw))
        self._took: list[float] = []
        self._calls: set[asyncio.Task[None]] = set()
        self._ended = asyncio.Event()
        self._ticking: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        await self._channel.channel_ready()
        self._ticking = asyncio.create_task(self._tick())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        assert self._ticking is not None
        if error is None:
            await self.ended(_LEAST_CALLS - len(self._took))
        self._ticking.cancel()
        await asyncio.wait((self._ticking, *self._calls))
        await self._channel.close()

    def quality(self) -> Quality:
        """Return what it got so far."""
        took = sorted(self._took)
        return Quality(
            len(took),
            1 - len(self.failures) / len(took),
            statistics.median(took),
            took[min(len(took) - 1, int(0.99 * len(took)))],
        )

    async def ended(self, num_calls: int) -> None:
        """Wait until so many more calls have ended."""
        wanted = len(self._took) + num_calls
        async with asyncio.timeout(PATIENCE_SECONDS):
            while len(self._took) < wanted:
                self._ended.clear()
                await self._ended.wait()

    async def _tick(self) -> None:
        stub: Any = ImageServiceStub(self._channel)
        due = time.monotonic()
        while True:
            call = asyncio.create_task(self._call(stub))
            self._calls.add(call)
            call.add_done_callback(self._calls.discard)
            due += 1 / _PER_SECOND
            await asyncio.sleep(due - time.monotonic())  # at fixed times

    async def _call(self, stub: Any) -> None:
        started = time.monotonic()
        try:
            await stub.Classify(self._request, timeout=_DEADLINE_SECONDS)
        except grpc.aio.AioRpcError as error:
            self.failures.append(f"{error.code().name}: {error.details()}")
        finally:
            self._took.append(time.monotonic() - started)
            self._ended.set()


class Fault:
    """
    What a fault did to a gateway and its other callers.

    Attributes:
        before: What others got without it.
        during: What they got while it lasted; once the block is left.
        cost: What it cost the gateway; once the block is left.
        failures: Statuses of the others' calls that failed, with their texts.
    """

    def __init__(self, before: Quality, meter: Meter) -> None:
        self.before = before
        self.during = before
        self.failures: list[str] = []
        self.cost = meter.cost()

    def end(self, live: Live, cost: Cost) -> None:
        self.during, self.failures, self.cost = live.quality(), live.failures, cost

    def assert_unharmed(self, success: float) -> None:
        """Fail where less than this share of the others' calls was answered, unless it was so without the fault."""
        assert self.during.success >= min(success, self.before.success), self.failures[:5]

    def note(self, row: Row) -> None:
        """Add the cost and what the others got."""
        row.add("cost", self.cost)
        row.add("others", f"{self.during} (without: {self.before.p99_seconds * 1000:.0f} ms)")


# What others get of a gateway that nothing is done to, measured once.
_BEFORE: WeakKeyDictionary[Gateway, Quality] = WeakKeyDictionary()


@asynccontextmanager
async def injected(gateway: Gateway) -> AsyncIterator[Fault]:
    """Check that a gateway is well, let others call it while the block injects a fault, and check it again."""
    await gateway.check()
    if gateway not in _BEFORE:
        async with Live(gateway.address) as live:
            pass
        _BEFORE[gateway] = live.quality()
    meter = Meter(gateway)
    fault = Fault(_BEFORE[gateway], meter)
    async with Live(gateway.address) as live:
        yield fault
        cost = meter.cost()
    fault.end(live, cost)
    await gateway.recover()
