"""Bundles and engines in stock onnxruntime on the CPU."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

from nformer_edge.core.artifact import read_manifest
from nformer_edge.core.errors import ArtifactError, BackendError
from nformer_edge.onnx.bundle import BACKBONE, HEAD, model_spec, read_graph
from nformer_edge.runtime.runner import Runner


class OnnxruntimeRunner(Runner):
    """A bundle, or an engine that the onnxruntime backend built.

    Every file is verified against the manifest first, and the session is made from the very bytes that were hashed.

    Args:
        folder: the bundle or engine.
        kind: ``bundle`` or ``engine``.
        threads: of onnxruntime's operators; its own choice if None.

    Raises:
        ArtifactError: if anything does not match its manifest.
        BackendError: if onnxruntime is not installed, or the engine belongs to another backend.
    """

    backend = "onnxruntime"

    def __init__(self, folder: str | os.PathLike[str], kind: str, threads: int | None = None) -> None:
        self._folder, self._threads = Path(folder), threads
        self.name = self._folder.name
        self._manifest = read_manifest(folder, kind)
        if kind == "engine" and self._manifest.get("backend") != self.backend:
            raise BackendError(
                str(folder), got=f"an engine for {self._manifest.get('backend')}", expected=f"one for {self.backend}",
                mend="Build it again: nformer-edge build-engine --backend onnxruntime.",
            )  # fmt: skip
        self.spec = model_spec(str(folder), self._manifest)
        self.landmark_seed = int(self._manifest["landmark_seed"])
        fp32 = {"backbone": "fp32"} | ({"head": "fp32"} if self.has_head else {})
        self.precision = dict(self._manifest["precision"]) if kind == "engine" else fp32
        self._backbone: Any = None
        self._head: Any = None

    def open(self) -> None:
        self._backbone = self._session(BACKBONE)
        if self.has_head:
            self._head = self._session(HEAD)

    def close(self) -> None:
        self._backbone = self._head = None

    def _session(self, name: str) -> Any:
        try:
            import onnxruntime
        except ImportError as e:
            raise BackendError(
                "onnxruntime", got="not installed", expected="it, to run this engine",
                mend="pip install 'nformer-edge[cpu]'",
            ) from e  # fmt: skip
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # errors only: onnxruntime warns about every initialiser that it folds away
        if self._threads is not None:
            options.intra_op_num_threads = self._threads
        graph = read_graph(self._folder, self._manifest, name)
        try:
            return onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        except Exception as e:  # onnxruntime raises a class of its own for each status, with no root but Exception
            raise ArtifactError(
                str(self._folder / name), got=f"a graph that onnxruntime refuses ({e})", expected="one that it runs",
                mend="Export it again, or update onnxruntime.",
            ) from e  # fmt: skip

    def _embed(self, images: np.ndarray) -> np.ndarray:
        (features,) = self._backbone.run(None, {"images": images})
        return np.asarray(features)

    def _relate(self, features: np.ndarray, landmarks: np.ndarray) -> np.ndarray:
        (embeddings,) = self._head.run(None, {"features": features, "landmarks": landmarks})
        return np.asarray(embeddings)
