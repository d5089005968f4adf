"""Bundles and onnxruntime engines, run by stock onnxruntime on the CPU. Needs neither torch nor onnx.

Where our kernels are compiled, the head's two nodes run in them (see `ops.onnx_ops`); elsewhere the same file runs
by the standard operators of its own function bodies.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from types import TracebackType
from typing import Any

import numpy as np

from nformer_edge.backends.runner import check_head_input, check_images, model_name
from nformer_edge.core.artifact import MANIFEST, read_manifest, sha256_file
from nformer_edge.core.errors import ArtifactError
from nformer_edge.core.spec import check_at_least
from nformer_edge.exporting.bundle import BACKBONE, HEAD, model_spec, read_golden, read_graph
from nformer_edge.exporting.session import open_session
from nformer_edge.ops import onnx_ops

#: Images a run, unless told otherwise: more gain nothing on a CPU and cost memory.
MAX_BATCH = 32


class OnnxRuntimeRunner:
    """See `backends.runner.Runner`. Sessions are made when the context is entered, or at first use.

    Args:
        path: folder of a bundle or of an engine built for onnxruntime.
        kind: ``bundle`` or ``engine``.
        intra_op_threads: onnxruntime's choice (one a core) if None.
        max_batch: larger batches are split.
        native: run the head's operators in the native kernels where they are compiled.

    Raises:
        ArtifactError: if the folder does not verify, or is of a version that this one does not know.
        BackendError: if onnxruntime is not installed.
    """

    backend = "onnxruntime"

    def __init__(
        self,
        path: str | os.PathLike[str],
        kind: str,
        *,
        intra_op_threads: int | None = None,
        max_batch: int = MAX_BATCH,
        native: bool = True,
    ) -> None:
        check_at_least("max_batch", max_batch, 1)
        if intra_op_threads is not None:
            check_at_least("intra_op_threads", intra_op_threads, 1)
        self._path = os.fspath(path)
        self._manifest = read_manifest(path, kind)
        self.spec = model_spec(self._path, self._manifest)
        self.name = model_name(self.spec)
        self.sha256 = sha256_file(os.path.join(self._path, MANIFEST))
        self.checkpoint = str(self._manifest.get("checkpoint_sha256", ""))
        self.has_head = HEAD in self._manifest["files"]
        if self.has_head != (self.spec.head is not None):
            raise ArtifactError(
                self._path,
                f"{HEAD} {'without' if self.has_head else 'missing for'} a head in its spec",
                "both or neither",
                "Export the bundle again.",
            )
        stages = ("backbone", "head") if self.has_head else ("backbone",)
        self.precision: Mapping[str, str] = self._manifest.get("precision") or dict.fromkeys(stages, "fp32")
        self.landmark_seed = int(self._manifest["landmark_seed"])
        self.native = native and onnx_ops.available()
        self._threads, self._max_batch = intra_op_threads, max_batch
        self._sessions: dict[str, Any] = {}

    def __enter__(self) -> OnnxRuntimeRunner:
        self._session(BACKBONE)
        if self.has_head:
            self._session(HEAD)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._sessions.clear()

    def golden(self) -> dict[str, np.ndarray]:
        """See `Runner.golden`."""
        return read_golden(self._path, self._manifest)

    def embed(self, images: np.ndarray) -> np.ndarray:
        """See `Runner.embed`. Batches above `max_batch` are split."""
        images = check_images(images, self.spec)
        session = self._session(BACKBONE)
        parts = [
            session.run(["features"], {"images": images[i : i + self._max_batch]})[0]
            for i in range(0, len(images), self._max_batch)
        ]
        return np.concatenate(parts) if parts else np.empty((0, self.spec.backbone.features), np.float32)

    def relate(self, features: np.ndarray, landmarks: np.ndarray | None = None) -> np.ndarray:
        """See `Runner.relate`."""
        features, landmarks = check_head_input(features, landmarks, self.spec, self.landmark_seed)
        if len(features) == 0:
            return features
        return self._session(HEAD).run(["embeddings"], {"features": features, "landmarks": landmarks})[0]

    def _session(self, name: str) -> Any:
        if name not in self._sessions:
            graph, native = read_graph(self._path, self._manifest, name), self.native and name == HEAD
            self._sessions[name] = open_session(graph, name, self._threads, native)
        return self._sessions[name]
