"""Batch norm whose statistics are those of all ranks' clips together, in networks of ours and of others."""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from timm.layers import BatchNormAct2d  # type: ignore[reportPrivateImportUsage]
from torch import Tensor, nn


class SharedBatchNorm2d(nn.BatchNorm2d):
    """Batch norm over the clips of all ranks together, on any device and backend.

    torch's SyncBatchNorm needs CUDA. Here each rank gives its count, mean and variance, and all combine them (Chan
    1979), so that a run's losses do not depend on the number of workers.
    """

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        """Normalises (batch, channel, row, column)."""
        if not (self.training and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
            return super().forward(input)
        mean, variance, count = _pooled_moments(input)
        with torch.no_grad():
            assert self.num_batches_tracked is not None
            self.num_batches_tracked.add_(1)
            self.running_mean.lerp_(mean.detach(), self.momentum)  # type: ignore[union-attr]
            self.running_var.lerp_(variance.detach() * count / (count - 1), self.momentum)  # type: ignore[union-attr]
        scale = self.weight * torch.rsqrt(variance + self.eps)
        shift = self.bias - mean * scale
        return input * scale[:, None, None].to(input.dtype) + shift[:, None, None].to(input.dtype)


def share_batch_norms(module: nn.Module) -> nn.Module:
    """Puts shared batch norms in the place of a network's own, which are torch's, or timm's with an activation."""
    for name, child in module.named_children():
        module.add_module(name, share_batch_norms(child))
    if not isinstance(module, nn.BatchNorm2d):
        return module
    shared = SharedBatchNorm2d(module.num_features, module.eps, module.momentum)
    shared.load_state_dict({name: value for name, value in module.state_dict().items() if name in shared.state_dict()})
    shared.train(module.training)
    with_act = isinstance(module, BatchNormAct2d)
    return nn.Sequential(shared, module.drop, module.act) if with_act else shared  # type: ignore[reportArgumentType]


def _pooled_moments(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gives mean (channel,), variance (channel,) and count () over the ranks; gradients reach every rank."""
    local_variance, local_mean = torch.var_mean(x.float(), dim=(0, 2, 3), correction=0)
    count = torch.full((1,), x.numel() / x.shape[1], device=x.device)
    mine = torch.cat((local_mean, local_variance, count))
    rows = F.pad(mine[None], (0, 0, dist.get_rank(), dist.get_world_size() - dist.get_rank() - 1))
    means, variances, counts = _SumOverRanks.apply(rows).split((x.shape[1], x.shape[1], 1), dim=1)  # (rank, channel)
    share = counts / counts.sum()
    mean = (share * means).sum(0)
    variance = (share * (variances + (means - mean).square())).sum(0)
    return mean, variance, counts.sum()


class _SumOverRanks(torch.autograd.Function):
    """Adds a tensor over the ranks; each rank's gradient is the sum of all, since its part entered every sum."""

    @staticmethod
    def forward(ctx: Any, part: Tensor) -> Tensor:  # noqa: ARG004
        total = part.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:  # noqa: ARG004
        total = gradients[0].clone()
        dist.all_reduce(total)
        return total
