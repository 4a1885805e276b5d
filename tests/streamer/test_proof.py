"""A ledger proves something only if every fault shows in it: most tests here break a stream or a trainer on purpose."""

import itertools
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import streamer.lookup
import streamer.servicer
from streamer.client import SampleClient
from streamer.ledger import Ledger, LedgerError
from streamer.order import Order, Share, shares
from streamer.plan import Plan, Remainder
from streamer.proof import Verdict, verify
from streamer.server import StreamerServer
from tests.streamer.deliveries import NUM_SAMPLES, PLAN, Received, ranks, sent, train

ROOT = Path(__file__).parents[2]
DROP = replace(PLAN, remainder=Remainder.DROP)


def counts(verdict: Verdict) -> tuple[int, int, int, int]:
    return verdict.lost, verdict.repeated, verdict.unexpected, verdict.recovered


def judged(*paths: Path) -> tuple[int, int, int, int]:
    return counts(verify(paths))


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


def test_no_delivery_is_no_proof(tmp_path: Path) -> None:
    Ledger(tmp_path / "ledger").close()

    with pytest.raises(LedgerError, match="no delivery was begun"):
        verify([tmp_path / "ledger"])


# Streams broken on purpose


def without_batch(batches: list[Received]) -> list[Received]:
    return batches[:4] + batches[5:]


def without_last(batches: list[Received]) -> list[Received]:
    return batches[:-1]


def without_sample(batches: list[Received]) -> list[Received]:
    batches[4] = replace(batches[4], indices=np.delete(batches[4].indices, 3))
    return batches


def with_batch_twice(batches: list[Received]) -> list[Received]:
    return [*batches[:5], *batches[4:]]


def with_sample_twice(batches: list[Received]) -> list[Received]:
    indices = batches[4].indices.copy()
    indices[1] = indices[2]
    batches[4] = replace(batches[4], indices=indices)
    return batches


def with_batches_swapped(batches: list[Received]) -> list[Received]:
    batches[3], batches[4] = batches[4], batches[3]
    return batches


def with_contents_swapped(batches: list[Received]) -> list[Received]:
    first, second = batches[3:5]
    batches[3], batches[4] = replace(first, indices=second.indices), replace(second, indices=first.indices)
    return batches


def with_samples_reversed(batches: list[Received]) -> list[Received]:
    batches[4] = replace(batches[4], indices=batches[4].indices[::-1])
    return batches


def shifted_by_one(batches: list[Received]) -> list[Received]:
    indices = np.roll(np.concatenate([batch.indices for batch in batches]), 1)
    return [replace(batch, indices=indices[10 * number :][:10]) for number, batch in enumerate(batches)]


def of_another_seed(batches: list[Received]) -> list[Received]:
    return list(sent(replace(PLAN, seed=8)))


def of_another_epoch(batches: list[Received]) -> list[Received]:
    return list(sent(replace(PLAN, epoch=1)))


def of_other_data(batches: list[Received]) -> list[Received]:
    return list(sent(replace(PLAN, fingerprint=b"g" * 32)))


def in_file_order(batches: list[Received]) -> list[Received]:
    return list(sent(replace(PLAN, seed=None)))


def off_the_plan(batches: list[Received]) -> list[Received]:
    batches[4:6] = [Received(40, 60, np.concatenate([batches[4].indices, batches[5].indices]))]
    return batches


def on_a_plan_of_its_own(batches: list[Received]) -> list[Received]:
    """As if reading had begun 5 samples further on."""
    return list(sent(start=5))


@pytest.mark.parametrize(
    ("broken", "expected"),
    [
        (without_batch, (10, 0, 0, 0)),
        (without_last, (10, 0, 0, 0)),
        (without_sample, (10, 0, 9, 0)),
        (with_batch_twice, (0, 10, 0, 0)),
        (with_sample_twice, (10, 0, 10, 0)),
        (with_batches_swapped, (10, 0, 10, 0)),
        (with_contents_swapped, (20, 0, 20, 0)),
        (with_samples_reversed, (10, 0, 10, 0)),
        (shifted_by_one, (100, 0, 100, 0)),
        (of_another_seed, (100, 0, 100, 0)),
        (of_another_epoch, (100, 0, 100, 0)),
        (of_other_data, (100, 0, 100, 0)),
        (in_file_order, (100, 0, 100, 0)),
        (off_the_plan, (20, 0, 20, 0)),
        (on_a_plan_of_its_own, (100, 0, 95, 0)),
    ],
)
def test_broken_stream_is_caught(
    tmp_path: Path, broken: Callable[[list[Received]], list[Received]], expected: tuple[int, ...]
) -> None:
    train(tmp_path / "ledger", broken(list(sent())))

    assert judged(tmp_path / "ledger") == expected


@pytest.mark.parametrize(
    "other",
    [{"seed": 8}, {"seed": None}, {"fingerprint": b"g" * 32}, {"transform": "noise"}],
    ids=["seed", "file order", "data", "transform"],
)
def test_rank_with_another_plan_is_caught(tmp_path: Path, other: dict[str, object]) -> None:
    first, second, third = ranks(PLAN, 3)
    train(tmp_path / "0", plan=first)
    train(tmp_path / "1", plan=second)
    train(tmp_path / "2", plan=replace(third, **other))  # type: ignore[arg-type]

    verdict = verify(tmp_path.iterdir())
    assert counts(verdict) == (33, 0, 33, 0)
    assert "instead of" in str(next(finding for finding in verdict.findings if finding.kind == "unexpected"))


def test_two_ranks_that_read_as_the_same_one_are_caught(tmp_path: Path) -> None:
    first, _, third = ranks(PLAN, 3)
    for number, plan in enumerate([first, first, third]):
        train(tmp_path / str(number), plan=plan)

    assert judged(*tmp_path.iterdir()) == (33, 34, 0, 0)


def test_findings_name_samples_and_places(tmp_path: Path) -> None:
    path = tmp_path / "ledger"
    train(path, with_batch_twice(without_last(list(sent()))))

    lost, repeated = map(str, verify([path]).findings)
    indices = ", ".join(map(str, list(sent())[9].indices[:4]))
    assert lost == f"mnist train epoch 0, position 90: 10 lost (indices {indices}, ...): in no ledger"
    assert repeated.endswith(f"committed more than once [{path}:11, {path}:13]")


def test_lost_samples_that_were_received_are_told_with_their_place(tmp_path: Path) -> None:
    first_half(tmp_path / "ledger", 30, 50)
    train(tmp_path / "ledger", start=50)

    (finding,) = verify([tmp_path / "ledger"]).findings[:1]
    assert "received, and not committed" in str(finding)
    assert finding.places == (f"{tmp_path}/ledger:6",)


def test_only_the_first_few_are_named(tmp_path: Path) -> None:
    train(tmp_path / "ledger", list(sent())[::2])

    verdict = verify([tmp_path / "ledger"])
    assert verdict.lost == 50
    assert [finding.position for finding in verdict.findings] == [10, 30, 50, 70, 90]


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


# Any schedule


Fault = Callable[[list[Received], int], None]


def lose(batches: list[Received], choice: int) -> None:
    del batches[choice % len(batches)]


def repeat(batches: list[Received], choice: int) -> None:
    batches.insert(choice % len(batches), batches[choice % len(batches)])


def take_another_sample(batches: list[Received], choice: int) -> None:
    batch = batches[choice % len(batches)]
    indices = batch.indices.copy()
    indices[choice % len(indices)] += 1
    batches[choice % len(batches)] = replace(batch, indices=indices)


def tell_another_range(batches: list[Received], choice: int) -> None:
    batch = batches[choice % len(batches)]
    batches[choice % len(batches)] = replace(batch, next_position=batch.next_position + 1)


FAULTS: list[Fault] = [lose, repeat, take_another_sample, tell_another_range]


@dataclass(frozen=True)
class Life:
    """Processes that start together, commit some batches, receive one more, and die."""

    world_size: int
    batch_size: int
    committed: int


LIVES = st.lists(st.builds(Life, st.integers(1, 64), st.integers(1, 40), st.integers(0, 6)), max_size=6)
LAST = st.builds(Life, st.integers(1, 64), st.integers(1, 40), st.just(1_000_000))


@dataclass(frozen=True)
class Reading:
    """One rank's part of a life."""

    plan: Plan
    start: int
    committed: list[Received]
    left: list[Received]


def readings(lives: list[Life], num_samples: int, plan: Plan) -> Iterator[Reading]:
    """Yield what each rank of each life reads; a life begins where the one before committed up to."""
    position = reached = 0
    for life in lives:
        for each in ranks(replace(plan, batch_size=life.batch_size), life.world_size):
            batches = sent(each, num_samples, start=position)
            committed = list(itertools.islice(batches, life.committed))
            reached = max([reached, *(batch.next_position for batch in committed)])
            yield Reading(each, position, committed, list(itertools.islice(batches, 1)))
        position = reached


def judged_together(readings: list[Reading], num_samples: int) -> Verdict:
    """Write all of it to one ledger."""
    with TemporaryDirectory() as folder:
        with Ledger(Path(folder) / "ledger") as ledger:
            for reading in readings:
                delivery = ledger.begin(reading.plan, num_samples=num_samples, start_position=reading.start)
                for batch in reading.committed:
                    delivery.record(batch)
                    delivery.commit(batch.next_position)
                for batch in reading.left:
                    delivery.record(batch)
        return verify([ledger.path])


@settings(max_examples=50, deadline=None)
@given(LIVES, LAST, st.integers(1, 5000), st.sampled_from(Remainder))
def test_any_schedule_of_ranks_and_deaths_is_clean(
    lives: list[Life], last: Life, num_samples: int, remainder: Remainder
) -> None:
    plan = replace(PLAN, remainder=remainder)
    verdict = judged_together(list(readings([*lives, last], num_samples, plan)), num_samples)

    assert counts(verdict)[:3] == (0, 0, 0)
    assert verdict.committed == num_samples or remainder is Remainder.DROP


@settings(max_examples=60, deadline=None)
@given(LIVES, LAST, st.integers(1, 5000), st.sampled_from(FAULTS), st.integers(0, 2**32))
def test_any_fault_in_any_schedule_is_caught(
    lives: list[Life], last: Life, num_samples: int, fault: Fault, choice: int
) -> None:
    read = list(readings([*lives, last], num_samples, PLAN))
    victims = [reading.committed for reading in read if reading.committed]
    fault(victims[choice % len(victims)], choice)

    assert not judged_together(read, num_samples).is_clean


def test_200_000_samples_are_judged_in_a_second(tmp_path: Path) -> None:
    plan = replace(PLAN, batch_size=64)
    train(tmp_path / "ledger", plan=plan, num_samples=200_000)
    started = time.perf_counter()

    assert judged(tmp_path / "ledger") == (0, 0, 0, 0)
    assert time.perf_counter() - started < 1


# A real streamer


async def read_epoch(server: StreamerServer, path: Path, plan: Plan, *, die_at: int = 0) -> None:
    """Read with the client, die once where told, and go on from the cursor."""
    async with SampleClient(server.address) as client:
        (dataset,) = await client.datasets()
        info = dataset.splits[plan.split]
        plan = replace(plan, fingerprint=info.fingerprint)
        for start, stop in ((0, die_at), (die_at, 0)) if die_at else ((0, 0),):
            with Ledger(path) as ledger:
                delivery = ledger.begin(plan, num_samples=info.num_samples, start_position=start)
                async for batch in client.batches(plan, start_position=start, end_position=stop):
                    delivery.record(batch)
                    delivery.commit(batch.next_position)


async def test_epoch_of_a_real_streamer_is_clean(server: StreamerServer, tmp_path: Path) -> None:
    await read_epoch(server, tmp_path / "ledger", Plan(dataset="mnist", seed=3, batch_size=64), die_at=640)

    assert judged(tmp_path / "ledger") == (0, 0, 0, 0)


class DroppingOrder(Order):
    """Leaves one sample in 10,000 out, and takes the one after it in its place."""

    def indices(
        self, positions: np.ndarray[tuple[int, ...], np.dtype[np.int64]]
    ) -> np.ndarray[tuple[int, ...], np.dtype[np.int64]]:
        indices = super().indices(positions)
        return np.where(indices % 10_000 == 4711, indices + 1, indices)


async def test_streamer_that_drops_one_in_10_000_is_caught(
    large: StreamerServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streamer.lookup, "Order", DroppingOrder)
    await read_epoch(large, tmp_path / "ledger", Plan(dataset="mnist", seed=3, batch_size=256))

    assert judged(tmp_path / "ledger") == (6 * 256, 0, 6 * 256, 0)


def repeating_shares(
    plan: Plan, num_samples: int, *, start_position: int = 0, end_position: int = 0
) -> Iterator[Share]:
    """Send the batch before once more after a resume, as if it were the next."""
    for share in shares(plan, num_samples, start_position=start_position, end_position=end_position):
        again = start_position > 0 and share.position == start_position
        back = plan.batch_size if again else 0
        yield replace(share, first=share.first - back, last=share.last - back)


async def test_streamer_that_repeats_after_a_resume_is_caught(
    server: StreamerServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streamer.servicer, "shares", repeating_shares)
    await read_epoch(server, tmp_path / "ledger", Plan(dataset="mnist", seed=3, batch_size=64), die_at=640)

    assert judged(tmp_path / "ledger") == (64, 0, 64, 0)
