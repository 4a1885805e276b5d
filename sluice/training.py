"""``sluice train``: options to a config, a progress bar, and the new version loaded where Triton runs."""

import asyncio
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from rpc.address import joined
from rpc.settings import SettingsError, load
from serving.settings import TritonSettings
from sluice.interruption import asked_to_stop
from sluice.release import deploy, explain, tell_route
from streamer.client import SplitInfo
from streamer.settings import StreamerSettings
from training import overrides
from training.config import TrainConfig
from training.errors import ConfigError, DivergedError, StoppedError
from training.evaluation.evaluate import Evaluation
from training.folders import RESULT, config_of, unfinished
from training.loop import Step
from training.ranks import Ranks, gathered
from training.recipes import DEFAULT_RECIPE
from training.release.precision import Choice
from training.run import Observer, Result, assist, train

_RUNS = Path("runs")
_OPTION_OF = {
    "seed": "--seed",
    "optim.lr": "--lr",
    "budget.seconds": "--minutes",
    "budget.max_epochs": "--epochs",
    "data.streamer": "--streamer",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainOptions:
    """What the command line gave; none means as in the recipe."""

    recipe: str | None
    streamer: str | None
    seed: int | None
    epochs: int | None
    minutes: float | None
    lr: float | None
    triton: str | None
    load: bool = True
    ledger: Path | None = None
    assignments: tuple[str, ...] = ()
    """``field=value`` each."""
    config: Path | None = None
    """YAML of a recipe and fields."""
    data: Path | None = None
    """Folder of a data set, streamed for this run; ``:stretch`` or ``:center`` behind it says how images are framed."""
    resume: str | None = None
    """``auto``, or the folder of a run."""
    precision: Choice = "float32"
    """Of the version that is published."""
    force: bool = False
    """Publish also what is worse than the current version."""
    mlflow: str | None = None
    """Where MLflow keeps the run: its URI, or ``local`` for a file; None: nowhere."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """A finished run and whether Triton has it."""

    result: Result
    loaded_by: str | None
    """Address of the Triton that loaded the version; none when there was none."""

    def as_json(self) -> dict[str, Any]:
        """Return what a script wants to know."""
        return {
            "model": self.result.card.model,
            "version": self.result.card.version,
            "accuracy": self.result.evaluation.accuracy,
            "measured_on": self.result.data.judging.name,
            "test_accuracy": None if self.result.data.test is None else self.result.evaluation.accuracy,
            "epochs": self.result.last.epoch + 1,
            "samples_per_second": self.result.last.samples_per_second,
            "run": str(self.result.folder),
            "waited": self.result.stalls.waited_share,
            "loaded_by": self.loaded_by,
        }

    def as_text(self) -> str:
        """Return what a person wants to know."""
        card = self.result.card
        loaded = f"loaded by Triton at {self.loaded_by}" if self.loaded_by else "`sluice up` serves it"
        kind = "validation" if self.result.data.test is None else "test"
        return (
            f"{card.model} version {card.version}: {self.result.evaluation.accuracy:.2%} of "
            f"{self.result.evaluation.num_samples} {kind} images right; {loaded}. "
            f"{self.result.folder}/report.html shows the run"
        )


def configure(options: TrainOptions) -> TrainConfig:
    """
    Return the recipe's config with file, assignments and options laid over it, from low to high weight.

    Raises:
        SettingsError: No such recipe or field, or a value out of range.
    """
    if options.epochs is not None and options.minutes is not None:
        raise SettingsError("--epochs and --minutes both say how long to train; give one of them")
    try:
        recipe, values = (None, {}) if options.config is None else overrides.read(options.config)
        values |= overrides.parse(options.assignments) | _given(options)
        if options.data is not None:
            values = _named_as(options.data) | values
        if "data.streamer" not in values:
            place = load(StreamerSettings)
            values["data.streamer"] = joined(place.host, place.port)
        return overrides.overridden(overrides.recipe(options.recipe or recipe or DEFAULT_RECIPE), values)
    except ConfigError as error:
        message = str(error)
        for path, option in _OPTION_OF.items():
            if path in _given(options):
                message = message.replace(f"{path} = ", f"{option}: {path} = ")
        raise SettingsError(message) from error


def _named_as(data: Path) -> dict[str, Any]:
    """Return what a folder's data set and model are called where nobody said it."""
    from sluice.streaming import name_of, problem_of  # takes the streamer's own packages

    if problem := problem_of(data):
        raise SettingsError(f"--data {problem}")
    return {"name": name_of(data), "data.dataset": name_of(data)}


def _given(options: TrainOptions) -> dict[str, Any]:
    """Return what short options say, by path."""
    values = {"data.streamer": options.streamer, "seed": options.seed, "optim.lr": options.lr}
    given: dict[str, Any] = {path: value for path, value in values.items() if value is not None}
    if options.minutes is not None:
        given["budget.seconds"] = options.minutes * 60
    if options.epochs is not None:
        given |= {"budget.seconds": None, "budget.max_epochs": options.epochs}
    return given


def run(options: TrainOptions, *, report: Callable[[str], None]) -> Outcome | None:
    """
    Train, publish, and have Triton load the version where one runs.

    Started by ``torchrun`` it is one of several ranks, which train together: the first one does all else, and for the
    others None comes back once they are no longer needed.

    Args:
        options: From the command line.
        report: Told what cannot be seen in the progress bar, in lines.

    Raises:
        SettingsError, TrainingError, StreamerError: As :func:`training.run.train`.
        ServiceError: The streamer for ``options.data`` did not get ready.
        ServingError: The Triton named by ``options.triton`` does not answer; or one does, and did not load the
            version, or answered differently: the version is withdrawn.
    """
    with gathered() as ranks:
        config, resume = ranks.from_first(lambda: _config_and_folder(options))
        with _streamed(options, config, ranks, report) as config:
            if ranks.is_first:
                return _lead(options, config, resume, ranks, report)
            _assist(options, config, ranks)
            return None


@contextmanager
def _streamed(
    options: TrainOptions, config: TrainConfig, ranks: Ranks, report: Callable[[str], None]
) -> Iterator[TrainConfig]:
    """Give the config as it is, or where a folder was named, with a streamer for it that the first rank runs."""
    if options.data is None:
        yield config
        return
    from sluice.streaming import streaming

    served = streaming(config.data.dataset, options.data, owner=f"run {config.name}", report=report)
    with ExitStack() as stack:
        address = ranks.from_first(lambda: stack.enter_context(served))
        try:
            yield overrides.overridden(config, {"data.streamer": address})
        except StoppedError:
            report(f"going on takes --data {options.data}, too")
            raise


def _assist(options: TrainOptions, config: TrainConfig, ranks: Ranks) -> None:
    try:
        assist(config, ranks, ledger=options.ledger, stopping=asked_to_stop(lambda _: None))
    # Both come to all ranks at the same step, and the first one tells.
    except (StoppedError, DivergedError) as ended:
        # `torchrun` ends all as soon as one has ended: the first one is to say and keep what it has to.
        with suppress(RuntimeError):
            ranks.wait()
        sys.exit(128 + ended.signal if isinstance(ended, StoppedError) else 1)


def _lead(
    options: TrainOptions, config: TrainConfig, resume: Path | None, ranks: Ranks, report: Callable[[str], None]
) -> Outcome:
    repository = load(TritonSettings).model_repository
    report(f"asking the streamer at {config.data.streamer}")
    with ProgressView() as view, _tracked(view, options.mlflow, report) as observer:
        result = train(
            config,
            repository=repository,
            runs=_RUNS,
            observer=observer,
            ledger=options.ledger,
            resume=resume,
            stopping=asked_to_stop(report),
            precision=options.precision,
            force=options.force,
            report=report,
            ranks=ranks,
        )
    report(str(result.stalls))
    explain(result.exported, report)
    report(f"published {repository / result.card.model / str(result.card.version)}")
    loaded_by = asyncio.run(deploy(repository, result.card, options.triton, report)) if options.load else None
    tell_route(repository / result.card.model, result.card.version, report, is_loaded=loaded_by is not None)
    return Outcome(result=result, loaded_by=loaded_by)


@contextmanager
def _tracked(view: Observer, uri: str | None, report: Callable[[str], None]) -> Iterator[Observer]:
    """Give who hears of the run, and tell what MLflow lacks in the end; it is imported for those who ask for it."""
    if uri is None:
        yield view
        return
    from training.tracking import LOCAL, TrackedObserver

    tracked = TrackedObserver(view, LOCAL if uri == "local" else uri)
    try:
        with tracked:
            yield tracked
    finally:
        if tracked.complaint:
            report(tracked.complaint)


def _config_and_folder(options: TrainOptions) -> tuple[TrainConfig, Path | None]:
    """Return what to train, and the run to go on with if there is one."""
    if options.data is not None and options.streamer is not None:
        raise SettingsError("--data and --streamer both say where the data is; give one of them")
    if options.resume is None:
        return configure(options), None
    if options.resume == "auto":
        config = configure(options)
        return config, unfinished(_RUNS, config)
    named = [option for path, option in _OPTION_OF.items() if path != "data.streamer" and path in _given(options)]
    given = {"--set": options.assignments, "--config": options.config, "--recipe": options.recipe}
    named += [option for option, value in given.items() if value]
    if named:
        raise SettingsError(f"--resume {options.resume}: goes on with the run's own config; leave out {named[0]}")
    folder = Path(options.resume)
    config = config_of(folder)
    if (folder / RESULT).exists():
        raise SettingsError(f"--resume {folder}: that run is finished, and its version published")
    if options.streamer is not None:
        config = overrides.overridden(config, {"data.streamer": options.streamer})
    return config, folder


class ProgressView:
    """A run as a progress bar on standard error, or as one line an epoch where that is no terminal."""

    def __init__(self) -> None:
        self._console = Console(file=sys.stderr)
        self._progress = Progress(
            TextColumn("epoch {task.fields[epoch]}/{task.fields[epochs]}"),
            BarColumn(bar_width=None),
            TextColumn("loss {task.fields[loss]:.3f}  training accuracy {task.fields[accuracy]:.2%}"),
            TextColumn("{task.fields[rate]:.0f} samples/s"),
            TimeRemainingColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task: TaskID | None = None
        self._epoch = 0

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def started(self, config: TrainConfig, split: SplitInfo, device: torch.device, folder: Path) -> None:
        """Say what is trained on what."""
        self._print(
            f"training {config.name} on {split.num_samples} samples of {config.data.dataset} "
            f"from {config.data.streamer}, on the {device.type.upper()}, seed {config.seed}"
        )

    def stepped(self, step: Step, num_samples: int) -> None:
        """Move the bar."""
        fields: dict[str, Any] = {
            "epoch": step.epoch + 1,
            "epochs": step.epochs,
            "loss": step.loss,
            "accuracy": step.accuracy,
            "rate": step.samples_per_second,
        }
        total = step.epochs * num_samples
        if self._task is None:
            self._task = self._progress.add_task("train", total=total, **fields)
        self._progress.update(self._task, completed=step.samples, total=total, **fields)
        if not self._console.is_terminal and step.samples == (step.epoch + 1) * num_samples:
            self._print(
                f"epoch {step.epoch + 1}/{step.epochs}: loss {step.loss:.3f}, training accuracy {step.accuracy:.2%}, "
                f"{step.samples_per_second:.0f} samples/s"
            )

    def validated(self, step: Step, evaluation: Evaluation) -> None:
        """Say what an epoch came to."""
        self._print(
            f"after epoch {step.epoch + 1}: {evaluation.accuracy:.2%} of {evaluation.num_samples} "
            "validation images right"
        )

    def evaluated(self, evaluation: Evaluation, split: SplitInfo) -> None:
        """Say how good the network is."""
        self._progress.stop()  # the finished bar stays above what follows
        self._print(f"{split.name} split: {evaluation.accuracy:.2%} of {evaluation.num_samples} right")

    def _print(self, line: str) -> None:
        self._console.print(line, highlight=False, soft_wrap=True)
