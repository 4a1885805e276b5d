from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
import torch

from streamer.client import Plan
from streamer.loading import TensorBatch
from streamer.reading.recording import Origin
from training.config import TrainConfig
from training.errors import DivergedError
from training.evaluation.evaluate import evaluate
from training.loop import Loop, Step, fit
from training.model import Network
from training.overrides import overridden

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


def config(*, epochs: int, **values: Any) -> TrainConfig:
    """Return a run without dropout; ``values`` by path, with ``__`` for the dot."""
    fixed = {"optim.lr": 1e-3, "budget.seconds": None, "budget.max_epochs": epochs, "model.dropout": 0.0}
    given = {path.replace("__", "."): value for path, value in values.items()}
    return overridden(TrainConfig(precision="float32"), fixed | given)


@pytest.mark.parametrize(
    "values",
    [
        pytest.param({}, id="adamw"),
        pytest.param({"precision": "bfloat16"}, id="bfloat16"),
        pytest.param(
            {"optim__name": "sgd", "optim__lr": 0.03, "optim__clip_norm": 1.0, "ema__decay": 0.5, "ema__every": 1},
            id="sgd, average, batch norm",
        ),
    ],
)
def test_network_learns_what_can_be_told_apart(values: dict[str, Any]) -> None:
    torch.manual_seed(0)
    has_norms = "ema__decay" in values
    network = Network(4, batch_norm=has_norms)
    steps: list[Step] = []
    fit(
        network,
        # A norm's statistics are those of the last 20 steps or so.
        config(epochs=12 if has_norms else 6, **values),
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


def test_gradient_that_is_not_finite_stops_before_the_weights_change() -> None:
    network = Network(4)
    network.output.weight.register_hook(lambda gradient: gradient * float("nan"))  # type: ignore[no-untyped-call]  # torch leaves it untyped
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    with pytest.raises(DivergedError, match="step 1: the norm of the gradients is nan"):
        fit(
            network,
            config(epochs=1, optim__clip_norm=1.0),
            lambda _: batches(),
            num_samples=NUM_SAMPLES,
            on_step=lambda _: None,
        )

    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_failure_is_told_late_with_the_step_and_the_weights_before_it(name: str) -> None:
    """As on a GPU, which is asked every few steps."""
    network = Network(4)
    loop = Loop(network, config(epochs=1, optim__name=name, log_steps=1000), num_samples=NUM_SAMPLES)
    loop._read_steps = 1000
    steps = loop.steps([*batches(), *batches()])
    next(steps)
    next(steps)
    bias = network.fc1.bias.detach()
    bias += float("inf")
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    with pytest.raises(DivergedError, match="step 3: the loss is nan"):
        list(steps)

    assert loop.number == 6
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, before[name]), name


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_clipped_gradients_have_the_norm_allowed(name: str) -> None:
    network = Network(4)
    list(Loop(network, config(epochs=1, optim__name=name, optim__clip_norm=0.01), num_samples=48).steps(batches()[:1]))
    squares = [parameter.grad.square().sum() for parameter in network.parameters() if parameter.grad is not None]

    assert torch.stack(squares).sum().sqrt().item() == pytest.approx(0.01, rel=1e-3)


def test_average_lags_behind_the_weights() -> None:
    torch.manual_seed(0)
    network = Network(4)
    first = network.output.weight.detach().clone()
    loop = Loop(network, config(epochs=1, ema__decay=0.999, ema__every=1), num_samples=NUM_SAMPLES)
    list(loop.steps(batches()[:1]))
    now, mean = network.output.weight, loop.result.output.weight

    # 2/11 stays of the first weights after one step, as (1 + 1) / (10 + 1) is less than the decay.
    torch.testing.assert_close(mean, first * 2 / 11 + now.detach() * 9 / 11)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_step_does_not_wait_for_the_gpu() -> None:
    network = Network(4).cuda()
    loop = Loop(network, config(epochs=1, ema__decay=0.9, optim__clip_norm=1.0), num_samples=NUM_SAMPLES)
    list(loop.steps(batches()))  # allocates and chooses kernels
    steps = loop.steps(batches())
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            next(steps)
    finally:
        torch.cuda.set_sync_debug_mode("default")


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
