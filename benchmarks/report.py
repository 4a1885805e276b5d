"""What was measured, as Markdown; and on what."""

import os
import platform
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from benchmarks.contest import Comparison, Outcome
from benchmarks.interleaved import Spread
from benchmarks.window import Turn

RESULTS = Path(__file__).parent / "results"

RATES = ("items/s, median", "lowest", "highest")
"""Columns of a rate."""


def surroundings(command: str, packages: Sequence[str], *, more: Mapping[str, str] | None = None) -> str:
    """
    Return a paragraph about commit, machine and versions.

    Args:
        command: What was run.
        packages: Whose versions matter.
        more: Versions of what is not installed here, by name.
    """
    described = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False, cwd=RESULTS.parent
    )
    versions = {name: version(name) for name in packages} | dict(more or {})
    return (
        f"`{command}` at {described.stdout.strip() or 'no commit'}, {datetime.now(UTC):%Y-%m-%d}: "
        f"{num_cores()} cores ({_cpu_model()}), Python {platform.python_version()}, "
        f"{', '.join(f'{name} {number}' for name, number in versions.items())}."
    )


def num_cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def rates_table(rates: Mapping[str, Spread]) -> str:
    """Return a table of rates by name."""
    return table(("", *RATES), ([name, *figures(rate)] for name, rate in rates.items()))


def outcome_table(outcome: Outcome, names: Iterable[str]) -> str:
    """Return a table of rates and CPU times of those contenders; one that is missing says why."""
    header = ("", *RATES, "reader, CPU s per million", "server, CPU s per million")
    return table(header, (_row(outcome, name) for name in names))


def factors_table(outcome: Outcome, comparisons: Iterable[Comparison]) -> str:
    """Return a table of factors, and what is asked of them."""
    rows = []
    for each in comparisons:
        factor = outcome.factor(each)
        shown = [_factor(value) for value in (factor.median, factor.lowest, factor.highest)] if factor else ["-"] * 3
        rows.append([f"{each.ours} / {each.theirs}", *shown, *_asked(each, factor)])
    return table(("", "factor, median", "lowest", "highest", "asked: at least", ""), rows)


def trials_table(outcome: Outcome) -> str:
    """Return a table of the ways that were tried."""
    rows = [
        [f"{name}, {way}" + (" (taken)" if way == outcome.chosen[name] else ""), f"{rate:,.0f}"]
        for name, rates in outcome.trials.items()
        for way, rate in rates.items()
    ]
    return table(("", "items/s"), rows)


def others_share(turns: Iterable[Turn]) -> float:
    """Return which share of this process's cores everything else took, 0..1, on average."""
    seen = list(turns)
    core_seconds = sum(turn.seconds for turn in seen) * num_cores()
    return sum(turn.other_cpu_seconds for turn in seen) / core_seconds if seen else 0.0


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table in Markdown; columns after the first hold numbers."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def figures(spread: Spread, digits: int = 0) -> list[str]:
    """Return the cells of a median, a lowest and a highest figure, as go with :data:`RATES`."""
    return [f"{value:,.{digits}f}" for value in (spread.median, spread.lowest, spread.highest)]


def met(value: float, *, least: float | None = None, most: float | None = None, form: str = "g") -> str:
    """Return what is asked of a figure, and whether it is met."""
    if least is not None:
        return f"at least {least:{form}}: {'met' if value >= least else 'missed'}"
    assert most is not None
    return f"at most {most:{form}}: {'met' if value <= most else 'missed'}"


def publish(text: str, page: Path | None) -> None:
    """Print what was measured, and write it where it has a page."""
    print(text)
    if page is not None:
        page.write_text(text)


def _row(outcome: Outcome, name: str) -> list[str]:
    if name in outcome.problems:
        return [f"{name}: {outcome.problems[name]}", *["-"] * 5]
    turns, way = outcome.turns[name], outcome.chosen[name]
    items = sum(turn.items for turn in turns) / 1e6
    reader, server = sum(turn.reader_cpu_seconds for turn in turns), sum(turn.server_cpu_seconds for turn in turns)
    return [
        f"{name}, {way}" if way else name,
        *figures(Spread.of([turn.rate for turn in turns])),
        f"{reader / items:,.2f}",
        f"{server / items:,.2f}" if server else "",
    ]


def _asked(comparison: Comparison, factor: Spread | None) -> tuple[str, str]:
    if comparison.asked is None:
        return "", ""
    is_met = factor is not None and factor.median >= comparison.asked
    return f"{comparison.asked:g}", "met" if is_met else "missed"


def _factor(value: float) -> str:
    return f"{value:.3g}"


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{models[0]}, {platform.machine()}" if models else platform.machine()
