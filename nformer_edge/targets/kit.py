"""Kits: what a program of others needs to run a model, filled in from its manifest. Templates are `export/NAME/`."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from nformer_edge import __version__
from nformer_edge.backends.engine import Engine
from nformer_edge.backends.open import open_files
from nformer_edge.backends.runner import model_name
from nformer_edge.backends.tensorrt.build import NAME as TENSORRT
from nformer_edge.core.artifact import (
    MANIFEST,
    SIGNATURE,
    atomic_folder,
    read_text,
    require_new,
    sha256_file,
    write_manifest,
)
from nformer_edge.core.errors import BackendError, UsageError
from nformer_edge.core.machine import shipped
from nformer_edge.core.spec import PreprocessSpec, check_choice
from nformer_edge.core.values import Written
from nformer_edge.exporting.bundle import BACKBONE, HEAD, Bundle, ModelFiles
from nformer_edge.exporting.session import ONNXRUNTIME

KIND = "kit"

#: Where the model's own folder lies in a kit, verified and whole.
MODEL = "model"

_PLACEHOLDER = re.compile(r"@([A-Z][A-Z0-9_]*)@")


@dataclass(frozen=True)
class Filling:
    """What is particular to one kit of one model.

    Args:
        words: for placeholders, besides those that every kit may have.
        files: besides the model's own, by their place in the kit.
        left_out: folders of the template that this model does not need.
        parts: folders of `export/` besides the kit's own.
    """

    words: Mapping[str, str] = field(default_factory=dict)
    files: Mapping[str, bytes] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()
    parts: tuple[str, ...] = ()


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
        UsageError: for another name (with the nearest spelling), or a model that this kit cannot run.
        BackendError: if onnx is missing, which `deepstream` needs for a graph that takes pixels.
        ArtifactError: if the model does not verify, or there is something at `out`.
    """
    check_choice("kit", name, tuple(KITS))
    require_new(out, KIND, force)
    opened = model if isinstance(model, (Bundle, Engine)) else open_files(model)
    filling = KITS[name](opened)
    with atomic_folder(out, KIND) as folder:
        (folder / MODEL).mkdir()
        for file in (*opened.files.files, *(n for n in (MANIFEST, SIGNATURE) if (opened.folder / n).is_file())):
            shutil.copyfile(opened.folder / file, folder / MODEL / file)
        opened = open_files(folder / MODEL)  # what was copied is what is verified
        words = _words(opened) | {"MANIFEST_SHA256": sha256_file(folder / MODEL / MANIFEST), **filling.words}
        for template in (shipped(f"export/{part}") for part in (name, *filling.parts)):
            for source in sorted(p for p in template.rglob("*") if p.is_file() and p.suffix != ".pyc"):
                place = source.relative_to(template)
                if not any(place.is_relative_to(left) for left in filling.left_out):
                    (folder / place).parent.mkdir(parents=True, exist_ok=True)
                    (folder / place).write_text(_PLACEHOLDER.sub(lambda found: words[found[1]], read_text(source)))
        for place_in_kit, data in filling.files.items():
            (folder / place_in_kit).parent.mkdir(parents=True, exist_ok=True)
            (folder / place_in_kit).write_bytes(data)
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
    backend, file = (TENSORRT, "model.plan") if plan else (ONNXRUNTIME, "model.onnx")
    words = {"BACKEND": backend, "PLACE": "KIND_GPU" if plan else "KIND_CPU"}
    files = {f"models/backbone/1/{file}": model.files.files[plan or BACKBONE]}
    if model.spec.head is None:
        return Filling(words, files, left_out=("models/nformer",))
    files[f"models/nformer/1/{file}"] = model.files.files[head_plan or HEAD]
    return Filling({**words, "LAYERS": str(model.spec.head.layers)}, files)


def _deepstream(model: ModelFiles) -> Filling:
    """DeepStream runs TensorRT alone, and hands floats to the graph: y = scale * (x - offset), x from 0 to 255."""
    plan, preprocess = _plans(model)[0], model.spec.preprocess
    pixels = preprocess.pixels
    if isinstance(model, Engine) and (not plan or pixels is not None):
        got = f"an engine for {model.manifest.backend}" if not plan else "a plan that takes uint8"
        hint = "Pass the bundle: DeepStream builds its own plan."
        raise UsageError("model", got, "a bundle, or a TensorRT engine that takes float32", hint)
    scale, offsets = 1.0, [0.0, 0.0, 0.0]
    if pixels is None:
        scale, offsets = 1 / (255 * sum(preprocess.std) / 3), [255 * mean for mean in preprocess.mean]
    numbers = [f"{x:.6g}" for x in offsets]
    words = {
        "LOSS": _loss(preprocess),
        "GRAPH_KEY": "model-engine-file" if plan else "onnx-file",
        "TRACKER_KEY": "modelEngineFile" if plan else "onnxFile",
        "GRAPH": f"{MODEL}/{plan}" if plan else BACKBONE,
        "BUILD": _PLAN if plan else _NO_PLAN,
        "NVINFER_MODE": {"int8": "1", "fp16": "2"}.get(model.precision["backbone"], "0") if plan else "2",
        "TRACKER_MODE": {"int8": "2", "fp16": "1"}.get(model.precision["backbone"], "0") if plan else "1",
        "INFER_DIMS": f"3, {preprocess.height}, {preprocess.width}",
        "INFER_DIMS_SEMICOLON": f"3;{preprocess.height};{preprocess.width}",
        "ORDER": "1" if pixels and pixels.layout == "NHWC" else "0",
        "COLOR": "1" if (pixels or preprocess).channels == "BGR" else "0",
        "SCALE": f"{scale:.8g}",
        "OFFSETS": ", ".join(numbers),
        "OFFSETS_SEMICOLON": ";".join(numbers),
        "NORMALIZE": "0" if model.spec.unit_features else "1",
    }
    return Filling(words, {} if plan else {BACKBONE: _of_floats(model.backbone) if pixels else model.backbone})


_PLAN = "The plan is built for one GPU and one TensorRT version; DeepStream must have the same (9.2: 10.16)."
_NO_PLAN = (
    "At the first start TensorRT builds a plan in FP16 beside the ONNX file, which takes minutes. Nothing checks it: "
    "compare features of some crops with those of `nformer-edge embed`."
)


def _loss(preprocess: PreprocessSpec) -> str:
    if preprocess.pixels is not None:
        return "Here the graph itself normalizes with three deviations: scale 1, offset 0, nothing is lost."
    if len(set(preprocess.std)) == 1:
        return "Here the three channels have one deviation: nothing is lost."
    return (
        "It has one scale for three channels, here of their mean deviation: cosine 0.995 (mean) and 0.968 (min) to "
        "the exact features (OSNet x0.25, 225 queries of Market-1501). A bundle of `export --input uint8` loses none."
    )


def _of_floats(graph: bytes) -> bytes:
    """A backbone that takes pixels as uint8, which takes them as floats: nvinfer has no other input."""
    try:
        import onnx
    except ImportError as e:
        hint = "pip install 'nformer-edge[graphs]'"
        raise BackendError("kit deepstream", "no onnx here", "it, to let the graph take floats", hint) from e
    model = onnx.load_from_string(graph)
    model.graph.input[0].type.tensor_type.elem_type = onnx.TensorProto.FLOAT  # its first Cast then does nothing
    onnx.checker.check_model(model, full_check=True)
    data: bytes = model.SerializeToString()
    return data


def _docker(model: ModelFiles) -> Filling:
    plan = bool(_plans(model)[0])
    extra = "cpu" if not isinstance(model, Engine) or model.manifest.backend == ONNXRUNTIME else model.manifest.backend
    chosen, other = ("jetson", "server") if plan else ("server", "jetson")
    words = {"DOCKERFILE": f"{chosen}.Dockerfile", "GPU": "--runtime nvidia " if plan else "", "EXTRA": extra}
    return Filling({**words, "VERSION": __version__}, left_out=(f"{other}.Dockerfile",))


#: Kits by name, a folder of `export/` each.
KITS: dict[str, Callable[[ModelFiles], Filling]] = {
    "triton": _triton,
    "cpp": lambda _: Filling(parts=("c",)),
    "web": lambda _: Filling(),
    "deepstream": _deepstream,
    "docker": _docker,
}
