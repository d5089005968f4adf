"""How to train, as frozen dataclasses: one schema for TOML files, the command line and Python."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

from nformer_edge.core.artifact import read_text
from nformer_edge.core.errors import ArtifactError, UsageError
from nformer_edge.core.spec import (
    BackboneSpec,
    HeadSpec,
    ModelSpec,
    PreprocessSpec,
    check_at_least,
    check_choice,
    from_dict,
)
from nformer_edge.data.loaders import AugmentSpec

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

T = TypeVar("T")

Schedule = Literal["steps", "cosine"]
Start = Literal["reciprocal_mean", "discriminant", "camera_discriminant", "random"]
Precision = Literal["fp32", "bf16", "fp16", "fp64"]


def _at_least(config: object, least: float, *names: str) -> None:
    for name in names:
        check_at_least(name, getattr(config, name), least)


@dataclass(frozen=True)
class LossConfig:
    """Weights of the three losses, as Luo et al. (2019) and the published NFormer set them.

    Args:
        label_smoothing: of the identity cross-entropy.
        margin: of the batch-hard triplet loss, in Euclidean distance.
        triplet_weight, center_weight: beside the cross-entropy's 1.
        center_lr: learning rate of the centers, which have their own plain gradient descent.
    """

    label_smoothing: float = 0.1
    margin: float = 0.3
    triplet_weight: float = 1.0
    center_weight: float = 0.0005
    center_lr: float = 0.5

    def __post_init__(self) -> None:
        _at_least(self, 0, "label_smoothing", "margin", "triplet_weight", "center_weight", "center_lr")


@dataclass(frozen=True)
class BackboneConfig:
    """Stage one. The defaults are the published recipe (Luo et al., 2019).

    Args:
        p, k: identities in a batch and images of each.
        weight_decay: L2, as Adam adds it to the gradient.
        accumulate: batches whose gradients make one step. A bigger `p` looks for hard examples in more images and
            takes the batch norm's statistics over them; this does not.
        schedule: ``steps`` divides by ten at each of `steps` (epochs); ``cosine`` falls to a hundredth.
        warmup: epochs over which the rate rises linearly from `warmup_factor` of itself.
        augment: flips, crops and erased rectangles.
    """

    epochs: int = 120
    p: int = 16
    k: int = 4
    accumulate: int = 1
    lr: float = 3.5e-4
    weight_decay: float = 5e-4
    schedule: Schedule = "steps"
    steps: tuple[int, ...] = (40, 70)
    warmup: int = 10
    warmup_factor: float = 0.01
    loss: LossConfig = field(default_factory=LossConfig)
    augment: AugmentSpec = field(default_factory=AugmentSpec)

    def __post_init__(self) -> None:
        _at_least(self, 0, "epochs", "lr", "weight_decay", "warmup", "warmup_factor")
        _at_least(self, 1, "accumulate")
        _at_least(self, 2, "p", "k")
        check_choice("schedule", self.schedule, ("steps", "cosine"))


@dataclass(frozen=True)
class HeadConfig:
    """Stage two, on extracted features. Defaults as published, but for `start`, `views` and `sets`.

    Args:
        epochs: 0 leaves the head at its start.
        sets: batches in an epoch.
        set_size: N, images in one set, drawn around a random image; all of them where there are fewer.
        batch: sets in a batch. The head relates images of one set only; losses and batch norm see all of them.
        accumulate: batches whose gradients make one step.
        views: how many times the training images are extracted, each time with another augmentation; features of
            images that the backbone has learnt by heart teach the head nothing.
        start: ``reciprocal_mean`` (`model.start`), ``discriminant``, ``camera_discriminant``
            (the same, fitted to what varies from camera to camera), ``random`` (as published).
        spread: each image's features are moved so many times as far from its person's mean, as those of people whom
            the backbone never saw lie; 1 leaves them.
        strength: of the start's neighbor mean against the image's own feature.
        sharpness: of the start's softmax, in logits from cosine 0 to 1. None lets all neighbors weigh nearly alike
            under the features rule.
        power: of the discriminant starts: what they map is each feature raised to this power; 1 leaves them.
        hold_choice: queries and keys stay as they started. Under the affinity rule they choose the neighbors: a
            choice that no gradient flows through, and that many landmarks make sensitive to small steps.
    """

    epochs: int = 20
    sets: int = 20
    set_size: int = 7000
    batch: int = 1
    accumulate: int = 1
    views: int = 4
    start: Start = "reciprocal_mean"
    spread: float = 1.0
    strength: float = 0.5
    sharpness: float | None = None
    power: float = 1.0
    hold_choice: bool = False
    lr: float = 3.5e-4
    weight_decay: float = 5e-4
    schedule: Schedule = "cosine"
    steps: tuple[int, ...] = ()
    warmup: int = 1
    warmup_factor: float = 0.1
    loss: LossConfig = field(default_factory=LossConfig)

    def __post_init__(self) -> None:
        _at_least(self, 0, "epochs", "spread", "strength", "lr", "weight_decay", "warmup", "warmup_factor", "power")
        _at_least(self, 1, "sets", "batch", "accumulate", "views")
        _at_least(self, 2, "set_size")
        check_choice("schedule", self.schedule, ("steps", "cosine"))
        check_choice("start", self.start, get_args(Start))


@dataclass(frozen=True)
class TrainConfig:
    """A whole training.

    Args:
        model: what to train; ``model.head`` None trains stage one alone.
        backbone, head: the two stages.
        holdout: share of the training identities kept out of training, to watch and choose by.
        seed: everything random follows from it.
        cache_mib: training images stay decoded in memory up to this size.
        precision: of the forward and backward pass; ``fp16`` needs a GPU, ``fp64`` is for checks.
        deterministic: refuse operations whose result depends on the order in which threads finish.
        save_minutes: an interrupted training loses at most so much, and the batch at hand.
    """

    model: ModelSpec = field(default_factory=lambda: ModelSpec(head=HeadSpec()))
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    head: HeadConfig = field(default_factory=HeadConfig)
    holdout: float = 0.0
    seed: int = 0
    cache_mib: int = 2048
    precision: Precision = "fp32"
    deterministic: bool = False
    save_minutes: float = 5.0

    def __post_init__(self) -> None:
        _at_least(self, 0, "seed", "cache_mib", "save_minutes")
        check_choice("precision", self.precision, get_args(Precision))
        if not 0 <= self.holdout < 1:
            raise UsageError("holdout", self.holdout, "0 <= holdout < 1", "Hold out fewer people.")

    @classmethod
    def gated(cls, seed: int = 0) -> TrainConfig:
        """The published backbone with the gated head, whose gates need no training."""
        return cls(ModelSpec(head=HeadSpec.gated()), head=HeadConfig(epochs=0, views=1), seed=seed)

    @classmethod
    def demo(cls, seed: int = 0, rule: str = "gated") -> TrainConfig:
        """For the generated dataset on a laptop's CPU: ResNet-18 at 96 x 48 in a few minutes."""
        # the paper's head: fewer neighbors than a person has images (16), as docs/results.md says; the landmark product
        # needs many landmarks to find neighbors. Chosen on held-out training identities.
        layers, landmarks = (2, 256) if rule == "affinity" else (4, 5)
        head = HeadSpec.gated(256)
        if rule != "gated":
            head = HeadSpec(256, layers, heads=2, k=12, landmarks=landmarks, rule=rule)  # type: ignore[arg-type]
        model = ModelSpec(BackboneSpec("resnet18", 256), head, PreprocessSpec(96, 48))
        augment = AugmentSpec(pad=2, erase=0.1)
        stage_one = BackboneConfig(
            epochs=7, p=8, lr=1.5e-3, schedule="cosine", warmup=1, warmup_factor=0.1, augment=augment
        )
        learnt = HeadConfig(epochs=0, views=1) if rule == "gated" else HeadConfig(epochs=2, sets=10, views=3, lr=3e-5)
        return cls(model, stage_one, learnt, holdout=0.1, seed=seed)


#: Where a configuration can start.
PRESETS: dict[str, Callable[[], TrainConfig]] = {
    "gated": TrainConfig.gated,
    "published": TrainConfig,
    "demo": TrainConfig.demo,
}


def read_config(path: str | os.PathLike[str]) -> TrainConfig:
    """A training configuration from TOML; absent keys take the published recipe's values.

    There is a head unless the file says ``head = false`` in its table ``model``, and it has the backbone's features.

    Raises:
        UsageError: if the file is missing or not TOML, or holds an unknown key or a value of the wrong type.
    """
    try:
        data = tomllib.loads(read_text(path, "a TOML file"))
    except (ValueError, RecursionError, ArtifactError) as e:
        raise UsageError(str(path), str(e), "a TOML file", "Check the file.") from e
    if isinstance(model := data.get("model"), dict):
        head, backbone = model.setdefault("head", {}), model.get("backbone", {})
        if head is False:
            model["head"] = None
        elif isinstance(head, dict) and isinstance(backbone, dict) and "features" in backbone:
            head.setdefault("features", backbone["features"])
    return from_dict(TrainConfig, data, Path(path).name)


def configure(
    start: str | os.PathLike[str] = "gated",
    *,
    seed: int | None = None,
    arch: str | None = None,
    imgsz: Sequence[int] | None = None,
    epochs: int | None = None,
    head_epochs: int | None = None,
    initial: str | os.PathLike[str] | None = None,
    with_head: bool = True,
    accumulate: int | None = None,
    holdout: float | None = None,
    precision: str | None = None,
    deterministic: bool | None = None,
    **head: Any,
) -> TrainConfig:
    """A preset or a TOML file with single values replaced: what the command line's flags do.

    Args:
        start: a name in PRESETS, or a `.toml` file.
        imgsz: height and width.
        epochs, head_epochs: of the two stages.
        initial: a checkpoint whose backbone and preprocessing take the place of a preset's (a file names its own).
        with_head: False trains the backbone alone.
        accumulate: of both stages.
        holdout, precision, deterministic: of `TrainConfig`.
        head: fields of `HeadSpec`. None anywhere keeps what `start` says.
    """
    config = PRESETS[str(start)]() if str(start) in PRESETS else read_config(start)
    model = config.model
    if initial is not None and str(start) in PRESETS:
        model = _like(initial, model)
    if not with_head:
        model = replace(model, head=None)
    elif model.head is not None:
        rule = head.get("rule") or model.head.rule
        if rule != model.head.rule and "gated" in (rule, model.head.rule):  # another head altogether
            other = PRESETS["gated" if rule == "gated" else "published"]()
            assert other.model.head is not None
            model = replace(model, head=replace(other.model.head, features=model.head.features))
            config = replace(config, head=other.head)
        model = replace(model, head=_with(model.head, **head))
    size = dict(zip(("height", "width"), imgsz, strict=True)) if imgsz else {}
    model = replace(model, backbone=_with(model.backbone, arch=arch), preprocess=_with(model.preprocess, **size))
    return _with(
        config,
        seed=seed,
        model=model,
        backbone=_with(config.backbone, epochs=epochs, accumulate=accumulate),
        head=_with(config.head, epochs=head_epochs, accumulate=accumulate),
        holdout=holdout,
        precision=precision,
        deterministic=deterministic,
    )


def _like(initial: str | os.PathLike[str], model: ModelSpec) -> ModelSpec:
    from nformer_edge.model.checkpoint import load_checkpoint

    made = load_checkpoint(initial).spec
    head = None if model.head is None else replace(model.head, features=made.backbone.features)
    return replace(made, head=head)


def _with(spec: T, **values: Any) -> T:
    return replace(spec, **{k: v for k, v in values.items() if v is not None})  # type: ignore[type-var]
