"""Connections that are reset in the middle of a message."""

import random
from pathlib import Path

import pytest

from tests.faults.conftest import Waits
from tests.faults.cutting import Cutter
from tests.faults.processes import Streamer
from tests.faults.reading import BATCH_BYTES, NUM_BATCHES, Reader, assert_exactly_once


@pytest.mark.parametrize("window_bytes", [1, 8 * 1024**2])
@pytest.mark.parametrize("batches", [0.5, 1.5, NUM_BATCHES / 2, NUM_BATCHES - 0.5])
async def test_connection_reset_in_mid_message(
    replica: Streamer, ledger: Path, waits: Waits, batches: float, window_bytes: int
) -> None:
    async with Cutter(replica.address, iter([int(batches * BATCH_BYTES)])) as cutter:
        reader = Reader([cutter.address], ledger, window_bytes=window_bytes)
        await reader.read()

        assert cutter.num_resets == 1
    assert_exactly_once(reader)
    waits.note("connection reset in mid-message", reader.longest_wait(0))


async def test_connections_of_three_replicas_reset_again_and_again(
    replicas: list[Streamer], ledger: Path, waits: Waits
) -> None:
    choice = random.Random(5)
    lengths = (choice.randrange(BATCH_BYTES, 20 * BATCH_BYTES) for _ in range(30))
    async with (
        Cutter(replicas[0].address, lengths) as one,
        Cutter(replicas[1].address, lengths) as two,
        Cutter(replicas[2].address, lengths) as three,
    ):
        reader = Reader([each.address for each in (one, two, three)], ledger)
        await reader.read()

        assert sum(each.num_resets for each in (one, two, three)) > 10
    assert_exactly_once(reader)
    waits.note("three replicas, each connection reset after 1 to 20 batches", reader.longest_wait(0))
