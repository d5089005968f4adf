"""What an INT8 backbone loses on held-out images, against FP32 on the same images, by onnxruntime on this CPU.

Images are decoded once. Two stages are judged from one run: the backbone's features, and, where the bundle has a head,
what the head makes of them, all images seen together.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from nformer_edge.core.machine import instruction_sets
from nformer_edge.data.batches import iter_batches
from nformer_edge.exporting.bundle import BACKBONE, HEAD, read_graph
from nformer_edge.exporting.session import open_session
from nformer_edge.metrics.agreement import rank_agreement
from nformer_edge.metrics.bootstrap import ONE_SIDED, paired_difference
from nformer_edge.metrics.ranking import RankingResult, evaluate
from nformer_edge.ops import native, onnx_ops
from nformer_edge.ops.contract import draw_landmarks
from nformer_edge.quantize.held_out import HeldOut
from nformer_edge.quantize.spec import OpenBundle

if TYPE_CHECKING:
    from onnx import ModelProto

#: Stages that can be judged; the second where there is a head.
STAGES = ("backbone", "end_to_end")

#: Images a run: more gain nothing on a CPU and cost memory.
_BATCH = 16

#: Pairs of single images that a latency is the median of, after so many that do not count.
_ROUNDS, _WARMUP = 31, 3


class Judge:
    """FP32's answers on held-out images, and what another backbone's differ.

    Args:
        bundle: verified.
        held_out: images that calibrated nothing.
        threads: of onnxruntime; one a CPU that this process may use if None.
    """

    def __init__(self, bundle: OpenBundle, held_out: HeldOut, threads: int | None = None) -> None:
        self._bundle, self.held_out = bundle, held_out
        self._threads = threads or native.default_threads()
        self.stages = STAGES if bundle.has_head else STAGES[:1]

    def facts(self) -> dict[str, Any]:
        """Everything but the backbone that a score depends on, as plain data."""
        import onnxruntime

        files = {name: entry["sha256"] for name, entry in self._bundle.manifest["files"].items() if "onnx" in name}
        return {
            "files": files,
            "held_out": self.held_out.sha256,
            "landmark_seed": self._bundle.manifest["landmark_seed"],
            "onnxruntime": onnxruntime.__version__,
            "cpu": list(instruction_sets()),
            "native": onnx_ops.available(),
        }

    def score(self, model: ModelProto) -> dict[str, dict[str, float]]:
        """What a backbone is worth, by stage.

        Returns:
            ``mAP``, ``rank1``, ``map_drop`` against FP32 with its one-sided 95 % bound ``map_drop_upper`` by the paired
            bootstrap over queries, and ``overlap_at_10``: overlap of the ten best, the protocol's own images left
            out. Fractions. A backbone that gives an image no feature is worth nothing.
        """
        found = self._answers(model.SerializeToString())
        return {stage: self._compared(found[stage], self._reference[stage]) for stage in self.stages}

    def reference(self) -> dict[str, dict[str, float]]:
        """``mAP`` and ``rank1`` of FP32, by stage."""
        scores = {stage: ranked for stage, (_, ranked) in self._reference.items()}
        return {stage: {"mAP": ranked.mAP, "rank1": ranked.rank(1)} for stage, ranked in scores.items()}

    def latency(self, model: ModelProto) -> dict[str, float]:
        """One image through the backbone, in turn with FP32: FP32's median in milliseconds, and the median ratio."""
        image = self._images[:1]
        runs = [self._session(graph) for graph in (self._float_backbone, model.SerializeToString())]
        seconds = np.empty((2, _WARMUP + _ROUNDS))
        for i in range(seconds.shape[1]):
            for which in (i % 2, 1 - i % 2):  # now one begins, now the other: neither always finds a warm cache
                start = time.perf_counter()
                runs[which](image)
                seconds[which, i] = time.perf_counter() - start
        plain, found = 1000 * seconds[:, _WARMUP:]
        return {
            "float_ms": statistics.median(plain.tolist()),
            "latency_ratio": statistics.median((found / plain).tolist()),
        }

    def size_mb(self, model: ModelProto | None = None) -> float:
        """The engine's graphs, the head's among them, in megabytes; FP32's if no backbone is given."""
        files = self._bundle.manifest["files"]
        backbone = files[BACKBONE]["bytes"] if model is None else model.ByteSize()
        return (backbone + (files[HEAD]["bytes"] if self._bundle.has_head else 0)) / 1e6

    @cached_property
    def _images(self) -> np.ndarray:
        paths = [r.path for r in self.held_out.records]
        return np.concatenate(list(iter_batches(paths, self._bundle.spec.preprocess)))

    @cached_property
    def _float_backbone(self) -> bytes:
        return read_graph(self._bundle.folder, self._bundle.manifest, BACKBONE)

    @cached_property
    def _reference(self) -> dict[str, tuple[np.ndarray, RankingResult]]:
        found = self._answers(self._float_backbone)
        return {stage: (rows, self._ranked(rows)) for stage, rows in found.items()}

    def _ranked(self, rows: np.ndarray) -> RankingResult:
        labeled = self.held_out.label(rows)
        return evaluate(labeled, labeled)

    def _compared(self, rows: np.ndarray, reference: tuple[np.ndarray, RankingResult]) -> dict[str, float]:
        theirs, expected = reference
        if not (np.isfinite(rows).all() and rows.any(axis=1).all()):
            return {"mAP": 0.0, "rank1": 0.0, "map_drop": expected.mAP, "map_drop_upper": 1.0, "overlap_at_10": 0.0}
        ranked, labeled, x = self._ranked(rows), self.held_out.label(theirs), self.held_out.label(rows)
        kept = rank_agreement((labeled, labeled), (x, x)).overlap
        gain = paired_difference(ranked.ap[ranked.valid], expected.ap[expected.valid], quantiles=ONE_SIDED)
        return {
            "mAP": ranked.mAP,
            "rank1": ranked.rank(1),
            "map_drop": expected.mAP - ranked.mAP,
            "map_drop_upper": 0.0 - gain.lower,
            "overlap_at_10": kept,
        }

    def _answers(self, backbone: bytes) -> dict[str, np.ndarray]:
        run = self._session(backbone)
        parts = [run(self._images[i : i + _BATCH]) for i in range(0, len(self._images), _BATCH)]
        found = {"backbone": np.concatenate(parts)}
        if self._bundle.has_head:
            found["end_to_end"] = self._head(found["backbone"])
        return found

    @cached_property
    def _head(self) -> Callable[[np.ndarray], np.ndarray]:
        spec = self._bundle.spec.head
        assert spec is not None, "asked for with a head alone"
        seed = int(self._bundle.manifest["landmark_seed"])
        landmarks = draw_landmarks(len(self.held_out.records), spec.layers, spec.landmarks, seed)
        graph = read_graph(self._bundle.folder, self._bundle.manifest, HEAD)
        session = open_session(graph, HEAD, self._threads, native=onnx_ops.available())
        return lambda features: session.run(["embeddings"], {"features": features, "landmarks": landmarks})[0]

    def _session(self, backbone: bytes) -> Callable[[np.ndarray], np.ndarray]:
        session = open_session(backbone, "backbone", self._threads)
        return lambda images: session.run(["features"], {"images": images})[0]
