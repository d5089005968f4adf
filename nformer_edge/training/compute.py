"""Where a training step is computed: one process in float32, or whatever `torchrun` and the precision ask for.

The loss is always that of the whole batch. With several ranks each one runs the model on its share of the batch,
`gather` brings the features of all shares together, and every rank computes the same loss on them: hard examples are
looked for in the whole batch, and R ranks do what one rank does with the same batch.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from nformer_edge.core.errors import BackendError, UsageError
from nformer_edge.core.values import JSON, Table, to_table
from nformer_edge.ops.operators import FastestOperators, using
from nformer_edge.training.config import Precision

M = TypeVar("M", bound=nn.Module)
T = TypeVar("T")


class Compute:
    """One process in float32, with nothing between the model and torch."""

    rank, world = 0, 1
    dtype = torch.float32

    def __init__(self, device: str = "cpu") -> None:
        self.device = torch.device(device)

    @property
    def leads(self) -> bool:
        """Whether this process writes files and speaks."""
        return self.rank == 0

    def adopt(self, model: M, criterion: nn.Module, adam: torch.optim.Optimizer) -> M:
        """Takes over the forward passes, gradients and steps of `model`, which is already on the device."""
        self.model, self.adam = model, adam
        return model

    def forward(self, function: Callable[[Any], T], sync: bool = True) -> T:
        """``function(model)`` under the precision; `sync` says whether its gradients are averaged over ranks."""
        return function(self.model)

    def backward(self, loss: Tensor) -> None:
        loss.backward()  # type: ignore[no-untyped-call]

    def step(self) -> None:
        self.adam.step()

    def unscaled(self, gradient: Tensor) -> Tensor | None:
        """A gradient that Adam does not step, without the loss's scale; None where it overflowed."""
        return gradient

    def gather(self, share: Tensor) -> Tensor:  # [B / R, ...] -> [B, ...]
        """The shares of all ranks in the order of the ranks. The gradient flows back into this rank's share alone."""
        return share

    def agree(self, value: float) -> float:
        """The leading rank's value, on every rank."""
        return value

    def wait(self) -> None:
        """Until every rank has come here."""

    def share_of(self, count: int, what: str) -> int:
        """How many of `count` fall to each rank.

        Raises:
            UsageError: if they cannot be shared out evenly.
        """
        if count % self.world:
            raise UsageError(what, f"{count} for {self.world} ranks", f"a multiple of {self.world}", "Change either.")
        return count // self.world

    def state(self) -> Table:
        """What of the step itself must be kept to go on: the loss scaler, as JSON."""
        return {}

    def load_state(self, state: Mapping[str, JSON]) -> None:
        """Takes back what `state` gave."""


class FabricCompute(Compute):
    """Several ranks or another precision, through Lightning Fabric: process groups, DDP, autocast, loss scaling.

    Args:
        device: ``cpu`` or ``cuda``; the rank chooses its own GPU.
        precision: `Precision`; ``fp64`` is for checking that ranks agree.

    Raises:
        BackendError: if lightning-fabric is missing.
        UsageError: for fp16 on a CPU.
    """

    def __init__(self, device: str, precision: Precision) -> None:
        try:
            import lightning_fabric
        except ImportError as e:
            hint = "Run pip install 'nformer-edge[scale]'."
            raise BackendError("several ranks or low precision", "no lightning-fabric", "lightning-fabric", hint) from e
        kind = torch.device(device).type
        if precision == "fp16" and kind == "cpu":
            raise UsageError("precision", "fp16 on cpu", "a GPU", "Use bf16 on a CPU.")
        self.world = int(os.environ.get("WORLD_SIZE", 1))
        local = int(os.environ.get("LOCAL_WORLD_SIZE", self.world))
        mode = {"bf16": "bf16-mixed", "fp16": "16-mixed"}.get(precision, "32-true")
        index = torch.device(device).index
        devices: Any = local if self.world > 1 or kind == "cpu" or index is None else [index]
        self.fabric: Any = lightning_fabric.Fabric(
            accelerator=kind,
            devices=devices,
            num_nodes=self.world // local,
            precision=mode,
            strategy="ddp" if self.world > 1 else "auto",
        )
        self.fabric.launch()
        super().__init__(str(self.fabric.device))
        self.rank = self.fabric.global_rank
        self.dtype = torch.float64 if precision == "fp64" else torch.float32
        self.low = precision in ("bf16", "fp16")

    def adopt(self, model: M, criterion: nn.Module, adam: torch.optim.Optimizer) -> M:
        self.wrapped = self.fabric.setup_module(_Whole(model), move_to_device=False)
        self.stepped = self.fabric.setup_optimizers(adam)
        self.scaler = getattr(self.fabric.strategy.precision, "scaler", None)
        return super().adopt(model, criterion, adam)

    def forward(self, function: Callable[[Any], T], sync: bool = True) -> T:
        out: list[T] = []
        delayed = self.fabric.no_backward_sync(self.wrapped, enabled=not sync and self.world > 1)
        with delayed, using(_Float32Operators(self.device.type)) if self.low else nullcontext():
            self.wrapped(lambda model: out.append(function(model)))
        return out[0]

    def backward(self, loss: Tensor) -> None:
        self.fabric.backward(loss, model=self.wrapped)

    def step(self) -> None:
        self.stepped.step()

    def unscaled(self, gradient: Tensor) -> Tensor | None:
        if self.scaler is None:
            return gradient
        gradient = gradient / self.scaler.get_scale()
        return gradient if bool(gradient.isfinite().all()) else None

    def gather(self, share: Tensor) -> Tensor:
        return share if self.world == 1 else _Gather.apply(share, self.rank, self.world)  # type: ignore[no-untyped-call]

    def agree(self, value: float) -> float:
        return float(self.fabric.broadcast(value)) if self.world > 1 else value

    def wait(self) -> None:
        self.fabric.barrier()

    def state(self) -> Table:
        return to_table(self.scaler.state_dict()) if self.scaler is not None else {}

    def load_state(self, state: Mapping[str, JSON]) -> None:
        if self.scaler is not None and state:
            self.scaler.load_state_dict(state)


def open_compute(device: str = "cpu", precision: Precision = "fp32") -> Compute:
    """What this process shall compute with: several ranks if `torchrun` started it."""
    if precision == "fp32" and int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return Compute(device)
    return FabricCompute(device, precision)


class _Whole(nn.Module):
    """A model whose forward runs any function of it, so that Fabric sees no tensor that it would round on its way."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, function: Callable[[nn.Module], None]) -> None:
        function(self.model)


class _Gather(torch.autograd.Function):
    """All ranks' shares. Every rank computes the same loss, so each already has its gradient: nothing is sent back.

    It is multiplied by the number of ranks, because DDP averages over them what has to be summed.
    """

    @staticmethod
    def forward(ctx: Any, share: Tensor, rank: int, world: int) -> Tensor:
        ctx.rank, ctx.world, ctx.rows = rank, world, len(share)
        shares = [torch.empty_like(share) for _ in range(world)]
        torch.distributed.all_gather(shares, share.contiguous())
        return torch.cat(shares)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        start = ctx.rank * ctx.rows
        return gradients[0][start : start + ctx.rows] * ctx.world, None, None


class _Float32Operators(FastestOperators):
    """The head's operators under autocast: neighbors are chosen and weighed in float32, never in half precision."""

    def __init__(self, device: str) -> None:
        self.device = device

    def row_top_k(self, a: Tensor, b: Tensor, k: int) -> Tensor:
        with torch.autocast(self.device, enabled=False):
            return super().row_top_k(a.float(), b.float(), k)

    def reciprocal_neighbor_attention(
        self,
        a: Tensor,
        b: Tensor,
        v: Tensor,
        neighbors: Tensor,
        scale: float | None = None,
        t: Tensor | None = None,
        cameras: Tensor | None = None,
        camera_factor: float = 1.0,
    ) -> Tensor:
        a, b, v, t = a.float(), b.float(), v.float(), None if t is None else t.float()
        with torch.autocast(self.device, enabled=False):
            return super().reciprocal_neighbor_attention(a, b, v, neighbors, scale, t, cameras, camera_factor)


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
        self.get_buffer("num_batches_tracked").add_(1)
        assert self.momentum is not None
        self.get_buffer("running_mean").lerp_(mean.detach(), self.momentum)
        self.get_buffer("running_var").lerp_(variance.detach() * (count / (count - 1)), self.momentum)
        scale = self.weight * (variance + self.eps).rsqrt()
        return centered * scale.view(wide) + self.bias.view(wide)


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
