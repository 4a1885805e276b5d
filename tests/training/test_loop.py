from collections.abc import Iterable

import numpy as np
import pytest
import torch

from streamer.client import Plan
from streamer.loading import TensorBatch
from streamer.reading.recording import Origin
from training.config import BudgetConfig, OptimConfig, TrainConfig
from training.errors import DivergedError
from training.evaluate import evaluate
from training.loop import Step, fit
from training.model import Network

NUM_SAMPLES = 48
ORIGIN = Origin(plan=Plan(dataset="rows"), num_samples=NUM_SAMPLES, start_position=0)


def batches(size: int = 16) -> list[TensorBatch]:
    """Images that are black but for a bright row at three times their label: easy to tell apart."""
    labels = np.arange(NUM_SAMPLES, dtype=np.int64) % 4
    images = np.zeros((NUM_SAMPLES, 28, 28), np.uint8)
    images[np.arange(NUM_SAMPLES), labels * 3] = 255
    starts = range(0, NUM_SAMPLES, size)
    return [
        TensorBatch(
            images=torch.from_numpy(images[start : start + size]),
            labels=torch.from_numpy(labels[start : start + size]),
            indices=np.arange(start, start + size),
            position=start,
            next_position=start + size,
            end_of_epoch=start + size == NUM_SAMPLES,
            origin=ORIGIN,
        )
        for start in starts
    ]


def config(*, epochs: int, lr: float = 1e-3, precision: str = "float32") -> TrainConfig:
    return TrainConfig.model_validate(
        {
            "optim": OptimConfig(lr=lr),
            "budget": BudgetConfig(seconds=None, max_epochs=epochs),
            "dropout": 0.0,
            "precision": precision,
        }
    )


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_network_learns_what_can_be_told_apart(precision: str) -> None:
    torch.manual_seed(0)
    network = Network(4)
    steps: list[Step] = []
    fit(
        network,
        config(epochs=6, precision=precision),
        lambda _: batches(),
        num_samples=NUM_SAMPLES,
        on_step=steps.append,
    )

    assert evaluate(network, batches(), num_classes=4).accuracy == 1.0
    assert steps[-1].loss < steps[0].loss


def test_each_step_says_where_the_stream_goes_on() -> None:
    steps: list[Step] = []
    last = fit(Network(4), config(epochs=2), lambda _: batches(), num_samples=NUM_SAMPLES, on_step=steps.append)

    assert [(step.epoch, step.position, step.samples) for step in steps] == [
        (0, 16, 16), (0, 32, 32), (0, 48, 48), (1, 16, 64), (1, 32, 80), (1, 48, 96),
    ]  # fmt: skip
    assert last == steps[-1]


def test_every_epoch_is_read_with_its_own_number() -> None:
    asked: list[int] = []

    def batches_of(epoch: int) -> Iterable[TensorBatch]:
        asked.append(epoch)
        return batches(NUM_SAMPLES)

    fit(Network(4), config(epochs=3), batches_of, num_samples=NUM_SAMPLES, on_step=lambda _: None)

    assert asked == [0, 1, 2]


def test_loss_that_is_not_finite_stops_before_the_weights_change() -> None:
    network = Network(4)
    with torch.no_grad():
        network.fc2.bias[0] = float("inf")
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    with pytest.raises(DivergedError, match=r"step 1: the loss is .*lower --lr"):
        fit(network, config(epochs=1), lambda _: batches(), num_samples=NUM_SAMPLES, on_step=lambda _: None)

    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_confusion_counts_true_classes_in_rows() -> None:
    network = Network(4)
    with torch.no_grad():
        network.output.bias.copy_(torch.tensor([0.0, 0.0, 1e3, 0.0]))
    evaluation = evaluate(network, batches(), num_classes=4)

    assert evaluation.confusion.tolist() == [[0, 0, 12, 0]] * 4
    assert evaluation.accuracy == 0.25


def test_evaluating_nothing_is_an_error() -> None:
    with pytest.raises(ValueError, match="holds no sample"):
        evaluate(Network(4), [], num_classes=4)
