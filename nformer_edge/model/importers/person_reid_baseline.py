"""Person_reID_baseline_pytorch's ``ft_net``: a ResNet-50, linear, batch norm. It tests at 256 x 128, bicubic."""

from __future__ import annotations

from nformer_edge.core.spec import BackboneSpec, PreprocessSpec
from nformer_edge.model.importers.plan import Plan, State, Wanted, fold_bias, model_spec, renamed
from nformer_edge.model.importers.resnets import CHANNELS, resnet_arch

_NOTE = "Its last stride is taken to be 2, that project's default; pass --last-stride 1 if it trained with --stride 1."


def plan(state: State, wanted: Wanted) -> Plan | None:
    """``model.*`` (torchvision's names) and ``classifier.add_block.*``."""
    first = state.get("classifier.add_block.0.weight")
    if "model.conv1.weight" not in state or first is None:
        return None
    arch, linear = resnet_arch(state, "model."), first.dim() == 2
    norm = f"classifier.add_block.{int(linear)}."
    places: list[tuple[str, str | None]] = [("model.fc.", None), ("model.", "backbone.trunk.")]
    if linear:
        places += [("classifier.add_block.0.weight", "backbone.neck.projection.weight")]
    names = renamed(state, [*places, (norm, "backbone.neck.bn.")])
    tensors = {ours: state[theirs] for ours, theirs in names.items()}
    folded = fold_bias(tensors, state, "classifier.add_block.0.bias") if linear else frozenset()
    features = len(first) if linear else CHANNELS[arch]
    found = BackboneSpec(arch, features, "bnneck" if linear else "bn", last_stride=2)
    return Plan(
        "Person_reID_baseline_pytorch ft_net",
        model_spec(found, PreprocessSpec(interpolation="bicubic"), wanted),
        tensors,
        names,
        folded,
        aside=("model.fc.", "classifier.classifier."),
        notes=() if wanted.last_stride else (_NOTE,),
    )
