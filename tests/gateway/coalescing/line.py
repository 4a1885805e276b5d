"""A lane on a model that doubles what the first byte of an image says, and a clock that a test moves."""

import asyncio
from collections.abc import Callable, Coroutine
from functools import wraps
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gateway.cache import RowCache
from gateway.coalesce import Ask, BatchRecord, Lane, Rows
from gateway.errors import (
    GatewayError,
    UpstreamFailedError,
)

POISON = b"\xff"
TIMEOUT_SECONDS = 60.0
FAILED = UpstreamFailedError("failed")


class Clock(asyncio.SelectorEventLoop):
    """An event loop whose time is what it is told to be."""

    now = 1.0

    def time(self) -> float:
        return self.now


class Room:
    """How many places are taken."""

    def __init__(self) -> None:
        self.num_taken = 0

    def take(self) -> "Room":
        self.num_taken += 1
        return self

    def release(self) -> None:
        self.num_taken -= 1
        assert self.num_taken >= 0


class Model:
    """Answers a batch when it is told to; fails with what is poisoned."""

    def __init__(self) -> None:
        self.batches: list[tuple[bytes, asyncio.Future[None]]] = []
        self.sizes: list[int] = []
        self.sent_at: dict[asyncio.Future[None], float] = {}

    async def infer(self, pixels: bytes, num_images: int) -> Rows:
        assert len(pixels) == num_images
        self.sizes.append(num_images)
        loop = asyncio.get_running_loop()
        told = loop.create_future()
        self.sent_at[told] = loop.time()
        self.batches.append((pixels, told))
        await told
        if POISON in pixels:
            raise UpstreamFailedError("poisoned")
        return np.frombuffer(pixels, np.uint8).astype(np.float32).reshape(-1, 1) * 2

    def answer(self, index: int = 0, error: Exception | None = None) -> None:
        _, told = self.batches.pop(index)
        if told.cancelled():
            return  # nobody waited for it any more
        if error is None:
            told.set_result(None)
        else:
            told.set_exception(error)


def holds(rows: Rows) -> NDArray[np.bool_]:
    return ~np.isnan(rows[:, 0])


class Line:
    """A lane, the model behind it, and the room before it."""

    def __init__(
        self,
        *,
        max_batch_size: int = 4,
        num_instances: int = 1,
        batches_per_instance: int = 2,
        timeout_seconds: float = TIMEOUT_SECONDS,
        joins: bool = True,
        cache: RowCache | None = None,
        may_cancel: bool = False,
    ) -> None:
        self.model, self.room = Model(), Room()
        self.records = list[BatchRecord]()
        self.lane = Lane(
            self.model.infer, holds, "numbers", max_batch_size=max_batch_size, num_instances=num_instances,
            batches_per_instance=batches_per_instance, timeout_seconds=timeout_seconds, may_cancel=lambda: may_cancel,
            joins=joins, cache=cache, on_batch=self.records.append,
        )  # fmt: skip

    def ask(self, *images: bytes, identity: str = "", deadline: float | None = None) -> Ask:
        return self.lane.ask(images, self.room.take(), identity=identity, deadline=deadline)


async def settled() -> None:
    """Let everything run that can."""
    for _ in range(10):
        await asyncio.sleep(0)


def told(ask: Ask) -> list[float | str]:
    return [float(one[0]) if not isinstance(one, GatewayError) else str(one) for one in ask.future.result()]


def by_the_clock(story: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Run a test where time passes when it says so."""

    @wraps(story)
    def run(**arguments: Any) -> None:
        with asyncio.Runner(loop_factory=Clock) as runner:
            runner.run(story(**arguments))

    return run


async def after(seconds: float) -> None:
    """Let time pass."""
    loop = asyncio.get_running_loop()
    assert isinstance(loop, Clock)
    loop.now += seconds
    await settled()
