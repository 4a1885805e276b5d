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
from training.errors import CheckpointError, StoppedError
from training.evaluation import record
from training.evaluation import report as page
from training.evaluation.evaluate import Evaluation, evaluate
from training.folders import CHECKPOINTS, RESULT, alone, new_folder
from training.journal import Journal
from training.loop import Loop, Step
from training.model import Network, fold
from training.ranks import ALONE, Ranks
from training.reading import Data, TrainingStream, batches_of, describe
from training.release import candidate
from training.release.export import Export
from training.release.precision import Choice
from training.release.publish import Card, prepare, publish_draft
from training.snapshot import from_first, parts_of, restore

__all__ = ["CHECKPOINTS", "Data", "Learnt", "Observer", "Result", "Stopping", "assist", "batches_of", "learn", "train"]

Stopping = AbstractContextManager[Callable[[], int | None]]
"""Held while steps are taken; gives what tells the number of the signal that asked to stop, None for none yet."""


class Observer(Protocol):
    """Who wants to see a run as it goes."""

    def started(self, config: TrainConfig, split: SplitInfo, device: torch.device, folder: Path) -> None:
        """The data is known, the network made, and the run described in its folder."""

    def stepped(self, step: Step, num_samples: int) -> None:
        """One optimizer step was taken; ``num_samples`` are in one epoch."""

    def validated(self, step: Step, evaluation: Evaluation) -> None:
        """The validation split was gone through after an epoch's last step."""

    def evaluated(self, evaluation: Evaluation, split: SplitInfo) -> None:
        """The test split was gone through, or without one the validation split once more."""


class _Nobody:
    """Who looks at ranks other than the first."""

    def started(self, config: TrainConfig, split: SplitInfo, device: torch.device, folder: Path) -> None: ...

    def stepped(self, step: Step, num_samples: int) -> None: ...

    def validated(self, step: Step, evaluation: Evaluation) -> None: ...

    def evaluated(self, evaluation: Evaluation, split: SplitInfo) -> None: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Learnt:
    """What came of training, before anybody looked at the test split."""

    folder: Path
    """Of the run."""
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
    """Calibrated."""
    data: Data
    """What it was trained, and by :attr:`training.reading.Data.judging` measured, on."""
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
    ranks: Ranks = ALONE,
) -> Result:
    """
    Train on the stream, calibrate, evaluate on the test split, write the report, publish the next version.

    It is one process, whatever RANK and WORLD_SIZE say, unless ``ranks`` are given: then it is the first one of them,
    while the others are in :func:`assist`, and alone again once the training is over.

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
        ranks: That train together.

    Raises:
        StoppedError: ``stopping`` said so; the state is kept.
        PromotionError: It is worse than the current version; the run is kept.
        TrainingError: Named by cause.
        streamer.errors.StreamerError: The streamer cannot be reached or does not have the data.
    """

    def begin(data: Data) -> Path:
        """Make places only for what has been found to be there."""
        if data.test is None:
            report(_without_test(data))
        prepare(repository, config.name)
        return resume or new_folder(runs, config)

    learnt = _learnt(_trained(config, begin, observer, ledger, stopping, report, ranks))
    ranks.leave()
    folder = learnt.folder
    draft, assessment = candidate.draft(
        learnt.network, learnt.data, config.data, name=config.name, source=folder, precision=precision
    )
    observer.evaluated(assessment.evaluation, learnt.data.judging)
    record.write(assessment.record, folder / record.FILE)
    page.write(folder)
    card, exported = publish_draft(learnt.network, repository, draft, force=force)
    (folder / RESULT).write_text(card.model_dump_json(indent=2, by_alias=True) + "\n")
    _tidy(folder / CHECKPOINTS, report)
    return Result(
        card=card,
        exported=exported,
        last=learnt.last,
        evaluation=assessment.evaluation,
        data=learnt.data,
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
    ranks: Ranks = ALONE,
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
        ranks: As for :func:`train`.

    Raises:
        StoppedError, TrainingError, streamer.errors.StreamerError: As :func:`train`.
    """
    return _learnt(_trained(config, lambda _: folder, observer, ledger, stopping, report, ranks))


def _learnt(training: "_Training") -> Learnt:
    best = checkpoint.load(training.folder)
    return Learnt(
        folder=training.folder,
        network=fold(best.network).to(training.loop.device),
        last=training.loop.last,
        data=training.data,
        validation_accuracy=best.state.validation.get("accuracy"),
        stalls=training.stalls,
    )


def assist(config: TrainConfig, ranks: Ranks, *, ledger: Path | None = None, stopping: Stopping | None = None) -> None:
    """
    Take a rank's share in what the first one does in :func:`train` or :func:`learn`, and return when that has learnt.

    It writes nothing but its ledger.

    Args:
        config: The first rank's.
        ranks: That train together.
        ledger: The first rank's: this one's has its number at the end of the name.
        stopping: Asked after each step; one rank that is to stop stops all.

    Raises:
        StoppedError: A rank was asked to stop; the first one has kept the state.
        TrainingError, streamer.errors.StreamerError: As :func:`train`.
    """
    _trained(config, lambda _: Path(), _Nobody(), ledger, stopping, lambda _: None, ranks)
    ranks.leave()


def _without_test(data: Data) -> str:
    return (
        f"{data.dataset.name} has no test split: the network is measured on {data.judging.name}, which also chooses "
        "its epoch and its temperature; expect less of new images"
    )


def _tidy(checkpoints: Path, report: Callable[[str], None]) -> None:
    """Give back the disk that a run needs only to go on; one that has ended does not."""
    try:
        checkpoint.keep_learnt(checkpoints)
    except (OSError, CheckpointError) as error:  # its version is published all the same
        report(f"{checkpoints}: not tidied up: {error}")


def _trained(
    config: TrainConfig,
    folder_for: Callable[[Data], Path],
    observer: Observer,
    ledger: Path | None,
    stopping: Stopping | None,
    report: Callable[[str], None],
    ranks: Ranks,
) -> "_Training":
    """Train until the budget is used up, on all ranks."""
    if config.deterministic:
        make_deterministic()
    randomness.seed(config.seed)
    device = device_of_choice()
    data = ranks.from_first(lambda: asyncio.run(describe(config.data)))
    folder = ranks.from_first(lambda: folder_for(data))
    model = config.model
    network = Network(data.train.num_classes, dropout=model.dropout, batch_norm=model.batch_norm).to(device)
    loop = Loop(network, config, num_samples=data.train.num_samples, ranks=ranks)
    with (
        alone(folder) if ranks.is_first else nullcontext(),
        TrainingStream(config, data.train, ledger, ranks) as stream,
    ):
        training = _Training(config, folder, loop, stream, data, observer, ranks)
        saved = from_first(ranks, folder / CHECKPOINTS)
        if saved is not None:
            training.resume(saved)
            for line in (*saved.complaints, f"going on with {folder} after step {loop.number}"):
                report(line)
        elif ranks.is_first:
            described = environment.describe(seed=config.seed, fingerprints=data.fingerprints, device=device)
            folders.describe(folder, config, described | {"ranks": ranks.size})
        _say_sharing(config, ranks, report)
        if not ranks.is_first:
            # Until here all were to have the same weights; from here on each drops activations of its own.
            randomness.seed_rank(config.seed, rank=ranks.rank, step=loop.number)
        observer.started(config, data.train, device, folder)
        training.run(stopping or nullcontext(lambda: None))
    return training


def _say_sharing(config: TrainConfig, ranks: Ranks, report: Callable[[str], None]) -> None:
    each, size = ranks.share_of(config.data.batch_size), config.data.batch_size
    if each * ranks.size != size:
        report(f"data.batch_size = {size}: {ranks.size} ranks cannot share it evenly; a step takes {each * ranks.size}")


class _Training:
    """Epochs, with what is noted, validated and kept between their steps."""

    def __init__(
        self,
        config: TrainConfig,
        folder: Path,
        loop: Loop,
        stream: TrainingStream,
        data: Data,
        observer: Observer,
        ranks: Ranks,
    ) -> None:
        self.loop = loop
        self.data = data
        self.folder = folder
        self._config = config
        self._stream = stream
        self._observer = observer
        self._ranks = ranks
        self._best_accuracy: float | None = None
        # Of an epoch that is better than all before it, until it is kept.
        self._best: tuple[dict[str, Tensor], State] | None = None
        self._kept_at = time.monotonic()

    @property
    def stalls(self) -> StallReport:
        """What the training has waited for."""
        return self._stream.dataset.report()

    def resume(self, saved: Saved) -> None:
        restore(self.loop, saved)
        self._stream.dataset.load_state(saved.state.data)
        self._best_accuracy = saved.state.best_accuracy

    def run(self, stopping: Stopping) -> None:
        loop = self.loop
        with self._journal() as journal, stopping as asked:
            while loop.epoch < loop.epochs:
                for step in loop.steps(self._stream.epoch(loop.epoch)):
                    self._observer.stepped(step, self.data.train.num_samples)
                    if journal is not None and step.number % self._config.log_steps == 0:
                        journal.stepped(step)
                    signal, is_due = self._ranks.agree(asked(), is_due=self._is_due())
                    # An epoch's last step is kept with what the epoch came to.
                    if not self._stream.is_over and (signal is not None or is_due):
                        self._keep({}, is_best=False)
                        self._stop_if(signal)
                loop.end_epoch()
                self._end_epoch(journal, asked)

    def _journal(self) -> AbstractContextManager[Journal | None]:
        """Return where figures are noted, by one rank for all."""
        return Journal(self.folder, step=self.loop.number) if self._ranks.is_first else nullcontext()

    def _end_epoch(self, journal: Journal | None, asked: Callable[[], int | None]) -> None:
        loop, every, split = self.loop, self._config.checkpoint.epochs, self.data.validation
        # The other ranks wait for what comes of it.
        measured = {} if journal is None or split is None else self._validate(journal, split)
        signal, is_due = self._ranks.agree(asked(), is_due=self._is_due(), now=True)
        is_turn = every is not None and loop.epoch % every == 0
        if signal is not None or is_turn or is_due or loop.epoch >= loop.epochs:
            self._keep(measured, is_best=split is None)
        self._stop_if(signal)

    def _validate(self, journal: Journal, split: SplitInfo) -> dict[str, float]:
        """Measure an epoch, and hold what it came to in memory where it is the best; of equals the later one."""
        loop = self.loop
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
        self.loop.read()  # nothing of a step that failed is kept
        with self._stream.dataset.committing(self._stream.last, step=self.loop.number):
            # All ledgers say what is about to be kept before it is, and then that it was.
            self._ranks.wait()
            if self._ranks.is_first:
                self._write(validation, is_best=is_best)
            self._ranks.wait()
        self._kept_at = time.monotonic()

    def _write(self, validation: dict[str, float], *, is_best: bool) -> None:
        loop, checkpoints = self.loop, self.folder / CHECKPOINTS
        if self._best is not None:
            weights, state = self._best
            is_best = state.step == loop.number
            if not is_best:
                checkpoint.keep_best(checkpoints, weights, state)
        state = self._state(validation, data=self._stream.dataset.state(), random=randomness.values())
        checkpoint.keep(checkpoints, parts_of(loop), state, is_best=is_best)
        self._best = None

    def _state(self, validation: dict[str, float], **others: Any) -> State:
        return State(
            config=self._config,
            num_classes=self.data.train.num_classes,
            step=self.loop.number,
            epoch=self.loop.epoch,
            fingerprint=self.data.train.fingerprint.hex(),
            loop=self.loop.position(),
            validation=validation,
            best_accuracy=self._best_accuracy,
            **others,
        )

    def _stop_if(self, signal: int | None) -> None:
        if signal is not None:
            raise StoppedError(self.loop.number, signal, self.folder)
