"""One door for whatever was handed on: a checkpoint, a bundle or an engine."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np

from nformer_edge.backends.runner import Runner
from nformer_edge.core.artifact import MANIFEST
from nformer_edge.core.errors import ArtifactError, BackendError, UsageError

#: How alike a stage's output must be to what it gave when it was made: cosine, by precision as built.
_SELF_TEST_COSINE = {"fp32": 0.99999, "fp16": 0.9995, "int8": 0.99}


def open_runner(
    path: str | os.PathLike[str],
    *,
    backend: str = "auto",
    threads: int | None = None,
    device: str = "cpu",
    reference: bool = False,
    native: bool = True,
) -> Runner:
    """Opens a model by what lies at `path`: a `.safetensors` checkpoint, a bundle's folder or an engine's folder.

    Args:
        path: the model.
        backend: ``auto``, or the one that must run it, such as ``onnxruntime``.
        threads: CPU threads; for a TensorRT engine, threads of the caller that compute at once: each gets an execution
            context, with its memory (two if None).
        device: for a checkpoint, ``cpu`` or a CUDA device; for a TensorRT engine the GPU, the first one if ``cpu``.
        reference: a checkpoint runs layer by layer, nothing folded, to judge engines by.
        native: the head's two operators run in the native kernels where they are compiled; otherwise as plain torch
            or as the standard operators of the file's own bodies.

    Raises:
        ArtifactError: if it is damaged, or none of these.
        BackendError: if its backend is not installed here, or is not the one asked for.
        UsageError: for a device that this kind of model does not have.
    """
    path = Path(path)
    if not path.is_dir() and path.suffix != ".safetensors":
        got = "a file of another kind" if path.exists() else "no such file or folder"
        raise ArtifactError(
            str(path),
            got,
            "a checkpoint (.safetensors), a bundle or an engine",
            "Make one with `nformer-edge train`, `export` or `build-engine`.",
        )
    kind = "checkpoint" if not path.is_dir() else _kind(path)
    runs_on = _engine_backend(path) if kind == "engine" else {"checkpoint": "pytorch"}.get(kind, "onnxruntime")
    if backend not in ("auto", runs_on):
        raise BackendError(
            str(path),
            f"a {kind} that {runs_on} runs",
            f"one for {backend}",
            f"Build one: nformer-edge build-engine --backend {backend}",
        )
    if runs_on == "pytorch":
        return _open_checkpoint(path, threads, device, reference, native)
    if runs_on in ("tensorrt", "tensorrt-rtx"):
        from nformer_edge.backends.tensorrt.run import TensorRTRunner

        return TensorRTRunner(path, device=device, contexts=threads)
    if device != "cpu":
        raise UsageError("device", device, f"cpu for {runs_on}", "Leave --device out.")
    if runs_on == "onnxruntime":
        from nformer_edge.backends.onnxruntime.run import OnnxRuntimeRunner

        return OnnxRuntimeRunner(path, kind, threads=threads, native=native)
    raise BackendError(
        str(path),
        f"an engine for {runs_on}",
        "one for a backend that this version runs",
        "Build one: nformer-edge build-engine --backend onnxruntime",
    )


def _open_checkpoint(path: Path, threads: int | None, device: str, plain: bool, native: bool) -> Runner:
    try:
        from nformer_edge.backends.torch import TorchRunner
    except ImportError as e:
        raise BackendError(
            str(path),
            f"no {e.name} here",
            "PyTorch and safetensors, to run a checkpoint",
            "pip install 'nformer-edge[train]', or pass a bundle or an engine.",
        ) from e
    return TorchRunner(path, threads=threads, device=device, plain=plain, native=native)


def _kind(path: Path) -> str:
    """What the manifest says the folder is; whoever opens it verifies that."""
    try:
        kind = json.loads((path / MANIFEST).read_text())["kind"]
    except FileNotFoundError:
        kind = "folder without a manifest"
    except (OSError, ValueError, KeyError, TypeError):
        kind = "folder whose manifest cannot be read"
    if kind not in ("bundle", "engine"):
        raise ArtifactError(str(path), f"a {kind}", "a bundle or an engine", "Make it again, or check the path.")
    return str(kind)


def _engine_backend(path: Path) -> str:
    return str(json.loads((path / MANIFEST).read_text()).get("backend"))


def self_test(runner: Runner) -> dict[str, float]:
    """Runs the golden inputs that travel with the model and compares with what it gave when it was made.

    Returns:
        For each stage the lowest cosine; empty for a model that carries no golden vectors.

    Raises:
        ArtifactError: if a stage's output is not what it was.
    """
    golden = runner.golden()
    outputs = {}
    if "images" in golden:
        outputs["backbone"] = (runner.embed(golden["images"]), golden["features"])
    if "head_input" in golden:
        outputs["head"] = (runner.relate(golden["head_input"], golden["landmarks"]), golden["embeddings"])
    lowest = {}
    for stage, (found, expected) in outputs.items():
        norms = np.linalg.norm(found, axis=1) * np.linalg.norm(expected, axis=1)
        lowest[stage] = float(((found * expected).sum(axis=1) / norms).min())
        least = _SELF_TEST_COSINE[runner.precision[stage]]
        if not lowest[stage] >= least:
            raise ArtifactError(
                f"{runner.name}: {stage}",
                f"a cosine of {lowest[stage]:.5f} to what it gave when made",
                f"at least {least}",
                "This machine computes otherwise: build the engine here.",
            )
    return lowest
