"""One door for whatever was handed on: a checkpoint, a bundle or an engine."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np

from nformer_edge.backends.base import PYTORCH, get, names
from nformer_edge.backends.engine import KIND as ENGINE
from nformer_edge.backends.engine import Engine, open_engine
from nformer_edge.backends.runner import Runner
from nformer_edge.backends.spec import AUTO
from nformer_edge.core.artifact import MANIFEST
from nformer_edge.core.errors import ArtifactError, BackendError, UsageError
from nformer_edge.core.filekind import FileKind, file_kind
from nformer_edge.exporting.bundle import KIND as BUNDLE
from nformer_edge.exporting.bundle import Bundle, open_bundle

#: How alike a part's output must be to what it gave when it was made: cosine, by precision as built.
_SELF_TEST_COSINE = {"fp32": 0.99999, "fp16": 0.9995, "int8": 0.99}


def open_model(
    path: str | os.PathLike[str],
    *,
    backend: str = "auto",
    device: str | None = None,
    intra_op_threads: int | None = None,
    contexts: int | None = None,
    reference: bool = False,
    native: bool = True,
) -> Runner:
    """Opens a model by what lies at `path`: a `.safetensors` checkpoint, a bundle's folder or an engine's folder.

    Args:
        path: the model.
        backend: ``auto``, or the one that must run it, such as ``onnxruntime``.
        device: ``cpu``, or a GPU such as ``cuda:0``. None: the CPU, or for a TensorRT engine the first GPU.
        intra_op_threads: CPU threads of one forward pass; the backend's own choice if None.
        contexts: of a TensorRT engine, threads of the caller that compute at once: each takes the memory of one
            execution context. Two if None.
        reference: a checkpoint runs layer by layer, nothing folded, to judge engines by.
        native: the head's two operators run in the native kernels where they are compiled; otherwise as plain torch
            or as the standard operators of the file's own bodies.

    Raises:
        ArtifactError: if it is damaged, or none of these.
        BackendError: if its backend is not installed here, or is not the one asked for.
        UsageError: for a device, threads or contexts that this kind of model does not have.
    """
    path = Path(path)
    if not path.is_dir() and path.suffix != ".safetensors":
        found = FileKind("no such file or folder", "Make one with `nformer-edge train`, `export` or `build-engine`.")
        found = file_kind(path) if path.exists() else found
        raise ArtifactError(str(path), found.name, "a checkpoint (.safetensors), a bundle or an engine", found.hint)
    if not path.is_dir():
        _refuse_other(path, "checkpoint", PYTORCH, backend)
        if contexts is not None:
            hint = "Set intra_op_threads: CPU threads of one forward pass."
            raise UsageError("contexts", contexts, "nothing for a checkpoint", hint)
        return _open_checkpoint(path, intra_op_threads, device, reference, native)
    model = open_files(path)
    runs_on = model.manifest.backend if isinstance(model, Engine) else names()[-1]  # ONNX files run on any machine
    _refuse_other(path, model.files.kind, runs_on, backend)
    return get(runs_on).run(model, device=device, intra_op_threads=intra_op_threads, contexts=contexts, native=native)


def _refuse_other(path: Path, kind: str, runs_on: str, backend: str) -> None:
    if backend not in (AUTO, runs_on):
        hint = f"Build one: nformer-edge build-engine --backend {backend}"
        raise BackendError(str(path), f"a {kind} that {runs_on} runs", f"one for {backend}", hint)


def _open_checkpoint(
    path: Path, intra_op_threads: int | None, device: str | None, reference: bool, native: bool
) -> Runner:
    try:
        from nformer_edge.backends.torch import TorchRunner
    except ImportError as e:
        hint = "pip install 'nformer-edge[train]', or pass a bundle or an engine."
        expected = "PyTorch and safetensors, to run a checkpoint"
        raise BackendError(str(path), f"no {e.name} here", expected, hint) from e
    return TorchRunner(path, device=device, intra_op_threads=intra_op_threads, reference=reference, native=native)


def open_files(path: str | os.PathLike[str]) -> Bundle | Engine:
    """A bundle or an engine, by what its manifest says, verified.

    Raises:
        ArtifactError: if it is damaged, or neither.
    """
    path = Path(path)
    try:
        kind = json.loads((path / MANIFEST).read_text())["kind"]
    except FileNotFoundError:
        kind = "folder without a manifest"
    except (OSError, ValueError, KeyError, TypeError):
        kind = "folder with an unreadable manifest"
    if kind not in (BUNDLE, ENGINE):
        raise ArtifactError(str(path), f"a {kind}", "a bundle or an engine", "Make it again, or check the path.")
    return open_bundle(path) if kind == BUNDLE else open_engine(path)


def self_test(runner: Runner) -> dict[str, float]:
    """Runs the golden inputs that travel with the model and compares with what it gave when it was made.

    Returns:
        For each part the lowest cosine; empty for a model that carries no golden vectors.

    Raises:
        ArtifactError: if a part's output is not what it was.
    """
    golden = runner.golden()
    outputs = {}
    if "images" in golden:
        outputs["backbone"] = (runner.embed(golden["images"]), golden["features"])
    if "head_input" in golden:
        outputs["head"] = (runner.relate(golden["head_input"], golden["landmarks"]), golden["embeddings"])
    lowest = {}
    for part, (found, expected) in outputs.items():
        norms = np.linalg.norm(found, axis=1) * np.linalg.norm(expected, axis=1)
        lowest[part] = float(((found * expected).sum(axis=1) / norms).min())
        limit = _SELF_TEST_COSINE[runner.precision[part]]
        if not lowest[part] >= limit:
            got = f"a cosine of {lowest[part]:.5f} to what it gave when made"
            hint = "This machine computes otherwise: build the engine here."
            raise ArtifactError(f"{runner.name}: {part}", got, f"at least {limit}", hint)
    return lowest
