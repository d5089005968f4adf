"""Batch norm over the whole batch when every rank holds only a share of it."""

from __future__ import annotations

import copy
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)


def share_batch_norm(model: M, device: torch.device) -> M:
    """A copy of `model` whose batch norms take their statistics over all ranks, under the same parameter names.

    On a GPU that is `torch.nn.SyncBatchNorm`, which knows no CPU; there `SharedBatchNorm` does the same.
    """
    model = copy.deepcopy(model)
    if device.type != "cpu":
        return nn.SyncBatchNorm.convert_sync_batchnorm(model)  # type: ignore[no-untyped-call,no-any-return]
    for name, module in list(model.named_modules()):
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            parent = model.get_submodule(name.rpartition(".")[0])
            setattr(parent, name.rpartition(".")[2], SharedBatchNorm(module))
    return model


class SharedBatchNorm(nn.Module):
    """`BatchNorm1d` or `BatchNorm2d` over the images of all ranks, which hold equally many; on any device.

    Args:
        source: gives its parameters and statistics, which are shared with it.
    """

    def __init__(self, source: nn.BatchNorm1d | nn.BatchNorm2d) -> None:
        super().__init__()
        self.eps, self.momentum = source.eps, source.momentum
        self.weight, self.bias = source.weight, source.bias
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            self.register_buffer(name, getattr(source, name))
        self.train(source.training)

    def forward(
        self,
        x: Tensor,  # [B, C] or [B, C, H, W]
    ) -> Tensor:  # as x
        if not self.training:
            known = self.get_buffer("running_mean"), self.get_buffer("running_var")
            return nn.functional.batch_norm(x, *known, self.weight, self.bias, False, 0.0, self.eps)
        axes = [0, *range(2, x.dim())]
        wide = [1, -1, *[1] * (x.dim() - 2)]
        count = x.numel() // x.shape[1] * torch.distributed.get_world_size()
        mean: Tensor = _Sum.apply(x.sum(axes)) / count  # type: ignore[no-untyped-call]
        centered = x - mean.view(wide)
        variance: Tensor = _Sum.apply(centered.square().sum(axes)) / count  # type: ignore[no-untyped-call]
        self._note(mean.detach(), variance.detach() * (count / (count - 1)))
        scale = self.weight * (variance + self.eps).rsqrt()
        return centered * scale.view(wide) + self.bias.view(wide)

    def _note(self, mean: Tensor, variance: Tensor) -> None:
        self.get_buffer("num_batches_tracked").add_(1)
        assert self.momentum is not None
        for name, value in (("running_mean", mean), ("running_var", variance)):
            self.get_buffer(name).lerp_(value, self.momentum)


class _Sum(torch.autograd.Function):
    """The sum over ranks. What every rank's loss asks of it flows back to every rank."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = x.clone()
        torch.distributed.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        gradient = gradients[0].clone()
        torch.distributed.all_reduce(gradient)
        return gradient
