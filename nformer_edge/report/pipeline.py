"""One request through the whole product, image files in and ranked gallery out, each stage timed."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np

from nformer_edge.backends.runner import Runner
from nformer_edge.core.errors import DataError
from nformer_edge.core.preprocess import load_image, normalize, resize
from nformer_edge.metrics.distance import cosine_distances, smallest, unit_rows
from nformer_edge.ops.contract import draw_landmarks

T = TypeVar("T")

#: In the order of the road. `copy_in` and `copy_out` only where a runner says that its device has them.
STAGES = ("decode", "preprocess", "copy_in", "backbone", "head", "copy_out", "search")


class Pipeline:
    """decode -> preprocess -> backbone [-> head] -> search.

    With the head, the request's images and the gallery are seen together, as NFormer needs it, in every request.

    Args:
        runner: an open model.
        gallery: float32 [G, D], features as the backbone gives them.
        with_head: run the head.
        top: gallery images that the search returns.
        batch: images that the backbone sees at once.

    A runner whose device copies may have an attribute ``copy_ms``, the last call's ``(in, out)`` in milliseconds;
    they are taken out of the stage and told apart.
    """

    def __init__(self, runner: Runner, gallery: np.ndarray, *, with_head: bool, top: int = 10, batch: int = 32) -> None:
        if not len(gallery):
            raise DataError("gallery", "no image", "at least one", "Give gallery images.")
        self.runner, self.gallery, self.top, self.batch = runner, gallery, top, batch
        self.head = runner.spec.head if with_head else None
        self.unit_gallery = unit_rows(gallery, "gallery features")
        self.stage_ms: dict[str, float] = {}

    def __call__(self, paths: Sequence[str]) -> tuple[np.ndarray, dict[str, float]]:
        """Ranks the gallery for each image.

        Returns:
            int64 [len(paths), top], gallery rows best first; milliseconds by stage, and ``total`` from issue to reply.
        """
        self.stage_ms = {}
        start = time.perf_counter_ns()
        features = np.concatenate([self._embed(paths[i : i + self.batch]) for i in range(0, len(paths), self.batch)])
        ranked = self._search(self._relate(features), len(paths))
        total = (time.perf_counter_ns() - start) / 1e6
        return ranked, {**self.stage_ms, "total": total}

    def _timed(self, stage: str, work: Callable[[], T], device: bool = False) -> T:
        start = time.perf_counter_ns()
        result = work()
        elapsed = (time.perf_counter_ns() - start) / 1e6
        copies: Any = getattr(self.runner, "copy_ms", None) if device else None
        for name, copy in zip(("copy_in", "copy_out"), copies or (), strict=False):
            self.stage_ms[name] = self.stage_ms.get(name, 0.0) + copy
            elapsed -= copy
        self.stage_ms[stage] = self.stage_ms.get(stage, 0.0) + elapsed
        return result

    def _embed(self, paths: Sequence[str]) -> np.ndarray:
        spec = self.runner.spec.preprocess
        images = self._timed("decode", lambda: [load_image(p) for p in paths])
        batch = self._timed("preprocess", lambda: normalize(np.stack([resize(i, spec) for i in images]), spec))
        return self._timed("backbone", lambda: self.runner.embed(batch), device=True)

    def _relate(self, features: np.ndarray) -> np.ndarray:
        """Features of the request, followed by the gallery's where the head has changed them."""
        head = self.head
        if head is None:
            return features

        def work() -> np.ndarray:
            joint = np.concatenate([features, self.gallery])
            landmarks = draw_landmarks(len(joint), head.layers, head.landmarks, self.runner.landmark_seed)
            return self.runner.relate(joint, landmarks)

        return self._timed("head", work, device=True)

    def _search(self, features: np.ndarray, queries: int) -> np.ndarray:
        def work() -> np.ndarray:
            gallery = self.unit_gallery if self.head is None else unit_rows(features[queries:])
            return smallest(cosine_distances(unit_rows(features[:queries]), gallery), self.top)

        return self._timed("search", work)
