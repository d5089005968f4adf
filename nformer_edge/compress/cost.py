"""What a backbone costs, counted on the model itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from nformer_edge.model.backbone import Backbone


@dataclass(frozen=True)
class Cost:
    """Of one image through a backbone.

    Args:
        parameters: learned numbers.
        gmacs: multiplications with addition of convolutions and linear layers, in 10^9.
    """

    parameters: int
    gmacs: float


@torch.inference_mode()
def cost_of(backbone: Backbone, size: tuple[int, int]) -> Cost:
    """Counted in one pass of an image of `size` (height, width)."""
    count = 0

    def add(layer: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        nonlocal count
        weight = layer.get_parameter("weight")
        places = output[0].numel() // output.shape[1]
        count += weight.numel() * places

    layers = [m for m in backbone.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    hooks = [layer.register_forward_hook(add) for layer in layers]
    try:
        backbone.eval()(torch.zeros(1, 3, *size))
    finally:
        for hook in hooks:
            hook.remove()
    return Cost(sum(p.numel() for p in backbone.parameters()), count / 1e9)
