"""Query images in, ranked gallery out."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nformer_edge.core.errors import DataError
from nformer_edge.core.features import FeatureSet, check_features, load_features
from nformer_edge.core.spec import check_at_least
from nformer_edge.data.readers import read_dataset
from nformer_edge.data.records import ImageRecord
from nformer_edge.evaluate.distance import cosine_distances, smallest, unit_rows
from nformer_edge.runtime.embed import embed_records, list_images, relate_sets
from nformer_edge.runtime.open import open_runner
from nformer_edge.runtime.runner import Runner

#: Queries whose distances to the whole gallery are held at once.
_BLOCK = 256


def search(
    runner: Runner, query: FeatureSet, gallery: FeatureSet, *, top: int = 10, head: bool = True
) -> tuple[np.ndarray, np.ndarray]:
    """Ranks the gallery for each query by cosine, through the head where the model has one.

    Args:
        query, gallery: features as the backbone gave them.
        top: gallery images a query, at most the gallery's size.
        head: False ranks by the backbone alone.

    Returns:
        int64 [Q, top] gallery rows, best first, equal scores lower row first; float32 [Q, top] cosine similarity.

    Raises:
        DataError: if the gallery is empty or a feature cannot be used.
    """
    check_at_least("top", top, 1)
    dim = runner.spec.backbone.features
    check_features(query.features, "query features", dim)
    check_features(gallery.features, "gallery features", dim)
    if not len(gallery):
        raise DataError("gallery", got="no image", expected="at least one", mend="Give gallery images.")
    if head and runner.has_head:
        query, gallery = relate_sets(runner, query, gallery)
    keys = unit_rows(gallery.features, "gallery features")
    top = min(top, len(gallery))
    rows, scores = np.empty((len(query), top), np.int64), np.empty((len(query), top), np.float32)
    for start in range(0, len(query), _BLOCK):
        block = slice(start, start + _BLOCK)
        distances = cosine_distances(unit_rows(query.features[block], "query features"), keys)
        rows[block] = smallest(distances, top)
        scores[block] = 1 - np.take_along_axis(distances, rows[block], axis=1)
    return rows, scores


def search_files(
    model: str | os.PathLike[str], query: Sequence[str | os.PathLike[str]], gallery: str | os.PathLike[str], *,
    top: int = 10, batch: int = 32, threads: int | None = None, head: bool = True,
) -> dict[str, Any]:  # fmt: skip
    """Ranks a gallery for query image files.

    Args:
        gallery: a folder of images, a dataset (its gallery), or a feature store made by the same model.

    Returns:
        JSON of kind ``search``: for each query its path and ``matches``: rank, path, pid, camid, score (cosine).
    """
    with open_runner(model, threads=threads) as runner:
        probes = embed_records(runner, [ImageRecord(os.fspath(p), -1, -1) for p in query], batch=batch)
        known = _gallery(runner, gallery, batch)
        rows, scores = search(runner, probes, known, top=top, head=head)
    found = [
        {
            "query": path,
            "matches": [
                {
                    "rank": rank, "path": known.paths[g], "pid": int(known.pids[g]), "camid": int(known.camids[g]),
                    "score": float(score),
                }
                for rank, (g, score) in enumerate(zip(rows[q], scores[q], strict=True), 1)
            ],
        }
        for q, path in enumerate(probes.paths)
    ]  # fmt: skip
    return {"kind": "search", "model": str(model), "gallery": len(known), "queries": found}


def _gallery(runner: Runner, gallery: str | os.PathLike[str], batch: int) -> FeatureSet:
    if Path(gallery).suffix == ".npz":
        sets = load_features(gallery)
        return sets["gallery"] if "gallery" in sets else next(iter(sets.values()))
    try:
        records = read_dataset(gallery).gallery or list_images(gallery)
    except DataError:
        records = list_images(gallery)
    return embed_records(runner, records, batch=batch)


def format_matches(result: dict[str, Any]) -> str:
    """A search's result as text: each query, its matches below."""
    lines = []
    for entry in result["queries"]:
        lines.append(entry["query"])
        lines += [f"  {m['rank']:>3}  {m['score']:.4f}  {m['path']}" for m in entry["matches"]]
    return "\n".join(lines)
