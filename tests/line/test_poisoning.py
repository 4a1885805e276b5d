"""A model that learnt from wrong labels does not take the place of one that learnt from right ones."""

import asyncio
from pathlib import Path

import numpy as np
import pytest
import torch

from streamer.client import DatasetInfo, Plan, SplitInfo
from streamer.loading import TensorBatch
from streamer.reading.recording import Origin
from streamer.sources import datasets, memory
from streamer.sources.split import MemoryDataset, MemorySplit
from training.config import TrainConfig
from training.errors import PromotionError
from training.evaluation.assessment import assess
from training.evaluation.subjects import NetworkSubject
from training.loop import fit
from training.model import Network, fold
from training.overrides import overridden
from training.reading import Data
from training.release import candidate
from training.release.publish import Draft, publish_draft

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

EPOCHS = 3
NAMES = [str(digit) for digit in range(10)]
FLIPPED = 0.2


def batches(split: MemorySplit, labels: np.ndarray[tuple[int], np.dtype[np.int64]], size: int) -> list[TensorBatch]:
    order = np.random.default_rng(0).permutation(len(labels))
    origin = Origin(plan=Plan(dataset="mnist"), num_samples=len(labels), start_position=0)
    return [
        TensorBatch(
            images=torch.from_numpy(split.images[indices]),
            labels=torch.from_numpy(labels[indices]),
            indices=indices,
            position=start,
            next_position=start + len(indices),
            end_of_epoch=start + size >= len(labels),
            origin=origin,
        )
        for start in range(0, len(labels), size)
        for indices in (order[start : start + size],)
    ]


def info(split: MemorySplit) -> SplitInfo:
    return SplitInfo(
        name=split.name,
        num_samples=split.num_samples,
        image_shape=split.image_shape,
        num_classes=split.num_classes,
        fingerprint=split.fingerprint,
        label_bytes=split.label_bytes,
    )


def trained(data: MemoryDataset, *, flipped: float) -> tuple[Network, Draft]:
    """Train on labels of which a share is wrong, and measure on right ones."""
    train, test = data.splits["train"], data.splits["test"]
    random = np.random.default_rng(1)
    labels = train.labels.astype(np.int64)
    wrong = random.random(len(labels)) < flipped
    labels[wrong] = (labels[wrong] + random.integers(1, 10, wrong.sum())) % 10
    torch.manual_seed(0)
    config = overridden(TrainConfig(), {"budget.seconds": None, "budget.max_epochs": EPOCHS})
    network = Network(dropout=0.3)
    steps = batches(train, labels, 128)
    fit(network, config, lambda epoch: steps, num_samples=len(labels), on_step=lambda step: None)
    folded = fold(network)
    assessment = assess(
        NetworkSubject(folded),
        batches(test, test.labels.astype(np.int64), 500),
        source=Path("run"),
        kind="checkpoint",
        dataset="mnist",
        split=info(test),
        class_names=NAMES,
    )
    known = Data(
        dataset=DatasetInfo(name="mnist", splits={}, class_names=()),
        train=info(train),
        validation=None,
        test=info(test),
    )
    return folded, candidate.drafted(assessment, known, name="mnist")


def test_model_trained_on_flipped_labels_is_refused(small_mnist: Path, tmp_path: Path) -> None:
    files = asyncio.run(datasets.find("mnist", data=small_mnist, cache=tmp_path, report=print))
    data = asyncio.run(memory.load(files))
    network, draft = trained(data, flipped=0)
    publish_draft(network, tmp_path / "models", draft)
    network, draft = trained(data, flipped=FLIPPED)

    with pytest.raises(PromotionError, match="not published: worse than mnist version 1"):
        publish_draft(network, tmp_path / "models", draft)
