"""OSNet trunks (Zhou et al., ICCV 2019; OSNet-AIN: TPAMI 2021) under the parameter names of torchreid's OSNet."""

from __future__ import annotations

from functools import partial, reduce
from typing import Literal

import torch
from torch import Tensor, nn

Instance = Literal["", "after", "inside"]

#: Of an `OSBlock`.
STREAMS = ("conv2a", "conv2b", "conv2c", "conv2d")

_CHANNELS = (64, 256, 384, 512)  # of x1.0
_INSTANCE: dict[str, tuple[tuple[Instance, Instance], ...]] = {
    "osnet": (("", ""), ("", ""), ("", "")),
    "osnet_ibn": (("after", "after"), ("", ""), ("", "")),
    "osnet_ain": (("inside", "inside"), ("", "inside"), ("inside", "")),
}


class ConvLayer(nn.Module):
    """Convolution, batch norm (instance norm with `instance`), and ReLU unless `linear`."""

    def __init__(
        self, inputs: int, outputs: int, kernel: int, stride: int = 1, linear: bool = False, instance: bool = False
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)
        self.bn: nn.Module = nn.InstanceNorm2d(outputs, affine=True) if instance else nn.BatchNorm2d(outputs)
        self.relu: nn.Module = nn.Identity() if linear else nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.bn(self.conv(x)))


class LightConv3x3(nn.Module):
    """1x1 linear, 3x3 depthwise, batch norm, ReLU."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 1, bias=False)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, groups=channels, bias=False)
        self.bn = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.bn(self.conv2(self.conv1(x))))


class ChannelGate(nn.Module):
    """Channel weights from the globally pooled input; one gate serves all four streams of a block."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.global_avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc1 = nn.Conv2d(channels, channels // 16, 1)
        self.relu = nn.ReLU(inplace=True)
        self.fc2 = nn.Conv2d(channels // 16, channels, 1)
        self.gate_activation = nn.Sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate_activation(self.fc2(self.relu(self.fc1(self.global_avgpool(x)))))


class OSBlock(nn.Module):
    """Four streams of 1 to 4 light convolutions, or those of them that pruning left, summed after the shared gate.

    Args:
        instance: where an instance norm stands: ``after`` the sum with the shortcut (IBN), ``inside``, in place of the
            last batch norm (AIN), or nowhere.
    """

    def __init__(self, inputs: int, outputs: int, instance: Instance = "") -> None:
        super().__init__()
        middle = outputs // 4
        self.conv1 = ConvLayer(inputs, middle, 1)
        self.conv2a = LightConv3x3(middle)
        self.conv2b = nn.Sequential(*(LightConv3x3(middle) for _ in range(2)))
        self.conv2c = nn.Sequential(*(LightConv3x3(middle) for _ in range(3)))
        self.conv2d = nn.Sequential(*(LightConv3x3(middle) for _ in range(4)))
        self.gate = ChannelGate(middle)
        self.conv3 = ConvLayer(middle, outputs, 1, linear=True)
        if instance == "inside":
            self.conv3.bn = nn.Identity()
        self.instance = instance
        self.IN = nn.InstanceNorm2d(outputs, affine=True) if instance else nn.Identity()
        self.downsample = ConvLayer(inputs, outputs, 1, linear=True) if inputs != outputs else None
        self.relu = nn.ReLU(inplace=True)

    @property
    def streams(self) -> tuple[str, ...]:
        """Names of those that are there: one that was taken away is None."""
        return tuple(name for name in STREAMS if getattr(self, name) is not None)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(x)
        streams = [getattr(self, stream)(y) for stream in self.streams]
        y = reduce(torch.add, map(self.gate, streams))
        y, shortcut = self.conv3(y), x if self.downsample is None else self.downsample(x)
        return self.relu(self.IN(y) + shortcut if self.instance == "inside" else self.IN(y + shortcut))


def _stage(inputs: int, outputs: int, shrink: bool, instance: tuple[Instance, Instance]) -> nn.Sequential:
    blocks: list[nn.Module] = [OSBlock(inputs, outputs, instance[0]), OSBlock(outputs, outputs, instance[1])]
    if shrink:
        blocks.append(nn.Sequential(ConvLayer(outputs, outputs, 1), nn.AvgPool2d(2, 2)))
    return nn.Sequential(*blocks)


class OSNet(nn.Module):
    """Images to a feature map, a sixteenth of the image's sides.

    Args:
        arch: ``osnet``, ``osnet_ibn`` or ``osnet_ain``, then ``_x`` and the width, such as ``0_25``.
    """

    def __init__(self, arch: str) -> None:
        super().__init__()
        kind, _, width = arch.partition("_x")
        c = [int(channels * float(width.replace("_", "."))) for channels in _CHANNELS]
        first, second, third = _INSTANCE[kind]
        self.conv1 = ConvLayer(3, c[0], 7, 2, instance=kind != "osnet")
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        self.conv2 = _stage(c[0], c[1], True, first)
        self.conv3 = _stage(c[1], c[2], True, second)
        self.conv4 = _stage(c[2], c[3], False, third)
        self.conv5 = ConvLayer(c[3], c[3], 1)
        self.channels = c[3]
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(
        self,
        images: Tensor,  # [B, 3, H, W]
    ) -> Tensor:  # [B, channels, H / 16, W / 16]
        x = self.maxpool(self.conv1(images))
        return self.conv5(self.conv4(self.conv3(self.conv2(x))))


osnet_x1_0 = partial(OSNet, "osnet_x1_0")
osnet_x0_75 = partial(OSNet, "osnet_x0_75")
osnet_x0_5 = partial(OSNet, "osnet_x0_5")
osnet_x0_25 = partial(OSNet, "osnet_x0_25")
osnet_ibn_x1_0 = partial(OSNet, "osnet_ibn_x1_0")
osnet_ain_x1_0 = partial(OSNet, "osnet_ain_x1_0")
osnet_ain_x0_75 = partial(OSNet, "osnet_ain_x0_75")
osnet_ain_x0_5 = partial(OSNet, "osnet_ain_x0_5")
osnet_ain_x0_25 = partial(OSNet, "osnet_ain_x0_25")
