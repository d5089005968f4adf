"""Weights that others published, brought into a checkpoint: torchreid's OSNet files and torchvision's ResNets."""

from __future__ import annotations

import os
import pickle
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from nformer_edge.core.artifact import sha256_file
from nformer_edge.core.errors import ArtifactError
from nformer_edge.core.spec import BackboneSpec, ModelSpec, PreprocessSpec, to_dict
from nformer_edge.model.backbone import Backbone
from nformer_edge.model.checkpoint import Checkpoint, save_checkpoint

_WIDTHS = {16: "osnet_x0_25", 32: "osnet_x0_5", 48: "osnet_x0_75", 64: "osnet_x1_0"}
_MEND = "Pass a state dictionary as torchreid or torchvision publishes it."


@dataclass(frozen=True)
class Match:
    """What an import found: names in the model's own spelling.

    Args:
        matched: tensors that were loaded.
        left: tensors of the file that have no place (its classifier among them) or another shape.
        missing: tensors of the model that the file does not fill.
    """

    matched: tuple[str, ...]
    left: tuple[str, ...]
    missing: tuple[str, ...]

    def __str__(self) -> str:
        return f"{len(self.matched)} tensors matched, {len(self.left)} left, {len(self.missing)} missing"


def read_state(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The tensors of a `.pth` (read with ``weights_only=True``) or `.safetensors` file, ``module.`` stripped.

    Raises:
        ArtifactError: if the file is missing, damaged, or holds more than tensors.
    """
    if not Path(path).is_file():
        raise ArtifactError(str(path), got="no such file", expected="published weights", mend="Check the path.")
    try:
        if Path(path).suffix == ".safetensors":
            data: object = safetensors.torch.load_file(path)
        else:
            data = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, safetensors.SafetensorError, RuntimeError, OSError, ValueError, EOFError) as e:
        reason = str(e).splitlines()[0] if str(e) else type(e).__name__
        raise ArtifactError(str(path), got=f"unreadable weights ({reason})", expected="tensors only", mend=_MEND) from e
    if isinstance(data, Mapping) and isinstance(data.get("state_dict"), Mapping):
        data = data["state_dict"]
    if not isinstance(data, Mapping):
        raise ArtifactError(str(path), got=type(data).__name__, expected="a state dictionary", mend=_MEND)
    state = {re.sub(r"^module\.", "", str(k)): v for k, v in data.items() if isinstance(v, Tensor)}
    if not state:
        raise ArtifactError(str(path), got="no tensors", expected="a state dictionary", mend=_MEND)
    return state


def import_weights(
    path: str | os.PathLike[str],
    spec: BackboneSpec | None = None,
    preprocess: PreprocessSpec | None = None,
    partial: bool = False,
) -> tuple[Checkpoint, Match]:
    """A published backbone as a checkpoint in memory; `save_checkpoint` writes it.

    Args:
        path: torchreid's OSNet, torchvision's ResNet or IBN-a weights.
        spec: the backbone to fill; None recognises an OSNet with its own fully connected neck by its shapes.
        preprocess: None for 256 x 128, bilinear, ImageNet's mean and deviation, as torchreid tests.
        partial: whether a model that the file fills in part is acceptable.

    Raises:
        ArtifactError: if the file cannot be read or recognised, or fills the model in part and `partial` is False.
    """
    state = read_state(path)
    spec = spec or _recognise(path, state)
    backbone = Backbone(spec)
    match = fill_backbone(backbone, state)
    if match.missing and not partial:
        raise ArtifactError(
            str(path), got=f"{match}; the first missing is {match.missing[0]}", expected=f"all of {spec.arch}",
            mend="Check the architecture, or allow a partial match.",
        )  # fmt: skip
    if not match.matched:
        raise ArtifactError(str(path), got="no tensor that fits", expected=f"weights of {spec.arch}", mend=_MEND)
    model = ModelSpec(spec, None, preprocess or PreprocessSpec())
    extra = {"imported": Path(path).name, "imported_sha256": sha256_file(path)}
    return Checkpoint(model, backbone.eval(), None, extra), match


def import_checkpoint(
    path: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    arch: str | None = None,
    imgsz: Sequence[int] | None = None,
    partial: bool = False,
) -> dict[str, Any]:
    """Writes a published backbone as the checkpoint `out`.

    Args:
        arch: None recognises an OSNet with its own fully connected neck.
        imgsz: height and width of the images; 256 x 128 if None.

    Returns:
        JSON: what matched, what was left over in the file, what the model misses, and the checkpoint's sha256.
    """
    own_neck = arch is None or (arch.startswith("osnet") and "fc.0.weight" in read_state(path))
    spec = None if own_neck else BackboneSpec(arch)  # type: ignore[arg-type]
    preprocess = PreprocessSpec(imgsz[0], imgsz[1]) if imgsz else None
    checkpoint, match = import_weights(path, spec, preprocess, partial)
    if arch is not None and checkpoint.spec.backbone.arch != arch:
        raise ArtifactError(str(path), got=checkpoint.spec.backbone.arch, expected=arch, mend="Name what it holds.")
    digest = save_checkpoint(out, checkpoint.spec, checkpoint.backbone, None, checkpoint.extra)
    return {
        "kind": "import", "checkpoint": str(out), "sha256": digest, "model": to_dict(checkpoint.spec),
        "matched": list(match.matched), "left_over": list(match.left), "missing": list(match.missing),
        "summary": f"wrote {out}: {checkpoint.spec.backbone.arch}, {match}",
    }  # fmt: skip


def fill_backbone(backbone: Backbone, state: Mapping[str, Tensor]) -> Match:
    """Loads what fits by name and shape: trunk names as published, ``fc.*`` into OSNet's own neck."""
    wanted = {k: v for k, v in backbone.state_dict().items() if not k.endswith("num_batches_tracked")}
    found, left = {}, []
    for name, tensor in state.items():
        own = f"neck.{name}" if name.startswith("fc.") else f"trunk.{name}"
        if own in wanted and wanted[own].shape == tensor.shape:
            found[own] = tensor
        elif not name.endswith("num_batches_tracked"):
            left.append(name)
    nn.Module.load_state_dict(backbone, found, strict=False)
    missing = tuple(sorted(wanted.keys() - found.keys()))
    return Match(tuple(sorted(found)), tuple(sorted(left)), missing)


def _recognise(path: str | os.PathLike[str], state: Mapping[str, Tensor]) -> BackboneSpec:
    stem, fc = state.get("conv1.conv.weight"), state.get("fc.0.weight")
    if stem is None or fc is None or stem.shape[0] not in _WIDTHS or fc.dim() != 2:
        raise ArtifactError(
            str(path), got="weights of an unknown network", expected="torchreid's OSNet",
            mend="Say which backbone the weights are for.",
        )  # fmt: skip
    return BackboneSpec(_WIDTHS[stem.shape[0]], int(fc.shape[0]), "fc")  # type: ignore[arg-type]
