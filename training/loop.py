"""
The loop: steps over epochs of batches, under a schedule that fits a budget.

Axes: N images, C channels, H height, W width, K classes.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from streamer.loading import TensorBatch
from training.config import TrainConfig
from training.devices import device_of_choice, is_half
from training.ema import Average
from training.meters import Means, Meters
from training.model import Network
from training.optim import gradient_norm, guarded_step, make_optimizer, set_rate
from training.pace import Pace
from training.ranks import ALONE, Ranks
from training.schedule import learning_rate

__all__ = ["Loop", "Step", "device_of_choice", "fit", "images_of"]


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
    """Running mean of the training loss, when it was read last."""
    accuracy: float
    """Running mean of the share of training samples classified right, 0..1, when it was read last."""
    lr: float
    """Learning rate of this step."""
    samples_per_second: float
    """Rate so far, without the first few steps."""


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
    Train in place, without checkpoints and validation, and return the last step.

    With ``config.ema`` the weights are the averages in the end.

    Args:
        network: On the device to train on.
        config: The whole run.
        batches_of: Gives the batches of an epoch, each sample once.
        num_samples: Samples in one epoch.
        on_step: Called after each step; keep it short.

    Raises:
        DivergedError: The loss is not finite; the weights are those before that step.
    """
    loop = Loop(network, config, num_samples=num_samples)
    while loop.epoch < loop.epochs:
        for step in loop.steps(batches_of(loop.epoch)):
            on_step(step)
        loop.end_epoch()
    network.load_state_dict(loop.result.state_dict())
    return loop.last


class Loop:
    """
    A run in training: what it needs from step to step, and nothing of where its batches come from.

    On a GPU no step waits for the device: loss and failures are added up there and read every ``config.log_steps``.

    Args:
        network: On the device to train on; trained in place.
        config: The whole run.
        num_samples: Samples in one epoch.
        ranks: That take each step together, every one with its share of the batch.
    """

    def __init__(self, network: Network, config: TrainConfig, *, num_samples: int, ranks: Ranks = ALONE) -> None:
        self.network = network.train().to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stub lacks it
        self.device = next(network.parameters()).device
        self.optimizer = make_optimizer(network, config.optim)
        self.average = None if config.ema.decay is None else Average(network, config.ema.decay, config.ema)
        self.meters = Meters(self.device)
        self.pace = Pace(config.budget, num_samples, decide=lambda epochs: ranks.from_first(lambda: epochs))
        self.epoch = 0
        """Epochs finished; the number of the one that is being trained on."""
        self.number = 0
        """Steps taken."""
        self.last: Step
        """The last one of them."""
        # Only now, as an average is of a network with plain norms.
        forward = ranks.spread(network)
        self._forward: Callable[[Tensor], Tensor] = torch.compile(forward) if config.compile else forward
        self._ranks = ranks
        self._config = config
        self._is_half = is_half(config.precision, self.device)
        # A CPU has nothing to wait for.
        self._read_steps = 1 if self.device.type == "cpu" else config.log_steps
        self._means = Means()

    @property
    def epochs(self) -> int:
        """Epochs planned."""
        return self.pace.epochs

    @property
    def result(self) -> Network:
        """What has been learnt so far: the average of the weights where there is one, else the weights."""
        return self.network if self.average is None else self.average.network

    def steps(self, batches: Iterable[TensorBatch]) -> Iterator[Step]:
        """
        Take a step with each batch of the epoch, or of what is left of it.

        Raises:
            DivergedError: A loss, or with clipping a gradient, is not finite; the weights are those before that step.
        """
        self.network.train()
        for batch in batches:
            self.last = self._step(batch)
            yield self.last
        self.read()

    def end_epoch(self) -> None:
        """Count the epoch and plan how many there are to be."""
        self.epoch += 1
        self.pace.plan(done=self.epoch)

    def read(self) -> Means:
        """
        Wait for the device and return running loss and accuracy; what is kept of a run is read before.

        Raises:
            DivergedError: As :meth:`steps`.
        """
        if self.number:
            self._means = self.meters.read()
        return self._means

    def position(self) -> dict[str, Any]:
        """Return what a checkpoint has to know besides tensors: plain values, fit for JSON."""
        return {
            "last": asdict(self.last),
            "epoch": self.epoch,
            "epochs": self.pace.epochs,
            "progress": self.pace.progress,
            "elapsed_seconds": self.pace.elapsed_seconds,
            "means": self.meters.state(),
        }

    def resume(self, position: dict[str, Any]) -> None:
        """Go on from a :meth:`position`; the tensors are the caller's business."""
        self.last = Step(**position["last"])
        self.number, self.epoch = self.last.number, position["epoch"]
        self.meters.load_state(position["means"])
        self.pace.resume(
            samples=self.last.samples, **{name: position[name] for name in ("epochs", "progress", "elapsed_seconds")}
        )

    def _step(self, batch: TensorBatch) -> Step:
        lr = learning_rate(self.pace.begin_step(), self._config.optim.lr, self._config.schedule)
        set_rate(self.optimizer, lr)
        self._learn(self._here(batch))
        self.pace.end_step(_size(batch), epochs_done=self.epoch)
        if self.number % self._read_steps == 0:
            self.read()
        return Step(
            number=self.number,
            epoch=self.epoch,
            epochs=self.pace.epochs,
            samples=self.pace.samples,
            position=batch.next_position,
            loss=self._means.loss,
            accuracy=self._means.accuracy,
            lr=lr,
            samples_per_second=self.pace.rate,
        )

    def _here(self, batch: TensorBatch) -> TensorBatch:
        """Return the batch on the device; a GPU fetches it when it gets there."""
        if self.device.type == "cpu":
            return batch
        return batch.pin_memory().to(self.device, non_blocking=True)

    def _learn(self, batch: TensorBatch) -> None:
        optim = self._config.optim
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self._is_half):
            logits_NK = self._forward(images_of(batch))
        loss = _loss(logits_NK.float(), batch.labels, optim.label_smoothing)
        share = len(batch.labels) / _size(batch)
        self.optimizer.zero_grad(set_to_none=True)
        self._ranks.weigh(loss, share).backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        norm = shrink = None
        if optim.clip_norm is not None:
            norm = gradient_norm(self.network)
            shrink = (norm / optim.clip_norm).clamp(min=1)
        share_right = (logits_NK.argmax(dim=1) == batch.labels).float().mean()
        loss, share_right = self._ranks.mean((loss, share_right), share)
        self.number += 1
        self.meters.add(self.number, loss, share_right, norm)
        guarded_step(self.optimizer, failed=self.meters.failed, shrink=shrink)
        if self.average is not None:
            self.average.update(self.number)


def _size(batch: TensorBatch) -> int:
    """Return the samples of a step, over all ranks."""
    return batch.next_position - batch.position


def _loss(logits_NK: Tensor, labels: Tensor, label_smoothing: float) -> Tensor:
    """Return the mean loss; of no sample it is 0, with gradients of 0."""
    if not len(labels):
        return logits_NK.sum()
    return F.cross_entropy(logits_NK, labels, label_smoothing=label_smoothing)
