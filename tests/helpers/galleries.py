"""A model that gives no features of its own, for galleries of any; and, run as a script, a writer to be killed."""

from __future__ import annotations

import sys
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np

from nformer_edge.core.features import Features
from nformer_edge.core.spec import BackboneSpec, HeadSpec, ModelSpec, NeighborRule, PreprocessSpec
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
    draw = np.random.default_rng(0)
    layer = {"offset": 0.1, "log_slope": 3.0, "log_strength": -1.0, "profile": [0.1] * 6 + [0.05] * 8}
    numbers = {f"h.{i}.{name}": x for i in range(2) for name, x in layer.items()}
    mapped = {"map.power": 1, "map.linear.w": draw.standard_normal((size, size)), "map.linear.b": np.zeros(size)}
    head = HeadSpec(size, layers=2, heads=1, k=8, landmarks=landmarks, rule="gated")
    return _with_head(head, {**numbers, **mapped, "own": 0.5}, seed)


def nformer(rule: NeighborRule, seed: int = 0, size: int = SIZE, landmarks: int = 16) -> Any:
    """As `gated`, with the published head under its features or affinity rule."""
    draw = np.random.default_rng(0)
    parts = {"attn.c_attn": 3 * size, "attn.c_proj": size, "mlp.c_fc": 4 * size, "mlp.c_proj": size}
    numbers: dict[str, Any] = {f"bottleneck.{name}": np.ones(size) for name in ("running_var", "weight")}
    numbers |= {f"bottleneck.{name}": np.zeros(size) for name in ("running_mean", "bias")}
    for layer in range(2):
        for name, width in parts.items():
            rows = 4 * size if name == "mlp.c_proj" else size
            numbers[f"h.{layer}.{name}.w"] = draw.standard_normal((rows, width)) / rows**0.5
            numbers[f"h.{layer}.{name}.b"] = np.zeros(width)
        for name in ("ln_1", "ln_2"):
            numbers |= {f"h.{layer}.{name}.g": np.ones(size), f"h.{layer}.{name}.b": np.zeros(size)}
    head = HeadSpec(size, layers=2, heads=2, k=8, landmarks=landmarks, rule=rule)
    return _with_head(head, numbers, seed)


def _with_head(head: HeadSpec, numbers: dict[str, Any], seed: int) -> Any:
    model = stub(head.features)
    model.spec = replace(model.spec, head=head)
    model.has_head, model.landmark_seed, model.head_numbers = True, seed, lambda: numbers
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
