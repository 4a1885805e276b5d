"""What a step tells, added up on the device it runs on, so that no step waits for being looked at."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from training.errors import DivergedError


@dataclass(frozen=True, slots=True)
class Means:
    """What the meters show at one moment."""

    loss: float = math.nan
    """Running mean of the training loss."""
    accuracy: float = math.nan
    """Running mean of the share of training samples classified right, 0..1."""


class Meters:
    """
    Running means of loss and accuracy, and the first step that failed.

    A failed step, and each one after it, is told to the optimizer by :attr:`failed`, on the device; the host learns of
    it at the next :meth:`read`, with the weights still those from before.

    Args:
        device: Where the training runs.
    """

    def __init__(self, device: torch.device) -> None:
        self._means = torch.zeros(2, device=device)
        # Step, loss and norm of gradients of the first failure; step 0 for none.
        self._failure = torch.zeros(3, device=device, dtype=torch.float64)
        self.failed = torch.zeros((), device=device)
        """float32 scalar: 1 once a step has failed, 0 before."""

    def add(self, step: int, loss: Tensor, share_right: Tensor, norm: Tensor | None) -> None:
        """
        Take a step in, before the optimizer does.

        Args:
            step: Its number, from 1.
            loss: Scalar.
            share_right: Scalar, 0..1.
            norm: Of all gradients, scalar; None where nobody needs it.
        """
        loss = loss.detach()
        norm = torch.zeros_like(loss) if norm is None else norm
        bad = ~(torch.isfinite(loss) & torch.isfinite(norm))
        here = torch.stack((torch.full_like(loss, step), loss, norm)).double()
        self._failure = torch.where(bad & (self.failed == 0), here, self._failure)
        self.failed = torch.maximum(self.failed, bad.float())
        self._means.lerp_(torch.stack((loss, share_right)), max(0.02, 1 / step))

    def read(self) -> Means:
        """
        Wait for the device and return what it has added up.

        Raises:
            DivergedError: A step since the last reading failed; the weights are those before it.
        """
        loss, accuracy, step, failed_loss, norm = torch.cat((self._means.double(), self._failure)).tolist()
        if step:
            raise DivergedError(int(step), failed_loss, norm=norm)
        return Means(loss, accuracy)

    def state(self) -> list[float]:
        """Return the means, for a checkpoint."""
        means: list[float] = self._means.tolist()
        return means

    def load_state(self, state: list[Any]) -> None:
        """Go on from the means of a checkpoint."""
        self._means.copy_(torch.tensor(state))
