"""Callers who know what is right, and what health told them meanwhile."""

import asyncio
import itertools
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from numpy.typing import NDArray

from gateway.server import SERVICE
from protos.gateway.v1 import image_service_pb2 as pb
from protos.gateway.v1.image_service_pb2_grpc import ImageServiceStub
from tests.gateway.fake_triton import label_of

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING

_OPTIONS = [("grpc.use_local_subchannel_pool", 1), ("grpc.max_reconnect_backoff_ms", 200)]
_PATIENCE_SECONDS = 90.0
# Between two calls of one that was refused; who asks again at once measures himself.
_PAUSE_SECONDS = 0.02

_seeds = itertools.count(7_000_000_000)


def image_of(pixels: NDArray[np.uint8]) -> pb.Image:
    """Return 28x28 pixels, uint8, as a message that is classified just as they are."""
    raw = pb.RawImage(height=28, width=28, pixels=pixels.tobytes())
    return pb.Image(raw=raw, polarity=pb.POLARITY_LIGHT_ON_DARK, framing=pb.FRAMING_STRETCH)


def request_of(pixels: NDArray[np.uint8]) -> pb.ClassifyRequest:
    """Return the request to classify 28x28 pixels, uint8, just as they are."""
    return pb.ClassifyRequest(image=image_of(pixels))


def noise(seed: int) -> NDArray[np.uint8]:
    """Return 28x28 pixels that no other seed gives."""
    return np.random.default_rng(seed).integers(1, 256, (28, 28), np.uint8)


def fresh() -> NDArray[np.uint8]:
    """Return 28x28 pixels that were never asked before."""
    return noise(next(_seeds))


async def refusal(call: Any) -> tuple[grpc.aio.AioRpcError, float]:
    """Return what a call fails with, and after how many seconds."""
    started = time.monotonic()
    with pytest.raises(grpc.aio.AioRpcError) as failed:
        await call
    return failed.value, time.monotonic() - started


def tally(codes: Counter[str]) -> str:
    """Return how often each status came, the most frequent first: ``7 OK, 2 UNAVAILABLE``."""
    return ", ".join(f"{number} {code}" for code, number in codes.most_common())


@dataclass(frozen=True, slots=True)
class Call:
    """One call that has ended."""

    began: float
    ended: float
    code: str
    details: str = ""

    @property
    def seconds(self) -> float:
        return self.ended - self.began


class Callers:
    """
    Some who ask one thing after the other, each time an image of its own, without retries; ``async with``.

    Attributes:
        calls: Those that have ended, in that order.
        num_wrong: Answers that belong to another image.
    """

    def __init__(
        self,
        address: str,
        num_callers: int,
        *,
        deadline_seconds: float,
        expected: Callable[[NDArray[np.uint8]], int] = label_of,
    ) -> None:
        self.calls: list[Call] = []
        self.num_wrong = 0
        self._num_answered = 0
        self._address = address
        self._num_callers = num_callers
        self._deadline_seconds = deadline_seconds
        self._expected = expected
        self._tasks: list[asyncio.Task[None]] = []
        self._ended = asyncio.Event()

    async def __aenter__(self) -> Self:
        self._channel = grpc.aio.insecure_channel(self._address, options=_OPTIONS)
        self._tasks = [asyncio.create_task(self._ask(number)) for number in range(self._num_callers)]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.wait(self._tasks)
        await self._channel.close()

    def codes(self, since: float = 0.0) -> Counter[str]:
        """Count the calls that ended since then by how they did."""
        return Counter(call.code for call in self.calls if call.ended >= since)

    async def succeed(self, since: float) -> float:
        """Wait until a call that began since then is answered, and return how long after it that was."""
        async with asyncio.timeout(_PATIENCE_SECONDS):
            while True:
                for call in self.calls:
                    if call.code == "OK" and call.began >= since:
                        return call.ended - since
                self._ended.clear()
                await self._ended.wait()

    async def answered(self, num_calls: int) -> None:
        """Wait until so many more calls are answered."""
        wanted = self._num_answered + num_calls
        async with asyncio.timeout(_PATIENCE_SECONDS):
            while self._num_answered < wanted:
                self._ended.clear()
                await self._ended.wait()

    async def _ask(self, number: int) -> None:
        stub: Any = ImageServiceStub(self._channel)
        for turn in range(1_000_000):
            pixels = noise(1_000_000 * number + turn)
            began, code, details = time.monotonic(), "OK", ""
            try:
                answer = await stub.Classify(request_of(pixels), timeout=self._deadline_seconds)
                self._num_answered += 1
                self.num_wrong += answer.prediction.label != self._expected(pixels)
            except grpc.aio.AioRpcError as error:
                code, details = error.code().name, error.details() or ""
            self.calls.append(Call(began, time.monotonic(), code, details))
            self._ended.set()
            if code != "OK":
                await asyncio.sleep(_PAUSE_SECONDS)


class HealthRecord:
    """
    What health has told of the gateway, and when; ``async with``.

    Attributes:
        told: Time, by the monotonic clock, and status.
    """

    def __init__(self, address: str, service: str = SERVICE) -> None:
        self.told: list[tuple[float, int]] = []
        self._address = address
        self._service = service
        self._changed = asyncio.Event()

    async def __aenter__(self) -> Self:
        self._channel = grpc.aio.insecure_channel(self._address, options=_OPTIONS)
        self._task = asyncio.create_task(self._read())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._task.cancel()
        await asyncio.wait((self._task,))
        await self._channel.close()

    async def becomes(self, wanted: int, since: float) -> float:
        """Wait until this is or was the status after a moment, and return how long after; 0 where it was then."""
        return await self._holds(lambda status: status == wanted, since)

    async def ceases(self, unwanted: int, since: float) -> float:
        """Wait until anything else is or was the status after a moment, and return how long after."""
        return await self._holds(lambda status: status != unwanted, since)

    async def _holds(self, wanted: Callable[[int], bool], since: float) -> float:
        async with asyncio.timeout(_PATIENCE_SECONDS):
            while True:
                for index, (at, status) in enumerate(self.told):
                    until = self.told[index + 1][0] if index + 1 < len(self.told) else float("inf")
                    if wanted(status) and until > since:
                        return max(0.0, at - since)
                self._changed.clear()
                await self._changed.wait()

    def seconds(self, wanted: int, since: float, until: float) -> float:
        """Return for how long between two moments this was the status."""
        ends = [at for at, _ in self.told[1:]] + [until]
        return sum(
            max(0.0, min(end, until) - max(at, since))
            for (at, status), end in zip(self.told, ends, strict=True)
            if status == wanted
        )

    async def _read(self) -> None:
        stub = health_pb2_grpc.HealthStub(self._channel)
        async for answer in stub.Watch(health_pb2.HealthCheckRequest(service=self._service), wait_for_ready=True):
            self.told.append((time.monotonic(), answer.status))
            self._changed.set()
