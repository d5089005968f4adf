"""Torchreid's models: OSNet (Zhou et al., ICCV 2019), OSNet-IBN, OSNet-AIN (TPAMI 2021) and ResNet, at 256 x 128."""

from __future__ import annotations

import re

from nformer_edge.core.errors import ArtifactError
from nformer_edge.core.spec import BackboneSpec, PreprocessSpec
from nformer_edge.model.importers.plan import Plan, State, Wanted, model_spec, renamed
from nformer_edge.model.importers.resnets import CHANNELS, resnet_arch

_WIDTHS = {16: "x0_25", 32: "x0_5", 48: "x0_75", 64: "x1_0"}
_STRIDE_NOTE = "Its last stride is taken to be {}, as torchreid trains {}; --last-stride says otherwise."


def plan(state: State, wanted: Wanted) -> Plan | None:
    """An OSNet: trunk, its own fully connected neck, a training classifier."""
    stem, fc, classifier = (state.get(f"{name}.weight") for name in ("conv1.conv", "fc.0", "classifier"))
    if stem is None:
        return None
    ain = "conv2.0.conv2.0.layers.0.conv1.weight" in state
    kind = "osnet_ain" if ain else "osnet_ibn" if "conv2.0.IN.weight" in state else "osnet"
    arch, channels = f"{kind}_{_WIDTHS.get(stem.shape[0])}", 8 * stem.shape[0]
    bare = fc is None and classifier is not None and classifier.shape[-1] == channels
    if stem.shape[0] not in _WIDTHS or (kind == "osnet_ibn" and stem.shape[0] != 64) or (fc is None and not bare):
        got = f"an {kind} whose first convolution has {stem.shape[0]} channels{', without fc' if fc is None else ''}"
        raise ArtifactError("weights", got, "OSNet of x0.25, x0.5, x0.75 or x1.0, OSNet-IBN of x1.0", "Import these.")
    found = BackboneSpec(arch, channels if fc is None else int(fc.shape[0]), "none" if fc is None else "fc")
    names = renamed(state, [("fc.", "backbone.neck.fc."), ("classifier.", None), ("", "backbone.trunk.")])
    tensors = {_plain(ours): state[theirs] for ours, theirs in names.items()}
    names = {_plain(ours): theirs for ours, theirs in names.items()}
    layout = {"osnet": "torchreid OSNet", "osnet_ibn": "torchreid OSNet-IBN", "osnet_ain": "torchreid OSNet-AIN"}[kind]
    return Plan(layout, model_spec(found, PreprocessSpec(), wanted), tensors, names, aside=("classifier.",))


def _plain(name: str) -> str:
    """OSNet-AIN's names as those of OSNet: the streams of a block, and the convolution that ends a part."""
    name = re.sub(r"\.pool([23])\.0\.", r".conv\1.2.0.", name)
    name = re.sub(r"\.conv2\.0\.layers\.0\.", ".conv2a.", name)
    return re.sub(r"\.conv2\.([123])\.layers\.", lambda m: f".conv2{'abcd'[int(m[1])]}.", name)


def plan_resnet(state: State, wanted: Wanted) -> Plan | None:
    """A ResNet with a training classifier, with or without fully connected layers before it."""
    fc = state.get("fc.0.weight")
    if "layer1.0.conv1.weight" not in state or (fc is None and "classifier.weight" not in state):
        return None
    arch = resnet_arch(state)
    stride = 2 if fc is None or arch != "resnet50" else 1
    found = BackboneSpec(arch, CHANNELS[arch], "none", last_stride=2)
    if fc is not None:
        found = BackboneSpec(arch, int(fc.shape[0]), "fc", last_stride=1 if stride == 1 else 2)
    names = renamed(state, [("fc.", "backbone.neck.fc."), ("classifier.", None), ("", "backbone.trunk.")])
    note = _STRIDE_NOTE.format(stride, f"{arch}{'' if fc is None else '_fc512'}")
    return Plan(
        "torchreid ResNet",
        model_spec(found, PreprocessSpec(), wanted),
        {ours: state[theirs] for ours, theirs in names.items()},
        names,
        aside=("classifier.",),
        notes=() if wanted.last_stride else (note,),
    )
