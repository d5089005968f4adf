"""One image to one feature: a trunk, global average pooling and a neck."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from nformer_edge.core.spec import BackboneSpec
from nformer_edge.model.osnet import OSNet
from nformer_edge.model.resnet import ResNet, resnet18, resnet50, resnet50_ibn_a

_TRUNKS: dict[str, Callable[[], ResNet | OSNet]] = {
    "resnet18": resnet18,
    "resnet50": resnet50,
    "resnet50_ibn_a": resnet50_ibn_a,
    "osnet_x1_0": lambda: OSNet(1.0),
    "osnet_x0_75": lambda: OSNet(0.75),
    "osnet_x0_5": lambda: OSNet(0.5),
    "osnet_x0_25": lambda: OSNet(0.25),
}


class BNNeck(nn.Module):
    """Projection, then batch norm without shift (Luo et al., 2019): metric losses before it, identities after."""

    def __init__(self, inputs: int, features: int) -> None:
        super().__init__()
        self.projection = nn.Linear(inputs, features, bias=False)
        self.bn = nn.BatchNorm1d(features)
        self.bn.bias.requires_grad_(False)
        nn.init.kaiming_normal_(self.projection.weight, mode="fan_out")

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        before = self.projection(x)
        return before, self.bn(before)


class FCNeck(nn.Module):
    """OSNet's own: linear, batch norm, ReLU. Its output serves every loss."""

    def __init__(self, inputs: int, features: int) -> None:
        super().__init__()
        linear = nn.Linear(inputs, features)
        nn.init.normal_(linear.weight, 0.0, 0.01)
        nn.init.zeros_(linear.bias)
        self.fc = nn.Sequential(linear, nn.BatchNorm1d(features), nn.ReLU(inplace=True))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        after = self.fc(x)
        return after, after


class Backbone(nn.Module):
    """Preprocessed images to features (`BackboneSpec`)."""

    def __init__(self, spec: BackboneSpec) -> None:
        super().__init__()
        self.spec = spec
        self.trunk = _TRUNKS[spec.arch]()
        self.pool = nn.AdaptiveAvgPool2d(1)
        neck = FCNeck if spec.neck == "fc" else BNNeck
        self.neck = neck(self.trunk.channels, spec.features)

    def forward(
        self,
        images: Tensor,  # [B, 3, H, W]
    ) -> Tensor:  # [B, D]
        """The feature after the neck: what galleries hold."""
        return self.both(images)[1]

    def both(
        self,
        images: Tensor,  # [B, 3, H, W]
    ) -> tuple[Tensor, Tensor]:  # [B, D], [B, D]
        """The features before and after the neck's batch norm: for metric losses and for the classifier."""
        before, after = self.neck(self.pool(self.trunk(images)).flatten(1))
        return before, after
