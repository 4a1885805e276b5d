"""What ledgers prove of whole epochs, and of trainers that die, some of them broken on purpose."""

import itertools
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from streamer.ledger import Ledger, LedgerError
from streamer.plan import Plan, Remainder
from streamer.proof import verify
from tests.streamer.deliveries import NUM_SAMPLES, PLAN, counts, judged, ranks, sent, train

ROOT = Path(__file__).parents[2]
DROP = replace(PLAN, remainder=Remainder.DROP)


def test_epoch_of_one_reader_is_clean(tmp_path: Path) -> None:
    train(tmp_path / "ledger")

    verdict = verify([tmp_path / "ledger", tmp_path / "ledger"])
    assert verdict.is_clean
    assert (verdict.committed, verdict.epochs, verdict.files) == (100, 1, 1)


@pytest.mark.parametrize("seed", [7, None])
def test_epochs_and_data_sets_in_one_file_are_judged_apart(tmp_path: Path, seed: int | None) -> None:
    for epoch, split in itertools.product(range(3), ["train", "test"]):
        train(tmp_path / "ledger", plan=replace(PLAN, epoch=epoch, split=split, seed=seed))

    verdict = verify([tmp_path / "ledger"])
    assert verdict.is_clean
    assert verdict.epochs == 6


def test_ranks_are_folded_and_a_missing_one_is_lost(tmp_path: Path) -> None:
    paths = [tmp_path / str(rank) for rank in range(3)]
    for path, plan in zip(paths, ranks(PLAN, 3), strict=True):
        train(path, plan=plan)

    assert judged(*paths) == (0, 0, 0, 0)
    assert judged(*paths[:2]) == (33, 0, 0, 0)


# 100 samples: full batches end at 96, at 90, and nowhere.
@pytest.mark.parametrize(("batch_size", "world_size"), [(4, 4), (10, 3), (60, 2)])
def test_dropped_remainder_is_not_lost(tmp_path: Path, batch_size: int, world_size: int) -> None:
    plans = ranks(replace(DROP, batch_size=batch_size), world_size)
    for plan in plans:
        train(tmp_path / str(plan.rank), plan=plan)

    assert judged(*tmp_path.iterdir()) == (0, 0, 0, 0)


def test_last_full_batch_is_lost_also_where_a_remainder_is_dropped(tmp_path: Path) -> None:
    plan = replace(DROP, batch_size=30)
    train(tmp_path / "ledger", sent(plan, stop=60), plan)

    assert judged(tmp_path / "ledger") == (30, 0, 0, 0)


def test_what_the_last_plan_of_an_epoch_drops_is_not_lost(tmp_path: Path) -> None:
    """From 70 on no batch of 40 is full, where batches of 10 would go on to the end."""
    train(tmp_path / "first", sent(DROP, stop=70), DROP)
    train(tmp_path / "second", plan=replace(DROP, batch_size=40), start=70)

    assert judged(tmp_path / "first", tmp_path / "second") == (0, 0, 0, 0)


def test_batch_that_says_it_goes_further_moves_no_end(tmp_path: Path) -> None:
    plan = replace(DROP, batch_size=30)
    *batches, last = sent(plan)
    train(tmp_path / "ledger", [*batches, replace(last, next_position=190)], plan)

    assert judged(tmp_path / "ledger") == (30, 0, 30, 0)


def test_what_was_received_and_not_committed_is_recovered(tmp_path: Path) -> None:
    with Ledger(tmp_path / "ledger") as ledger:
        delivery = ledger.begin(PLAN, num_samples=NUM_SAMPLES)
        for batch in sent(stop=50):
            delivery.record(batch)
        delivery.commit(30)
    assert judged(tmp_path / "ledger") == (70, 0, 0, 0)

    train(tmp_path / "ledger", start=30)
    assert judged(tmp_path / "ledger") == (0, 0, 0, 20)


def first_half(path: Path, committed: int, position: int, *, saving: bool = False) -> None:
    """Train to ``position``, of which the ledger says so up to ``committed``; die, perhaps while saving the rest."""
    with Ledger(path) as ledger:
        delivery = ledger.begin(PLAN, num_samples=NUM_SAMPLES)
        for batch in sent(stop=position):
            delivery.record(batch)
        delivery.commit(committed)
        if saving:
            with pytest.raises(KeyboardInterrupt), delivery.committing(position):
                raise KeyboardInterrupt


@pytest.mark.parametrize(("start", "recovered"), [(50, 0), (30, 20)])
def test_death_between_checkpoint_and_commit_is_settled_by_where_the_next_one_begins(
    tmp_path: Path, start: int, recovered: int
) -> None:
    first_half(tmp_path / "first", 30, 50, saving=True)
    train(tmp_path / "second", start=start)

    assert judged(tmp_path / "second", tmp_path / "first") == (0, 0, 0, recovered)


def test_clock_that_was_set_back_does_not_unsettle_a_death(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first_half(tmp_path / "ledger", 30, 50, saving=True)
    monkeypatch.setattr(time, "time", lambda: 0.0)
    train(tmp_path / "ledger", start=50)

    assert judged(tmp_path / "ledger") == (0, 0, 0, 0)


def test_death_before_anything_came_is_clean_once_it_came(tmp_path: Path) -> None:
    with Ledger(tmp_path / "ledger") as ledger:
        ledger.begin(PLAN, num_samples=NUM_SAMPLES)
    assert judged(tmp_path / "ledger") == (100, 0, 0, 0)

    train(tmp_path / "ledger")
    assert judged(tmp_path / "ledger") == (0, 0, 0, 0)


def test_commit_that_was_torn_off_is_no_commit(tmp_path: Path) -> None:
    train(tmp_path / "ledger")
    *lines, last = (tmp_path / "ledger").read_bytes().splitlines(keepends=True)
    (tmp_path / "ledger").write_bytes(b"".join(lines) + last[:-3])

    verdict = verify([tmp_path / "ledger"])
    assert counts(verdict) == (10, 0, 0, 0)
    assert verdict.torn_lines == [f"{tmp_path}/ledger:{len(lines) + 1}"]


def test_lost_samples_that_were_received_are_told_with_their_place(tmp_path: Path) -> None:
    first_half(tmp_path / "ledger", 30, 50)
    train(tmp_path / "ledger", start=50)

    (finding,) = verify([tmp_path / "ledger"]).findings[:1]
    assert "received, and not committed" in str(finding)
    assert finding.places == (f"{tmp_path}/ledger:6",)


def test_no_delivery_is_no_proof(tmp_path: Path) -> None:
    Ledger(tmp_path / "ledger").close()

    with pytest.raises(LedgerError, match="no delivery was begun"):
        verify([tmp_path / "ledger"])


TRAINER = """
import json, os, sys
from pathlib import Path
from tests.streamer.deliveries import NUM_SAMPLES, PLAN, Ledger, sent

folder, num_samples = Path(sys.argv[1]), int(sys.argv[2])
checkpoint = folder / "checkpoint"
position, step = json.loads(checkpoint.read_text()) if checkpoint.exists() else (0, 0)
with Ledger(folder / "ledger") as ledger:
    delivery = ledger.begin(PLAN, num_samples=num_samples, start_position=position, step=step)
    for step, batch in enumerate(sent(PLAN, num_samples, start=position), step + 1):
        delivery.record(batch)
        if step % 3 == 0 or batch.next_position == num_samples:
            with delivery.committing(batch.next_position, step=step):
                (folder / "new").write_text(json.dumps([batch.next_position, step]))
                os.replace(folder / "new", checkpoint)
            print(step, flush=True)
"""


def test_trainer_killed_again_and_again_and_resumed_from_its_checkpoint_is_clean(tmp_path: Path) -> None:
    command = [sys.executable, "-c", TRAINER, str(tmp_path), "50000"]
    for lines in (1, 2, 5, 11, 23, 47):
        with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            for _ in range(lines):
                process.stdout.readline()
            process.kill()
    subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL, check=True)

    assert judged(tmp_path / "ledger")[:3] == (0, 0, 0)


# Trainers broken on purpose: 40 samples trained on, 10 more received as the process dies before that step.


def test_commit_on_receipt_is_caught_when_the_checkpoint_is_loaded(tmp_path: Path) -> None:
    train(tmp_path / "ledger", sent(stop=50))
    train(tmp_path / "ledger", start=40)

    assert judged(tmp_path / "ledger") == (0, 10, 0, 0)


def test_cursor_that_runs_ahead_of_the_steps_is_caught(tmp_path: Path) -> None:
    """The trainer commits what it trained on, and the checkpoint's cursor is that of what was received."""
    first_half(tmp_path / "ledger", 40, 50)
    train(tmp_path / "ledger", start=50)

    assert judged(tmp_path / "ledger") == (10, 0, 0, 0)


def steps(
    path: Path, start: int, stop: int, *, steps_before: int, lag: int = 0, epoch: int = 0, plan: Plan = PLAN
) -> None:
    """Train with the optimizer's count in every commit; with a lag, commits come that many steps too early."""
    plan = replace(plan, epoch=epoch)
    with Ledger(path) as ledger:
        delivery = ledger.begin(plan, num_samples=NUM_SAMPLES, start_position=start, step=steps_before)
        for number, batch in enumerate(sent(plan, start=start, stop=stop), 1):
            delivery.record(batch)
            delivery.commit(batch.next_position, step=max(steps_before, steps_before + number - lag))


def test_commit_on_receipt_is_caught_by_steps_where_the_cursor_runs_ahead_too(tmp_path: Path) -> None:
    steps(tmp_path / "ledger", 0, 50, steps_before=0)
    steps(tmp_path / "ledger", 50, 100, steps_before=4)

    verdict = verify([tmp_path / "ledger"])
    assert counts(verdict) == (10, 0, 0, 0)
    assert "has 4 steps, where 5 batches were committed" in str(verdict.findings[0])


def test_commit_on_receipt_is_caught_by_steps_without_a_death(tmp_path: Path) -> None:
    steps(tmp_path / "ledger", 0, 100, steps_before=0, lag=1)

    assert judged(tmp_path / "ledger") == (0, 0, 100, 0)


def test_cursor_ahead_of_the_steps_is_caught_at_the_end_of_an_epoch(tmp_path: Path) -> None:
    steps(tmp_path / "ledger", 0, 100, steps_before=0)
    steps(tmp_path / "ledger", 0, 100, steps_before=9, epoch=1)

    assert judged(tmp_path / "ledger") == (10, 0, 0, 0)


def test_steps_that_agree_are_clean(tmp_path: Path) -> None:
    steps(tmp_path / "0", 0, 50, steps_before=100)
    steps(tmp_path / "1", 50, 100, steps_before=105)
    steps(tmp_path / "2", 0, 100, steps_before=110, epoch=1)

    assert judged(*tmp_path.iterdir()) == (0, 0, 0, 0)


def test_steps_that_agree_are_clean_with_checkpoints_between(tmp_path: Path) -> None:
    with Ledger(tmp_path / "ledger") as ledger:
        for epoch in range(2):
            plan = replace(PLAN, epoch=epoch)
            delivery = ledger.begin(plan, num_samples=NUM_SAMPLES, step=10 * epoch)
            for number, batch in enumerate(sent(plan), 1):
                delivery.record(batch)
                if number == 4:
                    with delivery.committing(batch.next_position, step=10 * epoch + 4):
                        pass
                delivery.commit(batch.next_position, step=10 * epoch + number)

    assert judged(tmp_path / "ledger") == (0, 0, 0, 0)


def test_cursor_ahead_of_the_steps_is_caught_on_every_rank(tmp_path: Path) -> None:
    for plan in ranks(PLAN, 2):
        steps(tmp_path / f"first {plan.rank}", 0, 60, steps_before=0, plan=plan)
    steps(tmp_path / "second", 60, 100, steps_before=2)

    assert judged(*tmp_path.iterdir()) == (20, 0, 0, 0)


def test_rank_without_a_share_of_the_last_batch_has_a_step_less(tmp_path: Path) -> None:
    for epoch, plan in itertools.product(range(2), ranks(replace(PLAN, batch_size=33), 3)):
        steps(tmp_path / str(plan.rank), 0, 100, steps_before=2 * epoch, epoch=epoch, plan=plan)

    assert judged(*tmp_path.iterdir()) == (0, 0, 0, 0)


def test_steps_without_batches_are_caught(tmp_path: Path) -> None:
    steps(tmp_path / "ledger", 0, 100, steps_before=0, lag=-2)

    assert judged(tmp_path / "ledger") == (0, 0, 20, 0)


def test_checkpoint_with_steps_without_batches_is_caught(tmp_path: Path) -> None:
    steps(tmp_path / "ledger", 0, 50, steps_before=0)
    steps(tmp_path / "ledger", 50, 100, steps_before=6)

    assert judged(tmp_path / "ledger") == (0, 0, 10, 0)
