"""ResNet trunks under torchvision's parameter names, IBN-a under those of its authors, non-local under FastReID's.

Sources: He et al., CVPR 2016; Luo et al., 2019 (last stride 1); Pan et al., ECCV 2018 (IBN-a); Wang et al., CVPR 2018
(non-local).
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from nformer_edge.core.spec import Stem


class IBN(nn.Module):
    """Instance norm on the first half of the channels, batch norm on the rest."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.IN = nn.InstanceNorm2d(channels // 2, affine=True)
        self.BN = nn.BatchNorm2d(channels - channels // 2)

    def forward(self, x: Tensor) -> Tensor:
        half = self.IN.num_features
        first, rest = x[:, :half], x[:, half:]
        return torch.cat([self.IN(first.contiguous()), self.BN(rest.contiguous())], dim=1)


def _shortcut(inputs: int, outputs: int, stride: int) -> nn.Sequential | None:
    if stride == 1 and inputs == outputs:
        return None
    return nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions: ResNet-18."""

    expansion = 1

    def __init__(self, inputs: int, width: int, stride: int, ibn: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 3, stride, 1, bias=False)
        self.bn1 = IBN(width) if ibn else nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = _shortcut(inputs, width, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return self.relu(y + (x if self.downsample is None else self.downsample(x)))


class Bottleneck(nn.Module):
    """1x1, 3x3 with the stride, 1x1: ResNet-50."""

    expansion = 4

    def __init__(self, inputs: int, width: int, stride: int, ibn: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 1, bias=False)
        self.bn1 = IBN(width) if ibn else nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, 4 * width, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * width)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = _shortcut(inputs, 4 * width, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        return self.relu(y + (x if self.downsample is None else self.downsample(x)))


class NonLocal(nn.Module):
    """Every place gathers from all others: FastReID's block, whose inner width is 1.

    With one channel the affinity of two places is a product of two numbers, so that the sum over places stands alone
    and no matrix of places by places is needed.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.g = nn.Conv2d(channels, 1, 1)
        self.W = nn.Sequential(nn.Conv2d(1, channels, 1), nn.BatchNorm2d(channels))
        nn.init.zeros_(self.W.get_parameter("1.weight"))
        self.theta = nn.Conv2d(channels, 1, 1)
        self.phi = nn.Conv2d(channels, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        gathered = (self.phi(x) * self.g(x)).mean((2, 3), keepdim=True)
        return x + self.W(self.theta(x) * gathered)


_DEPTHS = {"resnet18": (2, 2, 2, 2), "resnet50": (3, 4, 6, 3), "resnet50_ibn_a": (3, 4, 6, 3)}


class ResNet(nn.Module):
    """Images to a feature map, of sides and details as `BackboneSpec` says."""

    def __init__(self, arch: str, stem: Stem = "standard", last_stride: int = 1, non_local: bool = False) -> None:
        super().__init__()
        block = BasicBlock if arch == "resnet18" else Bottleneck
        self.conv1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.Identity() if stem == "no_relu" else nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, ceil_mode=True) if stem == "ceil_pool" else nn.MaxPool2d(3, 2, 1)
        inputs = 64
        for i, (depth, stride) in enumerate(zip(_DEPTHS[arch], (1, 2, 2, last_stride), strict=True)):
            width, with_ibn = 64 << i, arch == "resnet50_ibn_a" and i < 3
            layers = []
            for j in range(depth):
                layers.append(block(inputs, width, stride if j == 0 else 1, with_ibn))
                inputs = width * block.expansion
            self.add_module(f"layer{i + 1}", nn.Sequential(*layers))
        self.channels = inputs
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        self.NL_2 = nn.ModuleList(NonLocal(512) for _ in range(2 * non_local))
        self.NL_3 = nn.ModuleList(NonLocal(1024) for _ in range(3 * non_local))

    def forward(
        self,
        images: Tensor,  # [B, 3, H, W]
    ) -> Tensor:  # [B, channels, H / 16, W / 16], or a 32nd of the sides
        x = self.maxpool(self.relu(self.bn1(self.conv1(images))))
        for i, blocks in enumerate((None, self.NL_2, self.NL_3, None)):
            layers = list(self.get_submodule(f"layer{i + 1}").children())
            after = [None] * (len(layers) - len(blocks or ())) + list(blocks or ())
            for layer, gather in zip(layers, after, strict=True):
                x = layer(x) if gather is None else gather(layer(x))
        return x


resnet18 = partial(ResNet, "resnet18")
resnet50 = partial(ResNet, "resnet50")
resnet50_ibn_a = partial(ResNet, "resnet50_ibn_a")
