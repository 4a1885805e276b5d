"""What a reader lets come before it is wanted."""

import asyncio
import time
from collections.abc import Callable, Iterable
from typing import Any

import pytest

from streamer.client import BatchReader, Plan
from streamer.loading import StreamedDataset
from streamer.server import StreamerServer
from tests.streamer.relay import Relay

PLAN = Plan(dataset="mnist", seed=7, batch_size=10)
READERS = [BatchReader, StreamedDataset]


@pytest.mark.parametrize("reader", READERS)
async def test_reader_with_a_small_window_lets_few_batches_come(
    server: StreamerServer, reader: Callable[..., Iterable[Any]]
) -> None:
    passed = 0
    lead: list[int] = []

    def count(call: int, number: int, raw: bytes) -> bytes:
        nonlocal passed
        passed += 1
        return raw

    def work() -> None:
        for taken, _ in enumerate(reader(relay.address, PLAN, prefetch_batches=1, window_bytes=1), 1):
            # Room for what should not come to come.
            time.sleep(0.002)
            lead.append(passed - taken)

    async with Relay(server.address, count) as relay:
        await asyncio.to_thread(work)
    assert len(lead) == 100
    assert max(lead) <= 3, "one that waits, one that was handed over for it, one for the credit that gave"


@pytest.mark.parametrize("reader", READERS)
def test_reader_without_a_window_is_refused(reader: Callable[..., Iterable[Any]]) -> None:
    with pytest.raises(ValueError, match="window_bytes: 0; at least 1"):
        reader("127.0.0.1:1", PLAN, window_bytes=0)
