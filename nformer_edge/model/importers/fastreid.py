"""FastReID's BoT: a ResNet or IBN-a ResNet, average pooling, batch norm with or without a reduction before it.

Three generations of names are read: ``heads.bnneck`` (0.1), ``heads.bottleneck`` with ``heads.classifier`` (1.0), and
with ``heads.weight`` (1.3). Images are tested at 256 x 128, bicubic.
"""

from __future__ import annotations

from nformer_edge.core.spec import BackboneSpec, PreprocessSpec, Stem
from nformer_edge.model.importers.plan import Plan, State, Wanted, model_spec, renamed
from nformer_edge.model.importers.resnets import CHANNELS, resnet_arch

_NOTES = {
    "standard": "Stem as up to FastReID 0.1.1; a file with heads.bnneck from August 2020 needs --stem ceil_pool.",
    "ceil_pool": "The stem's pooling is padded at the end alone, as FastReID has it since August 2020.",
    "no_relu": "",
}


def plan(state: State, wanted: Wanted) -> Plan | None:
    """A FastReID BoT model: ``backbone.*`` and ``heads.*``."""
    if "backbone.conv1.weight" not in state or not any(name.startswith("heads.") for name in state):
        return None
    arch = resnet_arch(state, "backbone.")
    old = "heads.bnneck.weight" in state
    reduced = "heads.bottleneck.0.weight" in state and state["heads.bottleneck.0.weight"].dim() == 4
    norm = "heads.bnneck." if old else "heads.bottleneck.1." if reduced else "heads.bottleneck.0."
    names = renamed(state, [("backbone.", "backbone.trunk."), (norm, "backbone.neck.bn.")])
    tensors = {ours: state[theirs] for ours, theirs in names.items()}
    if reduced:
        tensors["backbone.neck.projection.weight"] = state["heads.bottleneck.0.weight"].flatten(1)
        names["backbone.neck.projection.weight"] = "heads.bottleneck.0.weight"
    features = len(state["heads.bottleneck.0.weight"]) if reduced else CHANNELS[arch]
    stem: Stem = "standard" if old else "ceil_pool"
    spec = model_spec(
        BackboneSpec(arch, features, "bnneck" if reduced else "bn", stem), _preprocess(state), wanted, None
    )
    note = _NOTES[spec.backbone.stem]
    return Plan(
        "FastReID BoT",
        spec,
        tensors,
        names,
        frozenset({"pixel_mean", "pixel_std"} & state.keys()),
        aside=("heads.classifier.", "heads.weight", "heads.cls_layer."),
        notes=(note,) if note else (),
    )


def _preprocess(state: State) -> PreprocessSpec:
    """Mean and deviation as the file has them, for pixels 0 to 255; ImageNet's where it has none."""
    plain = PreprocessSpec(interpolation="bicubic")
    mean, std = state.get("pixel_mean"), state.get("pixel_std")
    if mean is None or std is None or mean.numel() != 3 or std.numel() != 3:
        return plain
    means, stds = ([round(float(v) / 255, 6) for v in t.flatten()] for t in (mean, std))
    return PreprocessSpec(mean=(means[0], means[1], means[2]), std=(stds[0], stds[1], stds[2]), interpolation="bicubic")
