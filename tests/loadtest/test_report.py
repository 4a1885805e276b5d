import json
from datetime import UTC, datetime
from typing import Any

import pytest

from loadtest.arrivals import ClosedLoop, OpenLoop
from loadtest.batches import Ran
from loadtest.report import Report
from loadtest.tally import NOT_SENT, Tally, Verdict
from tests.loadtest.plans import plan_of

OPEN = OpenLoop(rate=100, max_outstanding=10)


def filled() -> Tally:
    """A hundred answers after 1, 2, ... 100 ms, nine in ten right, and three calls that failed."""
    tally = Tally()
    for number in range(1, 101):
        tally.begin(0.0001)
        tally.succeed(number / 1000, Verdict(images=1, judged=1, right=int(number % 10 != 0)))
    for _ in range(2):
        tally.begin(0.0001)
        tally.fail(0.002, "RESOURCE_EXHAUSTED", "overloaded")
    tally.skip()
    return tally


def report_of(**fields: Any) -> Report:
    usual: dict[str, Any] = {
        "plan": plan_of(),
        "model": "mnist version 3",
        "num_samples": 1000,
        "started": datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC),
        "is_complete": True,
        "elapsed_seconds": 2.0,
        "tally": filled(),
        "batches": {("mnist", 3): Ran(800, 200, {1: 40, 3: 40, 4: 80, 8: 39, 64: 1})},
        "cpu_share": 0.2,
        "loop_share": 0.1,
    }
    return Report(**usual | fields)


def test_page_says_what_was_run_and_found() -> None:
    page = report_of().as_text()

    for words in (
        "classify at 127.0.0.1:1 (mnist version 3), 1,000 different images as PNG",
        "closed loop, 2 callers, 0.3 s after 0.1 s of warm-up",
        "103 calls in 2.00 s",
        "50.0   images/s 50.0",
        "p50 50.0   p90 90.0   p95 95.0   p99 99.0   p99.9 100.0   max 100.0 ms",
        "OK 100   RESOURCE_EXHAUSTED 2   NOT_SENT 1",
        "RESOURCE_EXHAUSTED after p50 2.00",
        "2 x RESOURCE_EXHAUSTED: overloaded",
        "90.00% (90 of 100 right)",
        "800 images in 200, 4.00 a batch, by mnist version 3",
        "1: 20%   3-4: 60%   5-8: 20%   33-64: <1%",
    ):
        assert words in page
    assert "warning" not in page


def test_json_survives_a_round_trip_and_has_ghz_fields() -> None:
    read = json.loads(json.dumps(report_of(plan=plan_of(pace=OPEN)).as_json()))

    assert read["count"] == 103
    assert (read["total"], read["average"], read["fastest"], read["slowest"]) == (
        2_000_000_000,
        50_500_000,
        1_000_000,
        100_000_000,
    )
    assert (read["rps"], read["imagesPerSecond"]) == (50, 50)
    assert [point["percentage"] for point in read["latencyDistribution"]] == [50, 90, 95, 99, 99.9]
    assert read["latencyDistribution"][1]["latency"] == pytest.approx(90_000_000, rel=2e-3)
    assert read["statusCodeDistribution"] == {"OK": 100, "RESOURCE_EXHAUSTED": 2, NOT_SENT: 1}
    assert read["errorDistribution"] == {"RESOURCE_EXHAUSTED: overloaded": 2}
    assert (read["options"]["loop"], read["options"]["rps"], read["options"]["concurrency"]) == ("open", 100, None)
    assert read["accuracy"] == {"right": 90, "of": 100, "share": 0.9, "refused": 0}
    assert read["batchSizes"][0]["sizes"][1] == {"size": 3, "count": 40}
    assert datetime.fromisoformat(read["date"]).year == 2026
    assert read["endReason"] == "normal"


def test_similarity_is_shown_for_pairs() -> None:
    tally = Tally()
    tally.succeed(0.1, Verdict(images=2, same_score=0.9))
    tally.succeed(0.1, Verdict(images=2, different_score=0.25))
    report = report_of(plan=plan_of(target="compare"), tally=tally)

    assert "mean score 0.900 of 1 pairs of one class, 0.250 of 1 pairs of two" in report.as_text()
    assert report.as_json()["similarity"]["different"] == {"pairs": 1, "meanScore": 0.25}
    assert "accuracy" not in report.as_text()


@pytest.mark.parametrize(
    ("batches", "words"), [(None, "unknown: Triton answers neither at"), ({}, "ran nothing; another one answers here")]
)
def test_page_says_why_it_knows_no_batches(batches: dict[tuple[str, int], Ran] | None, words: str) -> None:
    assert words in report_of(batches=batches).as_text()


def test_interrupted_test_says_so() -> None:
    report = report_of(is_complete=False)

    assert "interrupted: measured for 2.0 s" in report.as_text()
    assert report.as_json()["endReason"] == "cancel"


def test_page_without_an_answer_shows_no_latency() -> None:
    tally = Tally()
    tally.fail(0.1, "UNAVAILABLE", "gone")
    page = report_of(tally=tally).as_text()

    assert "latency" not in page
    assert "UNAVAILABLE 1" in page


def test_late_sending_is_a_warning_in_open_loop_alone() -> None:
    tally = filled()
    for _ in range(10):
        tally.lateness.record(0.05)

    assert "late, by 50.0 ms at p99" in report_of(plan=plan_of(pace=OPEN), tally=tally).as_text()
    assert report_of(plan=plan_of(pace=ClosedLoop(callers=2)), tally=tally).warnings() == []


def test_busy_load_generator_is_a_warning() -> None:
    (warning,) = report_of(loop_share=0.93).warnings()

    assert "busy 93% of the time" in warning
