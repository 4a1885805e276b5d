"""A training run from the stream to a published version."""

import asyncio
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from streamer.client import SplitInfo
from streamer.loading import StallReport
from training import checkpoint, environment, folders, randomness
from training.checkpoint import Saved, State
from training.config import TrainConfig
from training.devices import device_of_choice, make_deterministic
from training.errors import StoppedError
from training.evaluation import record
from training.evaluation import report as page
from training.evaluation.evaluate import Evaluation, evaluate
from training.folders import CHECKPOINTS, RESULT, alone, new_folder
from training.journal import Journal
from training.loop import Loop, Step
from training.model import Network, fold
from training.reading import Data, Reading, batches_of, describe
from training.release import candidate
from training.release.export import Export
from training.release.precision import Choice
from training.release.publish import Card, prepare, publish_draft
from training.snapshot import parts_of, restore

__all__ = ["CHECKPOINTS", "Data", "Learnt", "Observer", "Result", "Stopping", "batches_of", "learn", "train"]

Stopping = AbstractContextManager[Callable[[], int | None]]
"""Held while steps are taken; gives what tells the number of the signal that asked to stop, None for none yet."""


class Observer(Protocol):
    """Who wants to see a run as it goes."""

    def started(self, config: TrainConfig, split: SplitInfo, device: torch.device) -> None:
        """The data is known and the network made."""

    def stepped(self, step: Step, num_samples: int) -> None:
        """One optimizer step was taken; ``num_samples`` are in one epoch."""

    def validated(self, step: Step, evaluation: Evaluation) -> None:
        """The validation split was gone through after an epoch's last step."""

    def evaluated(self, evaluation: Evaluation) -> None:
        """The test split was gone through."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Learnt:
    """What came of training, before anybody looked at the test split."""

    network: Network
    """The best, or without a validation split the last; without norms and dropout, in evaluation mode."""
    last: Step
    data: Data
    validation_accuracy: float | None
    """Of the network; None without a validation split."""
    stalls: StallReport
    """What the training has waited for."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """What a run left behind."""

    card: Card
    exported: Export
    last: Step
    evaluation: Evaluation
    """Of the test split, calibrated."""
    folder: Path
    """Holds config, environment, metrics, checkpoints, ``evaluation.json`` and ``report.html``."""
    stalls: StallReport
    """What the training has waited for."""


def train(
    config: TrainConfig,
    *,
    repository: Path,
    runs: Path,
    observer: Observer,
    ledger: Path | None = None,
    resume: Path | None = None,
    stopping: Stopping | None = None,
    precision: Choice = "float32",
    force: bool = False,
    report: Callable[[str], None] = lambda _: None,
) -> Result:
    """
    Train on the stream, calibrate, evaluate on the test split, write the report, publish the next version.

    It is one process: RANK and WORLD_SIZE in the environment are another's.

    Interrupting it (KeyboardInterrupt) closes the stream and publishes nothing; it goes on from its last checkpoint.

    Args:
        config: The whole run.
        repository: Triton's model repository.
        runs: A folder for this run is made in here.
        observer: Told about progress.
        ledger: A file that proves what was trained on, for ``sluice stream verify``; a run goes on in it. Committed
            is what is in a checkpoint.
        resume: Folder of a run to go on with, whose config this is.
        stopping: Asked after each step.
        precision: Of the version: see :func:`training.release.export.export`.
        force: Publish also what is worse than the current version.
        report: Told where a run goes on, and which checkpoints are damaged, in lines.

    Raises:
        StoppedError: ``stopping`` said so; the state is kept.
        PromotionError: It is worse than the current version; the run is kept.
        TrainingError: Named by cause.
        streamer.errors.StreamerError: The streamer cannot be reached or does not have the data.
    """
    prepare(repository, config.name)
    folder = resume or new_folder(runs, config)
    learnt = learn(config, folder, observer=observer, ledger=ledger, stopping=stopping, report=report)
    draft, assessment = candidate.draft(
        learnt.network, learnt.data, config.data, name=config.name, source=folder, precision=precision
    )
    observer.evaluated(assessment.evaluation)
    record.write(assessment.record, folder / record.FILE)
    page.write(folder)
    card, exported = publish_draft(learnt.network, repository, draft, force=force)
    (folder / RESULT).write_text(card.model_dump_json(indent=2, by_alias=True) + "\n")
    return Result(
        card=card,
        exported=exported,
        last=learnt.last,
        evaluation=assessment.evaluation,
        folder=folder,
        stalls=learnt.stalls,
    )


def learn(
    config: TrainConfig,
    folder: Path,
    *,
    observer: Observer,
    ledger: Path | None = None,
    stopping: Stopping | None = None,
    report: Callable[[str], None] = lambda _: None,
) -> Learnt:
    """
    Train on the stream and choose the best epoch on the validation split; what a search does with each of its trials.

    Args:
        config: The whole run.
        folder: Of this run; where it holds checkpoints, training goes on from the newest.
        observer: Told about progress.
        ledger: As for :func:`train`.
        stopping: As for :func:`train`.
        report: As for :func:`train`.

    Raises:
        StoppedError, TrainingError, streamer.errors.StreamerError: As :func:`train`.
    """
    if config.deterministic:
        make_deterministic()
    randomness.seed(config.seed)
    device = device_of_choice()
    data = asyncio.run(describe(config.data))
    model = config.model
    network = Network(data.train.num_classes, dropout=model.dropout, batch_norm=model.batch_norm).to(device)
    loop = Loop(network, config, num_samples=data.train.num_samples)
    with alone(folder), Reading(config, data.train, ledger) as reading:
        training = _Training(config, folder, loop, reading, data, observer)
        if checkpoint.is_any(folder / CHECKPOINTS):
            saved = checkpoint.newest(folder / CHECKPOINTS)
            training.resume(saved)
            for line in (*saved.complaints, f"going on with {folder} after step {loop.number}"):
                report(line)
        else:
            described = environment.describe(seed=config.seed, fingerprints=data.fingerprints, device=device)
            folders.describe(folder, config, described)
        observer.started(config, data.train, device)
        training.run(stopping or nullcontext(lambda: None))
        stalls = reading.dataset.report()
    best = checkpoint.load(folder)
    return Learnt(
        network=fold(best.network).to(device),
        last=loop.last,
        data=data,
        validation_accuracy=best.state.validation.get("accuracy"),
        stalls=stalls,
    )


class _Training:
    """Epochs, with what is noted, validated and kept between their steps."""

    def __init__(
        self,
        config: TrainConfig,
        folder: Path,
        loop: Loop,
        reading: Reading,
        data: Data,
        observer: Observer,
    ) -> None:
        self._config = config
        self._folder = folder
        self._loop = loop
        self._reading = reading
        self._data = data
        self._observer = observer
        self._best_accuracy: float | None = None
        # Of an epoch that is better than all before it, until it is kept.
        self._best: tuple[dict[str, Tensor], State] | None = None
        self._kept_at = time.monotonic()

    def resume(self, saved: Saved) -> None:
        restore(self._loop, saved)
        self._reading.dataset.load_state(saved.state.data)
        self._best_accuracy = saved.state.best_accuracy

    def run(self, stopping: Stopping) -> None:
        loop = self._loop
        with Journal(self._folder, step=loop.number) as journal, stopping as asked:
            while loop.epoch < loop.epochs:
                for step in loop.steps(self._reading.epoch(loop.epoch)):
                    self._observer.stepped(step, self._data.train.num_samples)
                    if step.number % self._config.log_steps == 0:
                        journal.stepped(step)
                    # An epoch's last step is kept with what the epoch came to.
                    signal = asked()
                    if not self._reading.last.end_of_epoch and (signal is not None or self._is_due()):
                        self._keep({}, is_best=False)
                        self._stop_if(signal)
                loop.end_epoch()
                self._end_epoch(journal, asked)

    def _end_epoch(self, journal: Journal, asked: Callable[[], int | None]) -> None:
        loop, every = self._loop, self._config.checkpoint.epochs
        measured = {} if self._data.validation is None else self._validate(journal, self._data.validation)
        signal = asked()
        is_turn = every is not None and loop.epoch % every == 0
        if signal is not None or is_turn or self._is_due() or loop.epoch >= loop.epochs:
            self._keep(measured, is_best=self._data.validation is None)
        self._stop_if(signal)

    def _validate(self, journal: Journal, split: SplitInfo) -> dict[str, float]:
        """Measure an epoch, and hold what it came to in memory where it is the best; of equals the later one."""
        loop = self._loop
        evaluation = evaluate(loop.result, batches_of(self._config.data, split), num_classes=split.num_classes)
        journal.validated(loop.last, loss=evaluation.loss, accuracy=evaluation.accuracy)
        self._observer.validated(loop.last, evaluation)
        measured = {"accuracy": evaluation.accuracy, "loss": evaluation.loss}
        if self._best_accuracy is None or evaluation.accuracy >= self._best_accuracy:
            self._best_accuracy = evaluation.accuracy
            weights = {name: tensor.detach().to("cpu", copy=True) for name, tensor in loop.result.state_dict().items()}
            self._best = weights, self._state(measured)
        return measured

    def _is_due(self) -> bool:
        return time.monotonic() - self._kept_at >= self._config.checkpoint.seconds

    def _keep(self, validation: dict[str, float], *, is_best: bool) -> None:
        loop, dataset, checkpoints = self._loop, self._reading.dataset, self._folder / CHECKPOINTS
        loop.read()  # nothing of a step that failed is kept
        if self._best is not None:
            weights, state = self._best
            is_best = state.step == loop.number
            if not is_best:
                checkpoint.keep_best(checkpoints, weights, state)
        with dataset.committing(self._reading.last, step=loop.number):
            state = self._state(validation, data=dataset.state(), random=randomness.values())
            checkpoint.keep(checkpoints, parts_of(loop), state, is_best=is_best)
        self._best = None
        self._kept_at = time.monotonic()

    def _state(self, validation: dict[str, float], **others: Any) -> State:
        return State(
            config=self._config,
            num_classes=self._data.train.num_classes,
            step=self._loop.number,
            epoch=self._loop.epoch,
            fingerprint=self._data.train.fingerprint.hex(),
            loop=self._loop.position(),
            validation=validation,
            best_accuracy=self._best_accuracy,
            **others,
        )

    def _stop_if(self, signal: int | None) -> None:
        if signal is not None:
            raise StoppedError(self._loop.number, signal, self._folder)
