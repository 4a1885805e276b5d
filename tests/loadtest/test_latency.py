import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadtest.latency import Latencies


@given(
    seconds=st.lists(st.floats(1e-6, 3600), min_size=1, max_size=200),
    percentage=st.sampled_from([50.0, 90.0, 99.0, 99.9, 100.0]),
)
def test_percentile_is_right_to_three_digits(seconds: list[float], percentage: float) -> None:
    latencies = Latencies()
    for each in seconds:
        latencies.record(each)

    rank = max(1, math.floor(percentage / 100 * len(seconds) + 0.5))
    expected = sorted(seconds)[rank - 1]
    assert latencies.at(percentage) == pytest.approx(expected, rel=2e-3, abs=1e-6)


def test_extremes_and_mean_are_exact() -> None:
    latencies = Latencies()
    for each in (0.1234567, 2.7654321, -0.5):
        latencies.record(each)

    assert (latencies.fastest, latencies.slowest) == (0, 2.7654321)
    assert latencies.mean == pytest.approx((0.1234567 + 2.7654321) / 3)
    assert latencies.at(100) <= latencies.slowest


def test_more_than_an_hour_keeps_its_place_at_the_end() -> None:
    latencies = Latencies()
    latencies.record(10_000)

    assert latencies.slowest == 10_000
    assert latencies.at(50) == pytest.approx(3600, rel=2e-3)


def test_nothing_recorded_is_zero() -> None:
    latencies = Latencies()

    assert (latencies.at(99), latencies.mean, latencies.fastest, latencies.slowest) == (0, 0, 0, 0)
