"""Where a failing engine goes wrong: at its input, or at which node. Loads onnx only where graphs are compared."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nformer_edge.core.errors import Error
from nformer_edge.core.features import Features
from nformer_edge.core.spec import ModelSpec, PreprocessSpec
from nformer_edge.data.batches import iter_batches
from nformer_edge.data.records import ImageRecord
from nformer_edge.ops.contract import draw_landmarks
from nformer_edge.report.models import evenly

#: Images that the backbone is compared on, and rows of features for the head, whose neighbors need a crowd.
IMAGES = 4
ROWS = 256


def _images(records: Sequence[ImageRecord], preprocess: PreprocessSpec) -> np.ndarray:
    paths = [records[i].path for i in evenly(IMAGES, len(records))]
    return np.concatenate(list(iter_batches(paths, preprocess, IMAGES)))


def compare_inputs(reference: PreprocessSpec, engine: PreprocessSpec, records: Sequence[ImageRecord]) -> dict[str, Any]:
    """What two models make of the same image files, before anything is computed.

    Returns:
        ``input`` of the result's JSON, see `report.parity`.
    """
    ours, theirs = (_images(records, spec) for spec in (reference, engine))
    error = float(np.linalg.norm(theirs - ours) / np.linalg.norm(ours)) if ours.shape == theirs.shape else None
    pairs = [(f.name, getattr(engine, f.name), getattr(reference, f.name)) for f in dataclasses.fields(reference)]
    return {
        "images": len(ours),
        "error": error,
        "preprocess": [f"{name}: {has}, the reference {had}" for name, has, had in pairs if has != had],
    }


def compare_layers(
    reference_path: str | os.PathLike[str],
    engine_path: str | os.PathLike[str],
    stages: Iterable[dict[str, Any]],
    spec: ModelSpec,
    records: Sequence[ImageRecord],
    features: Sequence[Features],
) -> list[dict[str, Any]]:
    """The float graph and the engine's graph of each of `stages`, node by node on the reference's own inputs.

    Args:
        reference_path: checkpoint or bundle: where the float graph comes from.
        engine_path: what is judged.
        stages: of a parity result, ``backbone`` and ``head`` alone.
        spec: of the reference.
        records: images that the backbone is compared on.
        features: of the reference's backbone, that the head is compared on.

    Returns:
        ``layers`` of the result's JSON, see `report.parity`; a stage that cannot be compared has a ``note``.
    """
    wanted = {s["stage"]: s["precision"] for s in stages}
    if not wanted:
        return []
    try:
        from nformer_edge.report.layers import compare_graphs, read_graphs

        ours, theirs = (read_graphs(Path(p), tuple(wanted)) for p in (reference_path, engine_path))
        return [
            compare_graphs(stage, precision, ours[stage], theirs[stage], _feed(stage, spec, records, features))
            for stage, precision in wanted.items()
        ]
    except (Error, ImportError) as e:
        return [_not_compared(stage, str(e)) for stage in wanted]


def _feed(
    stage: str, spec: ModelSpec, records: Sequence[ImageRecord], features: Sequence[Features]
) -> dict[str, np.ndarray]:
    if stage == "backbone":
        return {"images": _images(records, spec.preprocess)}
    assert spec.head is not None, "the stage is there"
    rows = np.concatenate([s.features for s in features])
    chosen = rows[evenly(ROWS, len(rows))]
    return {"features": chosen, "landmarks": draw_landmarks(len(chosen), spec.head.layers, spec.head.landmarks, 0)}


def _not_compared(stage: str, why: str) -> dict[str, Any]:
    return {
        "stage": stage,
        "samples": 0,
        "compared": 0,
        "tensors": 0,
        "outside": 0,
        "nodes": [],
        "first": None,
        "note": why,
    }
