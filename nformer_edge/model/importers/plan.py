"""What every layout's module gives: which tensor of the file goes where, and what the file leaves open."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor

from nformer_edge.core.spec import BackboneSpec, HeadSpec, LastStride, ModelSpec, Pooling, PreprocessSpec, Stem

State = Mapping[str, Tensor]


@dataclass(frozen=True)
class Wanted:
    """What the user says and the file cannot; None leaves it to the layout.

    Args:
        backbone: fill this one.
        preprocess: how images reach it.
        features: project to so many in a ``bnneck`` of our own. A neck that the file holds is then left over.
        stem: of a ResNet (`core.spec.BackboneSpec`), as are `last_stride` and `pooling`.
        last_stride: see `stem`.
        pooling: see `stem`.
        heads: of an NFormer (`core.spec.HeadSpec`), as are `k` and `landmarks`.
        k: see `heads`.
        landmarks: see `heads`.
    """

    backbone: BackboneSpec | None = None
    preprocess: PreprocessSpec | None = None
    features: int | None = None
    stem: Stem | None = None
    last_stride: LastStride | None = None
    pooling: Pooling | None = None
    heads: int | None = None
    k: int | None = None
    landmarks: int | None = None

    def head(self, features: int, layers: int) -> HeadSpec:
        """A head of these sizes; the rest as published, or as the user says."""
        known = HeadSpec(features, layers)
        chosen = {name: value for name in ("heads", "k", "landmarks") if (value := getattr(self, name)) is not None}
        return replace(known, **chosen)


@dataclass(frozen=True)
class Plan:
    """Where each tensor of a file goes.

    Args:
        layout: the project, for people.
        spec: the model that the file holds.
        tensors: by their names in a checkpoint, such as ``backbone.trunk.conv1.weight``.
        names: the name in the file of each of `tensors` that stands there.
        folded: further names in the file whose values went into `tensors` or `spec`.
        aside: prefixes in the file of what inference does not need, such as a training classifier.
        anew: prefixes in a checkpoint of parts that such a file never holds; they start untrained.
        notes: what the user should know, one sentence each.
    """

    layout: str
    spec: ModelSpec
    tensors: dict[str, Tensor]
    names: dict[str, str]
    folded: frozenset[str] = frozenset()
    aside: tuple[str, ...] = ()
    anew: tuple[str, ...] = ()
    notes: tuple[str, ...] = field(default=())


def renamed(state: State, prefixes: Sequence[tuple[str, str | None]]) -> dict[str, str]:
    """Names in the file by names in a checkpoint.

    Of (theirs, ours) the first prefix that fits counts; with None for ours it leaves a tensor out.
    """
    names = {}
    for name in state:
        theirs, ours = next((pair for pair in prefixes if name.startswith(pair[0])), (name, None))
        if ours is not None:
            names[ours + name.removeprefix(theirs)] = name
    return names


def model_spec(
    backbone: BackboneSpec, preprocess: PreprocessSpec, wanted: Wanted, head: HeadSpec | None = None
) -> ModelSpec:
    """What a layout found, with what the user said put in its place."""
    options = ("stem", "last_stride", "pooling")
    chosen = {name: value for name in options if (value := getattr(wanted, name)) is not None}
    backbone = wanted.backbone or replace(backbone, **chosen)
    if wanted.features is not None:
        backbone = replace(backbone, neck="bnneck", features=wanted.features)
    return ModelSpec(backbone, head, wanted.preprocess or preprocess)


def fold_bias(tensors: dict[str, Tensor], state: State, name: str) -> frozenset[str]:
    """Their projection has a bias and ours none: the batch norm that follows subtracts it with its mean. Exact."""
    mean = tensors.get("backbone.neck.bn.running_mean")
    if name not in state or mean is None or state[name].shape != mean.shape:
        return frozenset()
    tensors["backbone.neck.bn.running_mean"] = mean - state[name]
    return frozenset({name})
