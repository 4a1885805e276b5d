"""What a network gets right on samples it was not trained on."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional as F

from streamer.loading import TensorBatch
from training.loop import images_of
from training.model import Network


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """Measures over one split."""

    num_samples: int
    accuracy: float
    """Share classified right, 0..1."""
    loss: float
    """Mean negative log-likelihood in nats."""
    confusion: npt.NDArray[np.int64]
    """[K, K] counts: rows are true classes, columns predicted ones."""


def evaluate(network: Network, batches: Iterable[TensorBatch], *, num_classes: int) -> Evaluation:
    """
    Return the measures of ``network``, in float32 and evaluation mode, over all ``batches``.

    Raises:
        ValueError: There was no sample.
    """
    network.eval()
    device = next(network.parameters()).device
    confusion = np.zeros((num_classes, num_classes), np.int64)
    loss_sum = 0.0
    with torch.inference_mode():
        for batch in batches:
            here = batch.to(device)
            logits_NK = network(images_of(here))
            loss_sum += F.cross_entropy(logits_NK, here.labels, reduction="sum").item()
            np.add.at(confusion, (batch.labels.numpy(), logits_NK.argmax(dim=1).cpu().numpy()), 1)
    num_samples = int(confusion.sum())
    if num_samples == 0:
        raise ValueError("nothing to evaluate: the split holds no sample")
    accuracy = float(np.trace(confusion)) / num_samples
    return Evaluation(num_samples=num_samples, accuracy=accuracy, loss=loss_sum / num_samples, confusion=confusion)
