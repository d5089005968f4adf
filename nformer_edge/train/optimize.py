"""One optimisation step, the same in both stages: Adam for the model, plain descent for the centers."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from nformer_edge.core.errors import DataError
from nformer_edge.train.config import BackboneConfig, HeadConfig
from nformer_edge.train.losses import Criterion
from nformer_edge.train.schedule import rate


class Optimizer:
    """Steps a model and its criterion.

    Args:
        model: its parameters with a gradient are trained.
        criterion: its classifier is trained like the model, its centers with their own rate.
        config: of the stage.
    """

    def __init__(self, model: nn.Module, criterion: Criterion, config: BackboneConfig | HeadConfig) -> None:
        self.config = config
        trained: Iterable[nn.Parameter] = [p for p in model.parameters() if p.requires_grad]
        trained = [*trained, *criterion.classifier.parameters()]
        self.adam = torch.optim.Adam(trained, lr=config.lr, weight_decay=config.weight_decay)
        self.centers = criterion.center.centers
        self.lr = config.lr

    def schedule(self, progress: float) -> None:
        """Sets the rate that belongs to `progress` epochs."""
        c = self.config
        self.lr = rate(c.lr, c.schedule, progress, c.epochs, c.warmup, c.steps)
        for group in self.adam.param_groups:
            group["lr"] = self.lr

    def step(self, loss: Tensor) -> float:
        """Backward and update. Returns the loss.

        Raises:
            DataError: if the loss is not finite.
        """
        value = float(loss.detach())
        if not abs(value) < float("inf"):
            raise DataError("training", got=f"a loss of {value}", expected="a number", mend="Lower the learning rate.")
        self.adam.zero_grad(set_to_none=True)
        self.centers.grad = None
        loss.backward()  # type: ignore[no-untyped-call]
        self.adam.step()
        if self.centers.grad is not None and self.config.loss.center_weight > 0:
            with torch.no_grad():  # the weight balances the model's gradient, not the centers' own
                self.centers -= (self.config.loss.center_lr / self.config.loss.center_weight) * self.centers.grad
        return value
