"""Checkpoints: one `.safetensors` file with the model's spec and its own hash inside. No pickle, no code."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn

from nformer_edge.core.artifact import sha256_file
from nformer_edge.core.errors import ArtifactError, Error
from nformer_edge.core.spec import ModelSpec, from_dict, to_dict
from nformer_edge.core.values import JSON
from nformer_edge.model.backbone import Backbone
from nformer_edge.model.gated import Head, make_head
from nformer_edge.model.tensorfile import TensorFile

_HINT = "Pass the file that `nformer-edge train` or `import` wrote."
_FILE = TensorFile("nformer-edge-checkpoint", "a checkpoint (.safetensors)", _HINT)


@dataclass(frozen=True)
class Checkpoint:
    """A model read back, in evaluation mode on the CPU.

    Args:
        spec: what the model is; `spec.head` is None exactly where `head` is.
        backbone: None for a head alone.
        head: None for a backbone alone.
        extra: whatever JSON the writer left, such as the training's history.
        sha256: of the whole file: what later artifacts cite.
    """

    spec: ModelSpec
    backbone: Backbone | None
    head: Head | None
    extra: Mapping[str, JSON] = field(default_factory=dict)
    sha256: str = ""


def save_checkpoint(
    path: str | os.PathLike[str],
    spec: ModelSpec,
    backbone: Backbone | None = None,
    head: Head | None = None,
    extra: Mapping[str, JSON] | None = None,
) -> str:
    """Writes a checkpoint atomically: a killed run leaves the old file or the new one.

    Returns:
        The file's sha256.

    Raises:
        ArtifactError: if the spec says other than what is given, or the disk is full.
    """
    if (spec.head is None) != (head is None) or (head is not None and head.spec != spec.head):
        raise ArtifactError(str(path), "a head that the spec does not name", str(spec.head), "Pass matching parts.")
    if backbone is not None and backbone.spec != spec.backbone:
        raise ArtifactError(str(path), f"a backbone {backbone.spec}", str(spec.backbone), "Pass matching parts.")
    tensors: dict[str, Tensor] = {}
    for prefix, module in (("backbone", backbone), ("head", head)):
        if module is not None:
            tensors |= {f"{prefix}.{k}": v for k, v in module.state_dict().items()}
    text = json.dumps(to_dict(spec), sort_keys=True), json.dumps(extra or {}, sort_keys=True, allow_nan=False)
    _FILE.write(path, tensors, {"spec": text[0], "extra": text[1]})
    return sha256_file(path)


def load_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Reads a checkpoint and verifies it: its own hash, its spec, and that every tensor is there with its shape.

    Raises:
        ArtifactError: naming what does not hold.
    """
    tensors, metadata = _FILE.read(path)
    try:
        spec = from_dict(ModelSpec, json.loads(metadata["spec"]))
        extra = json.loads(metadata["extra"])
    except (Error, KeyError, ValueError, RecursionError) as e:
        got, hint = f"an unreadable spec ({e})", "Train again with this version."
        raise ArtifactError(str(path), got, "this version's", hint) from e
    backbone = head = None
    if any(name.startswith("backbone.") for name in tensors):
        backbone = Backbone(spec.backbone).eval()
        _fill(path, backbone, tensors, "backbone.")
    if spec.head is not None:
        head = make_head(spec.head).eval()
        _fill(path, head, tensors, "head.")
    return Checkpoint(spec, backbone, head, extra, sha256_file(path))


def _fill(path: str | os.PathLike[str], module: nn.Module, tensors: dict[str, Tensor], prefix: str) -> None:
    state = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
    wanted = module.state_dict()
    missing = sorted(wanted.keys() - state.keys())
    unknown = sorted(state.keys() - wanted.keys())
    wrong = sorted(name for name in wanted.keys() & state.keys() if wanted[name].shape != state[name].shape)
    for what, names in (("no tensor", missing), ("an unknown tensor", unknown), ("another shape for", wrong)):
        if names:
            got = f"{what} {prefix}{names[0]} ({len(names)} such)"
            raise ArtifactError(str(path), got, "its spec's tensors", "Train or import it again.")
    module.load_state_dict(state)
