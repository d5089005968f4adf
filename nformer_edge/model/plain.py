"""Plain 3x3 convolutions: what an integer kernel does fastest. No gates, no shortcuts, no pooling inside.

Each convolution adds the identity to its kernel, where the shapes allow it (DiracNets: Zagoruyko and Komodakis, 2017).
It trains like a residual network and costs nothing, because both are one kernel before they are applied. One batch norm
follows the sum, as Chu et al. (2022, QARepVGG) ask for INT8. Widths are multiples of 16.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

#: Width and convolutions at each scale; the first stands on a 4 x 4 stem with stride 4, each other halves the sides.
_SCALES = {"plain_s": ((32, 1), (64, 2), (128, 2), (256, 2)), "plain_m": ((32, 1), (64, 2), (128, 5), (256, 3))}


class DiracConv(nn.Conv2d):
    """A 3x3 convolution without bias whose kernel gets the identity added."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__(inputs, outputs, 3, stride, 1, bias=False)
        nn.init.kaiming_normal_(self.weight, mode="fan_out", nonlinearity="relu")
        identity = torch.zeros_like(self.weight)
        if inputs == outputs and stride == 1:
            nn.init.dirac_(identity)
        self.register_buffer("identity", identity, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.weight + self.get_buffer("identity"), None)

    def folded(self) -> nn.Conv2d:
        """The same function as a convolution that every tool knows."""
        conv = nn.Conv2d(self.in_channels, self.out_channels, 3, self.stride[0], 1, bias=False)
        conv.weight = nn.Parameter((self.weight + self.get_buffer("identity")).detach())
        return conv.train(self.training)


class Plain(nn.Module):
    """Images to a feature map, a 32nd of the image's sides.

    Args:
        arch: ``plain_s`` or ``plain_m``.
    """

    def __init__(self, arch: str) -> None:
        super().__init__()
        scales = _SCALES[arch]
        inputs = scales[0][0]
        self.stem = nn.Sequential(nn.Conv2d(3, inputs, 4, 4, bias=False), nn.BatchNorm2d(inputs), nn.ReLU(inplace=True))
        nn.init.kaiming_normal_(self.stem.get_parameter("0.weight"), mode="fan_out", nonlinearity="relu")
        for i, (width, convolutions) in enumerate(scales):
            layers: list[nn.Module] = []
            for j in range(convolutions):
                conv = DiracConv(inputs, width, 2 if i and not j else 1)
                layers += [nn.Sequential(conv, nn.BatchNorm2d(width), nn.ReLU(inplace=True))]
                inputs = width
            self.add_module(f"scale{i + 1}", nn.Sequential(*layers))
        self.channels = inputs

    def forward(
        self,
        images: Tensor,  # [B, 3, H, W]
    ) -> Tensor:  # [B, channels, H / 32, W / 32]
        x: Tensor = self.stem(images)
        for name, scale in self.named_children():
            x = scale(x) if name != "stem" else x
        return x


def fold_identities(module: nn.Module) -> None:
    """Replaces every `DiracConv` in `module` by the plain convolution that it is."""
    for name, child in module.named_children():
        if isinstance(child, DiracConv):
            setattr(module, name, child.folded())
        else:
            fold_identities(child)


plain_s = partial(Plain, "plain_s")
plain_m = partial(Plain, "plain_m")
