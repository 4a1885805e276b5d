"""``sluice evaluate``: a run or a published version against a split, spoilt images, and images of other kinds."""

import asyncio
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from pydantic import ValidationError
from rich.console import Console
from rich.progress import track

from rpc.address import joined
from rpc.settings import SettingsError, load
from streamer.client import DatasetInfo, Plan, SampleClient, SplitInfo
from streamer.errors import UnknownDatasetError
from streamer.loading import StreamedDataset
from streamer.settings import StreamerSettings
from streamer.sources import datasets, memory
from training import checkpoint
from training.devices import device_of_choice
from training.errors import TrainingError
from training.evaluation import record, report
from training.evaluation.assessment import Assessment, assess
from training.evaluation.corruptions import CORRUPTIONS, SEVERITIES
from training.evaluation.evaluate import (
    STAND_INS,
    Detection,
    Images,
    Predictions,
    detect,
    robustness,
    stand_ins,
)
from training.evaluation.record import Picture, Record
from training.evaluation.subjects import NetworkSubject, ServedSubject, Subject
from training.model import IMAGE_SIZE
from training.release import manifest
from training.release.publish import Card

_RUNS = Path("runs")
_BATCH_SIZE = 500
_CONNECT_SECONDS = 30.0
_REFERENCES = 5000
_MOST = 10_000  # images of another kind
# An order of its own, so that the first samples are of all classes, however the files are sorted.
_SEED = 20_000


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluateOptions:
    """What ``sluice evaluate`` was told."""

    target: Path | None = None
    """A run, a checkpoint or a version's folder; None: the newest run."""
    streamer: str | None = None
    """``host:port``, or several, separated by commas; None: where the settings put it."""
    dataset: str | None = None
    """None: what the target was trained on."""
    split: str = "test"
    validation: str | None = None
    """Split to fit a temperature on; None: the run's own, and none for a version. Empty: none."""
    corruptions: bool = False
    samples: int = 1000
    """Images that each corruption is tried on."""
    ood: str = ""
    """Other data sets, separated by commas; noise and inverted are made up."""
    seed: int = 0
    """Of the corruptions."""
    out: Path | None = None
    """Folder for the results; None: the run's, or one in ``runs`` for a version."""
    report: bool = True


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """What is evaluated, and what it says about itself."""

    kind: str
    """``checkpoint`` or ``version``."""
    folder: Path
    subject: Subject
    dataset: str
    train_split: str
    validation: str
    class_names: list[str]
    """By label; empty where the target does not say."""
    num_classes: int
    out: Path


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What was measured, and where it lies."""

    record: Record
    folder: Path
    page: Path | None
    """The report, where one was written."""

    def as_text(self) -> str:
        """Return the compact table."""
        written = " and ".join(str(path) for path in (self.folder / record.FILE, self.page) if path is not None)
        return "\n".join([*_lines(self.record), f"Written: {written}"])


def run(options: EvaluateOptions, *, say: Callable[[str], None]) -> Outcome:
    """
    Evaluate, and write ``evaluation.json`` and the report.

    Args:
        options: From the command line.
        say: Told what is going on, in lines.

    Raises:
        SettingsError: An option makes no sense.
        TrainingError: There is nothing to evaluate, or a file of it is damaged.
        streamer.errors.StreamerError: The streamer cannot be reached or does not have the data.
    """
    target = find(options.target, options.out)
    validation = target.validation if options.validation is None else options.validation
    if validation == options.split:
        raise SettingsError(f"--validation {validation}: what --split judges must not choose the temperature")
    place = load(StreamerSettings)
    served = _served(options.streamer or joined(place.host, place.port))
    reader = served.reader(options.dataset or target.dataset)
    info = reader.info(options.split)
    _check(info, reader.dataset.name, num_classes=target.num_classes)
    what = f"{info.num_samples:,} images of {reader.dataset.name} {info.name}"
    say(f"evaluating {target.folder} on {what}, from {served.address}")
    assessment = _assess(target, reader, info, validation)
    measured = assessment.record
    if options.corruptions:
        measured = _spoil(measured, target.subject, reader.sample(info.name, options.samples), seed=options.seed)
    if others := [name.strip() for name in options.ood.split(",") if name.strip()]:
        images_of, notes = _others(others, served, reader.sample(info.name, _MOST))
        measured = _compare(measured, target, reader, assessment.predictions, images_of, notes)
        for note in measured.notes:
            say(note)
    record.write(measured, target.out / record.FILE)
    page = report.write(target.out) if options.report else None
    return Outcome(record=measured, folder=target.out, page=page)


def find(path: Path | None, out: Path | None = None) -> Target:
    """
    Return what lies in a folder, ready to answer.

    Args:
        path: A run, a checkpoint or a version; None: the newest run.
        out: Where results go; by default into the run, or into a folder in ``runs`` for a version.

    Raises:
        TrainingError: Neither of them is there, or a file of it is damaged.
    """
    path = _newest_run() if path is None else path
    return _version(path, out) if (path / manifest.MODEL).exists() else _checkpoint(path, out)


def _newest_run() -> Path:
    runs = sorted(path.parent for path in _RUNS.glob("*/checkpoints"))
    if not runs:
        raise TrainingError(
            f"{_RUNS}: no run here; name one, a checkpoint or a folder such as model_repository/mnist/1"
        )
    return runs[-1]


def _checkpoint(path: Path, out: Path | None) -> Target:
    kept = checkpoint.load(path)
    config = kept.state.config
    # A checkpoint lies in its run, in a folder of all of them.
    run_folder = path.parent.parent if path.parent.name == "checkpoints" else path
    return Target(
        kind="checkpoint",
        folder=path,
        subject=NetworkSubject(kept.network.to(device_of_choice())),
        dataset=config.data.dataset,
        train_split=config.data.train_split,
        validation=config.data.validation_split,
        class_names=[],
        num_classes=kept.state.num_classes,
        out=out or run_folder,
    )


def _version(path: Path, out: Path | None) -> Target:
    manifest.verify(path)
    try:
        card = Card.model_validate_json((path / manifest.CARD).read_bytes())
    except ValidationError as error:
        raise TrainingError(f"{path / manifest.CARD}: no card of a version: {error.errors()[0]['msg']}") from error
    return Target(
        kind="version",
        folder=path,
        subject=ServedSubject(path / manifest.MODEL, device_of_choice()),
        dataset=card.dataset.name,
        train_split="train",
        validation="",
        class_names=card.class_names,
        num_classes=len(card.class_names),
        # Nothing is added to what is published.
        out=out or _RUNS / f"{card.model}-version-{card.version}",
    )


@dataclass(frozen=True, slots=True)
class Reader:
    """Splits of one data set, from a streamer."""

    address: str
    dataset: DatasetInfo

    def info(self, split: str) -> SplitInfo:
        """Describe a split, or a slice of one."""
        return asyncio.run(self._info(split))

    async def _info(self, split: str) -> SplitInfo:
        async with SampleClient(self.address) as client:
            return await client.split(self._plan(split, seed=None))

    def batches(self, split: str, *, seed: int | None = None) -> StreamedDataset:
        """Return a split's batches, in file order unless seeded."""
        return StreamedDataset(self.address, self._plan(split, seed=seed), distributed=False)

    def sample(self, split: str, limit: int) -> Images:
        """Return up to ``limit`` images, of all classes however the files are sorted."""
        return Images.first_of(self.batches(split, seed=_SEED), limit)

    def _plan(self, split: str, *, seed: int | None) -> Plan:
        return Plan(dataset=self.dataset.name, split=split, seed=seed, batch_size=_BATCH_SIZE)


@dataclass(frozen=True, slots=True)
class _Served:
    """What a streamer has."""

    address: str
    datasets: Mapping[str, DatasetInfo]

    def reader(self, name: str) -> Reader:
        if name not in self.datasets:
            known = ", ".join(sorted(self.datasets)) or "none"
            raise TrainingError(f"dataset {name!r}: the streamer at {self.address} does not have it; it has {known}")
        return Reader(self.address, self.datasets[name])


def _served(address: str) -> _Served:
    async def ask() -> list[DatasetInfo]:
        async with SampleClient(address) as client:
            await client.wait_ready(timeout_seconds=_CONNECT_SECONDS)
            return list(await client.datasets())

    return _Served(address, {dataset.name: dataset for dataset in asyncio.run(ask())})


def _check(info: SplitInfo, dataset: str, *, num_classes: int) -> None:
    _check_shape(info, dataset)
    if info.num_classes > num_classes:
        raise TrainingError(
            f"dataset {dataset!r}, split {info.name}: has {info.num_classes} classes, the network knows {num_classes}"
        )


def _check_shape(info: SplitInfo, dataset: str) -> None:
    if tuple(info.image_shape) != (IMAGE_SIZE, IMAGE_SIZE):
        raise TrainingError(
            f"dataset {dataset!r}, split {info.name}: images are {info.image_shape}, "
            f"the network takes ({IMAGE_SIZE}, {IMAGE_SIZE})"
        )


def _assess(target: Target, reader: Reader, info: SplitInfo, validation: str) -> Assessment:
    return assess(
        target.subject,
        reader.batches(info.name),
        validation=reader.batches(validation) if validation else (),
        fitted_on=validation,
        source=target.folder,
        kind=target.kind,
        dataset=reader.dataset.name,
        split=info,
        class_names=_class_names(target, reader.dataset),
    )


def _class_names(target: Target, dataset: DatasetInfo) -> list[str]:
    names = target.class_names or list(dataset.class_names)
    # A data set may name fewer classes than the network was made for.
    return names + [str(label) for label in range(len(names), target.num_classes)]


def _spoil(measured: Record, subject: Subject, images: Images, *, seed: int) -> Record:
    """Add the accuracy on spoilt images."""
    console = Console(file=sys.stderr)
    results = track(
        robustness(subject, images, seed=seed),
        description="corruptions",
        total=len(CORRUPTIONS) * len(SEVERITIES),
        console=console,
        disable=not console.is_terminal,
    )
    added = {
        "corruptions": record.corruption_rows(list(results)),
        "corrupted_samples": len(images),
        "example": Picture.of(images.image_NHW[0]),
        "corruption_seed": seed,
    }
    return measured.model_copy(update=added)


def _compare(
    measured: Record,
    target: Target,
    reader: Reader,
    known: Predictions,
    others: Mapping[str, Images],
    notes: list[str],
) -> Record:
    """Add how well images of other kinds are told from the known ones."""
    references = reader.sample(target.train_split, _REFERENCES)
    temperature = measured.served.temperature
    results: list[Detection] = []
    for name, images in others.items():
        results += detect(target.subject, known, references, images, other=name, temperature=temperature)
    return measured.model_copy(update={"outliers": record.outlier_rows(results), "notes": notes})


def _others(names: Iterable[str], served: _Served, known: Images) -> tuple[dict[str, Images], list[str]]:
    """Return images by what they are, and what there is to say about them."""
    made_up = stand_ins(known)
    others: dict[str, Images] = {}
    notes = []
    for name in names:
        if name in made_up:
            others[name] = made_up[name]
        elif (found := _other(name, served)) is not None:
            others[name] = found
        else:
            others |= made_up
            notes.append(
                f"{name} is neither served by the streamer nor on this machine: {' and '.join(made_up)} images "
                "stand in for it, which are easier to tell"
            )
    return others, notes


def _other(name: str, served: _Served) -> Images | None:
    """Return images of another data set, from the streamer or from this machine; None where neither has it."""
    if name in served.datasets:
        splits = served.datasets[name].splits
        split = "test" if "test" in splits else next(iter(splits))
        _check_shape(splits[split], name)
        return served.reader(name).sample(split, _MOST)
    try:
        files = datasets.cached(name, data=None, cache=load(StreamerSettings).cache)
    except UnknownDatasetError as error:
        allowed = ", ".join(sorted({*served.datasets, *STAND_INS}))
        raise SettingsError(f"--ood {name}: the streamer does not serve it; allowed are {allowed}") from error
    if files is None:
        return None
    test = asyncio.run(memory.load(files)).splits["test"]
    count = min(_MOST, test.num_samples)
    return Images(image_NHW=test.images[:count], label_N=test.labels[:count].astype(np.int64), index_N=np.arange(count))


def _lines(measured: Record) -> Iterator[str]:
    """Yield the compact table."""
    low, high = measured.accuracy_interval
    wrong = measured.num_samples - round(measured.accuracy * measured.num_samples)
    yield f"{measured.subject} on {measured.dataset} {measured.split}: {measured.num_samples:,} images"
    yield _row("accuracy", f"{measured.accuracy:.2%}", f"{low:.2%} to {high:.2%} with 95 % confidence; {wrong} wrong")
    known = [row for row in measured.classes if row.recall is not None]
    worst = min(known, key=lambda row: row.recall or 0.0)
    yield _row("worst class", f"{worst.recall:.2%}", f"of {worst.support} images of {worst.name}")
    yield from _calibration_lines(measured)
    if measured.corruption_accuracy is not None:
        yield _row("corrupted", f"{measured.corruption_accuracy:.2%}", f"mean over {measured.corrupted_samples} images")
        yield from _corruption_lines(measured)
    for row in measured.outliers:
        text = f"AUROC of {row.score}; {row.fpr_at_95:.1%} pass where 95 % of the known do"
        yield _row(row.other, f"{row.auroc:.4f}", text)


def _calibration_lines(measured: Record) -> Iterator[str]:
    served, raw = measured.served, measured.raw
    yield _row("nll", f"{served.nll:.4f}", f"{raw.nll:.4f} uncalibrated" if raw else "")
    yield _row("brier", f"{served.brier:.4f}", f"{raw.brier:.4f} uncalibrated" if raw else "")
    yield _row("ece", f"{served.ece:.4f}", f"{raw.ece:.4f} uncalibrated" if raw else "")
    if measured.fitted_on:
        yield _row("temperature", f"{served.temperature:.3f}", f"fitted on {measured.fitted_on}")


def _corruption_lines(measured: Record) -> Iterator[str]:
    rows = {(row.name, row.severity): row.accuracy for row in measured.corruptions}
    for name in dict.fromkeys(row.name for row in measured.corruptions):
        yield "  " + name.ljust(16) + "".join(f"{rows[name, severity]:9.1%}" for severity in SEVERITIES)


def _row(name: str, value: str, comment: str) -> str:
    return f"{name:<13} {value:>8}   {comment}".rstrip()
