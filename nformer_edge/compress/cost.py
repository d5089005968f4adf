"""What a backbone costs, counted on the model itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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


def cost_of(backbone: Backbone, size: tuple[int, int]) -> Cost:
    """Counted in one pass of an image of `size` (height, width)."""
    import torch  # who reads a result needs none

    count = 0

    def add(layer: Any, inputs: tuple[Any, ...], output: Any) -> None:
        nonlocal count
        count += layer.weight.numel() * (output[0].numel() // output.shape[1])

    layers = [m for m in backbone.modules() if isinstance(m, (torch.nn.Conv2d, torch.nn.Linear))]
    hooks = [layer.register_forward_hook(add) for layer in layers]
    try:
        with torch.inference_mode():
            backbone.eval()(torch.zeros(1, 3, *size, device=next(backbone.parameters()).device))
    finally:
        for hook in hooks:
            hook.remove()
    return Cost(sum(p.numel() for p in backbone.parameters()), count / 1e9)
