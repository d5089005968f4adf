"""One image to one feature: a trunk, global pooling and a neck."""

from __future__ import annotations

import copy
import importlib
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from nformer_edge.core.errors import UsageError
from nformer_edge.core.spec import TRUNKS, BackboneSpec
from nformer_edge.model.osnet import STREAMS, OSBlock
from nformer_edge.model.plain import fold_identities


def _trunk(spec: BackboneSpec) -> nn.Module:
    module, _, name = TRUNKS[spec.arch].partition(":")
    make = getattr(importlib.import_module(f"nformer_edge.model.{module}"), name)
    return make(**spec.trunk_options())


class GeM(nn.Module):
    """Generalized mean pooling (Radenovic et al., TPAMI 2019): powers, mean, root. The exponent is learned."""

    def __init__(self) -> None:
        super().__init__()
        self.p = nn.Parameter(torch.full((1,), 3.0))

    def forward(
        self,
        x: Tensor,  # [B, C, h, w]
    ) -> Tensor:  # [B, C, 1, 1]
        return x.clamp(min=1e-6).pow(self.p).mean((2, 3), keepdim=True).pow(1 / self.p)


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


def _same(neck: str, inputs: int, features: int) -> None:
    if inputs != features:
        hint = "Give that number, or use bnneck, which projects."
        raise UsageError("features", f"{features} with neck {neck}", f"{inputs}, the trunk's channels", hint)


class BatchNormNeck(nn.Module):
    """Batch norm without shift on the pooled feature itself, as Luo et al. (2019) have it."""

    def __init__(self, inputs: int, features: int) -> None:
        super().__init__()
        _same("bn", inputs, features)
        self.bn = nn.BatchNorm1d(features)
        self.bn.bias.requires_grad_(False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, self.bn(x)


class FCNeck(nn.Module):
    """Torchreid's: linear, batch norm, ReLU. Its output serves every loss."""

    def __init__(self, inputs: int, features: int) -> None:
        super().__init__()
        linear = nn.Linear(inputs, features)
        nn.init.normal_(linear.weight, 0.0, 0.01)
        nn.init.zeros_(linear.bias)
        self.fc = nn.Sequential(linear, nn.BatchNorm1d(features), nn.ReLU(inplace=True))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        after = self.fc(x)
        return after, after


class NoNeck(nn.Module):
    """The pooled feature itself, for every loss."""

    def __init__(self, inputs: int, features: int) -> None:
        super().__init__()
        _same("none", inputs, features)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, x


_NECKS: dict[str, type[BNNeck] | type[BatchNormNeck] | type[FCNeck] | type[NoNeck]] = {
    "bnneck": BNNeck,
    "bn": BatchNormNeck,
    "fc": FCNeck,
    "none": NoNeck,
}


def widths_of(backbone: nn.Module) -> dict[str, tuple[int, int]]:
    """Channels in and out of every layer that has a width, by name; (0, 0) for a stream that was taken away."""
    widths = {}
    for name, layer in backbone.named_modules():
        if isinstance(layer, nn.Conv2d):
            widths[name] = (layer.in_channels, layer.out_channels)
        elif isinstance(layer, nn.Linear):
            widths[name] = (layer.in_features, layer.out_features)
        elif isinstance(layer, _NORMS):
            widths[name] = (layer.num_features, layer.num_features)
        elif isinstance(layer, OSBlock):
            widths |= {f"{name}.{stream}": (0, 0) for stream in STREAMS if stream not in layer.streams}
    return widths


_NORMS = (nn.BatchNorm2d, nn.BatchNorm1d, nn.InstanceNorm2d)


def _narrow(backbone: nn.Module, name: str, inputs: int, outputs: int) -> None:
    """Replaces the layer of that name by an untrained one of another width, or takes a stream away."""
    parent, _, stream = name.rpartition(".")
    if inputs == outputs == 0 and stream in STREAMS:
        block = next((module for found, module in backbone.named_modules() if found == parent), None)
        if not isinstance(block, OSBlock) or block.streams in ((), (stream,)):
            raise UsageError(f"widths.{name}", (0, 0), "a block that has another stream", "Correct the spec.")
        setattr(block, stream, None)
    else:
        backbone.set_submodule(name, _narrower(backbone, name, inputs, outputs))


def _narrower(backbone: nn.Module, name: str, inputs: int, outputs: int) -> nn.Module:
    """An untrained layer like the one of that name, of another width."""
    own = widths_of(backbone).get(name)
    layer = backbone.get_submodule(name) if own else None
    if own is None or not (1 <= inputs <= own[0] and 1 <= outputs <= own[1]):
        expected = "a layer with a width" if own is None else f"at most {own}"
        raise UsageError(f"widths.{name}", (inputs, outputs), expected, "Correct the spec.")
    if isinstance(layer, nn.Linear):
        return nn.Linear(inputs, outputs, layer.bias is not None)
    if isinstance(layer, nn.Conv2d):
        groups = inputs if layer.groups == layer.in_channels else layer.groups
        shape: dict[str, Any] = {name: getattr(layer, name) for name in ("kernel_size", "stride", "padding")}
        return nn.Conv2d(inputs, outputs, **shape, groups=groups, bias=layer.bias is not None)
    assert isinstance(layer, _NORMS)
    narrower = type(layer)(outputs, affine=layer.affine)
    for own_parameter, parameter in zip(layer.parameters(), narrower.parameters(), strict=True):
        parameter.requires_grad_(own_parameter.requires_grad)
    return narrower


class Backbone(nn.Module):
    """Preprocessed images to features (`BackboneSpec`)."""

    def __init__(self, spec: BackboneSpec) -> None:
        super().__init__()
        self.spec = spec
        self.trunk = _trunk(spec)
        self.pool = GeM() if spec.pooling == "gem" else nn.AdaptiveAvgPool2d(1)
        channels: Any = self.trunk.channels
        self.neck = _NECKS[spec.neck](channels, spec.features)
        for name, (inputs, outputs) in (spec.widths or {}).items():
            _narrow(self, name, inputs, outputs)
        if spec.widths:
            channels, _ = next(iter(widths_of(self.neck).values()), (channels, channels))
            self.trunk.channels = channels

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
        return self.embedded(self.trunk(images))

    def embedded(
        self,
        maps: Tensor,  # [B, C, h, w], the trunk's
    ) -> tuple[Tensor, Tensor]:  # [B, D], [B, D]
        """`both`, from the trunk's feature maps on."""
        before, after = self.neck(self.pool(maps).flatten(1))
        return before, after


def for_inference(backbone: Backbone) -> Backbone:
    """The same function as `backbone` in evaluation mode, quicker on a CPU and rounded otherwise; `backbone` stays.

    Batch norms are folded into the convolutions before them, and weights stand channels last. Of OSNet x0.25's time on
    one core batch norm takes a quarter, and its many thin convolutions run faster in that order.
    """
    folded = copy.deepcopy(backbone).eval()
    fold_identities(folded)
    for module in folded.modules():
        for (name, conv), (after, norm) in pairwise(list(module.named_children())):  # stand in the order of their calls
            if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                setattr(module, name, fuse_conv_bn_eval(conv, norm))
                setattr(module, after, nn.Identity())
    return folded.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
