"""A path becomes the runner that can open it. Imports a framework only when a path needs it."""

from __future__ import annotations

import json
import os
from pathlib import Path

from nformer_edge.core.artifact import MANIFEST
from nformer_edge.core.errors import ArtifactError, BackendError
from nformer_edge.core.spec import check_at_least
from nformer_edge.runtime.runner import Runner


def open_runner(path: str | os.PathLike[str], *, threads: int | None = None, device: str = "cpu") -> Runner:
    """The runner for a model file; enter it to load the model.

    Args:
        path: a checkpoint (PyTorch), a bundle (onnxruntime) or an engine (the backend that built it).
        threads: of the backend's operators; its own choice if None.
        device: for checkpoints: ``cpu`` or a CUDA device.

    Raises:
        ArtifactError: if `path` is missing, damaged or something else.
        BackendError: if its backend cannot run here.
    """
    if threads is not None:
        check_at_least("threads", threads, 1)
    path = Path(path)
    if path.is_file():
        from nformer_edge.runtime.torch_runner import TorchRunner

        return TorchRunner(path, threads, device)
    kind, backend = _folder_kind(path)
    if backend == "onnxruntime":
        from nformer_edge.runtime.onnxruntime_runner import OnnxruntimeRunner

        return OnnxruntimeRunner(path, kind, threads)
    raise BackendError(
        str(path), got=f"an engine for {backend}", expected="one that this version runs (onnxruntime)",
        mend="Build one: nformer-edge build-engine --backend onnxruntime.",
    )  # fmt: skip


def _folder_kind(path: Path) -> tuple[str, str]:
    """Kind and backend as the manifest claims; the runner verifies the manifest before it opens a file."""
    expected = "a checkpoint (.safetensors), a bundle or an engine"
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        kind = manifest["kind"]
    except FileNotFoundError as e:
        got = f"a folder without {MANIFEST}" if path.is_dir() else "no such file or folder"
        raise ArtifactError(str(path), got=got, expected=expected, mend="Check the path.") from e
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise ArtifactError(
            str(path / MANIFEST), got=f"no readable manifest ({e})", expected=expected, mend="Make it again."
        ) from e
    if kind == "bundle":
        return kind, "onnxruntime"
    if kind == "engine":
        return kind, str(manifest.get("backend"))
    raise ArtifactError(str(path), got=f"a {kind}", expected=expected, mend="Check the path.")
