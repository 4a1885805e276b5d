import json
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Metric, generate_latest
from prometheus_client.registry import Collector

from rpc.processes import totals
from rpc.processes.totals import Family, Snapshot
from rpc.telemetry import Registry


def process(requests: float = 0, open_streams: float = 0, seconds: tuple[float, ...] = ()) -> CollectorRegistry:
    registry = Registry("test")
    Counter("test_requests", "Requests.", ["method"], registry=registry).labels("A").inc(requests)
    Gauge("test_open", "Open.", registry=registry).set(open_streams)
    histogram = Histogram("test_seconds", "Time.", buckets=(1, 2), registry=registry)
    for each in seconds:
        histogram.observe(each)
    return registry


def values(snapshot: Snapshot, name: str) -> list[float]:
    return list(snapshot[name].values.values())


class Received(Collector):
    """What came out of another process."""

    def __init__(self, line: bytes) -> None:
        self._line = line

    def collect(self) -> Iterator[Metric]:
        return totals.metrics(totals.decode(json.loads(self._line)))


def own(text: bytes) -> list[bytes]:
    return [line for line in text.splitlines() if b"test_" in line]


def test_snapshot_is_shown_as_the_process_itself_would() -> None:
    registry = process(3, 2, (0.5, 1.5, 9))
    received = Received(totals.encode(totals.snapshot(registry)))

    assert own(generate_latest(received)) == own(generate_latest(registry))


def test_counters_histograms_and_gauges_add_up() -> None:
    total = totals.total([totals.snapshot(process(3, 2, (0.5,))), totals.snapshot(process(4, 1, (1.5, 9)))])

    assert values(total, "test_requests") == [7]
    assert values(total, "test_open") == [3]
    assert values(total, "test_seconds") == [1, 2, 3, 3, 11]


@pytest.mark.parametrize(("how", "expected"), [("largest", 5), ("smallest", 2)])
def test_gauges_that_do_not_add_up_are_compared(how: str, expected: float) -> None:
    snapshots = [totals.snapshot(process(open_streams=each)) for each in (2, 5, 3)]

    assert values(totals.total(snapshots, **{how: ["test_open"]}), "test_open") == [expected]


def test_versions_are_not_added() -> None:
    total = totals.total([totals.snapshot(process())] * 3)
    assert values(total, "test_build") == [1]


def test_only_what_grows_outlives_a_process() -> None:
    left = totals.growing(totals.snapshot(process(3, 2, (0.5,))))
    assert {"test_requests", "test_seconds"} <= set(left)
    assert "test_open" not in left


counters = st.dictionaries(st.sampled_from("abc"), st.integers(0, 100), max_size=3)


@given(st.lists(counters, max_size=4), st.integers(0, 3))
def test_total_is_the_same_before_and_after_a_death(processes: list[dict[str, int]], dead: int) -> None:
    taken = [
        {name: Family("counter", "", {(f"{name}_total", ()): float(count)}) for name, count in each.items()}
        for each in processes
    ]
    living = [each for number, each in enumerate(taken) if number != dead]
    ended = totals.total([{}, *(totals.growing(each) for each in taken[dead : dead + 1])])

    assert totals.total([*living, ended]) == totals.total(taken)
