"""Streamers that come late, and streamers that an operator restarts."""

import asyncio
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from streamer.client import SampleClient
from tests.faults.conftest import Waits
from tests.faults.processes import Streamer
from tests.faults.reading import NUM_SAMPLES, PLAN, Reader, assert_exactly_once, fingerprint_at


@pytest.mark.parametrize(
    ("count", "is_resumed"),
    [(1, True), *(pytest.param(*case, marks=pytest.mark.slow) for case in [(1, False), (3, True), (3, False)])],
)
async def test_streamers_started_seconds_after_the_reader(
    replicas: list[Streamer], ledger: Path, waits: Waits, count: int, is_resumed: bool
) -> None:
    """A trainer that goes on from a checkpoint knows the fingerprint, and asks for its batches at once."""
    addresses = [each.address for each in replicas[:count]]
    async with SampleClient(addresses) as client:
        plan = replace(PLAN, fingerprint=await fingerprint_at(client)) if is_resumed else PLAN
    for each in replicas:
        each.kill()
    reader = Reader(addresses, ledger)
    reading = asyncio.create_task(reader.read(plan))
    await asyncio.sleep(2)  # so long nobody is there, which is the fault
    await replicas[0].start()
    serving_at = time.monotonic()
    for each in replicas[1:count]:
        await each.start()
    await reading

    assert_exactly_once(reader)
    waits.note("streamers started 2 s late: from the first one serving", reader.longest_wait(serving_at))


@pytest.mark.parametrize("rounds", [1, pytest.param(2, marks=pytest.mark.slow)])
async def test_rolling_restart_by_sigterm(replicas: list[Streamer], ledger: Path, waits: Waits, rounds: int) -> None:
    """One after another in the course of one epoch."""
    reader, told_at, restarting = Reader([each.address for each in replicas], ledger), list[float](), None
    turns = rounds * replicas
    async for batch in reader.batches():
        is_due = batch.next_position > NUM_SAMPLES * (len(told_at) + 1) // (len(turns) + 1)
        if len(told_at) < len(turns) and is_due:
            if restarting is not None:
                await restarting
            told_at.append(time.monotonic())
            restarting = asyncio.create_task(restart(turns[len(told_at) - 1]))
    assert restarting is not None
    await restarting

    assert len(told_at) == len(turns)
    assert_exactly_once(reader)
    for since, until in pairwise([*told_at, time.monotonic()]):
        waits.note("rolling restart by SIGTERM of three replicas", reader.longest_wait(since, until))


async def restart(replica: Streamer) -> None:
    assert await replica.terminate() == 0
    await replica.start()
