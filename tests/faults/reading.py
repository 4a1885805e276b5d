"""A reader that keeps a ledger, looks at what it really got, and at how long it waited for it."""

import math
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from streamer.client import Batch, Plan, Retry, SampleClient
from streamer.ledger import Ledger
from streamer.proof import Verdict, verify
from streamer.sources import idx

NUM_SAMPLES = 60_000
BATCH_SIZE = 256
BATCH_BYTES = BATCH_SIZE * 785
NUM_BATCHES = -(-NUM_SAMPLES // BATCH_SIZE)
PLAN = Plan(dataset="digits", seed=11, batch_size=BATCH_SIZE)

# A machine ten times slower needs its time to start a streamer.
PATIENT = Retry(first_batch_seconds=100, next_batch_seconds=100, max_attempts=1000)


def write_samples(folder: Path, num_samples: int = NUM_SAMPLES, side: int = 28) -> None:
    """Write IDX files of noise; the first four pixels of an image are its index."""
    rng = np.random.default_rng(4)
    for prefix, count in (("train", num_samples), ("t10k", 10)):
        images = rng.integers(0, 256, (count, side, side), dtype=np.uint8)
        images.reshape(count, -1)[:, :4] = np.arange(count, dtype="<u4").view(np.uint8).reshape(count, 4)
        (folder / f"{prefix}-images-idx3-ubyte").write_bytes(idx.format_images(images))
        labels = (np.arange(count) % 10).astype(np.uint8)
        (folder / f"{prefix}-labels-idx1-ubyte").write_bytes(idx.format_labels(labels))


def indices_in(batch: Batch) -> NDArray[np.int64]:
    """Return the index that each image bears in its pixels."""
    marks = np.ascontiguousarray(batch.images.reshape(len(batch.images), -1)[:, :4])
    return marks.view("<u4").ravel().astype(np.int64)


@dataclass(frozen=True)
class _Wait:
    """For one batch, on the monotonic clock."""

    since: float
    until: float


class Reader:
    """
    Reads epochs batch by batch as a trainer does; use as ``async with``.

    Args:
        addresses: Of the replicas.
        ledger: Its file.
        window_bytes: With 1, a batch is sent when the one before is done with: what is to come has not come yet.
        range_bytes: Asked of one of several replicas at once.
        retry: As of the client.
    """

    def __init__(
        self,
        addresses: Sequence[str],
        ledger: Path,
        *,
        window_bytes: int = 1,
        range_bytes: int = 8 * BATCH_BYTES,
        retry: Retry = PATIENT,
    ) -> None:
        self.client = SampleClient(addresses, window_bytes=window_bytes, range_bytes=range_bytes, retry=retry)
        self.ledger = ledger
        self._received: list[NDArray[np.int64]] = []
        self._waits: list[_Wait] = []

    async def batches(self, plan: Plan = PLAN, *, start: int = 0, end: int = 0) -> AsyncGenerator[Batch, None]:
        """Yield batches; each is committed when the next is asked for."""
        with Ledger(self.ledger) as ledger:
            async with self.client as client:
                pinned = plan if plan.fingerprint else replace(plan, fingerprint=await fingerprint_at(client))
                delivery = ledger.begin(pinned, num_samples=NUM_SAMPLES, start_position=start)
                async with aclosing(client.batches(pinned, start_position=start, end_position=end)) as stream:
                    while (batch := await self._next(stream)) is not None:
                        delivery.record(batch)
                        self._received.append(indices_in(batch))
                        yield batch
                        delivery.commit(batch.next_position)

    async def read(self, plan: Plan = PLAN, *, start: int = 0, end: int = 0) -> None:
        """Read all of it."""
        async for _ in self.batches(plan, start=start, end=end):
            pass

    @property
    def num_received(self) -> int:
        """Batches so far."""
        return len(self._received)

    @property
    def indices(self) -> NDArray[np.int64]:
        """What the pixels of all that was received bear."""
        return np.concatenate(self._received)

    def longest_wait(self, since: float, until: float = math.inf) -> float:
        """Return how long a batch took at most that was waited for between two moments, counted from the first."""
        waits = (wait for wait in self._waits if wait.until > since and wait.since < until)
        return max((wait.until - max(wait.since, since) for wait in waits), default=0.0)

    async def _next(self, stream: AsyncGenerator[Batch, None]) -> Batch | None:
        since = time.monotonic()
        batch = await anext(stream, None)
        if batch is not None:
            self._waits.append(_Wait(since, time.monotonic()))
        return batch


async def fingerprint_at(client: SampleClient) -> bytes:
    """Wait until a streamer serves, and ask it for the fingerprint of its samples, as a first start does."""
    await client.wait_ready(timeout_seconds=100)
    (dataset,) = await client.datasets()
    return dataset.splits[PLAN.split].fingerprint


def assert_exactly_once(*readers: Reader, epochs: int = 1, recovered: int = 0) -> None:
    """By the ledgers, and by what came."""
    verdict = verify({reader.ledger for reader in readers})
    assert shown(verdict) == (0, 0, 0, recovered), "\n".join(map(str, verdict.findings))
    assert verdict.committed == epochs * NUM_SAMPLES
    counts = np.bincount(np.concatenate([reader.indices for reader in readers]), minlength=NUM_SAMPLES)
    assert (counts == epochs).all()


def shown(verdict: Verdict) -> tuple[int, int, int, int]:
    return verdict.lost, verdict.repeated, verdict.unexpected, verdict.recovered
