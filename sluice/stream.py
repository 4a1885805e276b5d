"""``sluice stream``: what a streamer serves, how fast it reads, and whether a run's ledgers prove every sample."""

import itertools
import json
import statistics
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rpc.address import joined
from rpc.settings import SettingsError, load
from streamer.client import Batch, DatasetInfo, Plan, SampleClient, SplitInfo
from streamer.proof import KINDS, Verdict, verify
from streamer.settings import StreamerSettings

_TURNS = 5
_MAX_SECONDS = 3600.0


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchOptions:
    """What ``sluice stream bench`` was told."""

    streamer: str | None = None
    """``host:port``, or several, separated by commas; None: where the settings put it."""
    dataset: str = "mnist"
    batch_size: int = 256
    seconds: float = 2.0
    """Of each turn."""
    transform: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Turn:
    """What was read in one turn."""

    samples_per_second: float
    megabytes_per_second: float
    """Of images, a million bytes each."""
    waited: float
    """Share of the time, 0..1, in which the reading thread had nothing to do."""


def check(ledgers: Sequence[Path], *, as_json: bool) -> bool:
    """
    Print what the ledgers of a run prove, and tell whether each sample was delivered exactly once.

    Raises:
        streamer.ledger.LedgerError: One of them cannot be understood.
        OSError: One of them cannot be read.
    """
    verdict = verify(ledgers)
    print(json.dumps(verdict.as_json()) if as_json else _verdict_text(verdict))
    return verdict.is_clean


async def list_datasets(streamer: str | None, *, as_json: bool) -> None:
    """
    Print the data sets of a running streamer.

    Raises:
        SettingsError: ``streamer`` is no address.
        streamer.errors.ReaderError: It does not answer, or with an error.
    """
    async with _client(streamer) as client:
        datasets = await client.datasets()
    if as_json:
        print(json.dumps([_dataset_json(dataset) for dataset in datasets]))
        return
    rows = [_row(dataset, split) for dataset in datasets for split in dataset.splits.values()]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


async def bench(options: BenchOptions, *, as_json: bool) -> None:
    """
    Read in turns as fast as it goes, and print the median rates.

    Raises:
        SettingsError: An option makes no sense.
        streamer.errors.ReaderError: The streamer refuses, or does not answer.
    """
    if not 0 < options.seconds <= _MAX_SECONDS:
        raise SettingsError(f"--seconds {options.seconds:g}: allowed is above 0, up to {_MAX_SECONDS:,.0f}")
    plan = Plan(dataset=options.dataset, batch_size=options.batch_size, transform=options.transform, seed=0)
    async with _client(options.streamer) as client, aclosing(_endless(client, plan)) as batches:
        # Connecting and the first look at the data are no part of the rate.
        await anext(batches)
        turns = [await _turn(batches, options.seconds) for _ in range(_TURNS)]
    print(json.dumps(_rates_json(options, turns)) if as_json else _rates_text(options, turns))


async def _endless(client: SampleClient, plan: Plan) -> AsyncGenerator[Batch, None]:
    for epoch in itertools.count():
        async with aclosing(client.batches(replace(plan, epoch=epoch))) as batches:
            async for batch in batches:
                yield batch


async def _turn(batches: AsyncGenerator[Batch, None], seconds: float) -> Turn:
    samples = size = 0
    started, worked = time.perf_counter(), time.thread_time()
    while (elapsed := time.perf_counter() - started) < seconds:
        batch = await anext(batches)
        samples += len(batch.labels)
        size += batch.images.nbytes
    worked = time.thread_time() - worked
    return Turn(
        samples_per_second=samples / elapsed,
        megabytes_per_second=size / elapsed / 1e6,
        waited=max(0.0, 1 - worked / elapsed),
    )


def _client(streamer: str | None) -> SampleClient:
    place = load(StreamerSettings)
    try:
        return SampleClient(streamer or joined(place.host, place.port))
    except ValueError as error:
        raise SettingsError(f"--streamer {streamer}: expected HOST:PORT, or several, separated by commas") from error


def _verdict_text(verdict: Verdict) -> str:
    lines = [f"{kind:<10} {getattr(verdict, kind):>12,}" for kind in KINDS]
    lines += [f"  {finding}" for finding in verdict.findings if finding.kind != "recovered"]
    lines += [f"  torn line at {place}: a process died as it wrote" for place in verdict.torn_lines]
    epochs = f"{verdict.epochs} epoch{'s'[: verdict.epochs != 1]}"
    files = f"{verdict.files} ledger{'s'[: verdict.files != 1]}"
    return "\n".join([*lines, f"{verdict.committed:,} samples committed in {epochs}, {files}"])


def _dataset_json(dataset: DatasetInfo) -> dict[str, Any]:
    splits = [
        {
            "name": split.name,
            "num_samples": split.num_samples,
            "image_shape": list(split.image_shape),
            "num_classes": split.num_classes,
            "label_bytes": split.label_bytes,
            "fingerprint": split.fingerprint.hex(),
        }
        for split in dataset.splits.values()
    ]
    return {"name": dataset.name, "class_names": list(dataset.class_names), "splits": splits}


def _row(dataset: DatasetInfo, split: SplitInfo) -> tuple[str, ...]:
    shape = "x".join(map(str, split.image_shape))
    classes = f"{split.num_classes} classes"
    return dataset.name, split.name, f"{split.num_samples:,} images", shape, classes, split.fingerprint.hex()[:12]


def _rates_json(options: BenchOptions, turns: Sequence[Turn]) -> dict[str, Any]:
    told = {"dataset": options.dataset, "batch_size": options.batch_size, "transform": options.transform}
    names = ("samples_per_second", "megabytes_per_second", "waited")
    medians = {name: statistics.median(getattr(turn, name) for turn in turns) for name in names}
    return {**told, "seconds": options.seconds, **medians, "turns": [turn.samples_per_second for turn in turns]}


def _rates_text(options: BenchOptions, turns: Sequence[Turn]) -> str:
    def line(name: str, of: Callable[[Turn], float], form: str) -> str:
        values = sorted(map(of, turns))
        median, least, most = (format(value, form) for value in (statistics.median(values), values[0], values[-1]))
        return f"{name:<10} {median:>10}   {least} to {most}"

    transform = f", {options.transform}" if options.transform else ""
    return "\n".join(
        [
            f"{options.dataset} train in batches of {options.batch_size}{transform}: "
            f"medians of {_TURNS} turns of {options.seconds:g} s, and their range",
            line("samples/s", lambda turn: turn.samples_per_second, ",.0f"),
            line("MB/s", lambda turn: turn.megabytes_per_second, ",.1f"),
            line("waited", lambda turn: turn.waited, ".0%"),
        ]
    )
