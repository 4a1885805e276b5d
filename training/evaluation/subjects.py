"""
What can be evaluated: a network as it was trained, or the TorchScript that is served.

Axes: N images, H height, W width, C channels, D embedding, K classes.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from training.model import Network
from training.release.export import load_served


@dataclass(frozen=True, slots=True, eq=False)
class Answer:
    """What came of a batch, on the CPU."""

    logits_NK: npt.NDArray[np.float32]
    """Their softmax are the probabilities."""
    embedding_ND: npt.NDArray[np.float32]
    """Of unit length."""


class Subject(Protocol):
    """Answers images; in evaluation mode, without gradients."""

    @property
    def gives_logits(self) -> bool:
        """Whether logits are the network's own; else they are log probabilities, which lost each image's scale."""

    def answer(self, image_NHW: Tensor) -> Answer:
        """Answer images, uint8 [N, 28, 28], ink bright on dark, on any device."""


class NetworkSubject:
    """
    A network, in float32, on the device it is on.

    Args:
        network: Put into evaluation mode.
    """

    gives_logits = True

    def __init__(self, network: Network) -> None:
        self._network = network.eval()
        self._device = next(network.parameters()).device

    def answer(self, image_NHW: Tensor) -> Answer:
        """Answer images; see :class:`Subject`."""
        with torch.inference_mode():
            scaled_NCHW = image_NHW.to(self._device).unsqueeze(1).float() / 255.0
            features_ND = self._network.features(scaled_NCHW.contiguous(memory_format=torch.channels_last))
            logits_NK = self._network.output(features_ND)
            return Answer(logits_NK.float().cpu().numpy(), F.normalize(features_ND.float(), dim=1).cpu().numpy())


class ServedSubject:
    """
    A ``model.pt`` as Triton runs it: pixels in, probabilities and embeddings out.

    Args:
        path: TorchScript with the inputs and outputs of :class:`training.model.ServedNetwork`.
        device: Where to run it.

    Raises:
        ExportError: It is no TorchScript.
    """

    gives_logits = False

    def __init__(self, path: Path, device: torch.device) -> None:
        self._device = device
        self._served = load_served(path, device)

    def answer(self, image_NHW: Tensor) -> Answer:
        """Answer images; see :class:`Subject`."""
        with torch.inference_mode():
            probability_NK, embedding_ND = self._served(image_NHW.to(self._device).unsqueeze(1))
        # The least normal number stands for zero, whose logarithm is not finite.
        floor = torch.finfo(torch.float32).tiny
        return Answer(probability_NK.float().clamp(min=floor).log().cpu().numpy(), embedding_ND.float().cpu().numpy())
