"""Optimizer and schedule; the schedule is a plain function of progress."""

import math

import torch

from training.config import OptimConfig


def make_optimizer(network: torch.nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """Return AdamW with decay on weights alone: decaying a bias only biases it."""
    weights = [parameter for parameter in network.parameters() if parameter.ndim > 1]
    biases = [parameter for parameter in network.parameters() if parameter.ndim <= 1]
    groups = [
        {"params": weights, "weight_decay": config.weight_decay},
        {"params": biases, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.lr, fused=True)


def learning_rate(progress: float, config: OptimConfig) -> float:
    """
    Return the learning rate at a point of the run: cosine up to the peak, cosine down to nothing.

    Source: Smith & Topin 2018 (arXiv 1708.07120), start at 1/25 and end at 1/10,000 of the peak.

    Args:
        progress: 0 at the first step, 1 at the end; values outside are clamped.
        config: Peak rate and length of the warm-up.
    """
    progress = min(max(progress, 0.0), 1.0)
    if progress < config.warmup:
        return _cosine(config.lr / 25, config.lr, progress / config.warmup)
    return _cosine(config.lr, config.lr / 10_000, (progress - config.warmup) / (1 - config.warmup))


def _cosine(start: float, end: float, share: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * share)) / 2
