"""Weights that others published, brought into a checkpoint. Nothing in their files is run.

`model.importers` has one module a layout: torchreid's OSNet, torchvision's ResNet, reid-strong-baseline, the published
NFormer and FastReID's BoT.
"""

from __future__ import annotations

import os
import pickle
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from nformer_edge.core.artifact import sha256_file
from nformer_edge.core.errors import ArtifactError
from nformer_edge.core.spec import BackboneSpec, PreprocessSpec, to_dict
from nformer_edge.model.backbone import Backbone
from nformer_edge.model.checkpoint import Checkpoint, save_checkpoint
from nformer_edge.model.importers import fastreid, resnets, strong_baseline, torchreid
from nformer_edge.model.importers.plan import Plan, Wanted
from nformer_edge.model.nformer import NFormer

_LAYOUTS = (torchreid.plan, resnets.plan, strong_baseline.plan_nformer, strong_baseline.plan, fastreid.plan)
_KNOWN = "torchreid's OSNet, torchvision's ResNet, reid-strong-baseline, the published NFormer or FastReID's BoT"
_MEND = f"Pass a state dictionary of {_KNOWN}."
_WRAPPERS = ("state_dict", "model", "net", "model_state_dict")
_COUNTER = "num_batches_tracked"


@dataclass(frozen=True)
class Match:
    """What an import found.

    Args:
        layout: whose names these are.
        matched: tensors of the checkpoint that were filled.
        left: tensors of the file that have no place, or another shape.
        needless: those of `left` that inference does without, such as a training classifier.
        missing: tensors of the checkpoint that the file should fill and does not.
        anew: tensors of the checkpoint that such a file never holds; they start untrained.
        notes: what else there is to know, one sentence each.
    """

    layout: str
    matched: tuple[str, ...]
    left: tuple[str, ...]
    needless: tuple[str, ...]
    missing: tuple[str, ...]
    anew: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def stray(self) -> tuple[str, ...]:
        """What is left over and may matter."""
        return tuple(name for name in self.left if name not in self.needless)

    @property
    def whole(self) -> bool:
        """Whether nothing that matters is missing or left over."""
        return not self.missing and not self.stray

    def __str__(self) -> str:
        return f"{len(self.matched)} tensors matched, {len(self.left)} unused, {len(self.missing)} missing"


def read_state(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The tensors of a `.pth` (read with ``weights_only=True``) or `.safetensors` file, ``module.`` stripped.

    Raises:
        ArtifactError: if the file is missing, damaged, or holds more than tensors.
    """
    if not Path(path).is_file():
        raise ArtifactError(str(path), "no such file", "published weights", "Check the path.")
    try:
        if Path(path).suffix == ".safetensors":
            data: object = safetensors.torch.load_file(path)
        else:
            data = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as e:
        raise ArtifactError(
            str(path),
            f"a pickle of more than tensors, or none ({_first_line(e)})",
            "tensors only",
            "If it is a whole pickled model, load it with its own project and save its state_dict().",
        ) from e
    except (safetensors.SafetensorError, RuntimeError, OSError, ValueError, EOFError) as e:
        raise ArtifactError(str(path), f"unreadable weights ({_first_line(e)})", "tensors only", _MEND) from e
    for wrapper in _WRAPPERS:
        if isinstance(data, Mapping) and isinstance(data.get(wrapper), Mapping):
            data = data[wrapper]
            break
    if not isinstance(data, Mapping):
        raise ArtifactError(str(path), type(data).__name__, "a state dictionary", _MEND)
    state = {re.sub(r"^module\.", "", str(k)): v for k, v in data.items() if isinstance(v, Tensor)}
    if not state:
        raise ArtifactError(str(path), "no tensors", "a state dictionary", _MEND)
    return state


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def import_weights(
    path: str | os.PathLike[str],
    spec: BackboneSpec | None = None,
    preprocess: PreprocessSpec | None = None,
    partial: bool = False,
    stem: str | None = None,
    features: int | None = None,
    head: Mapping[str, object] | None = None,
) -> tuple[Checkpoint, Match]:
    """Published weights as a checkpoint in memory; `save_checkpoint` writes it.

    Args:
        path: a file in one of the layouts that `model.importers` knows.
        spec: the backbone to fill; None takes what the file holds.
        preprocess: None for what the project tests with.
        partial: whether a file that fills the model in part, or holds more than the model takes, is acceptable. What
            it does not fill is drawn from a fixed seed.
        stem: of a ResNet, where the file does not tell (`core.spec.BackboneSpec`).
        features: project to so many in a ``bnneck`` of our own, whatever neck the file holds.
        head: fields of `HeadSpec` that are in no tensor, where they are not the published ones.

    Raises:
        ArtifactError: if the file cannot be read or recognized, or matches in part and `partial` is False.
    """
    state = read_state(path)
    plan = _plan(path, state, Wanted(spec, preprocess, stem, head or {}))
    if features is not None:
        own_neck = replace(plan.spec.backbone, neck="bnneck", features=features)
        plan = _plan(path, state, Wanted(own_neck, preprocess, stem, head or {}))
    modules = _untrained(plan)
    match = _fill(modules, plan, state)
    if not match.matched:
        raise ArtifactError(str(path), "no tensor that fits", plan.spec.backbone.arch, _MEND)
    if not match.whole and not partial:
        first = [f"{what} is {names[0]}" for what, names in _incomplete(match) if names]
        raise ArtifactError(
            str(path),
            f"{match}; {'; '.join(first)}",
            f"all of {plan.spec.backbone.arch} and nothing else",
            "Check the architecture, or allow a partial match with --partial.",
        )
    extra = {"imported": Path(path).name, "imported_sha256": sha256_file(path), "layout": match.layout}
    backbone, found_head = modules["backbone"], modules.get("head")
    assert isinstance(backbone, Backbone), "made above"
    assert found_head is None or isinstance(found_head, NFormer), "made above"
    return Checkpoint(plan.spec, backbone, found_head, extra), match


def _incomplete(match: Match) -> tuple[tuple[str, tuple[str, ...]], ...]:
    return ("the first missing", match.missing), ("the first without a place", match.stray)


def _plan(path: str | os.PathLike[str], state: dict[str, Tensor], wanted: Wanted) -> Plan:
    for layout in _LAYOUTS:
        try:
            plan = layout(state, wanted)
        except ArtifactError as e:
            raise ArtifactError(str(path), e.got, e.expected, e.hint) from e
        if plan is not None:
            return plan
    raise ArtifactError(
        str(path),
        f"weights of an unknown layout (such as {next(iter(state))})",
        _KNOWN,
        "Rename its tensors as one of these names them.",
    )


def _untrained(plan: Plan) -> dict[str, nn.Module]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        modules: dict[str, nn.Module] = {"backbone": Backbone(plan.spec.backbone).eval()}
        if plan.spec.head is not None:
            modules["head"] = NFormer(plan.spec.head).eval()
    return modules


def _fill(modules: Mapping[str, nn.Module], plan: Plan, state: Mapping[str, Tensor]) -> Match:
    """Loads what fits by name and shape."""
    wanted = {f"{part}.{name}": t for part, module in modules.items() for name, t in module.state_dict().items()}
    found = {name: t for name, t in plan.tensors.items() if name in wanted and wanted[name].shape == t.shape}
    for part, module in modules.items():
        prefix = f"{part}."
        module.load_state_dict(
            {n.removeprefix(prefix): t for n, t in found.items() if n.startswith(prefix)}, strict=False
        )
    used = {plan.names[name] for name in found} | plan.folded
    left = sorted(name for name in state if name not in used and not name.endswith(_COUNTER))
    open_ = sorted(name for name in wanted if name not in found and not name.endswith(_COUNTER))
    anew = tuple(name for name in open_ if name.startswith(plan.anew))
    return Match(
        plan.layout,
        tuple(sorted(name for name in found if not name.endswith(_COUNTER))),
        tuple(left),
        tuple(name for name in left if name.startswith(plan.aside)),
        tuple(n for n in open_ if n not in anew),
        anew,
        plan.notes,
    )


def import_checkpoint(
    path: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    arch: str | None = None,
    imgsz: Sequence[int] | None = None,
    partial: bool = False,
    stem: str | None = None,
    features: int | None = None,
    head: Mapping[str, object] | None = None,
) -> dict[str, Any]:
    """Writes published weights as the checkpoint `out`.

    Args:
        arch: what the file must hold; None takes what it holds.
        imgsz: height and width of the images; those that the project tests with if None.
        partial, stem, features, head: see `import_weights`.

    Returns:
        JSON of kind ``import``: layout, what matched, what was left over in the file and which of it inference does
        without, what the model misses, what starts anew, notes, and the checkpoint's sha256.

    Raises:
        ArtifactError: as `import_weights` does, or if the file holds another architecture than `arch`.
    """
    checkpoint, match = import_weights(path, None, None, partial, stem, features, head)
    found = checkpoint.spec
    if arch is not None and found.backbone.arch != arch:
        raise ArtifactError(str(path), found.backbone.arch, arch, "Name what it holds.")
    if imgsz:
        shape = replace(found.preprocess, height=imgsz[0], width=imgsz[1])
        checkpoint = replace(checkpoint, spec=replace(checkpoint.spec, preprocess=shape))
    digest = save_checkpoint(out, checkpoint.spec, checkpoint.backbone, checkpoint.head, checkpoint.extra)
    return {
        "kind": "import",
        "checkpoint": str(out),
        "sha256": digest,
        "layout": match.layout,
        "model": to_dict(checkpoint.spec),
        "matched": list(match.matched),
        "left_over": list(match.left),
        "not_needed": list(match.needless),
        "missing": list(match.missing),
        "starts_anew": list(match.anew),
        "notes": list(match.notes),
        "summary": f"wrote {out}: {found.backbone.arch} from {match.layout}, {match}",
    }


def format_import(result: dict[str, Any]) -> str:
    """What `import_checkpoint` found, as text: a line for each kind of tensor, the first few by name."""
    lines = [result["summary"]]
    stray = [name for name in result["left_over"] if name not in result["not_needed"]]
    for what, names in (
        ("unused, not needed", result["not_needed"]),
        ("unused", stray),
        ("missing", result["missing"]),
        ("starts untrained", result["starts_anew"]),
    ):
        if names:
            lines.append(f"  {what}: {', '.join(names[:4])}{f' and {len(names) - 4} more' if len(names) > 4 else ''}")
    return "\n".join([*lines, *(f"  {note}" for note in result["notes"])])
