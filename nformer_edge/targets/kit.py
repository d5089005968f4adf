"""Kits: what a program of others needs to run a model, filled in from its manifest. Templates are `export/NAME/`."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from nformer_edge.backends.engine import Engine
from nformer_edge.backends.open import open_files
from nformer_edge.backends.runner import model_name
from nformer_edge.core.artifact import (
    MANIFEST,
    SIGNATURE,
    atomic_folder,
    read_text,
    require_new,
    sha256_file,
    write_manifest,
)
from nformer_edge.core.machine import shipped
from nformer_edge.core.spec import check_choice
from nformer_edge.core.values import Written
from nformer_edge.exporting.bundle import BACKBONE, HEAD, Bundle, ModelFiles

KIND = "kit"

#: Where the model's own folder lies in a kit, verified and whole.
MODEL = "model"

_PLACEHOLDER = re.compile(r"@([A-Z][A-Z0-9_]*)@")


@dataclass(frozen=True)
class Filling:
    """What is particular to one kit of one model.

    Args:
        words: for placeholders, besides those that every kit may have.
        files: of the model, by the place where the kit has them, too.
        left_out: folders of the template that this model does not need.
    """

    words: Mapping[str, str] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()


def write_kit(
    name: str, model: str | os.PathLike[str] | Bundle | Engine, out: str | os.PathLike[str], *, force: bool = False
) -> Written:
    """Writes the kit `name` of a model: its README, configurations and programs, and the model's verified files.

    Args:
        name: one of `KITS`.
        model: folder of a bundle or an engine.
        out: folder, written whole or not at all.
        force: replace an earlier kit.

    Raises:
        UsageError: for another name (with the nearest spelling).
        ArtifactError: if the model does not verify, or there is something at `out`.
    """
    check_choice("kit", name, tuple(KITS))
    require_new(out, KIND, force)
    opened = model if isinstance(model, (Bundle, Engine)) else open_files(model)
    filling, template = KITS[name](opened), shipped(f"export/{name}")
    with atomic_folder(out, KIND) as folder:
        (folder / MODEL).mkdir()
        for file in (*opened.files.files, *(n for n in (MANIFEST, SIGNATURE) if (opened.folder / n).is_file())):
            shutil.copyfile(opened.folder / file, folder / MODEL / file)
        opened = open_files(folder / MODEL)  # what was copied is what is verified
        words = _words(opened) | {"MANIFEST_SHA256": sha256_file(folder / MODEL / MANIFEST), **filling.words}
        for source in sorted(p for p in template.rglob("*") if p.is_file() and p.suffix != ".pyc"):
            place = source.relative_to(template)
            if not any(place.is_relative_to(left) for left in filling.left_out):
                (folder / place).parent.mkdir(parents=True, exist_ok=True)
                (folder / place).write_text(_PLACEHOLDER.sub(lambda found: words[found[1]], read_text(source)))
        for copy, file in filling.files.items():
            (folder / copy).parent.mkdir(parents=True, exist_ok=True)
            (folder / copy).write_bytes(opened.files.files[file])
        write_manifest(folder, KIND, {"name": name, "model_sha256": opened.sha256})
    return Written(Path(out))


def _words(model: ModelFiles) -> dict[str, str]:
    """What every kit may say of a model."""
    spec, preprocess = model.spec, model.spec.preprocess
    profiles = model.manifest.profiles if isinstance(model, Engine) else {}
    batches = profiles.get("backbone", {}).get("images", ())
    return {
        "NAME": model_name(spec),
        "KIND": model.files.kind,
        "PRECISION": model.precision["backbone"],
        "HEIGHT": str(preprocess.height),
        "WIDTH": str(preprocess.width),
        "FEATURES": str(spec.backbone.features),
        "MAX_BATCH": str(batches[-1][0] if batches else 32),
        "DIMS": ", ".join(map(str, preprocess.shape)),
        "DTYPE": {"float32": "FP32", "uint8": "UINT8"}[preprocess.dtype],
    }


def _plans(model: ModelFiles) -> tuple[str, str]:
    """Backbone and head as TensorRT reads them; "" where they are ONNX files."""
    found = [Path(name).with_suffix(".engine").name for name in (BACKBONE, HEAD)]
    backbone, head = (name if name in model.files.files else "" for name in found)
    return backbone, head


def _triton(model: ModelFiles) -> Filling:
    plan, head_plan = _plans(model)
    backend, file = ("tensorrt", "model.plan") if plan else ("onnxruntime", "model.onnx")
    files = {f"models/backbone/1/{file}": plan or BACKBONE}
    words = {"BACKEND": backend, "PLACE": "KIND_GPU" if plan else "KIND_CPU"}
    if model.spec.head is None:
        return Filling(words, files, ("models/nformer",))
    return Filling(
        {**words, "LAYERS": str(model.spec.head.layers)}, files | {f"models/nformer/1/{file}": head_plan or HEAD}
    )


#: Kits by name, a folder of `export/` each.
KITS: dict[str, Callable[[ModelFiles], Filling]] = {"triton": _triton}
