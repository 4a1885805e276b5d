from dataclasses import replace
from pathlib import Path

import pytest

from streamer.errors import ReaderError
from streamer.ledger import Ledger, read
from streamer.plan import Plan, Remainder
from streamer.proof import verify
from streamer.reading.recording import Origin, Recording
from tests.streamer.deliveries import NUM_SAMPLES, PLAN, Received, sent


def origin(epoch: int = 0, start: int = 0, plan: Plan = PLAN) -> Origin:
    return Origin(plan=replace(plan, epoch=epoch), num_samples=NUM_SAMPLES, start_position=start)


def batches(of: Origin) -> list[Received]:
    return list(sent(of.plan, start=of.start_position))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "rank-0.ledger"


def test_epochs_committed_step_by_step_are_clean(path: Path) -> None:
    recording, step = Recording(path, step=0), 0
    for epoch in range(2):
        for batch in batches(origin(epoch)):
            recording.receive(batch, origin(epoch))
            step += 1
            recording.commit(batch, origin(epoch), step)
    recording.close()

    verdict = verify([path])
    assert (verdict.is_clean, verdict.committed, verdict.recovered) == (True, 200, 0)
    assert [account.step for account in read(path).accounts] == [0, 10]


def test_checkpoint_commits_epochs_before_it_too(path: Path) -> None:
    recording = Recording(path, step=0)
    for epoch in range(3):
        for batch in batches(origin(epoch)):
            recording.receive(batch, origin(epoch))
    with recording.committing(batch, origin(2), 30):
        pass
    recording.close()

    verdict = verify([path])
    assert (verdict.is_clean, verdict.committed) == (True, 300)


def test_checkpoint_that_fails_commits_nothing(path: Path) -> None:
    recording = Recording(path, step=None)
    with pytest.raises(OSError, match="full"), recording.committing(batches(origin())[0], origin(), None):
        raise OSError("disk full")
    recording.close()

    assert verify([path]).committed == 0


def test_pass_left_early_is_recovered_by_the_next(path: Path) -> None:
    recording = Recording(path, step=0)
    for batch in batches(origin())[:5]:
        recording.receive(batch, origin())
    recording.commit(batches(origin())[2], origin(), 3)
    for number, batch in enumerate(batches(origin(start=30)), 4):
        recording.commit(batch, origin(start=30), number)
    recording.close()

    verdict = verify([path])
    assert (verdict.is_clean, verdict.committed, verdict.recovered) == (True, 100, 20)


def test_rank_without_a_share_of_the_last_batch_keeps_its_proof(tmp_path: Path) -> None:
    """Its count lags behind the others' by one, and must not be compared with theirs."""
    paths = [tmp_path / f"rank-{rank}" for rank in range(4)]
    for rank, path in enumerate(paths):
        plan, step = replace(PLAN, world_size=4, rank=rank, batch_size=7), 0
        recording = Recording(path, step=0)
        for epoch in range(2):
            # Three global batches of 28, and 2 samples for ranks 0 and 1.
            of = Origin(plan=replace(plan, epoch=epoch), num_samples=86, start_position=0)
            for batch in sent(of.plan, of.num_samples):
                step += 1
                recording.commit(batch, of, step)
        recording.close()

    assert verify(paths).is_clean


def test_last_batch_is_committed_after_the_next_pass_began(path: Path) -> None:
    """As where a step ends after the next batch was taken."""
    recording, late = Recording(path, step=0), None
    for epoch in range(3):
        for batch in batches(origin(epoch)):
            recording.receive(batch, origin(epoch))
            if late is not None:
                recording.commit(*late, None)
            late = batch, origin(epoch)
    assert late is not None
    with recording.committing(*late, None):
        pass
    recording.close()

    verdict = verify([path])
    assert (verdict.is_clean, verdict.committed, len(read(path).accounts)) == (True, 300, 3)


def test_pass_that_began_stays_open_while_the_one_before_it_is_committed(path: Path) -> None:
    recording = Recording(path, step=None)
    last, first = batches(origin())[-1], batches(origin(1))[0]
    for batch in batches(origin()):
        recording.receive(batch, origin())
    recording.receive(first, origin(1))
    recording.commit(last, origin(), None)
    recording.close()

    assert [len(account.committed) for account in read(path).accounts] == [10, 0]


def test_gap_is_told_and_not_written(path: Path) -> None:
    recording = Recording(path, step=None)
    first, _, third = batches(origin())[:3]
    recording.commit(first, origin(), None)

    with pytest.raises(ReaderError, match=r"between positions 10 and 20 never reached the ledger: .*StreamedLoader"):
        recording.commit(third, origin(), None)


def test_ledger_of_the_caller_stays_open(path: Path) -> None:
    with Ledger(path) as ledger:
        recording = Recording(ledger, step=None)
        recording.commit(batches(origin())[0], origin(), None)
        recording.close()
        ledger.begin(PLAN, num_samples=NUM_SAMPLES)


def test_dropped_remainder_keeps_the_count(path: Path) -> None:
    plan = replace(PLAN, batch_size=30, remainder=Remainder.DROP)
    recording, step = Recording(path, step=0), 0
    for epoch in range(2):
        for batch in batches(origin(epoch, plan=plan)):
            step += 1
            recording.commit(batch, origin(epoch, plan=plan), step)
    recording.close()

    assert [account.step for account in read(path).accounts] == [0, 3]
    assert verify([path]).is_clean
