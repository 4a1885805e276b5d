import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamer.errors import InvalidPlanError
from streamer.flow import Credit


def test_nothing_goes_before_the_first_grant() -> None:
    credit = Credit(100)
    assert not credit.lets_send
    assert not credit.was_granted

    credit.grant(1)
    assert credit.lets_send
    assert credit.was_granted


def test_batch_larger_than_what_is_left_goes_and_the_next_one_waits_for_all_of_it() -> None:
    credit = Credit(100)
    credit.grant(10)
    credit.spend(60)
    assert not credit.lets_send

    credit.grant(50)
    assert not credit.lets_send
    credit.grant(1)
    assert credit.lets_send


@pytest.mark.parametrize(
    ("num_bytes", "told"),
    [(0, "grant_bytes: 0; grant 1 or more"), (91, "grant_bytes: 91 on top of the 10 left; a balance of at most 100")],
)
def test_bad_grant_is_refused_and_changes_nothing(num_bytes: int, told: str) -> None:
    credit = Credit(100)
    credit.grant(10)
    with pytest.raises(InvalidPlanError, match=told):
        credit.grant(num_bytes)

    assert credit.balance == 10


@given(st.lists(st.tuples(st.integers(1, 500), st.integers(1, 300)), max_size=50))
def test_no_more_is_on_its_way_than_what_was_granted_and_one_batch(steps: list[tuple[int, int]]) -> None:
    credit, granted, sent, largest = Credit(10**6), 0, 0, 0
    for grant, batch in steps:
        credit.grant(grant)
        granted += grant
        largest = max(largest, batch)
        while credit.lets_send:
            credit.spend(batch)
            sent += batch
        assert granted <= sent < granted + largest
