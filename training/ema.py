"""A moving average of the weights: what a run validates and publishes."""

import copy

import torch
from torch.optim.swa_utils import get_ema_multi_avg_fn

from training.config import EmaConfig
from training.model import Network


class Average:
    """
    The exponential moving average of a network's weights, and of its norms' statistics.

    Young averages forget faster, so that the weights of the first steps do not linger: (1 + step) / (10 + step), as
    TensorFlow's ``ExponentialMovingAverage`` has it.

    Args:
        network: Whose weights are averaged; the average starts as a copy.
        decay: Share kept in one step, 0..1.
        config: How often to update.
    """

    def __init__(self, network: Network, decay: float, config: EmaConfig) -> None:
        self.network = copy.deepcopy(network).eval().requires_grad_(False)
        self._decay = decay
        self._every = config.every
        pairs = zip(self.network.state_dict().values(), network.state_dict().values(), strict=True)
        # What is no floating-point number counts batches, which matters to nobody in evaluation mode.
        self._pairs = [(mean, now) for mean, now in pairs if mean.is_floating_point()]

    def update(self, step: int) -> None:
        """Take the weights after a step in, if it is the turn of that step."""
        if step % self._every:
            return
        decay = min(self._decay, (1 + step) / (10 + step)) ** self._every
        means, now = zip(*self._pairs, strict=True)
        with torch.no_grad():
            get_ema_multi_avg_fn(decay)(means, now, 0)  # type: ignore[no-untyped-call]  # torch leaves it untyped
