"""Trainers that die by SIGKILL, and go on from their checkpoint."""

import random
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from streamer.proof import Verdict, verify
from tests.faults.processes import Streamer
from tests.faults.reading import NUM_SAMPLES, shown
from tests.faults.trainer import Job, State, Trainers

MOMENTS = ["received", "recorded", "stepped", "saving", "saved", "committed"]
CHECKPOINT = 30
NUM_STEPS = -(-NUM_SAMPLES // 128)


@pytest.fixture
def job(replica: Streamer, tmp_path: Path) -> Job:
    """Of one rank."""
    return Job(addresses=replica.address, folder=tmp_path, checkpoint_steps=CHECKPOINT)


def judged(job: Job) -> Verdict:
    return verify(job.folder.glob("*.ledger"))


def assert_trained_once(job: Job) -> None:
    """By the ledgers, and by what went into the weights."""
    verdict = judged(job)
    assert shown(verdict)[:3] == (0, 0, 0), "\n".join(map(str, verdict.findings))
    assert verdict.committed == NUM_SAMPLES
    assert (State.load(job.folder).trained == 1).all()


def finish(job: Job) -> None:
    with Trainers(job) as trainers:
        trainers.finish()


def unbroken(job: Job) -> State:
    """Train the same in one life."""
    folder = job.folder / "unbroken"
    folder.mkdir()
    finish(replace(job, folder=folder))
    return State.load(folder)


@pytest.mark.parametrize("moment", MOMENTS)
def test_trainer_killed_at_a_moment_goes_on_as_if_nothing_had_been(job: Job, moment: str) -> None:
    # At these moments a checkpoint is due.
    with Trainers(replace(job, dies=(moment, 5 * CHECKPOINT))) as trainers:
        trainers.wait_for_a_death()
    finish(job)

    assert_trained_once(job)


def test_trainer_killed_at_10_random_steps_ends_with_the_weights_of_an_unbroken_run(job: Job) -> None:
    steps = sorted(random.Random(1).sample(range(1, NUM_STEPS - CHECKPOINT), 10))
    for step in steps:
        with Trainers(replace(job, tells_at=step)) as trainers:
            trainers.wait_told()
            trainers.kill()
    finish(job)

    assert_trained_once(job)
    assert judged(job).recovered > 0
    state, expected = State.load(job.folder), unbroken(job)
    assert state.step == expected.step == NUM_STEPS
    assert torch.equal(state.weights, expected.weights)
    assert torch.equal(state.momentum, expected.momentum)


@pytest.mark.parametrize(
    "moment", ["stepped", "saved", *(pytest.param(moment, marks=pytest.mark.slow) for moment in ("recorded", "saving"))]
)
def test_job_of_4_ranks_that_dies_goes_on_with_3(job: Job, moment: str) -> None:
    """Shares are of other sizes then, and the cursor is the same."""
    four = replace(job, batch_size=64, world_size=4, dies=(moment, 3 * CHECKPOINT))
    with Trainers(four) as trainers:
        trainers.wait_for_a_death()
    finish(replace(job, batch_size=64, world_size=3))

    assert_trained_once(job)
    assert judged(job).files == 4


def test_world_size_that_changes_with_every_death(job: Job) -> None:
    for number, world_size in enumerate((4, 1, 3, 2)):
        with Trainers(replace(job, world_size=world_size, tells_at=(number + 1) * 40)) as trainers:
            trainers.wait_told()
            trainers.kill()
    finish(replace(job, world_size=3))

    assert_trained_once(job)


def test_ledger_on_a_full_disk_ends_the_trainer_and_loses_nothing(job: Job) -> None:
    """What it could not write does not count, and it goes on when there is room again."""
    small = replace(job, batch_size=16, checkpoint_steps=100)
    with Trainers(replace(small, max_file_bytes=135_000)) as trainers:
        (problem,) = trainers.failures()
    assert re.fullmatch(r".*rank-0\.ledger: cannot be written: File too large", problem)
    assert 0 < State.load(job.folder).position < NUM_SAMPLES

    finish(small)
    assert_trained_once(job)
    assert len(judged(job).torn_lines) == 1
