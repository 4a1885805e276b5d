"""``sluice train``: options to a config, a progress bar, and the new version loaded where Triton runs."""

import asyncio
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from pydantic import ValidationError
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from rpc.address import joined
from rpc.settings import SettingsError, load
from serving.control import TritonControl
from serving.errors import ServingError
from serving.settings import TritonSettings
from streamer.client import SplitInfo
from streamer.settings import StreamerSettings
from training.config import TrainConfig
from training.evaluate import Evaluation
from training.loop import Step
from training.recipes import RECIPES
from training.run import Result, train

_RUNS = Path("runs")
_OPTION_OF = {
    "seed": "--seed",
    "lr": "--lr",
    "seconds": "--minutes",
    "max_epochs": "--epochs",
    "streamer": "--streamer",
}
_LOOK_SECONDS = 1.0
_LOAD_SECONDS = 120.0


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainOptions:
    """What the command line gave; none means as in the recipe."""

    recipe: str
    streamer: str | None
    seed: int | None
    epochs: int | None
    minutes: float | None
    lr: float | None
    triton: str | None
    load: bool = True
    ledger: Path | None = None


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
            "test_accuracy": self.result.evaluation.accuracy,
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
        return (
            f"{card.model} version {card.version}: {self.result.evaluation.accuracy:.2%} of "
            f"{self.result.evaluation.num_samples} test images right; {loaded}. Run kept in {self.result.folder}"
        )


def configure(options: TrainOptions) -> TrainConfig:
    """
    Return the recipe's config with the given options laid over it.

    Raises:
        SettingsError: No such recipe, or a value out of range.
    """
    if options.recipe not in RECIPES:
        raise SettingsError(f"--recipe {options.recipe}: no such recipe; known are {', '.join(sorted(RECIPES))}")
    if options.epochs is not None and options.minutes is not None:
        raise SettingsError("--epochs and --minutes both say how long to train; give one of them")
    place = load(StreamerSettings)
    given: dict[str, dict[str, Any]] = {
        "data": {"streamer": options.streamer or joined(place.host, place.port)},
        "optim": {} if options.lr is None else {"lr": options.lr},
        "budget": {},
    }
    if options.minutes is not None:
        given["budget"] = {"seconds": options.minutes * 60}
    if options.epochs is not None:
        given["budget"] = {"seconds": None, "max_epochs": options.epochs}
    config = RECIPES[options.recipe]().model_dump()
    for part, values in given.items():
        config[part] |= values
    if options.seed is not None:
        config["seed"] = options.seed
    try:
        return TrainConfig.model_validate(config)
    except ValidationError as error:
        problems = (f"{_OPTION_OF[str(fault['loc'][-1])]}: {fault['msg']}" for fault in error.errors())
        raise SettingsError("; ".join(problems)) from error


def run(options: TrainOptions, *, report: Callable[[str], None]) -> Outcome:
    """
    Train, publish, and have Triton load the version where one runs.

    Args:
        options: From the command line.
        report: Told what cannot be seen in the progress bar, in lines.

    Raises:
        SettingsError, TrainingError, StreamerError: As :func:`training.run.train`.
        ServingError: A Triton named by ``options.triton`` did not load the version; it stays published.
    """
    config = configure(options)
    settings = load(TritonSettings)
    report(f"asking the streamer at {config.data.streamer}")
    with ProgressView() as view:
        result = train(config, repository=settings.model_repository, runs=_RUNS, observer=view, ledger=options.ledger)
    report(str(result.stalls))
    report(f"published {settings.model_repository / result.card.model / str(result.card.version)}")
    address = options.triton or joined(settings.host, settings.grpc_port)
    loaded = options.load and asyncio.run(
        _load(address, result.card.model, must=options.triton is not None, report=report)
    )
    return Outcome(result=result, loaded_by=address if loaded else None)


async def _load(address: str, model: str, *, must: bool, report: Callable[[str], None]) -> bool:
    """Load the newest version; a Triton that nobody named may be absent, or may refuse."""
    async with TritonControl(address) as control:
        try:
            # Live, not ready: one version that does not load, or is being unloaded, makes the server unready.
            await control.wait_live(timeout_seconds=_LOAD_SECONDS if must else _LOOK_SECONDS)
        except ServingError:
            if must:
                raise
            return False
        try:
            await control.load(model)
        except ServingError as error:
            if must:
                raise
            report(f"not loaded: {error}")
            return False
    return True


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

    def started(self, config: TrainConfig, split: SplitInfo, device: torch.device) -> None:
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

    def evaluated(self, evaluation: Evaluation) -> None:
        """Say how good the network is."""
        self._progress.stop()  # the finished bar stays above what follows
        self._print(f"test split: {evaluation.accuracy:.2%} of {evaluation.num_samples} right")

    def _print(self, line: str) -> None:
        self._console.print(line, highlight=False, soft_wrap=True)
