"""
Metrics of several processes as those of one: pure.

Counters and histograms add up, those of processes that have ended included: a sum that fell would look like a restart.
Gauges add up over the processes there are, with the exceptions that their names tell.
"""

import json
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from prometheus_client import Metric
from prometheus_client.registry import Collector

_Series = tuple[str, tuple[tuple[str, str], ...]]
"""Name and labels."""

_GROWING = ("counter", "histogram", "summary")


@dataclass(frozen=True, slots=True)
class Family:
    """One metric of one process at one moment."""

    kind: str
    """As Prometheus calls it: ``counter``, ``gauge``, ..."""
    help: str
    values: dict[_Series, float]


Snapshot = dict[str, Family]
"""All metrics of one process at one moment, by name."""


def snapshot(collector: Collector) -> Snapshot:
    """Take the metrics as they are now."""
    return {
        metric.name: Family(
            metric.type,
            metric.documentation,
            {(sample.name, tuple(sample.labels.items())): sample.value for sample in metric.samples},
        )
        for metric in collector.collect()
    }


def encode(taken: Snapshot) -> bytes:
    """Write a snapshot as JSON, in one line without its end."""
    families = {
        name: [family.kind, family.help, [[series, labels, value] for (series, labels), value in family.values.items()]]
        for name, family in taken.items()
    }
    return json.dumps(families).encode()


def decode(families: Mapping[str, Any]) -> Snapshot:
    """Return the snapshot that :func:`encode` has written, parsed."""
    return {
        name: Family(kind, text, {(series, tuple(map(tuple, labels))): value for series, labels, value in values})
        for name, (kind, text, values) in families.items()
    }


def growing(taken: Snapshot) -> Snapshot:
    """Return what of a process counts on after its end."""
    return {name: family for name, family in taken.items() if family.kind in _GROWING}


def total(snapshots: Iterable[Snapshot], *, largest: Collection[str] = (), smallest: Collection[str] = ()) -> Snapshot:
    """
    Return the metrics of all processes together, in the order of the first.

    Args:
        snapshots: One of each process.
        largest: Gauges that say the same in each process, or of which the largest counts.
        smallest: Gauges of which the smallest counts.
    """
    summed: Snapshot = {}
    for taken in snapshots:
        for name, family in taken.items():
            values = summed.setdefault(name, Family(family.kind, family.help, {})).values
            for series, value in family.values.items():
                if series not in values:
                    values[series] = value
                elif name in largest or family.kind == "info":
                    values[series] = max(values[series], value)
                elif name in smallest:
                    values[series] = min(values[series], value)
                else:
                    values[series] += value
    return summed


def metrics(taken: Snapshot) -> Iterator[Metric]:
    """Yield a snapshot in the form that is shown."""
    for name, family in taken.items():
        metric = Metric(name, family.help, family.kind)
        for (series, labels), value in family.values.items():
            metric.add_sample(series, dict(labels), value)
        yield metric
