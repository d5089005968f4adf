"""Weights that others published, brought into a checkpoint. Nothing in their files is run.

`model.unpickle` reads PyTorch's files, `model.importers` has one module a project.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from nformer_edge.core.artifact import require_new_file, require_suffix
from nformer_edge.core.errors import ArtifactError, UsageError
from nformer_edge.core.filekind import file_kind
from nformer_edge.core.spec import ModelSpec, PreprocessSpec
from nformer_edge.core.values import Result
from nformer_edge.model.backbone import Backbone
from nformer_edge.model.checkpoint import Checkpoint, save_checkpoint
from nformer_edge.model.importers import fastreid, foreign, person_reid_baseline, resnets, strong_baseline, torchreid
from nformer_edge.model.importers.plan import Plan, Wanted
from nformer_edge.model.nformer import NFormer
from nformer_edge.model.unpickle import Saved, Unreadable, mappings

_LAYOUTS: tuple[Callable[[Mapping[str, Tensor], Wanted], Plan | None], ...] = (
    torchreid.plan,
    torchreid.plan_resnet,
    resnets.plan,
    strong_baseline.plan_nformer,
    strong_baseline.plan,
    fastreid.plan,
    person_reid_baseline.plan,
)
_KNOWN = (
    "OSNet or ResNet of torchreid, torchvision's ResNet, reid-strong-baseline, NFormer, FastReID's BoT, AGW or SBS,"
    " or ft_net of Person_reID_baseline_pytorch"
)
_COUNTER = "num_batches_tracked"
_EMA = re.compile(r"(^|[._ ])(ema|swa|teacher|averaged?|shadow)([._, ]|$)")
_NO_MODEL = re.compile(r"(^|\.)(optimizers?|optimizer_states|optim|schedulers?|lr_schedulers?|scaler|criterion|loss)")


@dataclass(frozen=True)
class Match:
    """What an import found.

    Args:
        layout: whose names these are.
        source: where in the file the tensors stood, and which prefix of their names was taken off; "" if neither.
        matched: tensors of the checkpoint that were filled.
        left: tensors of the file that have no place, or another shape.
        needless: those of `left` that inference does without, such as a training classifier.
        missing: tensors of the checkpoint that the file should fill and does not.
        anew: tensors of the checkpoint that such a file never holds; they start untrained.
        notes: what else there is to know, one sentence each.
    """

    layout: str
    source: str
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


@dataclass(frozen=True)
class Import(Result):
    """Published weights that became a checkpoint.

    Args:
        checkpoint: the file that was written.
        sha256: of that file.
        source_sha256: of the file that was read.
        model: what the checkpoint holds.
        match: which tensors found a place.
    """

    kind: ClassVar[str] = "import"
    version: ClassVar[int] = 2

    checkpoint: str
    sha256: str
    source_sha256: str
    model: ModelSpec
    match: Match

    def __str__(self) -> str:
        match = self.match
        lines = [f"wrote {self.checkpoint}: {self.model.backbone.arch} from {match.layout}, {match}"]
        images, usual = self.model.preprocess, PreprocessSpec()
        if (images.interpolation, images.mean, images.std) != (usual.interpolation, usual.mean, usual.std):
            ways = f"{images.interpolation}, mean {images.mean}, std {images.std}"
            lines.append(f"  images are prepared otherwise than by most ({ways}): a device must do the same")
        for what, names in (
            ("unused, not needed", match.needless),
            ("unused", match.stray),
            ("missing", match.missing),
            ("starts untrained", match.anew),
        ):
            if names:
                more = f" and {len(names) - 4} more" if len(names) > 4 else ""
                lines.append(f"  {what}: {', '.join(names[:4])}{more}")
        return "\n".join(
            [*lines, *(f"  {note}" for note in match.notes), f"  sha256 of the source {self.source_sha256}"]
        )


@dataclass(frozen=True, eq=False)
class Weights:
    """A file's tensors by name.

    Args:
        tensors: of the model, prefixes that all names shared taken off as far as a layout needs it.
        plan: where they go.
        source: as in `Match`.
        notes: as in `Match`.
        sha256: of the file.
    """

    tensors: dict[str, Tensor]
    plan: Plan
    source: str
    notes: tuple[str, ...]
    sha256: str


def read_weights(
    path: str | os.PathLike[str], wanted: Wanted | None = None, *, ema: bool = False, sha256: str | None = None
) -> Weights:
    """The one model that a `.pth` or `.safetensors` file of others holds, at any depth and behind any prefix.

    Args:
        path: the file. It is read once; what is hashed is what is used.
        wanted: what the user says and the file cannot.
        ema: take the averaged weights where the file holds both.
        sha256: refuse another file than this one.

    Raises:
        ArtifactError: for a file of another kind (named by its first bytes), a damaged one, another sha256, no model
            or several, or a model that no layout knows.
    """
    if not Path(path).is_file():
        got = "a folder" if Path(path).is_dir() else "no such file"
        raise ArtifactError(str(path), got, "published weights", "Check the path.")
    if sha256 is not None and not re.fullmatch("[0-9a-fA-F]{64}", sha256):
        raise UsageError("sha256", repr(sha256), "64 hexadecimal digits", "Copy the whole hash: `sha256sum` prints it.")
    data = Path(path).read_bytes()
    digest = hashlib.sha256(data).hexdigest()
    if sha256 is not None and sha256.lower() != digest:
        hint = "Download it again from a source that you trust; nothing in it was opened."
        raise ArtifactError(str(path), f"sha256 {digest}", sha256, hint)
    kind = file_kind(path, data)
    if not kind.weights:
        raise ArtifactError(str(path), kind.name, "published weights (.pth or .safetensors)", kind.hint)
    try:
        if kind.name.startswith("safetensors"):
            found: dict[str, dict[str, Tensor]] = {"": safetensors.torch.load(data)}
        else:
            saved = Saved(data)
            found = {
                place: {name: saved.tensor(view) for name, view in views.items()}
                for place, views in mappings(saved.root).items()
                if not _NO_MODEL.search(place)
            }
    except (Unreadable, safetensors.SafetensorError, ValueError) as e:
        hint = "Download or copy it again; if it stays so, save the model's state_dict() with its own project."
        raise ArtifactError(str(path), str(e), "weights as torch.save or safetensors write them", hint) from e
    return _choose(path, found, wanted or Wanted(), ema, digest)


def _choose(
    path: str | os.PathLike[str], found: dict[str, dict[str, Tensor]], wanted: Wanted, ema: bool, digest: str
) -> Weights:
    """The one mapping of tensors that is a model."""
    models: list[Weights] = []
    for place, tensors in found.items():
        planned = _planned(path, tensors, wanted)
        if planned is not None:
            prefix, state, plan = planned
            source = ", ".join(
                [f"entry {place}"] * bool(place) + [f"prefix {prefix.rstrip('.')} taken off"] * bool(prefix)
            )
            models.append(Weights(state, plan, source, (f"From {source}.",) if source else (), digest))
    if not models:
        raise _unknown(path, found)
    averaged = [m for m in models if _EMA.search(m.source)]
    plain = [m for m in models if not _EMA.search(m.source)]
    if ema and not averaged:
        raise ArtifactError(str(path), "no averaged weights", "an entry such as ema or model_ema", "Leave --ema out.")
    chosen = averaged if ema or not plain else plain
    if len(chosen) > 1:
        got = f"{len(chosen)} models ({'; '.join(m.source for m in chosen)})"
        raise ArtifactError(str(path), got, "one", "Save the state dictionary of one of them alone.")
    if plain and averaged and not ema:
        note = f"The file also holds averaged weights ({averaged[0].source}): --ema takes those."
        return replace(chosen[0], notes=(*chosen[0].notes, note))
    return chosen[0]


def _planned(
    path: str | os.PathLike[str], tensors: dict[str, Tensor], wanted: Wanted
) -> tuple[str, dict[str, Tensor], Plan] | None:
    """The first layout that fits, with the prefix that had to go; None where none fits."""
    state, prefix = {re.sub(r"(^|\.)_orig_mod\.", r"\1", name): t for name, t in tensors.items()}, ""
    while True:
        for layout in _LAYOUTS:
            try:
                plan = layout(state, wanted)
            except ArtifactError as e:
                raise ArtifactError(str(path), e.got, e.expected, e.hint) from e
            if plan is not None:
                return prefix, state, plan
        shared = {name.partition(".")[0] for name in state}
        if len(shared) != 1 or not all("." in name for name in state):
            return None
        (first,) = shared
        prefix, state = f"{prefix}{first}.", {name.removeprefix(f"{first}."): t for name, t in state.items()}


def _unknown(path: str | os.PathLike[str], found: dict[str, dict[str, Tensor]]) -> ArtifactError:
    if not found:
        hint = "Save the model's state dictionary: torch.save(model.state_dict(), 'weights.pth')"
        return ArtifactError(str(path), "no tensors", f"weights of {_KNOWN}", hint)
    state = max(found.values(), key=len)
    named = foreign.name_of(state)
    if named is not None:
        hint = "Only ResNet and OSNet backbones are built here: export it with its own project."
        return ArtifactError(str(path), f"weights of {named}", f"weights of {_KNOWN}", hint)
    got = f"weights of an unknown layout ({len(state)} tensors: {', '.join(list(state)[:3])} ...)"
    return ArtifactError(str(path), got, f"weights of {_KNOWN}", "Rename its tensors as one of these names them.")


def import_weights(
    path: str | os.PathLike[str],
    wanted: Wanted | None = None,
    *,
    partial: bool = False,
    ema: bool = False,
    sha256: str | None = None,
) -> tuple[Checkpoint, Match]:
    """Published weights as a checkpoint in memory; `save_checkpoint` writes it.

    Args:
        path: a file in one of the layouts that `model.importers` knows.
        wanted: what the user says and the file cannot.
        partial: whether a file that fills the model in part, or holds more than the model takes, is acceptable. What
            it does not fill is drawn from a fixed seed, and the notes say so.
        ema: see `read_weights`.
        sha256: see `read_weights`.

    Raises:
        ArtifactError: if the file cannot be read or recognized, holds NaN or Inf, or matches in part and `partial` is
            False.
    """
    weights = read_weights(path, wanted, ema=ema, sha256=sha256)
    plan = weights.plan
    modules = _untrained(plan)
    match = _fill(modules, weights)
    if not match.matched:
        raise ArtifactError(str(path), "no tensor that fits", plan.spec.backbone.arch, f"Pass weights of {_KNOWN}.")
    _check_finite(path, plan, match)
    if not match.whole:
        if not partial:
            first = [f"the first {what} is {names[0]}" for what, names in _incomplete(match) if names]
            hint = "Check the architecture. --partial goes on without them, and then every feature differs."
            if wanted is not None and wanted.features is not None:
                hint = "--features drops the trained neck: leave it out, or add --partial and train before you rank."
            expected = f"all of {plan.spec.backbone.arch} and nothing else"
            raise ArtifactError(str(path), f"{match}; {'; '.join(first)}", expected, hint)
        lacks = " and ".join(f"{len(names)} {what}" for what, names in _incomplete(match) if names)
        note = (
            f"Not the model of the file: {lacks}, so every feature differs from its own. Train before you rank by it."
        )
        match = replace(match, notes=(*match.notes, note))
    extra = {"imported": Path(path).name, "imported_sha256": weights.sha256, "layout": match.layout}
    backbone, found_head = modules["backbone"], modules.get("head")
    assert isinstance(backbone, Backbone), "made above"
    assert found_head is None or isinstance(found_head, NFormer), "made above"
    return Checkpoint(plan.spec, backbone, found_head, extra), match


def _incomplete(match: Match) -> tuple[tuple[str, tuple[str, ...]], ...]:
    return ("missing", match.missing), ("without a place", match.stray)


def _check_finite(path: str | os.PathLike[str], plan: Plan, match: Match) -> None:
    used = {name: plan.tensors[name] for name in match.matched}
    bad = [plan.names.get(name, name) for name, t in used.items() if not bool(torch.isfinite(t).all())]
    if bad:
        hint = "The training diverged or the file is damaged: take an earlier or another copy."
        raise ArtifactError(str(path), f"NaN or Inf in {len(bad)} tensors, first {bad[0]}", "finite weights", hint)


def _untrained(plan: Plan) -> dict[str, nn.Module]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        modules: dict[str, nn.Module] = {"backbone": Backbone(plan.spec.backbone).eval()}
        if plan.spec.head is not None:
            modules["head"] = NFormer(plan.spec.head).eval()
    return modules


def _fill(modules: Mapping[str, nn.Module], weights: Weights) -> Match:
    """Loads what fits by name and shape."""
    plan, state = weights.plan, weights.tensors
    wanted = {f"{part}.{name}": t for part, module in modules.items() for name, t in module.state_dict().items()}
    found = {name: t for name, t in plan.tensors.items() if name in wanted and wanted[name].shape == t.shape}
    for part, module in modules.items():
        prefix = f"{part}."
        module.load_state_dict(
            {n.removeprefix(prefix): t for n, t in found.items() if n.startswith(prefix)}, strict=False
        )
    used = {plan.names[name] for name in found if name in plan.names} | plan.folded
    left = sorted(name for name in state if name not in used and not name.endswith(_COUNTER))
    open_ = sorted(name for name in wanted if name not in found and not name.endswith(_COUNTER))
    anew = tuple(name for name in open_ if name.startswith(plan.anew))
    return Match(
        plan.layout,
        weights.source,
        tuple(sorted(name for name in found if not name.endswith(_COUNTER))),
        tuple(left),
        tuple(name for name in left if name.startswith(plan.aside)),
        tuple(n for n in open_ if n not in anew),
        anew,
        (*weights.notes, *plan.notes),
    )


def import_checkpoint(
    path: str | os.PathLike[str],
    out: str | os.PathLike[str],
    wanted: Wanted | None = None,
    *,
    arch: str | None = None,
    imgsz: Sequence[int] | None = None,
    partial: bool = False,
    ema: bool = False,
    sha256: str | None = None,
    force: bool = False,
) -> Import:
    """Writes published weights as the checkpoint `out`.

    Args:
        path: see `import_weights`, as for `wanted`, `partial`, `ema` and `sha256`.
        out: a `.safetensors` file.
        arch: what the file must hold; None takes what it holds.
        imgsz: height and width of the images; those that the project tests with if None.
        force: replace an earlier file.

    Raises:
        UsageError: if `out` is not named as a checkpoint.
        ArtifactError: as `import_weights` does, if there is something at `out`, or if the file holds another
            architecture than `arch`.
    """
    require_suffix(out, ".safetensors")
    require_new_file(out, "a checkpoint", force)
    checkpoint, match = import_weights(path, wanted, partial=partial, ema=ema, sha256=sha256)
    found = checkpoint.spec
    if arch is not None and found.backbone.arch != arch:
        raise ArtifactError(str(path), found.backbone.arch, arch, "Leave --arch out: the file says what it holds.")
    if imgsz:
        found = replace(found, preprocess=replace(found.preprocess, height=imgsz[0], width=imgsz[1]))
    digest = save_checkpoint(out, found, checkpoint.backbone, checkpoint.head, checkpoint.extra)
    return Import(str(out), digest, str(checkpoint.extra["imported_sha256"]), found, match)
