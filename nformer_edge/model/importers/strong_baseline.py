"""Reid-strong-baseline's ResNet (Luo et al., CVPRW 2019), and the published NFormer, which grew from it.

Their plain ResNets leave out the first ReLU; the IBN ones have it. Both test at 256 x 128, bilinear, after the neck.
"""

from __future__ import annotations

from nformer_edge.core.spec import BackboneSpec, HeadSpec, PreprocessSpec, Stem
from nformer_edge.model.importers.plan import Plan, State, Wanted, fold_bias, model_spec, renamed
from nformer_edge.model.importers.resnets import CHANNELS, resnet_arch

_HEAD_NOTE = (
    "A file does not say how many attention heads, neighbors and landmarks it was trained with:"
    " {heads}, {k} and {landmarks} are taken, as published."
)
_STEM_NOTE = "The stem has no ReLU, as that project trains it."


def plan(state: State, wanted: Wanted) -> Plan | None:
    """The baseline alone: ``base.*``, ``bottleneck.*`` (batch norm without projection) and a classifier.

    Without a neck (``MODEL.NECK 'no'``) its classifier has a bias.
    """
    if "base.conv1.weight" not in state or "projection.weight" in state:
        return None
    arch = resnet_arch(state, "base.")
    bare = "classifier.bias" in state and "bottleneck.weight" not in state
    backbone = BackboneSpec(arch, CHANNELS[arch], "none" if bare else "bn", _stem(arch))
    names = renamed(state, [("base.fc.", None), ("base.", "backbone.trunk."), ("bottleneck.", "backbone.neck.bn.")])
    spec = model_spec(backbone, PreprocessSpec(), wanted)
    return Plan(
        "reid-strong-baseline",
        spec,
        {ours: state[theirs] for ours, theirs in names.items()},
        names,
        aside=("classifier.", "base.fc."),  # the IBN trunk carries ImageNet's classifier along
        notes=(_STEM_NOTE,) if spec.backbone.stem == "no_relu" else (),
    )


def plan_nformer(state: State, wanted: Wanted) -> Plan | None:
    """The published NFormer checkpoint: ``backbone.*`` and ``nformer.*``; or its first stage, ``base.*``."""
    prefix = next((p for p in ("backbone.", "") if f"{p}base.conv1.weight" in state), None)
    if prefix is None or f"{prefix}projection.weight" not in state:
        return None
    arch = resnet_arch(state, f"{prefix}base.")
    features = int(state[f"{prefix}projection.weight"].shape[0])
    head = _head(state, features, wanted) if any(name.startswith("nformer.h.") for name in state) else None
    names = renamed(
        state,
        [
            (f"{prefix}base.fc.", None),
            (f"{prefix}base.", "backbone.trunk."),
            (f"{prefix}projection.weight", "backbone.neck.projection.weight"),
            (f"{prefix}bottleneck.", "backbone.neck.bn."),
            ("nformer.h.", "head.h."),
            ("nformer.bottleneck.", "head.bottleneck."),
        ],
    )
    tensors = {ours: state[theirs] for ours, theirs in names.items()}
    folded = fold_bias(tensors, state, f"{prefix}projection.bias")
    backbone = BackboneSpec(arch, features, "bnneck", _stem(arch))
    spec = model_spec(backbone, PreprocessSpec(), wanted, head)
    notes: tuple[str, ...] = (_STEM_NOTE,) if spec.backbone.stem == "no_relu" else ()
    if head is not None:
        notes += (_HEAD_NOTE.format(heads=head.heads, k=head.k, landmarks=head.landmarks),)
    aside = (f"{prefix}classifier.", f"{prefix}base.fc.", "nformer.classifier.")
    return Plan("published NFormer", spec, tensors, names, folded, aside, notes=notes)


def _stem(arch: str) -> Stem:
    return "standard" if arch == "resnet50_ibn_a" else "no_relu"


def _head(state: State, features: int, wanted: Wanted) -> HeadSpec:
    """Sizes by the tensors; the rest as published: neighbors by features, which testing brings to unit length."""
    layers = len({name.split(".")[2] for name in state if name.startswith("nformer.h.")})
    return wanted.head(features, layers)
