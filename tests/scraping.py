"""What Prometheus would read from a ``/metrics`` endpoint."""

import asyncio
import re
import time
import urllib.request
from pathlib import Path

from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

# This machine's own endpoints, whatever proxy it has.
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))
PAGE = Path(__file__).parents[1] / "docs" / "metrics.md"
# For machines that are ten times slower than most; less than a test's own limit, which says nothing of the series.
_PATIENCE_SECONDS = 60.0
_NAME = re.compile(r"`(\w+)`")


def scrape(url: str) -> list[Metric]:
    """
    Read every metric.

    Holds the caller's event loop up meanwhile; a server on that loop has to answer all the same.
    """
    with _OPENER.open(url, timeout=10) as response:
        return list(text_string_to_metric_families(response.read().decode()))


def value(url: str, name: str, **labels: str) -> float:
    """Read one series."""
    (found,) = [
        sample.value
        for metric in scrape(url)
        for sample in metric.samples
        if (sample.name, sample.labels) == (name, labels)
    ]
    return found


async def becomes(expected: float, url: str, name: str, **labels: str) -> None:
    """Wait until a series has a value, and fail with the one it has where that takes too long."""
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while (found := value(url, name, **labels)) != expected:
        assert time.monotonic() < deadline, f"{name} is {found:g} and does not become {expected:g}"
        await asyncio.sleep(0)  # a call's end at the server is told to nobody else


def shown(url: str) -> dict[str, set[str]]:
    """Read the names of all metrics, each with those of its labels; ``le`` aside, which only a histogram has."""
    names = {}
    for metric in scrape(url):
        name = f"{metric.name}_total" if metric.type == "counter" else metric.name
        names[name] = {label for sample in metric.samples for label in sample.labels} - {"le"}
    return names


def documented(service: str) -> dict[str, set[str]]:
    """Return what the page about metrics says that this service shows."""
    rows = [line.split("|") for line in PAGE.read_text().splitlines() if line.startswith("| `")]
    return {
        name: set(_NAME.findall(row[2]))
        for row in rows
        for name in _NAME.findall(row[1])
        if name.startswith((service, "process", "python"))
    }


def faults(url: str) -> list[str]:
    """Return what a linter of metrics would find: https://prometheus.io/docs/practices/naming/."""
    found = []
    for metric in scrape(url):
        own = not metric.name.startswith(("process", "python"))
        if not metric.documentation:
            found.append(f"{metric.name} has no help")
        if own and not metric.documentation.endswith("."):
            found.append(f"{metric.name}: its help is no sentence")
        if metric.type in ("unknown", "untyped"):
            found.append(f"{metric.name} has no type")
        if metric.type != "counter" and metric.name.endswith(("_total", "_count", "_sum", "_bucket")):
            found.append(f"{metric.name} looks like part of another type")
        if metric.type == "histogram" and not metric.name.endswith(("_seconds", "_bytes", "_images")):
            found.append(f"{metric.name} has no unit")
        if re.search(r"_(ms|milliseconds|minutes|kb|mb)(_|$)", metric.name):
            found.append(f"{metric.name} has no base unit")
        found += [f"{sample.name} of a counter" for sample in metric.samples if sample.name.endswith("_created")]
    return found
