"""The optimizer, its steps fit for a device that is not waited for."""

import torch
from torch import Tensor

from training.config import OptimConfig


def make_optimizer(network: torch.nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """Return AdamW or SGD with decay on weights alone: decaying a bias or a norm only biases it."""
    weights = [parameter for parameter in network.parameters() if parameter.ndim > 1]
    biases = [parameter for parameter in network.parameters() if parameter.ndim <= 1]
    groups = [
        {"params": weights, "weight_decay": config.weight_decay},
        {"params": biases, "weight_decay": 0.0},
    ]
    if config.name == "sgd":
        nesterov = config.momentum > 0
        return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, nesterov=nesterov, fused=True)
    return torch.optim.AdamW(groups, lr=config.lr, betas=(config.momentum, 0.999), fused=True)


def set_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Take the next step with this learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def gradient_norm(network: torch.nn.Module) -> Tensor:
    """Return the norm of all gradients together, a scalar on their device."""
    gradients = [parameter.grad for parameter in network.parameters() if parameter.grad is not None]
    return torch.nn.utils.get_total_norm(gradients)


def guarded_step(optimizer: torch.optim.Optimizer, *, failed: Tensor, shrink: Tensor | None) -> None:
    """
    Take a step, unless it has failed; nobody waits for the device to know.

    It takes the two values by which ``torch.amp.GradScaler`` tells fused optimizers the same.

    Args:
        optimizer: A fused one.
        failed: float32 scalar: 1 leaves the weights as they are, 0 does not.
        shrink: float32 scalar that gradients are divided by; None is 1.
    """
    optimizer.found_inf = failed  # type: ignore[attr-defined]  # set by GradScaler, declared nowhere
    optimizer.grad_scale = shrink  # type: ignore[attr-defined]  # set by GradScaler, declared nowhere
    optimizer.step()
