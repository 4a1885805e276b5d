"""
Run the gateway's fault tests and write docs/faults.md: what was done to it, what it promises, what was measured.

``python -m tests.faults.report`` runs all of tests/faults/gateway and writes the page. Options go on to pytest; where
they select some of the tests, the page is printed and the file stays as it is. In other runs of pytest this module is
no plugin, and the figures stay unread.
"""

import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "faults.md"
COMMAND = "python -m tests.faults.report"

_PROPERTY = "fault"
_SECTIONS = {
    "U": "Triton fails",
    "L": "The gateway's own life",
    "P": "Protocol abuse",
    "I": "Images",
    "A": "Who may call",
    "R": "Resources and overload",
}
_NAME = re.compile(r"\s*([A-Z])(\d+)([a-z]?)\b[.:]?\s*([^\n]*)")


@dataclass(slots=True)
class Row:
    """One row of the page."""

    name: str
    """Section, number, and a letter where one number takes several tests: ``P5``, ``P17b``."""
    fault: str
    promised: str
    figures: dict[str, str] = field(default_factory=dict)
    outcome: str = ""

    def add(self, name: str, figure: object) -> None:
        """Note what was measured."""
        self.figures[name] = str(figure)

    @property
    def section(self) -> str:
        return self.name[0]

    @property
    def order(self) -> tuple[int, int, str]:
        matched = _NAME.match(self.name)
        assert matched is not None
        letter, number, part, _ = matched.groups()
        return list(_SECTIONS).index(letter), int(number), part


class DuplicateRowError(Exception):
    """Two tests say that they are the same row."""


def note(item: pytest.Item, name: str, fault: str, promised: str) -> Row:
    """Return the row of a test; it goes to the page as it is when the test has ended."""
    assert _NAME.fullmatch(name), name
    assert name[0] in _SECTIONS, name
    row = Row(name, fault, promised)
    # Plain values, which pass from process to process; the figures are the row's own, and still to come.
    plain = {"name": name, "fault": fault, "promised": promised, "figures": row.figures}
    item.user_properties.append((_PROPERTY, plain))
    return row


class Table:
    """
    The plugin that gathers rows while pytest runs.

    Attributes:
        is_partial: Whether options kept some tests from running.
    """

    def __init__(self) -> None:
        self._rows: dict[str, Row] = {}
        self._described: dict[str, Row] = {}
        self.is_partial = False

    def pytest_deselected(self, items: Sequence[pytest.Item]) -> None:
        """Remember that some tests did not run."""
        self.is_partial = True

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        """Take what a docstring says, for tests that are skipped before they say it."""
        for item in session.items:
            matched = _NAME.match(getattr(getattr(item, "function", None), "__doc__", None) or "")
            if matched is not None:
                letter, number, part, text = matched.groups()
                self._described[item.nodeid] = Row(f"{letter}{number}{part}", text.rstrip("."), "")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Take what a test measured, and how it ended."""
        noted = (
            Row(**value) for name, value in report.user_properties if name == _PROPERTY and isinstance(value, dict)
        )
        row = next(noted, self._described.get(report.nodeid))
        if row is None:
            return
        if report.when == "call" or report.outcome != "passed":
            row.outcome = _outcome(report)
            self._rows[report.nodeid] = row

    def rows(self) -> list[Row]:
        """
        Return them by section and number.

        Raises:
            DuplicateRowError: Names both tests.
        """
        tests: dict[str, str] = {}
        for test, row in self._rows.items():
            if row.name in tests:
                raise DuplicateRowError(f"{row.name} is {tests[row.name]} and {test}")
            tests[row.name] = test
        return sorted(self._rows.values(), key=lambda row: row.order)


def page(rows: Iterable[Row], facts: Sequence[str]) -> str:
    """Return the page as Markdown."""
    lines = [
        "# Faults",
        "",
        "What was done to a running gateway, what it promises, and what was measured. "
        "While a fault lasts, another caller asks 50 times a second with a deadline of 1 s; "
        "*others* is how many of its calls were answered in time. Before and after each fault the gateway is healthy "
        "and answers right.",
        "",
        "```sh",
        "make faults            # runs them all and writes this page",
        "```",
        "",
        *facts,
    ]
    section = ""
    for row in rows:
        if row.section != section:
            section = row.section
            lines += ["", f"## {section}. {_SECTIONS[section]}", "", "| | fault | promised | measured |"]
            lines.append("| --- | --- | --- | --- |")
        figures = "; ".join(f"{name} {figure}" for name, figure in row.figures.items())
        found = ": ".join(filter(None, (row.outcome, figures)))
        lines.append(f"| {row.name} | {' | '.join(map(_cell, (row.fault, row.promised, found)))} |")
    return "\n".join(lines) + "\n"


def facts() -> list[str]:
    """Return where and how the figures came to be, a paragraph each."""
    git = ("git", "-C", str(ROOT))
    commit = subprocess.run((*git, "rev-parse", "--short", "HEAD"), capture_output=True, text=True).stdout.strip()
    changed = subprocess.run((*git, "status", "--porcelain"), capture_output=True, text=True).stdout.strip()
    kernel = ".".join(platform.release().split(".")[:2])
    cores = len(os.sched_getaffinity(0))
    return [
        f"Commit {commit or 'unknown'}{' with changes' if changed else ''}, {cores} cores, Linux {kernel}, "
        f"Python {platform.python_version()}, grpcio {version('grpcio')}, Pillow {version('pillow')}; "
        f"command `{COMMAND}`."
    ]


def _outcome(report: pytest.TestReport) -> str:
    reason = getattr(report, "wasxfail", None)
    if reason is not None:
        return f"**does not hold** ({reason.removeprefix('reason: ')})"
    if report.outcome == "skipped":
        text = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        return f"skipped ({text.removeprefix('Skipped: ')})"
    return {"passed": "held", "failed": "**FAILED**"}[report.outcome]


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def main(arguments: Sequence[str]) -> int:
    """Run the tests, write the page and return pytest's status."""
    table = Table()
    status = pytest.main([str(ROOT / "tests" / "faults" / "gateway"), *arguments], plugins=[table])
    rows = table.rows()
    if table.is_partial or not rows:
        print(page(rows, facts()))
        print("not all tests ran; the page stays as it is", file=sys.stderr)
    else:
        PAGE.write_text(page(rows, facts()))
        print(f"{len(rows)} rows in {PAGE.relative_to(ROOT)}")
    return int(status)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
