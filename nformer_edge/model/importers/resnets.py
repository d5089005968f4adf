"""Which ResNet a state dictionary holds, under torchvision's names behind some prefix; and torchvision's own files."""

from __future__ import annotations

import re

from nformer_edge.core.errors import ArtifactError
from nformer_edge.core.spec import BackboneSpec, PreprocessSpec
from nformer_edge.model.importers.plan import Plan, State, Wanted, model_spec, renamed

_DEPTHS: dict[tuple[bool, tuple[int, ...]], str] = {(False, (2, 2, 2, 2)): "resnet18", (True, (3, 4, 6, 3)): "resnet50"}
CHANNELS: dict[str, int] = {"resnet18": 512, "resnet50": 2048, "resnet50_ibn_a": 2048}


def resnet_arch(state: State, prefix: str = "") -> str:
    """The architecture by its blocks.

    Raises:
        ArtifactError: for a ResNet that this version does not build.
    """
    blocks = re.compile(re.escape(prefix) + r"layer([1-4])\.(\d+)\.")
    found = {(int(m[1]), int(m[2])) for name in state if (m := blocks.match(name))}
    depths = tuple(sum(stage == i for stage, _ in found) for i in range(1, 5))
    bottleneck = f"{prefix}layer1.0.conv3.weight" in state
    arch = _DEPTHS.get((bottleneck, depths))
    if arch is None:
        raise ArtifactError(
            "weights",
            f"a ResNet of {'bottlenecks' if bottleneck else 'basic blocks'}, {depths} in its layers",
            "resnet18, resnet50 or resnet50_ibn_a",
            "Import weights of one of these.",
        )
    with_ibn = f"{prefix}layer1.0.bn1.IN.weight" in state
    return "resnet50_ibn_a" if with_ibn and arch == "resnet50" else arch


def plan(state: State, wanted: Wanted) -> Plan | None:
    """Torchvision's ResNet, or IBN-Net's under the same names: an ImageNet trunk and its classifier ``fc``."""
    if "layer1.0.conv1.weight" not in state or "conv1.weight" not in state:
        return None
    backbone = wanted.backbone or BackboneSpec(resnet_arch(state))
    classifier = ("fc.weight", "fc.bias")
    names = renamed(state, [*((name, None) for name in classifier), ("", "backbone.trunk.")])
    note = "Its last stride is {} here. The neck is untrained: train the backbone before you rank by it."
    return Plan(
        "torchvision ResNet",
        model_spec(backbone, PreprocessSpec(), wanted),
        {ours: state[theirs] for ours, theirs in names.items()},
        names,
        aside=classifier,
        anew=("backbone.neck.",),
        notes=(note.format(wanted.last_stride or backbone.last_stride),),
    )
