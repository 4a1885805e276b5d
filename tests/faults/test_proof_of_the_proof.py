"""The ledgers' verdict is itself tested: what is broken on purpose is caught, every time."""

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from streamer.client import Retry
from streamer.errors import SampleCorruptError
from streamer.proof import Verdict, verify
from tests.faults.broken_streamer import ONE_IN
from tests.faults.processes import Streamer
from tests.faults.reading import BATCH_SIZE, NUM_SAMPLES, PLAN, Reader
from tests.faults.test_trainer_killed import finish, judged
from tests.faults.trainer import Job, Trainers

NUM_SEEDS = 20
SEEDS = pytest.mark.parametrize("num_seeds", [4, pytest.param(NUM_SEEDS, marks=pytest.mark.slow)])


@asynccontextmanager
async def broken(fault: str, data: str, folder: Path) -> AsyncIterator[Streamer]:
    """A streamer with a fault, as a process."""
    streamer = Streamer(data, folder / "log", program=("-m", "tests.faults.broken_streamer", fault))
    try:
        await streamer.start()
        yield streamer
    finally:
        streamer.close()


async def read(streamer: Streamer, path: Path, seed: int, *stops: int, rank: int = 0, world_size: int = 1) -> Verdict:
    """Read an epoch, with a restart of the reader at each stop."""
    retry = Retry(max_attempts=2, first_delay_seconds=0.01)
    reader = Reader([streamer.address], path, window_bytes=8 * 1024**2, retry=retry)
    plan = replace(PLAN, seed=seed, rank=rank, world_size=world_size)
    for start, end in zip((0, *stops), (*stops, 0), strict=True):
        await reader.read(plan, start=start, end=end)
    return verify([path])


@SEEDS
async def test_streamer_that_drops_one_in_10_000_is_caught_every_time(
    small_data: str, tmp_path: Path, num_seeds: int
) -> None:
    async with broken("drops", small_data, tmp_path) as streamer:
        for seed in range(num_seeds):
            verdict = await read(streamer, tmp_path / str(seed), seed)
            # A batch with a wrong sample counts as a whole.
            assert verdict.lost == verdict.unexpected == NUM_SAMPLES // ONE_IN * BATCH_SIZE


async def test_streamer_that_sends_batches_too_small_is_refused_by_the_reader(small_data: str, tmp_path: Path) -> None:
    async with broken("shortens", small_data, tmp_path) as streamer:
        with pytest.raises(SampleCorruptError, match=r"255 samples .* where the plan has 256"):
            await read(streamer, tmp_path / "ledger", 0)


@SEEDS
async def test_streamer_that_repeats_after_a_resume_is_caught_every_time(
    small_data: str, tmp_path: Path, num_seeds: int
) -> None:
    choice = random.Random(2)
    async with broken("repeats", small_data, tmp_path) as streamer:
        for seed in range(num_seeds):
            stop = BATCH_SIZE * choice.randrange(1, NUM_SAMPLES // BATCH_SIZE)
            verdict = await read(streamer, tmp_path / str(seed), seed, stop)
            assert (verdict.lost, verdict.unexpected) == (BATCH_SIZE, BATCH_SIZE)


@SEEDS
async def test_streamer_that_swaps_two_ranks_is_caught_every_time(
    small_data: str, tmp_path: Path, num_seeds: int
) -> None:
    """The two together have each sample once: that alone would show nothing."""
    async with broken("swaps", small_data, tmp_path) as streamer:
        for seed in range(num_seeds):
            paths = [tmp_path / f"{seed}-{rank}" for rank in range(2)]
            readings = [read(streamer, path, seed, rank=rank, world_size=2) for rank, path in enumerate(paths)]
            await asyncio.gather(*readings)
            assert verify(paths).lost == NUM_SAMPLES


@pytest.mark.parametrize(("tells_steps", "saves_cursor_of_receipt"), [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, NUM_SEEDS))])
def test_trainer_that_commits_on_receipt_is_caught_when_it_is_killed(
    replica: Streamer, tmp_path: Path, tells_steps: bool, saves_cursor_of_receipt: bool, seed: int
) -> None:
    choice = random.Random(seed)
    job = Job(
        addresses=replica.address, folder=tmp_path, commits_on_receipt=True,
        tells_steps=tells_steps, saves_cursor_of_receipt=saves_cursor_of_receipt,
    )  # fmt: skip
    moment, step = choice.choice(["recorded", "stepped"]), choice.randrange(20, 400)
    with Trainers(replace(job, dies=(moment, step))) as trainers:
        trainers.wait_for_a_death()
    finish(job)

    assert not judged(job).is_clean
