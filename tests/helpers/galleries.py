"""A model that gives no features of its own, for galleries of any; and, run as a script, a writer to be killed."""

from __future__ import annotations

import sys
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np

from nformer_edge.core.features import Features
from nformer_edge.core.spec import BackboneSpec, HeadSpec, ModelSpec, PreprocessSpec
from nformer_edge.gallery.gallery import Gallery

SIZE = 16


def stub(size: int = SIZE, sha256: str = "a" * 64, **preprocess: Any) -> Any:
    """What a gallery asks of a runner."""
    spec = ModelSpec(BackboneSpec(features=size), None, PreprocessSpec(**preprocess))
    precision = {"backbone": "fp32"}
    return SimpleNamespace(
        name="stub", backend="stub", precision=precision, spec=spec, sha256=sha256, checkpoint="", has_head=False,
        accuracy=None,
    )  # fmt: skip


def gated(seed: int = 0, size: int = SIZE, landmarks: int = 16) -> Any:
    """A `stub` with a gated head, which has a live form; `seed` draws its landmarks."""
    model, draw = stub(size), np.random.default_rng(0)
    head = HeadSpec(size, layers=2, heads=1, k=8, landmarks=landmarks, rule="gated")
    layer = {"offset": 0.1, "log_slope": 3.0, "log_strength": -1.0, "profile": [0.1] * 6 + [0.05] * 8}
    numbers = {f"h.{i}.{name}": x for i in range(2) for name, x in layer.items()}
    mapped = {"map.power": 1, "map.linear.w": draw.standard_normal((size, size)), "map.linear.b": np.zeros(size)}
    model.spec = replace(model.spec, head=head)
    model.has_head, model.landmark_seed, model.head_numbers = True, seed, lambda: {**numbers, **mapped, "own": 0.5}
    return model


def rows(seed: int, count: int = 1, size: int = SIZE) -> Features:
    """Random features, the same for a seed."""
    return Features(np.random.default_rng(seed).standard_normal((count, size)).astype(np.float32))


if __name__ == "__main__":
    with Gallery(stub(), sys.argv[1]) as gallery:
        start = int(sys.argv[2])
        for turn in range(start, sys.maxsize):
            gallery.add(rows(turn, 3), ids=f"person {turn}")
            if turn % 3 == 2 and turn > start:
                gallery.remove(f"person {turn - 1}")
            if turn % 7 == 6:
                gallery.compact()
            print(turn, flush=True)
