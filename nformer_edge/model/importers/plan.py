"""What every layout's module gives: which tensor of the file goes where, and what the file leaves open."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor

from nformer_edge.core.spec import BackboneSpec, HeadSpec, ModelSpec, PreprocessSpec

State = Mapping[str, Tensor]


@dataclass(frozen=True)
class Wanted:
    """What the user says and the file cannot; None and {} leave it to the layout.

    Args:
        backbone: fill this one.
        preprocess: how images reach it.
        stem: of a ResNet (`core.spec.BackboneSpec`).
        head: fields of `HeadSpec` that are in no tensor: heads, k, landmarks, rule, input_scale.
    """

    backbone: BackboneSpec | None = None
    preprocess: PreprocessSpec | None = None
    stem: str | None = None
    head: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True)
class Plan:
    """Where each tensor of a file goes.

    Args:
        layout: the project, for people.
        spec: the model that the file holds.
        tensors: by their names in a checkpoint, such as ``backbone.trunk.conv1.weight``.
        names: the name in the file of each of `tensors`.
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
    notes: tuple[str, ...] = ()


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


def model_spec(backbone: BackboneSpec, preprocess: PreprocessSpec, wanted: Wanted, head: HeadSpec | None) -> ModelSpec:
    """What a layout found, with what the user said put in its place."""
    if wanted.stem is not None:
        backbone = replace(backbone, stem=wanted.stem)  # type: ignore[arg-type]
    return ModelSpec(wanted.backbone or backbone, head, wanted.preprocess or preprocess)
