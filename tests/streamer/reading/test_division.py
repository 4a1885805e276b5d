from itertools import zip_longest

from hypothesis import example, given
from hypothesis import strategies as st

from streamer.order import shares
from streamer.plan import Plan, Remainder
from streamer.reading.division import Division

Piece = tuple[int, int, int, int]
"""Position, next position, and the rank's first and last sample in the order."""


def read_by(worker: int, num_workers: int, division: Division) -> list[Piece]:
    """Return what a worker gets from a streamer, without empty batches, placed in the whole."""
    return [
        (*leg.place(share.position, share.next_position), share.first, share.last)
        for leg in division.legs(worker, num_workers)
        for share in shares(
            leg.plan, division.num_samples, start_position=leg.start_position, end_position=leg.end_position
        )
        if share.last > share.first
    ]


@st.composite
def divisions(draw: st.DrawFn) -> Division:
    world_size = draw(st.integers(1, 9))
    num_samples = draw(st.integers(1, 600))
    plan = Plan(
        dataset="mnist",
        world_size=world_size,
        rank=draw(st.integers(0, world_size - 1)),
        batch_size=draw(st.integers(1, 40)),
        remainder=draw(st.sampled_from(Remainder)),
    )
    return Division(plan, num_samples, draw(st.integers(0, num_samples)))


@given(divisions(), st.integers(1, 7))
def test_batches_taken_from_workers_in_turn_are_those_of_one_reader(division: Division, num_workers: int) -> None:
    each = [read_by(worker, num_workers, division) for worker in range(num_workers)]
    taken = [piece for turn in zip_longest(*each) for piece in turn if piece is not None]

    assert taken == read_by(0, 1, division)
    # A loader that is done with one worker asks the others once more.
    assert [len(pieces) for pieces in each] == sorted((len(pieces) for pieces in each), reverse=True)


@given(divisions())
@example(Division(Plan(dataset="mnist", world_size=4, rank=3, batch_size=7), 86, 0))
def test_rank_ends_where_nothing_of_its_own_follows(division: Division) -> None:
    pieces = read_by(0, 1, division)

    assert [division.ends_at(piece[1]) for piece in pieces] == [False] * (len(pieces) - 1) + [True] * bool(pieces)


def test_start_past_the_end_is_left_to_the_streamer_to_refuse() -> None:
    division = Division(Plan(dataset="mnist"), 100, 101)

    assert [leg.start_position for worker in range(3) for leg in division.legs(worker, 3)] == [101]
