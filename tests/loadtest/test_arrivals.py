import math

from hypothesis import given
from hypothesis import strategies as st

from loadtest.arrivals import OpenLoop


@given(rate=st.floats(0.1, 1000), seconds=st.floats(0, 20))
def test_every_call_that_is_due_is_on_the_schedule(rate: float, seconds: float) -> None:
    moments = list(OpenLoop(rate=rate, max_outstanding=1).due(seconds))

    assert abs(len(moments) - math.ceil(seconds * rate)) <= 1
    assert moments == [number / rate for number in range(len(moments))]
    assert all(moment < seconds for moment in moments)


def test_late_calls_are_due_as_exactly_as_early_ones() -> None:
    """A tenth cannot be written in binary; summed up a hundred thousand times it is off by more than a microsecond."""
    *_, last = OpenLoop(rate=10, max_outstanding=1).due(10_000)

    assert last == 99_999 / 10
