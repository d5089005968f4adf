"""Copies a bundle's graphs and runs them as onnxruntime does."""

from __future__ import annotations

from nformer_edge.backends.engine import Built
from nformer_edge.backends.onnxruntime.build import run
from nformer_edge.exporting.bundle import BACKBONE, GOLDEN, HEAD

__all__ = ["EXTRA", "INT8_HEAD", "NAME", "ON_CPU", "PRECISIONS", "USE", "build", "missing", "missing_to_run", "run"]

NAME, EXTRA, USE = "toy-backend", "cpu", "to show how a backend is added"
ON_CPU = True
INT8_HEAD = False
PRECISIONS = ("fp32",)


def missing():
    return ()


missing_to_run = missing


def build(bundle, folder, spec, low):
    for name in (BACKBONE, HEAD, GOLDEN):
        bundle.files.copy(name, folder)
    return Built(versions={"toy": "1"}, precision=bundle.precision)
