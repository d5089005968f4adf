"""One optimization step, the same in both stages: Adam for the model, plain descent for the centers."""

from __future__ import annotations

import math
from bisect import bisect_right

import torch
from torch import Tensor, nn

from nformer_edge.core.errors import DataError
from nformer_edge.training.compute import Compute
from nformer_edge.training.config import BackboneConfig, HeadConfig, Schedule
from nformer_edge.training.losses import Criterion

GAMMA = 0.1
COSINE_FLOOR = 0.01


def rate(
    base: float,
    schedule: Schedule,
    progress: float,
    epochs: int,
    warmup: int,
    steps: tuple[int, ...] = (),
    warmup_factor: float = 0.1,
) -> float:
    """The learning rate at `progress` (in epochs, from 0; fractions allowed).

    Linear warm-up from `warmup_factor` of `base` over `warmup` epochs, then either a tenth of it after each epoch of
    `steps`, or half a cosine from the end of the warm-up down to a hundredth.
    """
    if warmup and progress < warmup:
        return base * (warmup_factor + (1 - warmup_factor) * progress / warmup)
    if schedule == "steps":
        return base * GAMMA ** bisect_right(steps, progress)
    share = (progress - warmup) / max(1e-9, epochs - warmup)
    return base * (COSINE_FLOOR + (1 - COSINE_FLOOR) * 0.5 * (1 + math.cos(math.pi * min(1.0, share))))


class Optimizer:
    """Steps a model and its criterion.

    Args:
        model: its parameters with a gradient are trained.
        criterion: its centers are trained with their own rate, all else in it like the model.
        config: of the stage.
        compute: who computes; this process alone if None.
    """

    def __init__(
        self,
        model: nn.Module,
        criterion: Criterion,
        config: BackboneConfig | HeadConfig,
        compute: Compute | None = None,
    ) -> None:
        self.config = config
        self.centers = criterion.center.centers
        trained = [p for p in model.parameters() if p.requires_grad]
        trained += [p for p in criterion.parameters() if p is not self.centers]
        self.adam = torch.optim.Adam(trained, lr=config.lr, weight_decay=config.weight_decay)
        self.lr = config.lr
        self.compute = compute or Compute()
        self.compute.adopt(model, criterion, self.adam)

    def schedule(self, progress: float) -> None:
        """Sets the rate that belongs to `progress` epochs."""
        c = self.config
        self.lr = rate(c.lr, c.schedule, progress, c.epochs, c.warmup, c.steps, c.warmup_factor)
        for group in self.adam.param_groups:
            group["lr"] = self.lr

    def part(self, step: int, total: int) -> tuple[int, int]:
        """Which part of which optimization step batch `step` of an epoch of `total` is: (index, parts)."""
        index = step % self.config.accumulate
        return index, min(self.config.accumulate, total - (step - index))

    def step(self, loss: Tensor, part: tuple[int, int] = (0, 1)) -> float:
        """Backward, and an update after the last part. Returns the loss.

        Raises:
            DataError: if the loss is not finite.
        """
        value = float(loss.detach())
        if not abs(value) < float("inf"):
            raise DataError("training", f"a loss of {value}", "a number", "Lower the learning rate.")
        index, parts = part
        if index == 0:
            self.adam.zero_grad(set_to_none=True)
            self.centers.grad = None
        self.compute.backward(loss if parts == 1 else loss / parts)
        if index == parts - 1:
            self._update()
        return value

    def _update(self) -> None:
        gradient = None if self.centers.grad is None else self.compute.unscaled(self.centers.grad)
        self.compute.step()
        if gradient is not None and self.config.loss.center_weight > 0:
            with torch.no_grad():  # the weight balances the model's gradient, not the centers' own
                self.centers.sub_((self.config.loss.center_lr / self.config.loss.center_weight) * gradient)

    def tensors(self) -> dict[str, Tensor]:
        """Adam's moments and counts, by the place of their parameter."""
        state = self.adam.state
        places = enumerate(p for group in self.adam.param_groups for p in group["params"])
        return {f"{i}.{name}": t for i, p in places if p in state for name, t in state[p].items()}

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Takes back what `tensors` gave, in each parameter's memory layout: other strides could round otherwise."""
        places = [p for group in self.adam.param_groups for p in group["params"]]
        for key, tensor in tensors.items():
            index, _, name = key.partition(".")
            parameter = places[int(index)]
            state = self.adam.state[parameter]
            like = tensor if tensor.dim() == 0 else torch.zeros_like(parameter)
            state[name] = like.clone() if tensor.dim() == 0 else like.copy_(tensor)
