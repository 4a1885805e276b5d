"""
Batch norm over the samples of all ranks, so that a step comes to the same however many share it.

Axes: N images, C channels, H height, W width.
"""

from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed import ProcessGroup


def share_norms(network: nn.Module, group: ProcessGroup) -> None:
    """
    Have a network's norms take the statistics of all ranks' samples; parameters and buffers stay the objects they are.

    Args:
        network: On the device that it is trained on; changed in place.
        group: That norms on a CPU talk in.
    """
    if next(network.parameters()).device.type != "cpu":
        nn.SyncBatchNorm.convert_sync_batchnorm(network)  # type: ignore[no-untyped-call]  # torch leaves it untyped
        return
    for name, module in network.named_children():
        if isinstance(module, nn.BatchNorm2d):
            setattr(network, name, _SharedNorm(module, group))


class _SharedNorm(nn.BatchNorm2d):
    """What ``torch.nn.SyncBatchNorm`` is on GPUs alone."""

    def __init__(self, norm: nn.BatchNorm2d, group: ProcessGroup) -> None:
        super().__init__(norm.num_features, eps=norm.eps, momentum=norm.momentum)
        self.weight, self.bias = norm.weight, norm.bias
        for name, buffer in norm.named_buffers():
            setattr(self, name, buffer)
        self._group = group

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        image_NCHW = input.float()
        count, mean_C, variance_C = _moments(image_NCHW, self._group)
        self._follow(count, mean_C.detach(), variance_C.detach())
        scale_C = self.weight * torch.rsqrt(variance_C + self.eps)
        shift_C = self.bias - mean_C * scale_C
        normed_NCHW = torch.addcmul(_over_images(shift_C), image_NCHW, _over_images(scale_C))
        return normed_NCHW.to(input.dtype)

    def _follow(self, count: float, mean_C: Tensor, variance_C: Tensor) -> None:
        """Move the running statistics, whose variance is that of the population."""
        assert self.momentum is not None
        self.get_buffer("running_mean").lerp_(mean_C, self.momentum)
        self.get_buffer("running_var").lerp_(variance_C * (count / max(count - 1, 1)), self.momentum)
        self.get_buffer("num_batches_tracked").add_(1)


def _moments(image_NCHW: Tensor, group: ProcessGroup) -> tuple[float, Tensor, Tensor]:
    """Return how many values of all ranks each channel has, their mean and variance."""
    axes = (0, 2, 3)
    count = image_NCHW.numel() // image_NCHW.shape[1]
    if count:
        variance_C, mean_C = torch.var_mean(image_NCHW, dim=axes, correction=0)
    else:
        # A rank without a sample has nothing to say, but has to say so, forward and backward.
        variance_C = mean_C = image_NCHW.sum(dim=axes)
    # Doubles, as the difference of two of them is what counts in the end.
    mean_C, variance_C = mean_C.double(), variance_C.double()
    own = torch.cat((mean_C * count, (variance_C + mean_C.square()) * count, mean_C.new_tensor([count])))
    sums: Tensor = _Sum.apply(own, group)  # type: ignore[no-untyped-call]  # torch leaves it untyped
    total = sums[-1].detach()
    mean_C, square_C = (sums[:-1] / total).chunk(2)
    return total.item(), mean_C.float(), (square_C - mean_C.square()).clamp(min=0).float()


class _Sum(torch.autograd.Function):
    """The sum over all ranks, whose gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        total = own.clone()
        distributed.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        total = gradients[0].clone()
        distributed.all_reduce(total, group=ctx.group)
        return total, None


def _over_images(values_C: Tensor) -> Tensor:
    return values_C.reshape(1, -1, 1, 1)
