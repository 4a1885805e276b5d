import pytest

from benchmarks.surge import Call, arrivals_of, settled
from loadtest.tally import DEADLINE_EXCEEDED, Tally, Verdict


def _calls(*, slow_until: float = 0.0, lost_until: float = 0.0) -> list[Call]:
    """Return 20 calls a second for 4 s."""
    return [
        Call(began=moment, seconds=0.5 if moment < slow_until else 0.01, is_answered=moment >= lost_until)
        for moment in (number / 20 for number in range(80))
    ]


@pytest.mark.parametrize(
    ("calls", "after"),
    [
        (_calls(), 0.0),
        (_calls(slow_until=1.0), 1.0),
        (_calls(lost_until=1.3), 1.5),
        (_calls(slow_until=4.0), None),
        ([], None),
    ],
)
def test_all_is_well_again_when_a_whole_second_is(calls: list[Call], after: float | None) -> None:
    assert settled(calls, normal_seconds=0.01) == after


def test_one_good_moment_is_not_yet_well() -> None:
    calls = [call for call in _calls(slow_until=2.0) if not 0.5 <= call.began < 1.0]
    calls += [Call(began=0.5 + number / 20, seconds=0.01, is_answered=True) for number in range(10)]

    assert settled(calls, normal_seconds=0.01) == 2.0


def _tally(*, answered: int, expired: int, refused: int) -> Tally:
    tally = Tally()
    for _ in range(answered + expired + refused):
        tally.begin(0.0)
    for number in range(answered):
        tally.succeed(0.001 * (number + 1), Verdict(images=16))
    for _ in range(expired):
        tally.fail(1.0, DEADLINE_EXCEEDED, "late")
    for _ in range(refused):
        tally.fail(0.004, "RESOURCE_EXHAUSTED", "full")
    return tally


def test_admitted_are_those_who_were_not_refused() -> None:
    arrivals = arrivals_of(_tally(answered=100, expired=0, refused=300), rate=200, seconds=2, busy=0.1)

    assert (arrivals.due, arrivals.answered, arrivals.refused, arrivals.failed) == (400, 100, 300, 0)
    assert arrivals.goodput == 50
    assert arrivals.admitted_p99 == pytest.approx(0.099, rel=0.01)
    assert arrivals.refused_median == pytest.approx(0.004, rel=0.01)


def test_admitted_whose_time_ran_out_count_as_the_slowest() -> None:
    few = arrivals_of(_tally(answered=198, expired=1, refused=0), rate=200, seconds=1, busy=0.1)
    many = arrivals_of(_tally(answered=98, expired=2, refused=0), rate=200, seconds=1, busy=0.1)

    assert few.admitted_p99 == pytest.approx(0.197, rel=0.01)
    assert many.admitted_p99 == pytest.approx(1.0, rel=0.01)
