"""A training run from the stream to a published version."""

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Protocol

import torch

from streamer.client import DatasetInfo, Plan, SampleClient, SplitInfo
from streamer.loading import StallReport, StreamedDataset, TensorBatch
from training import checkpoint
from training.config import DataConfig, TrainConfig
from training.errors import TrainingError
from training.evaluate import Evaluation, evaluate
from training.loop import Step, device_of_choice, fit
from training.model import IMAGE_SIZE, Network
from training.publish import Card, DatasetCard, prepare, publish

_EVALUATION_BATCH_SIZE = 500
_CONNECT_SECONDS = 30.0


class Observer(Protocol):
    """Who wants to see a run as it goes."""

    def started(self, config: TrainConfig, split: SplitInfo, device: torch.device) -> None:
        """The data is known and the network made."""

    def stepped(self, step: Step, num_samples: int) -> None:
        """One optimizer step was taken; ``num_samples`` are in one epoch."""

    def evaluated(self, evaluation: Evaluation) -> None:
        """The test split was gone through."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """What a run left behind."""

    card: Card
    last: Step
    evaluation: Evaluation
    folder: Path
    """Holds the checkpoint, the whole config in it."""
    stalls: StallReport
    """What the training has waited for."""


def train(
    config: TrainConfig, *, repository: Path, runs: Path, observer: Observer, ledger: Path | None = None
) -> Result:
    """
    Train on the stream, evaluate on the test split, save a checkpoint, publish the next version.

    It is one process: RANK and WORLD_SIZE in the environment are another's.

    Interrupting it (KeyboardInterrupt) closes the stream and publishes nothing.

    Args:
        config: The whole run.
        repository: Triton's model repository.
        runs: A folder for this run is made in here.
        observer: Told about progress.
        ledger: A file that proves what was trained on, for ``sluice stream verify``; a run goes on in it. All of a
            run is committed at once, with its checkpoint: of one that ends before, nothing is.

    Raises:
        TrainingError: Named by cause.
        streamer.errors.StreamerError: The streamer cannot be reached or does not have the data.
    """
    torch.manual_seed(config.seed)
    device = device_of_choice()
    prepare(repository, config.name)
    folder = _run_folder(runs, config)
    dataset = asyncio.run(_describe(config.data))
    train_split, test_split = dataset.splits["train"], dataset.splits["test"]
    _check_shape(dataset)
    network = Network(train_split.num_classes, dropout=config.dropout).to(device)
    observer.started(config, train_split, device)
    reading = _Reading(config, train_split, ledger)
    with reading.dataset:
        last = fit(
            network,
            config,
            reading.epoch,
            num_samples=train_split.num_samples,
            on_step=lambda step: observer.stepped(step, train_split.num_samples),
        )
        with reading.dataset.committing(reading.last, step=last.number):
            state = checkpoint.State(
                config=config,
                num_classes=train_split.num_classes,
                step=last.number,
                epoch=last.epoch,
                position=last.position,
                fingerprint=train_split.fingerprint.hex(),
                data=reading.dataset.state(),
            )
            checkpoint.save(folder / "checkpoint", network, state)
    evaluation = evaluate(network, _test_batches(config, test_split), num_classes=test_split.num_classes)
    observer.evaluated(evaluation)
    card = publish(
        network,
        repository,
        name=config.name,
        class_names=list(dataset.class_names) or [str(label) for label in range(train_split.num_classes)],
        metrics={"test_accuracy": evaluation.accuracy, "test_loss": evaluation.loss},
        dataset=DatasetCard(
            name=dataset.name, num_train=train_split.num_samples, fingerprint=train_split.fingerprint.hex()
        ),
    )
    return Result(card=card, last=last, evaluation=evaluation, folder=folder, stalls=reading.dataset.report())


async def _describe(config: DataConfig) -> DatasetInfo:
    async with SampleClient(config.streamer) as client:
        await client.wait_ready(timeout_seconds=_CONNECT_SECONDS)
        datasets = {dataset.name: dataset for dataset in await client.datasets()}
    if config.dataset not in datasets:
        raise TrainingError(
            f"dataset {config.dataset!r}: the streamer at {config.streamer} does not have it; "
            f"it has {', '.join(sorted(datasets)) or 'none'}"
        )
    return datasets[config.dataset]


def _check_shape(dataset: DatasetInfo) -> None:
    for split in dataset.splits.values():
        if tuple(split.image_shape) != (IMAGE_SIZE, IMAGE_SIZE):
            raise TrainingError(
                f"dataset {dataset.name!r}, split {split.name}: images are {split.image_shape}, "
                f"the network takes ({IMAGE_SIZE}, {IMAGE_SIZE})"
            )


class _Reading:
    """The training split, pass by pass, and the last batch that a step was taken with."""

    def __init__(self, config: TrainConfig, split: SplitInfo, ledger: Path | None) -> None:
        plan = Plan(
            dataset=config.data.dataset,
            split=split.name,
            seed=config.seed,
            batch_size=config.data.batch_size,
            fingerprint=split.fingerprint,
        )
        self.dataset = StreamedDataset(
            config.data.streamer,
            plan,
            distributed=False,
            ledger=ledger,
            step=0,
            prefetch_batches=config.data.prefetch_batches,
        )
        self.last: TensorBatch

    def epoch(self, epoch: int) -> Iterator[TensorBatch]:
        self.dataset.set_epoch(epoch)
        for batch in self.dataset:
            yield batch
            self.last = batch


def _test_batches(config: TrainConfig, split: SplitInfo) -> StreamedDataset:
    """Return the test split in file order."""
    plan = Plan(
        dataset=config.data.dataset, split=split.name, batch_size=_EVALUATION_BATCH_SIZE, fingerprint=split.fingerprint
    )
    return StreamedDataset(config.data.streamer, plan, distributed=False, prefetch_batches=config.data.prefetch_batches)


def _run_folder(runs: Path, config: TrainConfig) -> Path:
    stamp = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
    folder = runs / f"{stamp}-{config.name}-seed{config.seed}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TrainingError(f"{folder}: cannot write: {error.strerror}") from error
    return folder
