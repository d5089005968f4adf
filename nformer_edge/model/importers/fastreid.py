"""FastReID's BoT, AGW and SBS: a ResNet or IBN-a ResNet, average or GeM pooling, perhaps non-local blocks, batch norm.

Three generations of names are read: ``heads.bnneck`` (0.1), ``heads.bottleneck`` with ``heads.classifier`` (1.0), and
with ``heads.weight`` (1.3). A reduction before the batch norm is our projection. Images are tested bicubic, at 384 x
128 for SBS and 256 x 128 for the others.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from nformer_edge.core.spec import BackboneSpec, Neck, PreprocessSpec, Stem
from nformer_edge.model.importers.plan import Plan, State, Wanted, model_spec, renamed
from nformer_edge.model.importers.resnets import CHANNELS, resnet_arch

_NOTES = {
    "standard": "Stem as up to FastReID 0.1.1; a file with heads.bnneck from August 2020 needs --stem ceil_pool.",
    "ceil_pool": "The stem's pooling is padded at the end alone, as FastReID has it since August 2020.",
    "no_relu": "",
}


def plan(state: State, wanted: Wanted) -> Plan | None:
    """A FastReID model: ``backbone.*`` and ``heads.*``."""
    if "backbone.conv1.weight" not in state or not any(name.startswith("heads.") for name in state):
        return None
    arch = resnet_arch(state, "backbone.")
    old = "heads.bnneck.weight" in state
    first = state.get("heads.bottleneck.0.weight")
    reduced = first is not None and first.dim() == 4
    norm = "heads.bnneck." if old else "heads.bottleneck.1." if reduced else "heads.bottleneck.0."
    learned, non_local = "heads.pool_layer.p" in state, any(name.startswith("backbone.NL_") for name in state)
    places = [("backbone.", "backbone.trunk."), (norm, "backbone.neck.bn."), ("heads.pool_layer.p", "backbone.pool.p")]
    names = renamed(state, places)
    tensors = {ours: state[theirs] for ours, theirs in names.items()}
    if first is not None and reduced:
        tensors["backbone.neck.projection.weight"] = first.flatten(1)
        names["backbone.neck.projection.weight"] = "heads.bottleneck.0.weight"
    bare = not old and first is None
    neck: Neck = "bnneck" if reduced else "none" if bare else "bn"
    features = len(first) if first is not None and reduced else CHANNELS[arch]
    stem: Stem = "standard" if old else "ceil_pool"
    found = BackboneSpec(arch, features, neck, stem, "gem" if learned or non_local else "avg", 1, non_local)
    spec = model_spec(found, _preprocess(state, 384 if learned and non_local else 256), wanted)
    notes = [_NOTES[spec.backbone.stem]]
    if spec.backbone.pooling == "gem" and not learned:
        tensors["backbone.pool.p"] = torch.full((1,), 3.0)
        notes.append("GeM pooling has exponent 3, which such a file does not hold; pass --pooling avg if it had none.")
    kind = "SBS" if learned and non_local else "AGW" if non_local else "BoT with GeM pooling" if learned else "BoT"
    return Plan(
        f"FastReID {kind}",
        spec,
        tensors,
        names,
        frozenset({"pixel_mean", "pixel_std"} & state.keys()),
        aside=("heads.classifier.", "heads.weight", "heads.cls_layer."),
        notes=tuple(note for note in notes if note),
    )


def _preprocess(state: State, height: int) -> PreprocessSpec:
    """Mean and deviation as the file has them, for pixels 0 to 255; ImageNet's where it has none."""
    plain = PreprocessSpec(height, interpolation="bicubic")
    mean, std = state.get("pixel_mean"), state.get("pixel_std")
    if mean is None or std is None or mean.numel() != 3 or std.numel() != 3:
        return plain
    means, stds = ([round(float(v) / 255, 6) for v in t.flatten()] for t in (mean, std))
    return replace(plain, mean=(means[0], means[1], means[2]), std=(stds[0], stds[1], stds[2]))
