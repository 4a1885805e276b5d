"""Trainers that read by a ``DataLoader`` with workers: the trainer dies by SIGKILL, or one of its workers does."""

import random
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from streamer.client import SampleClient
from streamer.proof import verify
from tests.children import Watched
from tests.faults.loading_trainer import NUM_EPOCHS, Checkpoint, LoadingJob, LoadingTrainer
from tests.faults.processes import Streamer
from tests.faults.reading import NUM_SAMPLES, shown

NUM_STEPS = NUM_EPOCHS * -(-NUM_SAMPLES // 256)
DEAD_WORKER = r"DataLoader worker \(pid.*\) (is killed by signal: Killed|exited unexpectedly)"


@pytest.fixture
def job(replica: Streamer, tmp_path: Path) -> LoadingJob:
    """Of two epochs and two workers."""
    return LoadingJob(addresses=replica.address, folder=tmp_path)


async def kill_at(job: LoadingJob, step: int) -> None:
    """Kill the trainer about there, and wait until its workers are gone too."""
    with LoadingTrainer(replace(job, tells_at=step)) as trainer:
        workers = Watched(trainer.workers())
        trainer.kill()
        await workers.ended()


def lose_worker_at(job: LoadingJob, step: int) -> None:
    with LoadingTrainer(replace(job, kills_worker_at=step)) as trainer:
        assert re.match(DEAD_WORKER, trainer.failure())


def finish(job: LoadingJob) -> None:
    with LoadingTrainer(job) as trainer:
        assert trainer.failure() == ""


def steps(count: int, seed: int) -> list[int]:
    return sorted(random.Random(seed).sample(range(1, NUM_STEPS - 40), count))


async def assert_trained_once(job: LoadingJob) -> None:
    """By the ledger, and by what the pixels said."""
    async with SampleClient(job.addresses) as client:
        info = await client.split(job.plan)
    expected = np.zeros((NUM_EPOCHS, NUM_SAMPLES), np.uint8)
    expected[:, info.base_indices(np.arange(info.num_samples))] = 1
    verdict = verify([job.folder / "trainer.ledger"])

    assert shown(verdict)[:3] == (0, 0, 0), "\n".join(map(str, verdict.findings))
    assert verdict.committed == NUM_EPOCHS * info.num_samples
    assert np.array_equal(Checkpoint.load(job.folder).trained, expected)


async def test_trainer_with_workers_killed_at_random_steps_repeats_and_loses_nothing(job: LoadingJob) -> None:
    for step in steps(3, seed=1):
        await kill_at(job, step)
    finish(job)

    await assert_trained_once(job)


async def test_worker_killed_ends_the_trainer_which_goes_on_from_its_checkpoint(job: LoadingJob) -> None:
    for step in steps(2, seed=2):
        lose_worker_at(job, step)
    finish(job)

    await assert_trained_once(job)


async def test_trainer_of_a_slice_killed_and_started_with_other_workers(job: LoadingJob) -> None:
    sliced = replace(job, plan=replace(job.plan, split="train[10%:]"))
    await kill_at(sliced, 100)
    lose_worker_at(replace(sliced, num_workers=3), 250)
    finish(replace(sliced, num_workers=1))

    await assert_trained_once(sliced)


@pytest.mark.slow
@pytest.mark.parametrize("start_method", ["fork", "forkserver", "spawn"])
async def test_workers_of_any_kind_end_with_their_trainer(job: LoadingJob, start_method: str) -> None:
    started = replace(job, start_method=start_method)
    await kill_at(started, 100)
    finish(started)

    await assert_trained_once(job)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
async def test_trainers_and_workers_killed_20_times(job: LoadingJob, seed: int) -> None:
    rng = random.Random(seed)
    for step in steps(20, seed):
        again = replace(job, num_workers=rng.randint(1, 3), checkpoint_steps=rng.randint(1, 30))
        if step <= Checkpoint.load(job.folder).step:
            continue  # the life before came further
        if rng.random() < 0.5:
            lose_worker_at(again, step)
        else:
            await kill_at(again, step)
    finish(job)

    await assert_trained_once(job)
