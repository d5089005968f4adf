"""What a model is and how images reach it, as frozen dataclasses that travel in every manifest."""

from __future__ import annotations

import math
import numbers
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Literal, TypeVar

from nformer_edge.core.errors import UsageError
from nformer_edge.core.values import Table, from_json, to_table

Neck = Literal["bnneck", "bn", "fc", "none"]
Pooling = Literal["avg", "gem"]
LastStride = Literal[1, 2]
Stem = Literal["standard", "no_relu", "ceil_pool"]
#: How a gallery keeps what the head computed of its rows in memory (`gallery.live`).
HeadState = Literal["fp32", "fp16", "int8"]

NeighborRule = Literal["features", "affinity", "gated"]
InputScale = Literal["unit", "sqrt_dim", "none"]
Precision = Literal["fp32", "fp16", "bf16", "int8"]
PrecisionChoice = Literal["fp32", "fp16", "bf16", "int8", "auto"]
GalleryCode = Literal["fp32", "fp16", "int8", "binary-int8", "pca128-int8", "pca64-int8"]
CalibrationMethod = Literal["minmax", "entropy", "percentile", "mse"]
CalibrationChoice = Literal["minmax", "entropy", "percentile", "mse", "auto"]

T = TypeVar("T")

#: Backbones: a module of `nformer_edge.model`, and what makes the trunk. A new one is one file and one line here.
TRUNKS = {
    "resnet18": "resnet:resnet18",
    "resnet50": "resnet:resnet50",
    "resnet50_ibn_a": "resnet:resnet50_ibn_a",
    "osnet_x1_0": "osnet:osnet_x1_0",
    "osnet_x0_75": "osnet:osnet_x0_75",
    "osnet_x0_5": "osnet:osnet_x0_5",
    "osnet_x0_25": "osnet:osnet_x0_25",
    "osnet_ibn_x1_0": "osnet:osnet_ibn_x1_0",
    "osnet_ain_x1_0": "osnet:osnet_ain_x1_0",
    "osnet_ain_x0_75": "osnet:osnet_ain_x0_75",
    "osnet_ain_x0_5": "osnet:osnet_ain_x0_5",
    "osnet_ain_x0_25": "osnet:osnet_ain_x0_25",
    "plain_s": "plain:plain_s",
    "plain_m": "plain:plain_m",
}


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    """Raises UsageError with the nearest spelling unless `value` is one of `choices`."""
    if value not in choices:
        near = get_close_matches(str(value), choices, n=1)
        hint = f"Did you mean {near[0]!r}?" if near else "Choose one of these."
        raise UsageError(name, repr(value), " | ".join(choices), hint)


def check_flags(**flags: object) -> None:
    """Raises UsageError for the first that is no boolean: the text "no" would count as yes."""
    for name, value in flags.items():
        if type(value).__name__ not in ("bool", "bool_"):  # numpy's own, too
            raise UsageError(name, repr(value), "True or False", "Pass a boolean.")


def check_at_least(name: str, value: float, least: float) -> None:
    """Raises UsageError unless `value` is a number >= `least`."""
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        raise UsageError(name, repr(value), f"a number, at least {least}", "Convert it.")
    if not value >= least:
        raise UsageError(name, value, f"at least {least}", f"Raise {name}.")


def check_whole(name: str, value: float, least: int) -> None:
    """Raises UsageError unless `value` is a whole number >= `least`."""
    check_at_least(name, value, least)
    if not isinstance(value, numbers.Integral):
        raise UsageError(name, repr(value), f"a whole number, at least {least}", "Round it.")


#: Places in an image's list of the gated head, itself at 0, whose scores make its profile (`model.gated`).
GATED_RANKS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)

#: Names in such a list: as far down as a profile looks.
GATED_LIST = GATED_RANKS[-1] + 1

#: What a profile falls by for each of its places that a small set does not have: thresholds rise, and gates close.
GATED_MISSING = 0.05

#: Images a person that the gated head has gates for; between them it interpolates.
GATED_IMAGES = (1, 4, 16)

#: Images a person that it assumes where nobody says: its gates do no harm with one image, and help with many.
GATED_UNTOLD = 2

#: Largest values of a spec and of arguments: far above any use, and too small for a forged file to hang or to fill the
#: memory.
LIMITS = {
    "height": 8192,
    "width": 8192,
    "features": 65536,
    "layers": 256,
    "heads": 1024,
    "k": 16384,
    "landmarks": 1 << 20,
    "threads": 1024,
    "intra_op_threads": 1024,
}


def check_size(name: str, value: float, min_value: float = 1) -> None:
    """Raises UsageError unless `value` is a number from `min_value` to the limit of `name`."""
    check_at_least(name, value, min_value)
    if not value <= LIMITS[name]:
        raise UsageError(name, value, f"at most {LIMITS[name]}", f"Lower {name}.")


@dataclass(frozen=True)
class PixelSpec:
    """What a backbone's graph takes that normalizes pixels itself: uint8.

    Args:
        layout: ``NCHW`` or ``NHWC``.
        channels: their order as they come in; the graph brings them to the model's.
    """

    layout: Literal["NCHW", "NHWC"] = "NCHW"
    channels: Literal["RGB", "BGR"] = "RGB"

    def __post_init__(self) -> None:
        check_choice("layout", self.layout, ("NCHW", "NHWC"))
        check_choice("channels", self.channels, ("RGB", "BGR"))


@dataclass(frozen=True)
class PreprocessSpec:
    """How an image file becomes one row of the backbone's input; recorded in every manifest.

    Args:
        height, width: pixels after resizing.
        mean, std: of each channel, for values 0 to 1.
        channels: their order.
        interpolation: of the resizing.
        pixels: what the graph takes where it normalizes pixels itself; null where it takes normalized numbers.
    """

    height: int = 256
    width: int = 128
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    channels: Literal["RGB", "BGR"] = "RGB"
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    pixels: PixelSpec | None = None

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of one image as the backbone takes it."""
        size = (self.height, self.width)
        return (3, *size) if self.pixels is None or self.pixels.layout == "NCHW" else (*size, 3)

    @property
    def dtype(self) -> str:
        """Of the backbone's input."""
        return "float32" if self.pixels is None else "uint8"

    def __post_init__(self) -> None:
        check_size("height", self.height, 16)
        check_size("width", self.width, 16)
        if not all(math.isfinite(x) for x in (*self.mean, *self.std)):
            raise UsageError("mean and std", (self.mean, self.std), "finite numbers", "Correct the spec.")
        check_choice("channels", self.channels, ("RGB", "BGR"))
        check_choice("interpolation", self.interpolation, ("bilinear", "bicubic"))
        if not all(s > 0 for s in self.std):
            raise UsageError("std", self.std, "three positive numbers", "Correct the spec.")


@dataclass(frozen=True)
class BackboneSpec:
    """One image to one feature. Weights trained with one neck or stem are wrong under another.

    Args:
        arch: the trunk: ResNet (He et al. 2016), with IBN-a (Pan et al. 2018), OSNet (Zhou et al. 2019), OSNet-IBN or
            OSNet-AIN (Zhou et al. 2021), or plain 3x3 convolutions for INT8 (`model.plain`).
        features: how many numbers a feature has.
        neck: ``bnneck`` (projection to `features`, then batch norm), ``bn`` (batch norm alone, on as many features as
            the trunk has channels: Luo et al. 2019), ``fc`` (linear, batch norm, ReLU, as torchreid trains it) or
            ``none`` (the pooled feature itself).
        stem: how a ResNet begins: ``standard``, ``no_relu`` (reid-strong-baseline and the published NFormer leave out
            the first ReLU) or ``ceil_pool`` (FastReID's pooling is padded at the end alone, which shifts it by a
            pixel).
        pooling: ``avg``, or ``gem``: the mean of powers with a learned exponent, then the root (Radenovic et al. 2019).
        last_stride: of a ResNet's layer4. The feature map is a sixteenth of the image's sides with 1, else a 32nd.
        non_local: a ResNet-50 with FastReID's five non-local blocks in layer2 and layer3 (Wang et al. 2018).
        widths: of layers that pruning made narrower, by their name in the backbone: channels in and out; 0 and 0 of an
            OSNet block's stream that it took away.
    """

    arch: str = "resnet50"
    features: int = 256
    neck: Neck = "bnneck"
    stem: Stem = "standard"
    pooling: Pooling = "avg"
    last_stride: LastStride = 1
    non_local: bool = False
    widths: Mapping[str, tuple[int, int]] | None = None

    def __post_init__(self) -> None:
        check_choice("arch", self.arch, tuple(TRUNKS))
        for name, kind in (("neck", Neck), ("stem", Stem), ("pooling", Pooling)):
            check_choice(name, getattr(self, name), typing.get_args(kind))
        check_size("features", self.features, 1)
        if self.last_stride not in (1, 2):
            raise UsageError("last_stride", self.last_stride, "1 or 2", "Choose one of these.")
        for name, value in self.trunk_options().items():
            if not self.arch.startswith("resnet"):
                raise UsageError(name, f"{value} with {self.arch}", f"{value} with a ResNet", f"Leave {name} out.")
        if self.non_local and self.arch == "resnet18":
            raise UsageError("non_local", "True with resnet18", "a ResNet-50", "Leave non_local out.")

    def trunk_options(self) -> dict[str, str | int | bool]:
        """What the trunk is made with, where it is not the default."""
        options = {name: getattr(self, name) for name in ("stem", "last_stride", "non_local")}
        return {name: value for name, value in options.items() if value != getattr(BackboneSpec, name)}


@dataclass(frozen=True)
class HeadSpec:
    """The NFormer head (Wang et al., CVPR 2022), or the gated head that follows from it (`model.gated`).

    Args:
        features: numbers in one feature, D.
        layers: one after the other.
        heads: of each layer, H; 1 under the gated rule.
        k: neighbors of each image, K.
        landmarks: of each layer. The gated rule takes the mean of layer 1's landmarks as the center of the set.
        rule: how neighbors are chosen and weighted: ``features`` (by cosine, as the published code does), ``affinity``
            (by each layer's affinity, as the paper says) or ``gated`` (by cosine, each weighted by how far it stands
            above what both images give strangers).
        input_scale: the L2 norm that each feature gets before the first layer: ``unit`` (1), ``sqrt_dim`` (square root
            of `features`) or ``none`` (unchanged).
    """

    features: int = 256
    layers: int = 4
    heads: int = 2
    k: int = 20
    landmarks: int = 5
    rule: NeighborRule = "features"
    input_scale: InputScale = "unit"

    @classmethod
    def gated(cls, features: int = 256) -> HeadSpec:
        """The default of the gated rule."""
        return cls(features, layers=2, heads=1, k=20, landmarks=1024, rule="gated")

    @property
    def listed(self) -> int:
        """Names in every list that the head asks for."""
        return GATED_LIST if self.rule == "gated" else self.k

    def __post_init__(self) -> None:
        check_choice("rule", self.rule, typing.get_args(NeighborRule))
        check_choice("input_scale", self.input_scale, typing.get_args(InputScale))
        for name in ("features", "layers", "heads", "k", "landmarks"):
            check_size(name, getattr(self, name))
        if self.rule == "gated" and self.heads != 1:
            raise UsageError("heads", self.heads, "1 under the gated rule", "Leave heads out.")
        if self.features % self.heads:
            raise UsageError(
                "heads",
                f"{self.heads} heads for {self.features} features",
                "a divisor of features",
                "Choose a number of heads that divides the features.",
            )


@dataclass(frozen=True)
class ModelSpec:
    """A whole model.

    Args:
        backbone: one image to one feature.
        head: features of many images, related to each other; None for a backbone alone.
        preprocess: an image file to the backbone's input.
        unit_features: whether the backbone's graph brings features to length 1.
    """

    backbone: BackboneSpec = field(default_factory=BackboneSpec)
    head: HeadSpec | None = None
    preprocess: PreprocessSpec = field(default_factory=PreprocessSpec)
    unit_features: bool = False

    def __post_init__(self) -> None:
        if self.head is not None and self.head.features != self.backbone.features:
            raise UsageError(
                "head.features",
                self.head.features,
                f"the backbone's {self.backbone.features}",
                "Give head and backbone the same number of features.",
            )


def to_dict(spec: object) -> Table:
    """A spec as plain JSON data. Tuples become lists."""
    return to_table(spec)


def from_dict(cls: type[T], data: object, where: str = "") -> T:
    """A spec from JSON or TOML data; absent keys take their defaults. See `core.values.from_json`.

    Raises:
        UsageError: for a key that `cls` does not have (with the nearest spelling), or a value of the wrong type.
    """
    return from_json(cls, data, where)
