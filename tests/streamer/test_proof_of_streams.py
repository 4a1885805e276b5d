"""A ledger proves something only if every fault of a stream shows in it: these are broken on purpose."""

import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import streamer.lookup
import streamer.servicer
from streamer.client import SampleClient
from streamer.ledger import Ledger
from streamer.order import Order, Share, shares
from streamer.plan import Plan, Remainder
from streamer.proof import Verdict, verify
from streamer.server import StreamerServer
from tests.streamer.deliveries import PLAN, Received, counts, judged, ranks, sent, train


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
def test_rank_with_another_plan_is_caught(tmp_path: Path, other: dict[str, Any]) -> None:
    first, second, third = ranks(PLAN, 3)
    train(tmp_path / "0", plan=first)
    train(tmp_path / "1", plan=second)
    train(tmp_path / "2", plan=replace(third, **other))

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


def test_only_the_first_few_are_named(tmp_path: Path) -> None:
    train(tmp_path / "ledger", list(sent())[::2])

    verdict = verify([tmp_path / "ledger"])
    assert verdict.lost == 50
    assert [finding.position for finding in verdict.findings] == [10, 30, 50, 70, 90]


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
