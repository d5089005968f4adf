"""nformer-edge: person re-identification with NFormer, from training to a checked engine.

    import nformer_edge as ne

    with ne.open("engine") as model:
        gallery = model.gallery()
        gallery.add(crops, ids=names)
        print(gallery.search(queries, top=10))

Importing this package loads neither numpy nor any framework: each name is resolved when it is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nformer_edge.core.errors import Error
    from nformer_edge.core.features import Features
    from nformer_edge.exporting.export import export_bundle as export
    from nformer_edge.gallery.gallery import Gallery
    from nformer_edge.gallery.model import embed, open, search
    from nformer_edge.gallery.search import Matches
    from nformer_edge.report.accuracy import evaluate
    from nformer_edge.report.benchmark import benchmark
    from nformer_edge.report.parity import parity
    from nformer_edge.targets.build import build
    from nformer_edge.training.train import train

__version__ = "0.1.0"

__all__ = [
    "Error",
    "Features",
    "Gallery",
    "Matches",
    "benchmark",
    "build",
    "embed",
    "evaluate",
    "export",
    "open",
    "parity",
    "search",
    "train",
]

#: Where each name lives: module, or module and the name there.
_HOMES = {
    "Error": "core.errors",
    "Features": "core.features",
    "Gallery": "gallery.gallery",
    "Matches": "gallery.search",
    "benchmark": "report.benchmark",
    "build": "targets.build",
    "embed": "gallery.model",
    "evaluate": "report.accuracy",
    "export": "exporting.export:export_bundle",
    "open": "gallery.model",
    "parity": "report.parity",
    "search": "gallery.model",
    "train": "training.train",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, _, there = _HOMES[name].partition(":")
    globals()[name] = value = getattr(import_module(f"{__name__}.{module}"), there or name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
