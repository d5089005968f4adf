"""Bundles and onnxruntime engines, run by stock onnxruntime on the CPU. Needs neither torch nor onnx.

Where our kernels are compiled, the head's two nodes run in them (see `ops.onnx_ops`); elsewhere the same file runs
by the standard operators of its own function bodies.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from nformer_edge.backends.engine import Engine, how_to_rebuild
from nformer_edge.backends.onnxruntime.build import NAME
from nformer_edge.backends.runner import check_head_input, check_images, model_name
from nformer_edge.core.errors import ArtifactError, BackendError
from nformer_edge.core.machine import VNNI, saturates_int8
from nformer_edge.core.spec import check_at_least, check_size
from nformer_edge.exporting.bundle import BACKBONE, HEAD, ModelFiles, check_graphs
from nformer_edge.exporting.session import open_session
from nformer_edge.ops import onnx_ops

#: Images a run, unless told otherwise: more gain nothing on a CPU and cost memory.
MAX_BATCH = 32


class OnnxRuntimeRunner:
    """See `backends.runner.Runner`. Sessions are made when the context is entered, or at first use.

    Args:
        model: a bundle, or an engine built for onnxruntime.
        intra_op_threads: onnxruntime's choice (one a core) if None.
        max_batch: larger batches are split.
        native: run the head's operators in the native kernels where they are compiled.

    Raises:
        ArtifactError: if a graph is missing, or there is one too many, or (when it is opened) takes other inputs than
            its spec says.
        BackendError: if onnxruntime is not installed, or would saturate on this CPU.
    """

    backend = NAME

    def __init__(
        self, model: ModelFiles, *, intra_op_threads: int | None = None, max_batch: int = MAX_BATCH, native: bool = True
    ) -> None:
        check_at_least("max_batch", max_batch, 1)
        if intra_op_threads is not None:
            check_size("intra_op_threads", intra_op_threads)
        check_graphs(model)
        refuse_saturation(model)
        self._model = model
        self.spec, self.sha256, self.has_head = model.spec, model.sha256, model.has_head
        self.name = model_name(self.spec)
        self.checkpoint = model.manifest.checkpoint_sha256
        self.precision: Mapping[str, str] = model.precision
        self.landmark_seed, self.accuracy = model.manifest.landmark_seed, model.manifest.accuracy
        self.images_per_person, self.calibrated_on = model.manifest.images_per_person, model.calibrated_on
        self.native = native and onnx_ops.available()
        self._threads, self._max_batch = intra_op_threads, max_batch
        self._sessions: dict[str, Any] = {}

    def __enter__(self) -> OnnxRuntimeRunner:
        self._session(BACKBONE)
        if self.has_head:
            self._session(HEAD)
        return self

    def __exit__(self, *exception: object) -> None:
        self._sessions.clear()

    def golden(self) -> dict[str, np.ndarray]:
        """See `Runner.golden`."""
        return self._model.golden

    def head_numbers(self) -> dict[str, np.ndarray]:
        """See `Runner.head_numbers`."""
        return self._model.head_numbers

    def embed(self, images: np.ndarray) -> np.ndarray:
        """See `Runner.embed`. Batches above `max_batch` are split."""
        images = check_images(images, self.spec)
        blocks = (images[i : i + self._max_batch] for i in range(0, len(images), self._max_batch))
        parts = [self._run(BACKBONE, "features", images=block) for block in blocks]
        return np.concatenate(parts) if parts else np.empty((0, self.spec.backbone.features), np.float32)

    def relate(self, features: np.ndarray, landmarks: np.ndarray | None = None) -> np.ndarray:
        """See `Runner.relate`."""
        features, landmarks = check_head_input(features, landmarks, self.spec, self.landmark_seed)
        if len(features) == 0:
            return features
        return self._run(HEAD, "embeddings", features=features, landmarks=landmarks)

    def _run(self, name: str, output: str, **feed: np.ndarray) -> np.ndarray:
        session = self._session(name)
        try:
            return session.run([output], feed)[0]
        except Exception as e:  # its exceptions share no base class of their own
            reason = str(e).splitlines()[0] if str(e) else type(e).__name__
            hint = "Use fewer images at once if memory is short; otherwise export the bundle again with this version."
            raise BackendError(f"{self.name}: {name}", f"an error of {NAME} ({reason})", "a result", hint) from e

    def _session(self, name: str) -> Any:
        if name not in self._sessions:
            graph, native = self._model.files.files[name], self.native and name == HEAD
            session = open_session(graph, name, self._threads, native)
            self._check_inputs(name, {i.name: tuple(i.shape) for i in session.get_inputs()})
            self._sessions[name] = session
        return self._sessions[name]

    def _check_inputs(self, name: str, found: Mapping[str, tuple[Any, ...]]) -> None:
        head = self.spec.head
        expected: dict[str, tuple[Any, ...]] = {"images": ("B", *self.spec.preprocess.shape)}
        if head is not None:
            expected |= {"features": ("N", head.features), "landmarks": (head.layers, "l")}
        for key, shape in found.items():
            wanted = expected.get(key, ())
            same = all(isinstance(a, str) or isinstance(b, str) or a == b for a, b in zip(shape, wanted, strict=False))
            if len(shape) != len(wanted) or not same:
                hint = "The manifest is of another model: copy or make the folder again."
                raise ArtifactError(
                    f"{self._model.folder / name}: {key}", list(shape), f"{list(wanted)} by its spec", hint
                )


def refuse_saturation(model: ModelFiles) -> None:
    """Refuses INT8 with 8-bit weights on a CPU whose 16-bit sums of their products saturate.

    Raises:
        BackendError: naming the command that rebuilds the engine.
    """
    if not isinstance(model, Engine) or model.manifest.built_for.reduce_range is not False or not saturates_int8():
        return
    got = f"INT8 with 8-bit weights, built on {', '.join(model.manifest.built_for.instruction_sets) or 'another CPU'}"
    expected = f"7-bit weights on this CPU, which has none of {', '.join(VNNI)}: its sums would saturate"
    hint = f"{how_to_rebuild(str(model.folder), model.manifest)}; with --reduce-range anywhere, for every CPU."
    raise BackendError(str(model.folder), got, expected, hint)
