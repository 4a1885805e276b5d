"""Replicas that stop answering (SIGSTOP), with their connections open, and go on later."""

import asyncio
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest

from tests.faults.conftest import Waits
from tests.faults.processes import Streamer
from tests.faults.reading import NUM_BATCHES, PATIENT, Reader, assert_exactly_once


async def read_with_pause(reader: Reader, replica: Streamer, seconds: float) -> float:
    """Read an epoch, with the replica paused in the middle; return when that began."""
    resuming = None
    async for _ in reader.batches():
        if reader.num_received == NUM_BATCHES // 2:
            replica.send(signal.SIGSTOP)
            paused = time.monotonic()
            resuming = asyncio.get_running_loop().call_later(seconds, replica.send, signal.SIGCONT)
    assert resuming is not None
    assert resuming.when() < asyncio.get_running_loop().time(), "the reader needed the one that was paused"
    return paused


@pytest.mark.parametrize("seconds", [1, pytest.param(10, marks=pytest.mark.slow)])
async def test_only_replica_paused(replica: Streamer, ledger: Path, waits: Waits, seconds: int) -> None:
    reader = Reader([replica.address], ledger)
    paused = await read_with_pause(reader, replica, seconds)

    assert_exactly_once(reader)
    waits.note(f"the only replica paused for {seconds} s", reader.longest_wait(paused))


async def test_only_replica_paused_for_longer_than_the_reader_calls_it_broken(
    replica: Streamer, ledger: Path, waits: Waits
) -> None:
    """The reader has opened other streams meanwhile, which all begin when the replica goes on."""
    reader = Reader([replica.address], ledger, retry=replace(PATIENT, stall_seconds=0.3))
    paused = await read_with_pause(reader, replica, 2)

    assert_exactly_once(reader)
    waits.note("the only replica paused for 2 s, called broken after 0.3 s", reader.longest_wait(paused))


@pytest.mark.parametrize("received", [1, NUM_BATCHES // 2, NUM_BATCHES - 1], ids=["first", "middle", "last"])
async def test_one_of_three_paused_is_not_waited_for(
    replicas: list[Streamer], ledger: Path, waits: Waits, received: int
) -> None:
    """It goes on only when the epoch is over, and nothing but a second request helps: no stream counts as silent."""
    reader = Reader([each.address for each in replicas], ledger, retry=replace(PATIENT, stall_seconds=1000))
    async for _ in reader.batches():
        if reader.num_received == received:
            replicas[0].send(signal.SIGSTOP)
            paused = time.monotonic()

    assert_exactly_once(reader)
    waits.note("one of three replicas paused", reader.longest_wait(paused))


@pytest.mark.slow
async def test_one_of_three_paused_for_10_seconds(replicas: list[Streamer], ledger: Path, waits: Waits) -> None:
    reader, resumed = Reader([each.address for each in replicas], ledger), asyncio.Event()
    async for _ in reader.batches():
        await asyncio.sleep(0.06)  # a step of training, so that the epoch takes longer than the pause
        if reader.num_received == 10:
            replicas[0].send(signal.SIGSTOP)
            paused = time.monotonic()
            asyncio.get_running_loop().call_later(10, resume, replicas[0], resumed)

    assert resumed.is_set()
    assert_exactly_once(reader)
    assert reader.longest_wait(paused) < 9
    waits.note("one of three replicas paused for 10 s", reader.longest_wait(paused))


def resume(replica: Streamer, resumed: asyncio.Event) -> None:
    replica.send(signal.SIGCONT)
    resumed.set()
