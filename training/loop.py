"""
One training run: steps over epochs of batches, under a schedule that fits a time budget.

Axes: N images, C channels, H height, W width, K classes.
"""

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from streamer.loading import TensorBatch
from training.config import TrainConfig
from training.errors import DivergedError
from training.model import Network
from training.optim import learning_rate, make_optimizer

# The first steps allocate memory and choose kernels; their time says nothing about the rest.
_UNREPRESENTATIVE_STEPS = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """Where a run stands after one optimizer step."""

    number: int
    """Steps taken, from 1."""
    epoch: int
    """Epoch of this step, from 0."""
    epochs: int
    """Epochs planned; changes when the rate does."""
    samples: int
    """Samples trained on so far, over all epochs."""
    position: int
    """Position in the epoch's order from which to go on: the streamer's cursor."""
    loss: float
    """Running mean of the training loss."""
    accuracy: float
    """Running mean of the share of training samples classified right, 0..1."""
    samples_per_second: float
    """Rate so far, without the first few steps."""


def device_of_choice() -> torch.device:
    """Return the GPU where torch sees one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def images_of(batch: TensorBatch) -> Tensor:
    """Return the batch's images as float [N, 1, 28, 28] in 0..1, channels last in memory, on its device."""
    image_NCHW = batch.images.unsqueeze(1).float() / 255.0
    return image_NCHW.contiguous(memory_format=torch.channels_last)


def fit(
    network: Network,
    config: TrainConfig,
    batches_of: Callable[[int], Iterable[TensorBatch]],
    *,
    num_samples: int,
    on_step: Callable[[Step], None],
) -> Step:
    """
    Train in place and return the last step.

    Args:
        network: On the device to train on.
        config: The whole run.
        batches_of: Gives the batches of an epoch, each sample once.
        num_samples: Samples in one epoch.
        on_step: Called after each step; keep it short.

    Raises:
        DivergedError: The loss is not finite; the weights are those before that step.
    """
    run = _Run(network, config, num_samples)
    epoch = 0
    while epoch < run.epochs:
        for batch in batches_of(epoch):
            on_step(run.step(epoch, batch))
        epoch += 1
        run.plan(done=epoch)
    return run.last


class _Run:
    """The state of a run between steps."""

    def __init__(self, network: Network, config: TrainConfig, num_samples: int) -> None:
        self.network = network.train().to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stub lacks it
        self.config = config
        self.num_samples = num_samples
        self.epochs = config.budget.max_epochs
        self.optimizer = make_optimizer(network, config.optim)
        self.device = next(network.parameters()).device
        self.started = self.clock_from = time.perf_counter()
        self.samples = self.clocked_samples = self.number = 0
        self.progress = 0.0
        self.loss = self.accuracy = math.nan
        self.last: Step

    def step(self, epoch: int, batch: TensorBatch) -> Step:
        self._schedule()
        here = batch.to(self.device)
        loss, correct = self._backward(images_of(here), here.labels)
        self.optimizer.step()
        self._count(len(batch.labels), loss, correct / len(batch.labels))
        if self.number == 4 * _UNREPRESENTATIVE_STEPS:
            self.plan(done=0)
        self.last = Step(
            number=self.number,
            epoch=epoch,
            epochs=self.epochs,
            samples=self.samples,
            position=batch.next_position,
            loss=self.loss,
            accuracy=self.accuracy,
            samples_per_second=self.rate,
        )
        return self.last

    @property
    def rate(self) -> float:
        """Samples a second, above 0."""
        return max(self.clocked_samples, 1) / max(time.perf_counter() - self.clock_from, 1e-9)

    def plan(self, *, done: int) -> None:
        """Fit the number of epochs to the rate measured so far."""
        self.epochs = self.config.budget.epochs(
            self.num_samples,
            done=done,
            elapsed_seconds=time.perf_counter() - self.started,
            samples_per_second=self.rate,
        )

    def _schedule(self) -> None:
        # A plan that grew must not take the schedule back: the rate then rests where it is.
        self.progress = max(self.progress, self.samples / (self.epochs * self.num_samples))
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.progress, self.config.optim)

    def _backward(self, image_NCHW: Tensor, label_N: Tensor) -> tuple[float, float]:
        half = self.config.precision == "bfloat16"
        with torch.autocast(self.device.type, torch.bfloat16, enabled=half):
            logits_NK = self.network(image_NCHW)
        loss = F.cross_entropy(logits_NK.float(), label_N, label_smoothing=self.config.optim.label_smoothing)
        value = loss.item()
        if not math.isfinite(value):
            raise DivergedError(self.number + 1, value)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        return value, (logits_NK.argmax(dim=1) == label_N).sum().item()

    def _count(self, num_samples: int, loss: float, accuracy: float) -> None:
        self.number += 1
        self.samples += num_samples
        self.clocked_samples += num_samples
        if self.number == _UNREPRESENTATIVE_STEPS:
            self.clock_from, self.clocked_samples = time.perf_counter(), 0
        weight = max(0.02, 1 / self.number)
        self.loss = loss if self.number == 1 else (1 - weight) * self.loss + weight * loss
        self.accuracy = accuracy if self.number == 1 else (1 - weight) * self.accuracy + weight * accuracy
