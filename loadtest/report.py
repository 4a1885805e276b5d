"""What a load test found, for a person and for a program."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from loadtest.arrivals import OpenLoop
from loadtest.batches import Counts, Ran
from loadtest.latency import Latencies
from loadtest.plan import Plan
from loadtest.tally import INTERRUPTED, OK, Tally

PERCENTAGES = (50.0, 90.0, 95.0, 99.0, 99.9)

_NANOSECONDS = 1_000_000_000
_INDENT = 12
# Where the client is the bottleneck: its one thread without a pause, or lateness that is a part of the latency.
_BUSY_SHARE = 0.85
_LATE_SECONDS, _LATE_SHARE = 0.001, 0.1


@dataclass(frozen=True, kw_only=True)
class Report:
    """The result of one load test."""

    plan: Plan
    model: str
    """Name and version of the model that answered first."""
    num_samples: int
    """Different images."""
    started: datetime
    is_complete: bool
    """False where it was interrupted."""
    elapsed_seconds: float
    """From the end of the warm-up to the last answer; above 0."""
    tally: Tally
    batches: Counts | None
    """What Triton ran meanwhile; None where it could not be asked."""
    cpu_share: float
    """Cores that the load generator used."""
    loop_share: float
    """Share of the time in which its one thread was busy."""

    @property
    def rps(self) -> float:
        """Answered calls a second."""
        return self.tally.succeeded / self.elapsed_seconds

    @property
    def images_per_second(self) -> float:
        """Images a second, in answered calls."""
        return self.tally.images / self.elapsed_seconds

    @property
    def accuracy(self) -> float | None:
        """Share of judged images whose class was named right; None where none was judged."""
        return self.tally.right / self.tally.judged if self.tally.judged else None

    def warnings(self) -> list[str]:
        """Return why the figures say more about the load generator than about the server; mostly nothing."""
        found: list[str] = []
        late = self.tally.lateness.at(99)
        if self._is_open and late > max(_LATE_SECONDS, _LATE_SHARE * self.tally.succeeded_latencies.at(99)):
            found.append(
                f"the load generator itself was late, by {_ms(late)} ms at p99, which is part of every latency above: "
                "lower the rate, or run it on a machine of its own"
            )
        if self.loop_share > _BUSY_SHARE:
            found.append(
                f"the load generator was busy {self.loop_share:.0%} of the time, and one core is all it can use: "
                "the server may be faster than shown"
            )
        return found

    def as_text(self) -> str:
        """Return a page for a person."""
        return "\n".join([*self._head(), "", *self._body()])

    def as_json(self) -> dict[str, Any]:
        """
        Return an object for a program: the fields of a ghz report, latencies in nanoseconds, and our own beside them.

        ``rps`` counts answered calls only; ghz counts failed ones too.
        """
        tally, latencies = self.tally, self.tally.succeeded_latencies
        return {
            "date": self.started.isoformat(),
            "endReason": "normal" if self.is_complete else "cancel",
            "options": _options(self.plan, self.num_samples),
            "model": self.model,
            "count": tally.count,
            "total": _ns(self.elapsed_seconds),
            "average": _ns(latencies.mean),
            "fastest": _ns(latencies.fastest),
            "slowest": _ns(latencies.slowest),
            "rps": self.rps,
            "imagesPerSecond": self.images_per_second,
            "latencyDistribution": _distribution(latencies),
            "statusCodeDistribution": dict(tally.codes),
            "errorDistribution": dict(tally.messages),
            "failedLatencyDistribution": {
                code: _distribution(failed) for code, failed in tally.latencies.items() if code != OK
            },
            "accuracy": _accuracy(tally, self.accuracy),
            "similarity": {
                "same": {"pairs": tally.same.count, "meanScore": tally.same.value},
                "different": {"pairs": tally.different.count, "meanScore": tally.different.value},
            },
            "batchSizes": None if self.batches is None else [_ran(*item) for item in self.batches.items()],
            "lateness": {"slowest": _ns(tally.lateness.slowest), "latencyDistribution": _distribution(tally.lateness)},
            "client": {"cores": self.cpu_share, "busy": self.loop_share},
            "warnings": self.warnings(),
        }

    @property
    def _is_open(self) -> bool:
        return isinstance(self.plan.pace, OpenLoop)

    def _head(self) -> Iterator[str]:
        plan = self.plan
        batch = f", {plan.batch_size:,} images a call," if plan.batch_size > 1 else ""
        form = "pixels" if plan.target == "triton" or plan.image_format == "raw" else "PNG"
        yield (
            f"{plan.target}{batch} at {plan.address} ({self.model}), {self.num_samples:,} different images as {form}"
        )
        if isinstance(plan.pace, OpenLoop):
            pace = f"open loop, {plan.pace.rate:g} calls a second"
        else:
            pace = f"closed loop, {plan.pace.callers} caller{'s' if plan.pace.callers != 1 else ''}"
        yield f"{pace}, {plan.duration_seconds:g} s after {plan.warm_up_seconds:g} s of warm-up"
        if not self.is_complete:
            yield f"interrupted: measured for {self.elapsed_seconds:.1f} s"

    def _body(self) -> Iterator[str]:
        tally = self.tally
        yield _row("count", f"{tally.count:,} calls in {self.elapsed_seconds:.2f} s")
        yield _row("rps", f"{self.rps:,.1f}   images/s {self.images_per_second:,.1f}")
        yield from self._latency_rows()
        yield from self._code_rows()
        yield from self._answer_rows()
        yield from self._batch_rows()
        lateness = ""
        if self._is_open:
            late = tally.lateness
            lateness = (
                f"; sent late by p50 {_ms(late.at(50))}   p99 {_ms(late.at(99))}   max {_ms(late.slowest)} ms, "
                "latencies count it in"
            )
        yield _row("client", f"{self.cpu_share:.2f} cores{lateness}")
        for warning in self.warnings():
            yield _row("warning", warning)

    def _latency_rows(self) -> Iterator[str]:
        latencies = self.tally.succeeded_latencies
        if latencies.count:
            points = [f"p{percentage:g} {_ms(latencies.at(percentage))}" for percentage in PERCENTAGES]
            yield _row("latency", "   ".join([*points, f"max {_ms(latencies.slowest)}"]) + " ms")

    def _code_rows(self) -> Iterator[str]:
        tally = self.tally
        known = [f"{code} {number:,}" for code, number in tally.codes.most_common()]
        yield _row("codes", "   ".join(known) or "none")
        for code, failed in tally.latencies.items():
            if code != OK:
                yield _row("", f"{code} after p50 {_ms(failed.at(50))}   p99 {_ms(failed.at(99))} ms")
        for message, number in tally.messages.most_common(3):
            yield _row("", f"{number:,} x {message}")
        if tally.codes[INTERRUPTED]:
            yield _row("", f"{INTERRUPTED}: had no answer yet when the test was stopped")

    def _answer_rows(self) -> Iterator[str]:
        tally = self.tally
        if self.accuracy is not None:
            yield _row("accuracy", f"{self.accuracy:.2%} ({tally.right:,} of {tally.judged:,} right)")
        if tally.refused:
            yield _row("", f"{tally.refused:,} images failed alone, in calls that were answered")
        if tally.same.value is not None and tally.different.value is not None:
            yield _row(
                "similarity",
                f"mean score {tally.same.value:.3f} of {tally.same.count:,} pairs of one class, "
                f"{tally.different.value:.3f} of {tally.different.count:,} pairs of two",
            )

    def _batch_rows(self) -> Iterator[str]:
        grpc, metrics = f"{self.plan.triton} (gRPC)", f"{self.plan.triton_metrics} (metrics)"
        places = f"{grpc} and {metrics}"
        if self.batches is None:
            yield _row(
                "batches",
                f"unknown: Triton answers neither at {grpc} nor {metrics}; containers let none in",
            )
        elif not self.batches:
            yield _row("batches", f"none: the Triton at {places} ran nothing; another one answers here")
        else:
            for (model, version), ran in self.batches.items():
                by = f"{model} version {version}"
                yield _row("batches", f"{ran.images:,} images in {ran.batches:,}, {ran.mean:.2f} a batch, by {by}")
                if ran.sizes:
                    yield _row("", "   ".join(_size_groups(ran.sizes)))


def _row(name: str, text: str) -> str:
    return f"{name:<{_INDENT}}{text}"


def _size_groups(sizes: Mapping[int, int]) -> Iterator[str]:
    """Group sizes by powers of two, with the share of all batches."""
    total, lowest, highest = sum(sizes.values()), 1, 1
    while lowest <= max(sizes):
        number = sum(count for size, count in sizes.items() if lowest <= size <= highest)
        if number:
            name = f"{lowest}" if lowest == highest else f"{lowest}-{highest}"
            share = number / total
            yield f"{name}: {share:.0%}" if share >= 0.01 else f"{name}: <1%"
        lowest, highest = highest + 1, highest * 2


def _ms(seconds: float) -> str:
    milliseconds = seconds * 1000
    return f"{milliseconds:,.{2 if milliseconds < 10 else 1 if milliseconds < 1000 else 0}f}"


def _ns(seconds: float) -> int:
    return round(seconds * _NANOSECONDS)


def _distribution(latencies: Latencies) -> list[dict[str, float]]:
    return [{"percentage": percentage, "latency": _ns(latencies.at(percentage))} for percentage in PERCENTAGES]


def _accuracy(tally: Tally, accuracy: float | None) -> dict[str, float | None]:
    return {"right": tally.right, "of": tally.judged, "share": accuracy, "refused": tally.refused}


def _ran(key: tuple[str, int], ran: Ran) -> dict[str, Any]:
    return {
        "model": key[0],
        "version": key[1],
        "images": ran.images,
        "batches": ran.batches,
        "mean": ran.mean,
        "sizes": [{"size": size, "count": count} for size, count in ran.sizes.items()],
    }


def _options(plan: Plan, num_samples: int) -> dict[str, Any]:
    pace = plan.pace
    is_open = isinstance(pace, OpenLoop)
    return {
        "target": plan.target,
        "host": plan.address,
        "loop": "open" if is_open else "closed",
        "rps": pace.rate if isinstance(pace, OpenLoop) else None,
        "maxOutstanding": pace.max_outstanding if isinstance(pace, OpenLoop) else None,
        "concurrency": None if isinstance(pace, OpenLoop) else pace.callers,
        "duration": _ns(plan.duration_seconds),
        "warmUp": _ns(plan.warm_up_seconds),
        "timeout": _ns(plan.timeout_seconds),
        "format": plan.image_format,
        "batchSize": plan.batch_size,
        "model": plan.model,
        "images": num_samples,
        "seed": plan.seed,
    }
