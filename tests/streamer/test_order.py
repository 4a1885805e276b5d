from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from streamer.errors import InvalidPlanError, PositionError
from streamer.order import Order, Share, check_plan, shares
from streamer.plan import Plan, Remainder

GOLDEN = [4788, 57960, 13013, 32337, 57584, 50587]
PLAN = Plan(dataset="mnist", batch_size=16)


def order(num_samples: int, *, seed: int | None = 1, epoch: int = 0, fingerprint: bytes = b"f") -> NDArray[np.int64]:
    made = Order(num_samples, fingerprint=fingerprint, seed=seed, epoch=epoch)
    return made.indices(np.arange(num_samples))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 200_000), st.integers(0, 2**64 - 1), st.integers(0, 2**32 - 1))
@example(1, 0, 0)
@example(2, 2**64 - 1, 2**32 - 1)
@example(65_536, 1, 1)
@example(65_537, 1, 1)
def test_every_index_has_one_position(num_samples: int, seed: int, epoch: int) -> None:
    assert np.array_equal(np.sort(order(num_samples, seed=seed, epoch=epoch)), np.arange(num_samples))


def test_index_at_a_position_does_not_depend_on_what_else_is_asked() -> None:
    made, whole = Order(1000, fingerprint=b"f", seed=3, epoch=4), order(1000, seed=3, epoch=4)

    assert [int(made.indices(np.array([position]))[0]) for position in (0, 999, 17)] == whole[[0, 999, 17]].tolist()


def test_no_seed_is_file_order() -> None:
    assert np.array_equal(order(100, seed=None, epoch=5), np.arange(100))


def test_order_of_version_1_is_what_saved_cursors_mean() -> None:
    """A golden value: when this fails, every cursor saved before means other samples."""
    assert order(60_000, seed=7)[:6].tolist() == GOLDEN
    assert order(60_000, seed=7, epoch=1)[:6].tolist() != GOLDEN


@pytest.mark.parametrize("other", [{"seed": 2}, {"epoch": 1}, {"fingerprint": b"g"}])
def test_orders_differ_by_seed_epoch_and_fingerprint(other: dict[str, Any]) -> None:
    same = np.count_nonzero(order(10_000) == order(10_000, **other))

    assert same < 10, "two random permutations agree in one place on average"


@pytest.mark.parametrize("num_samples", [3, 7, 40, 64])
def test_every_index_is_as_likely_at_every_position(num_samples: int) -> None:
    """Chi-square over (position, index): N*N cells in total have about (N - 1)**2 degrees of freedom."""
    num_orders = 100 * num_samples
    counts = np.zeros((num_samples, num_samples))
    for epoch in range(num_orders):
        counts[np.arange(num_samples), order(num_samples, epoch=epoch)] += 1

    expected = num_orders / num_samples
    freedom = (num_samples - 1) ** 2
    chi_square = float(((counts - expected) ** 2 / expected).sum())
    assert abs(chi_square - freedom) < 5 * (2 * freedom) ** 0.5


def test_order_has_no_runs_and_no_trend() -> None:
    indices = order(60_000)
    steps = np.diff(indices)

    assert np.count_nonzero(np.abs(steps) == 1) < 20, "2 are expected"
    assert abs(np.corrcoef(indices, np.arange(60_000))[0, 1]) < 0.02
    assert abs(np.corrcoef(indices[1:], indices[:-1])[0, 1]) < 0.02


def test_parts_of_the_file_are_spread_evenly_over_the_epoch() -> None:
    """A file sorted by class must still give mixed batches."""
    tenths = order(60_000).reshape(100, 600) // 6_000
    counts = np.array([np.bincount(batch, minlength=10) for batch in tenths])

    assert float(((counts - 60.0) ** 2 / 60.0).sum()) == pytest.approx(900, rel=0.25)


plans = st.builds(
    Plan,
    dataset=st.just("mnist"),
    world_size=st.integers(1, 9),
    batch_size=st.integers(1, 40),
    remainder=st.sampled_from(Remainder),
)


def positions(share: Share) -> range:
    return range(share.first, share.last)


def walk(plan: Plan, num_samples: int, start: int) -> list[list[Share]]:
    """All ranks' shares, by global batch."""
    ranks = [
        list(shares(replace(plan, rank=rank), num_samples, start_position=start)) for rank in range(plan.world_size)
    ]
    return [list(batch) for batch in zip(*ranks, strict=True)]


@settings(max_examples=200, deadline=None)
@given(plans, st.integers(1, 500), st.data())
def test_ranks_together_take_every_position_once(plan: Plan, num_samples: int, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, num_samples))
    batches = walk(plan, num_samples, start)

    taken = [position for batch in batches for share in batch for position in positions(share)]
    full = plan.world_size * plan.batch_size
    stop = num_samples if plan.remainder is Remainder.KEEP else start + (num_samples - start) // full * full
    assert taken == list(range(start, stop))


@settings(max_examples=200, deadline=None)
@given(plans, st.integers(1, 500))
def test_each_rank_ends_its_epoch_once_and_sees_the_same_chain(plan: Plan, num_samples: int) -> None:
    batches = walk(plan, num_samples, 0)

    for number, batch in enumerate(batches):
        assert {share.end_of_epoch for share in batch} == {number == len(batches) - 1}
        assert len({(share.position, share.next_position) for share in batch}) == 1
    chain = [batch[0] for batch in batches]
    assert all(before.next_position == after.position for before, after in pairwise(chain))


@settings(max_examples=200, deadline=None)
@given(plans, st.integers(1, 500))
def test_shares_of_a_batch_differ_by_at_most_one(plan: Plan, num_samples: int) -> None:
    for batch in walk(plan, num_samples, 0):
        sizes = [len(positions(share)) for share in batch]
        assert max(sizes) - min(sizes) <= (plan.remainder is Remainder.KEEP)
        assert max(sizes) <= plan.batch_size


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 40)), min_size=1), st.integers(1, 500))
def test_world_size_may_change_at_any_position(schedule: list[tuple[int, int]], num_samples: int) -> None:
    taken: list[int] = []
    cursor, step = 0, 0
    while cursor < num_samples:
        world_size, batch_size = schedule[step % len(schedule)]
        batch = walk(replace(PLAN, world_size=world_size, batch_size=batch_size), num_samples, cursor)[0]
        taken += [position for share in batch for position in positions(share)]
        cursor, step = batch[0].next_position, step + 1

    assert taken == list(range(num_samples))


def test_rank_left_without_a_sample_gets_a_closing_share() -> None:
    plan = replace(PLAN, world_size=4, rank=3, batch_size=2)

    *_, last = shares(plan, 10)
    assert last == Share(position=8, next_position=10, first=10, last=10, end_of_epoch=True)


def test_end_of_the_epoch_is_one_closing_share() -> None:
    assert list(shares(PLAN, 100, start_position=100)) == [Share(100, 100, 100, 100, end_of_epoch=True)]


def test_drop_ends_where_no_full_batch_fits() -> None:
    plan = replace(PLAN, remainder=Remainder.DROP)

    assert [share.end_of_epoch for share in shares(plan, 40)] == [False, True]
    assert list(shares(plan, 40, start_position=32)) == [Share(32, 32, 32, 32, end_of_epoch=True)]


def test_range_holds_the_batches_that_begin_in_it() -> None:
    ranges = [shares(PLAN, 100, start_position=32, end_position=65), shares(PLAN, 100, start_position=80)]

    assert [[share.position for share in part] for part in ranges] == [[32, 48, 64], [80, 96]]


def test_start_past_the_end_names_the_field() -> None:
    with pytest.raises(PositionError, match="start_position: 101 lies past the end; 0 to 100 are allowed"):
        shares(PLAN, 100, start_position=101)


@pytest.mark.parametrize(
    ("change", "field"),
    [({"rank": 1}, "plan.rank"), ({"batch_size": 0}, "plan.batch_size"), ({"batch_size": 65}, "plan.batch_size")],
)
def test_plan_out_of_range_names_the_field(change: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidPlanError, match="allowed") as caught:
        check_plan(replace(PLAN, **change), max_batch_samples=64)

    assert caught.value.field == field
