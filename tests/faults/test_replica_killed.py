"""Replicas that die by SIGKILL while an epoch is read."""

import asyncio
import math
import random
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from tests.faults.conftest import Waits
from tests.faults.processes import Streamer
from tests.faults.reading import NUM_BATCHES, PATIENT, PLAN, Reader, assert_exactly_once

# Batches received when it happens; of the last one nothing has been sent then.
MOMENTS = pytest.mark.parametrize("received", [1, NUM_BATCHES // 2, NUM_BATCHES - 1], ids=["first", "middle", "last"])


@MOMENTS
async def test_only_replica_killed_and_restarted(replica: Streamer, ledger: Path, waits: Waits, received: int) -> None:
    reader, restarting = Reader([replica.address], ledger), None
    async for _ in reader.batches():
        if reader.num_received == received:
            replica.kill()
            killed_at = time.monotonic()
            restarting = asyncio.create_task(restart(replica))
    assert restarting is not None
    serving_at = await restarting

    assert_exactly_once(reader)
    waits.note("the only replica killed and restarted", reader.longest_wait(killed_at))
    waits.note("the same, from when it serves again", reader.longest_wait(serving_at))


async def test_replica_that_is_back_is_asked_at_once(replica: Streamer, ledger: Path) -> None:
    """Between attempts half a minute passes where nobody comes back."""
    retry = replace(PATIENT, first_delay_seconds=60, max_delay_seconds=60)
    reader, restarting = Reader([replica.address], ledger, retry=retry), None
    async for _ in reader.batches():
        if reader.num_received == 1:
            replica.kill()
            restarting = asyncio.create_task(restart(replica))
    assert restarting is not None

    assert_exactly_once(reader)
    assert reader.longest_wait(await restarting) < 15


async def restart(replica: Streamer) -> float:
    """Start it again, and return when it serves."""
    await replica.start()
    return time.monotonic()


@pytest.mark.parametrize(
    ("received", "num_killed"), [(1, 1), (NUM_BATCHES // 2, 1), (NUM_BATCHES // 2, 2), (NUM_BATCHES - 1, 2)]
)
async def test_replicas_of_three_killed(
    replicas: list[Streamer], ledger: Path, waits: Waits, received: int, num_killed: int
) -> None:
    reader = Reader([each.address for each in replicas], ledger)
    async for _ in reader.batches():
        if reader.num_received == received:
            for each in replicas[:num_killed]:
                each.kill()
            killed = time.monotonic()

    assert_exactly_once(reader)
    waits.note(f"{num_killed} of three replicas killed", reader.longest_wait(killed))


async def kill_every_second(replicas: list[Streamer], count: int, killed_at: list[float]) -> None:
    """Kill one of them every second, and start it again at once; the one in turn is passed over if it is not back."""
    choice, starting = random.Random(8), dict[Streamer, asyncio.Task[None]]()
    while len(killed_at) < count:
        await asyncio.sleep(1)  # the fault's own pace
        well = [each for each in replicas if each not in starting or starting[each].done()]
        if len(well) < 2:
            continue
        victim = choice.choice(well)
        victim.kill()
        killed_at.append(time.monotonic())
        starting[victim] = asyncio.create_task(victim.start())
    await asyncio.gather(*starting.values())


@pytest.mark.parametrize("num_kills", [2, pytest.param(20, marks=pytest.mark.slow)])
async def test_one_of_three_killed_every_second(
    replicas: list[Streamer], ledger: Path, waits: Waits, num_kills: int
) -> None:
    killed_at: list[float] = []
    killing = asyncio.create_task(kill_every_second(replicas, num_kills, killed_at))
    # As a client of its own accord: up to 8 MiB are on their way from each.
    addresses = [each.address for each in replicas]
    reader, num_epochs = Reader(addresses, ledger, window_bytes=8 * 1024**2, range_bytes=4 * 1024**2), 0
    while not killing.done():
        async for _ in reader.batches(replace(PLAN, epoch=num_epochs)):
            await asyncio.sleep(0.01)  # a step of training, so that an epoch takes seconds
        num_epochs += 1
    await killing

    assert_exactly_once(reader, epochs=num_epochs)
    for since, until in pairwise([*killed_at, math.inf]):
        waits.note("one of three replicas killed every second", reader.longest_wait(since, until))
