"""2:4 sparsity: of each four weights next to each other two are zero, as NVIDIA's sparse tensor cores want it."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from nformer_edge.compress.distil import Distil
from nformer_edge.compress.step import Work
from nformer_edge.model.backbone import Backbone
from nformer_edge.training.history import Epoch


@dataclass(frozen=True)
class Sparsify:
    """Sets the smaller two of each four weights along the input channels to zero, and trains on with them at zero.

    Layers whose input channels are no multiple of four stay whole: the stem and depthwise convolutions.

    Args:
        distil: the training with the masks; ``epochs = 0`` in its `train` leaves it out.
    """

    distil: Distil = field(default_factory=Distil)

    def run(self, backbone: Backbone, work: Work) -> tuple[Backbone, list[Epoch]]:
        masks = masks_of(backbone)

        @torch.no_grad()
        def apply() -> None:
            for weight, mask in masks:
                weight.mul_(mask)

        apply()
        for _, mask in masks:
            mask.data = mask.to(work.compute.device)
        return self.distil.run(backbone, work, after_step=apply)


def masks_of(backbone: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """Each weight that can be 2:4 sparse, and its mask, 0 and 1."""
    found = []
    for layer in backbone.modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)) and layer.weight.shape[1] % 4 == 0:
            found.append((layer.weight, two_of_four(layer.weight.detach())))
    return found


def two_of_four(weight: Tensor) -> Tensor:  # [O, I, ...] -> the same shape, 0 and 1
    """Which weights stay: in each four along the input channels the two of largest magnitude, the earlier of equals."""
    last = weight.movedim(1, -1)
    fours = last.reshape(-1, 4).abs()
    order = fours.argsort(dim=1, descending=True, stable=True)
    mask = torch.zeros_like(fours).scatter_(1, order[:, :2], 1.0)
    return mask.reshape(last.shape).movedim(-1, 1).contiguous()
