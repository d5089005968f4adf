"""Torchreid's OSNet (Zhou et al., ICCV 2019): trunk, its own fully connected neck, a training classifier."""

from __future__ import annotations

from nformer_edge.core.errors import ArtifactError
from nformer_edge.core.spec import BackboneSpec, PreprocessSpec
from nformer_edge.model.importers.plan import Plan, State, Wanted, model_spec, renamed

_WIDTHS: dict[int, str] = {16: "osnet_x0_25", 32: "osnet_x0_5", 48: "osnet_x0_75", 64: "osnet_x1_0"}


def plan(state: State, wanted: Wanted) -> Plan | None:
    """OSNet x0.25 to x1.0 as torchreid saves it; 256 x 128, bilinear, as it tests."""
    stem, fc = state.get("conv1.conv.weight"), state.get("fc.0.weight")
    if stem is None:
        return None
    backbone = wanted.backbone
    if backbone is None:
        if stem.shape[0] not in _WIDTHS or fc is None or fc.dim() != 2:
            raise ArtifactError(
                "weights",
                f"an OSNet with {stem.shape[0]} channels in its first convolution",
                "x0.25, x0.5, x0.75 or x1.0 with its fully connected layer",
                "Import one of these.",
            )
        backbone = BackboneSpec(_WIDTHS[stem.shape[0]], int(fc.shape[0]), "fc")
    neck = "backbone.neck.fc." if backbone.neck == "fc" else None
    names = renamed(state, [("fc.", neck), ("classifier.", None), ("", "backbone.trunk.")])
    return Plan(
        "torchreid OSNet",
        model_spec(backbone, PreprocessSpec(), wanted, None),
        {ours: state[theirs] for ours, theirs in names.items()},
        names,
        aside=("classifier.",),
    )
