"""What a run reads: its splits as the streamer describes them, and their batches."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import torch

from streamer.client import DatasetInfo, Plan, SampleClient, SplitInfo
from streamer.loading import StreamedDataset, TensorBatch
from training.config import DataConfig, TrainConfig
from training.errors import ConfigError, TrainingError
from training.model import IMAGE_SIZE

_EVALUATION_BATCH_SIZE = 500
_CONNECT_SECONDS = 30.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Data:
    """What a run reads."""

    dataset: DatasetInfo
    train: SplitInfo
    validation: SplitInfo | None
    test: SplitInfo

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


class Reading:
    """The training split, pass by pass, and the last batch that a step was taken with."""

    def __init__(self, config: TrainConfig, split: SplitInfo, ledger: Path | None) -> None:
        plan = Plan(
            dataset=config.data.dataset,
            split=split.name,
            seed=config.seed,
            batch_size=config.data.batch_size,
            transform=config.augmentation,
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
        """What the last step was taken with."""
        self._augmentation = config.augmentation

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.dataset.close()

    def epoch(self, epoch: int) -> Iterator[TensorBatch]:
        """
        Yield the batches of an epoch, or what is left of it after ``load_state``.

        Raises:
            ConfigError: The augmentation makes images that the network does not take.
            streamer.errors.StreamerError: The stream broke for good.
        """
        self.dataset.set_epoch(epoch)
        for batch in self.dataset:
            self._check(batch)
            self.last = batch
            yield batch

    def _check(self, batch: TensorBatch) -> None:
        images = batch.images
        if images.dtype != torch.uint8 or images.shape[1:] != (IMAGE_SIZE, IMAGE_SIZE):
            raise ConfigError(
                f"augmentation = {self._augmentation}: makes {str(images.dtype).removeprefix('torch.')} images of "
                f"{tuple(images.shape[1:])}; the network takes uint8 of ({IMAGE_SIZE}, {IMAGE_SIZE}) and scales itself"
            )


async def describe(config: DataConfig) -> Data:
    """
    Ask the streamer for what a run reads.

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

        return Data(
            dataset=datasets[config.dataset],
            train=await described(config.train_split),
            validation=await described(config.validation_split) if config.validation_split else None,
            test=await described(config.test_split),
        )


def _check_shape(dataset: str, split: SplitInfo) -> None:
    if tuple(split.image_shape) != (IMAGE_SIZE, IMAGE_SIZE):
        raise TrainingError(
            f"dataset {dataset!r}, split {split.name}: images are {split.image_shape}, "
            f"the network takes ({IMAGE_SIZE}, {IMAGE_SIZE})"
        )
