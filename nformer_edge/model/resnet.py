"""ResNet trunks with last stride 1, under torchvision's parameter names, and IBN-a under those of its authors.

Sources: He et al., CVPR 2016; Luo et al., 2019 (last stride 1); Pan et al., ECCV 2018 (IBN-a).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nformer_edge.core.spec import Stem


class IBN(nn.Module):
    """Instance norm on the first half of the channels, batch norm on the rest."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.normed = channels // 2
        self.IN = nn.InstanceNorm2d(self.normed, affine=True)
        self.BN = nn.BatchNorm2d(channels - self.normed)

    def forward(self, x: Tensor) -> Tensor:
        first, rest = x[:, : self.normed], x[:, self.normed :]
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


class ResNet(nn.Module):
    """Images to a feature map, a sixteenth of the image's sides."""

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        depths: tuple[int, ...],
        ibn: bool = False,
        stem: Stem = "standard",
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.Identity() if stem == "no_relu" else nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, ceil_mode=True) if stem == "ceil_pool" else nn.MaxPool2d(3, 2, 1)
        inputs = 64
        for i, (depth, stride) in enumerate(zip(depths, (1, 2, 2, 1), strict=True)):
            width, with_ibn = 64 << i, ibn and i < 3
            layers = []
            for j in range(depth):
                layers.append(block(inputs, width, stride if j == 0 else 1, with_ibn))
                inputs = width * block.expansion
            self.add_module(f"layer{i + 1}", nn.Sequential(*layers))
        self.channels = inputs
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(
        self,
        images: Tensor,  # [B, 3, H, W]
    ) -> Tensor:  # [B, channels, H / 16, W / 16]
        x = self.maxpool(self.relu(self.bn1(self.conv1(images))))
        for i in range(4):
            x = self.get_submodule(f"layer{i + 1}")(x)
        return x


def resnet18(stem: Stem = "standard") -> ResNet:
    """ResNet-18, 512 channels."""
    return ResNet(BasicBlock, (2, 2, 2, 2), stem=stem)


def resnet50(stem: Stem = "standard") -> ResNet:
    """ResNet-50, 2048 channels."""
    return ResNet(Bottleneck, (3, 4, 6, 3), stem=stem)


def resnet50_ibn_a(stem: Stem = "standard") -> ResNet:
    """ResNet-50 with IBN-a in its first three stages, 2048 channels."""
    return ResNet(Bottleneck, (3, 4, 6, 3), ibn=True, stem=stem)
