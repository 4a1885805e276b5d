from typing import Any, Literal

import pytest

from tests.faults.report import DuplicateRowError, Table, page


def report(
    test: str, row: str, outcome: Literal["passed", "failed", "skipped"] = "passed", text: Any = None
) -> pytest.TestReport:
    """What pytest says of one test that is a row."""
    noted = {"name": row, "fault": "a | b", "promised": "c", "figures": {"CPU": "1 s"}}
    return pytest.TestReport(test, ("file", 1, ""), {}, outcome, text, "call", user_properties=[("fault", noted)])


def shown(*reports: pytest.TestReport) -> list[str]:
    table = Table()
    for each in reports:
        table.pytest_runtest_logreport(each)
    return [line for line in page(table.rows(), ["where"]).splitlines() if line.startswith(("|", "## "))]


def test_rows_are_sorted_into_their_sections() -> None:
    lines = shown(report("one", "I2"), report("two", "P10"), report("three", "P2"), report("four", "P17b"))

    assert [line.split(" | ")[0] for line in lines if not line.startswith(("| |", "| -"))] == [
        "## P. Protocol abuse", "| P2", "| P10", "| P17b", "## I. Images", "| I2",
    ]  # fmt: skip
    assert lines[-1] == r"| I2 | a \| b | c | held: CPU 1 s |"


def test_what_failed_or_was_skipped_is_shown_as_such() -> None:
    expected = report("three", "P3", "skipped")
    expected.wasxfail = "reason: of this"
    failed, skipped, known = shown(
        report("one", "P1", "failed"), report("two", "P2", "skipped", ("file", 1, "Skipped: no kernel")), expected
    )[-3:]

    assert "| **FAILED**: CPU" in failed
    assert "| skipped (no kernel): CPU" in skipped
    assert "| **does not hold** (of this): CPU" in known


def test_row_of_two_tests_is_an_error() -> None:
    with pytest.raises(DuplicateRowError, match="P1 is one and two"):
        shown(report("one", "P1"), report("two", "P1"))
