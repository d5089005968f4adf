"""A model that gives no features of its own, for galleries of any; and, run as a script, a writer to be killed."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import numpy as np

from nformer_edge.core.features import Features
from nformer_edge.core.spec import BackboneSpec, ModelSpec, PreprocessSpec
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
