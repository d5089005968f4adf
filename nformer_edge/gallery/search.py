"""Who is this? Query images to a ranked gallery."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nformer_edge.backends.open import open_model
from nformer_edge.backends.runner import Runner
from nformer_edge.core.errors import DataError
from nformer_edge.core.features import Features, load_features
from nformer_edge.core.spec import check_at_least
from nformer_edge.data.readers import read_dataset
from nformer_edge.gallery.embed import embed_records, holds_images, image_records, relate_sets
from nformer_edge.gallery.protocols import JOINT, PER_QUERY, relate_each
from nformer_edge.metrics.distance import check_same_size, cosine_distances, row_blocks, smallest, unit_rows


def top_matches(query: Features, gallery: Features, top: int = 10) -> tuple[np.ndarray, np.ndarray]:
    """The `top` gallery images of each query by cosine, best first; ties, lower index first.

    Taken in blocks of queries: no [Q, G] matrix is held.

    Returns:
        indices int64 [Q, min(top, G)] and cosines float32 of the same shape.

    Raises:
        DataError: if the sets' features differ in length, or a row is not finite or all zeros.
    """
    check_at_least("top", top, 1)
    check_same_size(query.features, gallery.features)
    q, g = unit_rows(query.features, "query features"), unit_rows(gallery.features, "gallery features")
    indices = np.empty((len(q), min(top, len(g))), np.int64)
    scores = np.empty(indices.shape, np.float32)
    for rows in row_blocks(len(q)):
        distances = cosine_distances(q[rows], g)
        indices[rows] = smallest(distances, top)
        scores[rows] = 1.0 - np.take_along_axis(distances, indices[rows], axis=1)
    return indices, scores


def search(
    runner: Runner,
    queries: Sequence[str | os.PathLike[str]],
    gallery: Features | str | os.PathLike[str],
    *,
    top: int = 10,
    head: bool = True,
    together: bool = False,
    batch: int = 32,
    threads: int | None = None,
) -> list[dict[str, Any]]:
    """Ranks `gallery` for each query image.

    Args:
        runner: an open model.
        queries: image files, or folders of them.
        gallery: features of this model, or a feature store, dataset or folder of images.
        top: matches a query.
        head: let the NFormer head, where there is one, see each query with the gallery first: a pass a query.
        together: all queries and the gallery in one pass. Quicker, and a query's matches depend on the other queries.
        batch: images decoded and run at once.
        threads: decoders.

    Returns:
        For each query ``query`` (path) and ``matches``: rank from 1, path, score (cosine), pid and camid if known.

    Raises:
        DataError: if an image cannot be read, or the gallery is empty or of another model.
    """
    found = gallery if isinstance(gallery, Features) else _open_gallery(runner, gallery, batch, threads)
    _check_gallery(runner, found)
    asked = embed_records(runner, image_records(queries), batch, threads)
    pairs: Iterable[tuple[Features, Features]] = [(asked, found)]
    if head and runner.has_head:
        pairs = [relate_sets(runner, asked, found)] if together else relate_each(runner, asked, found)
    indices, scores = map(np.concatenate, zip(*(top_matches(*pair, top) for pair in pairs), strict=True))
    return [
        {
            "query": path,
            "matches": [
                {
                    "rank": rank + 1,
                    "path": found.paths[i],
                    "score": float(score),
                    "pid": int(found.pids[i]),
                    "camid": int(found.camids[i]),
                }
                for rank, (i, score) in enumerate(zip(row, values, strict=True))
            ],
        }
        for path, row, values in zip(asked.paths, indices, scores, strict=True)
    ]


def _open_gallery(runner: Runner, source: str | os.PathLike[str], batch: int, threads: int | None) -> Features:
    if Path(source).suffix == ".npz":
        sets = load_features(source)
        return sets["gallery"] if "gallery" in sets else next(iter(sets.values()))
    if holds_images(source):
        records = image_records([source])
    else:
        dataset = read_dataset(source)
        records = dataset.gallery or dataset.train
    return embed_records(runner, records, batch, threads)


def _check_gallery(runner: Runner, gallery: Features) -> None:
    if not len(gallery):
        raise DataError("gallery", "zero images", "at least one", "Check the path.")
    if gallery.model and gallery.model != runner.sha256:
        raise DataError(
            "gallery",
            f"features of another model ({gallery.model[:12]}...)",
            f"of this one ({runner.sha256[:12]}...)",
            "Embed the gallery again with this model.",
        )


def search_files(
    model: str | os.PathLike[str],
    queries: Sequence[str | os.PathLike[str]],
    gallery: str | os.PathLike[str],
    *,
    top: int = 10,
    batch: int = 32,
    threads: int | None = None,
    head: bool = True,
    together: bool = False,
) -> dict[str, Any]:
    """Opens `model` and searches.

    Returns:
        JSON of kind ``search``: model, backend, head, protocol (null without the head), queries as `search` gives.
    """
    with open_model(model, intra_op_threads=threads) as runner:
        results = search(runner, queries, gallery, top=top, head=head, together=together, batch=batch, threads=threads)
        related = head and runner.has_head
        return {
            "kind": "search",
            "model": runner.name,
            "backend": runner.backend,
            "head": related,
            "protocol": (JOINT if together else PER_QUERY) if related else None,
            "queries": results,
        }


def format_matches(result: dict[str, Any]) -> str:
    """What `search_files` found, as text: one block a query."""
    blocks = []
    for found in result["queries"]:
        lines = [f"{m['rank']:4d}  {m['score']:.4f}  {m['path']}" for m in found["matches"]]
        blocks.append("\n".join([found["query"], *lines]))
    return "\n\n".join(blocks)
