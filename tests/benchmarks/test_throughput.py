import pytest

from benchmarks.throughput import CALLERS, largest_fall, spread


@pytest.mark.parametrize(
    ("rates", "fall"), [([1, 2, 4], 0), ([1, 4, 3, 3.5], 0.25), ([1, 4, 3.9, 2], 0.5), ([2, 1, 4], 0)]
)
def test_fall_is_counted_behind_the_peak(rates: list[float], fall: float) -> None:
    assert largest_fall(rates) == pytest.approx(fall)


def test_every_caller_has_a_place_on_a_connection() -> None:
    spreads = [spread(callers) for callers in CALLERS]

    assert [connections * streams for connections, streams in spreads] == list(CALLERS)
    assert max(connections for connections, _ in spreads) == 4
