"""One request, from image files to a ranked gallery, each step timed. The head and the search are the gallery's own."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from nformer_edge.backends.runner import Runner
from nformer_edge.core.errors import DataError
from nformer_edge.core.features import Features
from nformer_edge.core.preprocess import load_image, normalize, resize
from nformer_edge.gallery import protocols, search
from nformer_edge.gallery.held import Held

T = TypeVar("T")

#: In the order in which a request takes them. `copy_in` and `copy_out` only where a runner reports its device's copies.
STEPS = ("decode", "preprocess", "copy_in", "backbone", "head", "copy_out", "search")


@dataclass(frozen=True)
class Reply:
    """What a request gives.

    Args:
        ranked: int64 [images, top], gallery rows, best first.
        step_ms: milliseconds of each step.
        total_ms: from issue to reply.
    """

    ranked: np.ndarray
    step_ms: dict[str, float]
    total_ms: float


class Pipeline:
    """decode -> preprocess -> backbone [-> head] -> search, among images with the backbone's features in `gallery`.

    The head sees each image alone with the gallery (`gallery.protocols.relate_each`), and the gallery is searched by
    `gallery.search.top_matches`: the functions that `nformer-edge search` calls. `top` images are found; the backbone
    sees `batch` at once.

    A runner may have an attribute ``copy_ms``, the last call's ``(in, out)`` copies in milliseconds: they become steps
    of their own.
    """

    def __init__(self, runner: Runner, gallery: Features, *, with_head: bool, top: int = 10, batch: int = 32) -> None:
        if not len(gallery):
            raise DataError("gallery", "no image", "at least one", "Give gallery images.")
        self.runner, self.gallery, self.top, self.batch = runner, gallery, top, batch
        self.held = None if with_head else Held.of_features(gallery)  # kept, as a `Gallery` keeps it
        self.with_head, self.name = with_head, "+NFormer" if with_head else "backbone"
        self.step_ms: dict[str, float] = {}

    def __call__(self, paths: Sequence[str]) -> Reply:
        """Ranks the gallery for each image."""
        self.step_ms = {}
        start = time.perf_counter_ns()
        batches = [self._embed(paths[i : i + self.batch]) for i in range(0, len(paths), self.batch)]
        asked = Features(np.concatenate(batches), paths=tuple(paths))
        # the head takes one query at a time
        sets = [asked.take(np.array([i])) for i in range(len(asked))] if self.with_head else [asked]
        ranked = np.concatenate([self._search(s) for s in sets])
        return Reply(ranked, self.step_ms, (time.perf_counter_ns() - start) / 1e6)

    def _timed(self, step: str, work: Callable[[], T], device: bool = False) -> T:
        start = time.perf_counter_ns()
        result = work()
        elapsed = (time.perf_counter_ns() - start) / 1e6
        copies = getattr(self.runner, "copy_ms", None) if device else None
        for name, copy in zip(("copy_in", "copy_out"), copies or (), strict=False):
            self.step_ms[name] = self.step_ms.get(name, 0.0) + copy
            elapsed -= copy
        self.step_ms[step] = self.step_ms.get(step, 0.0) + elapsed
        return result

    def _embed(self, paths: Sequence[str]) -> np.ndarray:
        spec = self.runner.spec.preprocess
        images = self._timed("decode", lambda: [load_image(p) for p in paths])
        batch = self._timed("preprocess", lambda: normalize(np.stack([resize(i, spec) for i in images]), spec))
        return self._timed("backbone", lambda: self.runner.embed(batch), device=True)

    def _search(self, asked: Features) -> np.ndarray:
        seen = self.gallery
        if self.with_head:
            pairs = protocols.relate_each(self.runner, asked, seen)
            asked, seen = self._timed("head", lambda: next(pairs), device=True)
        return self._timed(
            "search", lambda: search.top_matches(asked, self.held or Held.of_features(seen), self.top)[0]
        )
