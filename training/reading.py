"""What a run reads: its splits as the streamer describes them, and their batches."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import torch

from streamer.client import DatasetInfo, Plan, SampleClient, SplitInfo
from streamer.loading import Origin, StreamedDataset, TensorBatch
from training.config import USUAL_TEST, DataConfig, TrainConfig
from training.errors import ConfigError, TrainingError
from training.model import IMAGE_SIZE
from training.ranks import ALONE, Ranks

_EVALUATION_BATCH_SIZE = 500
_CONNECT_SECONDS = 30.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Data:
    """What a run reads."""

    dataset: DatasetInfo
    train: SplitInfo
    validation: SplitInfo | None
    test: SplitInfo | None
    """None: the data set has none."""

    @property
    def judging(self) -> SplitInfo:
        """
        What the finished network is measured on: the test split, or where there is none the validation split.

        Raises:
            TrainingError: There is neither.
        """
        if (split := self.test or self.validation) is None:
            raise TrainingError(
                f"dataset {self.dataset.name!r}: has no test split, and data.validation_split is empty: "
                "there is nothing to measure a network on; data.validation_split = train[90%:] puts a tenth aside"
            )
        return split

    @property
    def class_names(self) -> list[str]:
        """By label."""
        return list(self.dataset.class_names) or [str(label) for label in range(self.train.num_classes)]

    @property
    def fingerprints(self) -> dict[str, str]:
        """Hex digests by split, slices too."""
        splits = (self.train, self.validation, self.test)
        return {split.name: split.fingerprint.hex() for split in splits if split is not None}


def batches_of(config: DataConfig, split: SplitInfo) -> StreamedDataset:
    """Return a split as it is stored, in file order."""
    plan = Plan(
        dataset=config.dataset, split=split.name, batch_size=_EVALUATION_BATCH_SIZE, fingerprint=split.fingerprint
    )
    return StreamedDataset(config.streamer, plan, distributed=False, prefetch_batches=config.prefetch_batches)


class TrainingStream:
    """
    The training split, pass by pass, and the last batch that a step was taken with.

    Args:
        config: The whole run.
        split: What is trained on.
        ledger: Of the first rank; those of others have their number at its end.
        ranks: That share each batch.
    """

    def __init__(self, config: TrainConfig, split: SplitInfo, ledger: Path | None, ranks: Ranks = ALONE) -> None:
        plan = Plan(
            dataset=config.data.dataset,
            split=split.name,
            seed=config.seed,
            world_size=ranks.size,
            rank=ranks.rank,
            batch_size=ranks.share_of(config.data.batch_size),
            transform=config.augmentation,
            fingerprint=split.fingerprint,
        )
        self.dataset = StreamedDataset(
            config.data.streamer,
            plan,
            distributed=False,
            ledger=ledger_of(ledger, ranks),
            step=0,
            prefetch_batches=config.data.prefetch_batches,
        )
        self.last: TensorBatch
        """What the last step was taken with."""
        self._plan = plan
        self._num_samples = split.num_samples
        self._augmentation = config.augmentation

    @property
    def is_over(self) -> bool:
        """Whether the last batch was the last of its epoch, on whichever rank it came."""
        return self.last.next_position >= self._num_samples

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.dataset.close()

    def epoch(self, epoch: int) -> Iterator[TensorBatch]:
        """
        Yield the batches of an epoch, or what is left of it after ``load_state``; as many on each rank.

        Raises:
            ConfigError: The augmentation makes images that the network does not take.
            streamer.errors.StreamerError: The stream broke for good.
        """
        self.dataset.set_epoch(epoch)
        state = self.dataset.state()
        start = position = state["position"] if state["epoch"] == epoch else 0
        for batch in self.dataset:
            self._check(batch)
            self.last = batch
            position = batch.next_position
            yield batch
        if position < self._num_samples:
            self.last = self._nothing(epoch, start, position)
            yield self.last

    def _nothing(self, epoch: int, start: int, position: int) -> TensorBatch:
        """Return the share of a rank that there is no sample left for: the others' last step is its own, too."""
        return TensorBatch(
            images=torch.empty((0, IMAGE_SIZE, IMAGE_SIZE), dtype=torch.uint8),
            labels=torch.empty(0, dtype=torch.int64),
            indices=np.empty(0, np.int64),
            position=position,
            next_position=self._num_samples,
            end_of_epoch=True,
            origin=Origin(plan=replace(self._plan, epoch=epoch), num_samples=self._num_samples, start_position=start),
        )

    def _check(self, batch: TensorBatch) -> None:
        images = batch.images
        if images.dtype != torch.uint8 or images.shape[1:] != (IMAGE_SIZE, IMAGE_SIZE):
            raise ConfigError(
                f"augmentation = {self._augmentation}: makes {str(images.dtype).removeprefix('torch.')} images of "
                f"{tuple(images.shape[1:])}; the network takes uint8 of ({IMAGE_SIZE}, {IMAGE_SIZE}) and scales itself"
            )


def ledger_of(ledger: Path | None, ranks: Ranks) -> Path | None:
    """Return where a rank proves what it was given: the first one in the file itself, others beside it."""
    return ledger if ledger is None or ranks.is_first else ledger.with_name(f"{ledger.name}.rank{ranks.rank}")


async def describe(config: DataConfig) -> Data:
    """
    Ask the streamer for what a run reads; of the splits only the usual test split may be missing.

    Raises:
        TrainingError: It does not have the data set, or its images are not what the network takes.
        streamer.errors.StreamerError: It cannot be reached, or has no such split.
    """
    async with SampleClient(config.streamer) as client:
        await client.wait_ready(timeout_seconds=_CONNECT_SECONDS)
        datasets = {dataset.name: dataset for dataset in await client.datasets()}
        if config.dataset not in datasets:
            raise TrainingError(
                f"dataset {config.dataset!r}: the streamer at {config.streamer} does not have it; "
                f"it has {', '.join(sorted(datasets)) or 'none'}"
            )

        async def described(split: str) -> SplitInfo:
            info = await client.split(Plan(dataset=config.dataset, split=split))
            _check_shape(config.dataset, info)
            return info

        dataset = datasets[config.dataset]
        # Another split that somebody asked for by its name has to be there.
        has_test = config.test_split != USUAL_TEST or USUAL_TEST in dataset.splits
        return Data(
            dataset=dataset,
            train=await described(config.train_split),
            validation=await described(config.validation_split) if config.validation_split else None,
            test=await described(config.test_split) if has_test else None,
        )


def _check_shape(dataset: str, split: SplitInfo) -> None:
    if tuple(split.image_shape) != (IMAGE_SIZE, IMAGE_SIZE):
        raise TrainingError(
            f"dataset {dataset!r}, split {split.name}: images are {split.image_shape}, "
            f"the network takes ({IMAGE_SIZE}, {IMAGE_SIZE}): PLACE:stretch instead of PLACE scales them"
        )
    if split.num_classes < 2:
        raise TrainingError(f"dataset {dataset!r}: has one class; at least two are needed")
