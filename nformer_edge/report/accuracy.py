"""What a model ranks like: backbone, NFormer by both query protocols, and re-ranking beside them.

JSON of a result (fractions 0 to 1, times in seconds)::

    {"kind": "evaluation", "version": 2, "machine": {...},
     "model": {"label", "path", "name", "backend", "precision": {"backbone", "head"}, "size_mb": {...},
               "landmark_seed"} or null for a feature store alone,
     "data": {"name", "query", "gallery", "source": "images" | "features"},
     "embed_seconds": 1.2 or null,
     "per_query": null, or why the per-query protocol is not there,
     "results": [{"name": "backbone" | "+NFormer" | "+NFormer per-query" | "k-reciprocal" | "reciprocal mean"
                          | "query expansion",
                  "mAP", "mINP", "cmc": [50], "queries", "left_out", "seconds",
                  "mAP_interval": [lower, upper], "rank1_interval": [lower, upper],
                  "protocol": "joint" | "per-query", "seeds": [0, ...], "mAP_by_seed": [...],
                  "rank1_by_seed": [...]  (NFormer only), "exact", "changed_rows"  (per-query only)}],
     "rank_lists": [{"result", "query": {"path", "pid", "camid"},
                     "gallery": [{"path", "pid", "camid", "correct", "distance"}]}]}

Intervals are 95 %, two-sided, by the bootstrap over queries (10,000 draws); of a mean over landmark seeds each query
scores its mean over them.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from nformer_edge.backends.runner import Runner
from nformer_edge.core.errors import UsageError
from nformer_edge.core.features import Features
from nformer_edge.core.machine import machine
from nformer_edge.core.values import to_json
from nformer_edge.gallery.embed import embed_dataset, relate_sets
from nformer_edge.gallery.protocols import JOINT, PER_QUERY, relate_per_query
from nformer_edge.metrics.bootstrap import mean_interval
from nformer_edge.metrics.ranking import RankingResult, evaluate, rank
from nformer_edge.metrics.rerank import average_query_expansion, k_reciprocal_distances, reciprocal_mean
from nformer_edge.report.models import (
    Data,
    Opener,
    describe_data,
    describe_model,
    is_feature_store,
    open_dataset,
    open_features,
    open_model,
)

VERSION = 2


def evaluate_model(
    model_path: str | os.PathLike[str] | None,
    data: Data,
    *,
    batch: int = 32,
    rerank: bool = False,
    seeds: Sequence[int] | None = None,
    rank_lists: int = 6,
    top: int = 10,
    threads: int | None = None,
    label: str | None = None,
    layout: str = "auto",
    opener: Opener | None = None,
    per_query: bool = True,
) -> dict[str, Any]:
    """Ranks a dataset's queries against its gallery with a checkpoint, bundle or engine.

    Args:
        model_path: the model; None to score a feature store as it is.
        data: a dataset, its folder, or a feature store (`.npz`) whose features the model's head takes.
        batch: images that the backbone sees at once.
        rerank: add k-reciprocal re-ranking and the two parameter-free baselines.
        seeds: of the landmarks; the model's own seed if None. Several give the spread over draws.
        rank_lists: how many queries' ranked galleries to record, spread evenly over the queries with a match.
        top: length of a recorded list.
        threads: of the backend; its own choice if None.
        label: what the report calls the model.
        layout: of the dataset's folder.
        opener: stands in for `open_model`.
        per_query: also rank each query alone with the gallery (`gallery.protocols`), where PyTorch runs the head.

    Returns:
        the JSON that this module's docstring describes.
    """
    if model_path is None:
        if not is_feature_store(data):
            raise UsageError("model", "none", "a model, or a feature store", "Name a model.")
        query, gallery = open_features(data)  # type: ignore[arg-type]
        results, lists = _score(None, query, gallery, rerank, (), rank_lists, top)
        return _document(None, data, query, gallery, None, results, lists)
    with open_model(model_path, threads, opener) as runner:
        start = time.perf_counter()
        if is_feature_store(data):
            (query, gallery), seconds = open_features(data), None  # type: ignore[arg-type]
        else:
            dataset = open_dataset(data, layout)
            query, gallery = embed_dataset(runner, dataset, ("query", "gallery"), batch).values()
            data, seconds = dataset, time.perf_counter() - start
        model = describe_model(model_path, runner, label)
        chosen = tuple(seeds) if seeds is not None else (runner.landmark_seed,)
        results, lists = _score(runner, query, gallery, rerank, chosen, rank_lists, top, per_query)
        why = _without_per_query(runner, per_query)
    return _document(model, data, query, gallery, seconds, results, lists, why)


def _document(
    model: dict[str, Any] | None,
    data: Data,
    query: Features,
    gallery: Features,
    seconds: float | None,
    results: list[dict[str, Any]],
    lists: list[dict[str, Any]],
    without_per_query: str | None = None,
) -> dict[str, Any]:
    return {
        "kind": "evaluation",
        "version": VERSION,
        "machine": to_json(machine()),
        "model": model,
        "data": describe_data(data, query, gallery),
        "embed_seconds": seconds,
        "per_query": without_per_query,
        "results": results,
        "rank_lists": lists,
    }


def scores(name: str, result: RankingResult, seconds: float) -> dict[str, Any]:
    """A ranking's figures as JSON."""
    return {
        "name": name,
        **_intervals([result]),
        "mAP": result.mAP,
        "mINP": result.mINP,
        "cmc": result.cmc.tolist(),
        "queries": int(result.valid.sum()),
        "left_out": result.left_out,
        "seconds": seconds,
    }


def _intervals(results: Sequence[RankingResult]) -> dict[str, list[float]]:
    """Of the mean over rankings of the same queries."""
    valid = results[0].valid  # labels alone decide it: the same in each
    by_query = {
        "mAP_interval": np.mean([r.ap[valid] for r in results], axis=0),
        "rank1_interval": np.mean([r.hits(1)[valid] for r in results], axis=0),
    }
    found = {name: mean_interval(scored) for name, scored in by_query.items()}
    return {name: [interval.lower, interval.upper] for name, interval in found.items()}


def _score(
    runner: Runner | None,
    query: Features,
    gallery: Features,
    rerank: bool,
    seeds: tuple[int, ...],
    rank_lists: int,
    top: int,
    per_query: bool = False,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    start = time.perf_counter()
    backbone = evaluate(query, gallery)
    results = [scores("backbone", backbone, time.perf_counter() - start)]
    shown = _spread(np.flatnonzero(backbone.valid), rank_lists)
    lists = _rank_lists("backbone", query, gallery, shown, top)
    if runner is not None and runner.has_head and seeds:
        by_seed = []
        for seed in seeds:
            start = time.perf_counter()
            q, g = relate_sets(runner, query, gallery, seed=seed)
            ranked = evaluate(q, g)
            by_seed.append((ranked, scores("+NFormer", ranked, time.perf_counter() - start) | {"protocol": JOINT}))
            if seed == seeds[0]:
                lists += _rank_lists("+NFormer", q, g, shown, top)
        results.append(_over_seeds(by_seed, seeds))
        if _without_per_query(runner, per_query) is None:
            results.append(_over_seeds([_alone(runner, query, gallery, seed) for seed in seeds], seeds))
    if rerank:
        results += _baselines(query, gallery)
    return results, lists


def _without_per_query(runner: Runner, wanted: bool) -> str | None:
    """Why an evaluation of this model has no per-query protocol; None where it has."""
    if not runner.has_head:
        return "the model has no head"
    if not hasattr(runner, "with_head"):
        return f"{runner.backend} runs the head as one graph: evaluate the checkpoint that it was made from"
    return None if wanted else "not asked for"


def _alone(runner: Runner, query: Features, gallery: Features, seed: int) -> tuple[RankingResult, dict[str, Any]]:
    start = time.perf_counter()
    found = relate_per_query(runner, query, gallery, seed)
    ranked = evaluate(found.query, found.gallery, distances=found.distances)
    return ranked, scores("+NFormer per-query", ranked, time.perf_counter() - start) | {
        "protocol": PER_QUERY,
        "exact": found.exact,
        "changed_rows": found.changed,
    }


def _over_seeds(ranked: list[tuple[RankingResult, dict[str, Any]]], seeds: tuple[int, ...]) -> dict[str, Any]:
    """The mean over landmark draws, with each draw's mAP and Rank-1 beside it."""
    by_seed = [plain for _, plain in ranked]
    merged = by_seed[0] | _intervals([result for result, _ in ranked])
    for name in ("mAP", "mINP", "seconds"):
        merged[name] = float(np.mean([r[name] for r in by_seed]))
    merged["cmc"] = np.mean([r["cmc"] for r in by_seed], axis=0).tolist()
    return merged | {
        "seeds": list(seeds),
        "mAP_by_seed": [r["mAP"] for r in by_seed],
        "rank1_by_seed": [r["cmc"][0] for r in by_seed],
    }


def _baselines(query: Features, gallery: Features) -> list[dict[str, Any]]:
    start = time.perf_counter()
    distances = k_reciprocal_distances(query.features, gallery.features)
    results = [scores("k-reciprocal", evaluate(query, gallery, distances=distances), time.perf_counter() - start)]
    start = time.perf_counter()
    q, g = reciprocal_mean(query.features, gallery.features)
    ranked = evaluate(query.with_features(q), gallery.with_features(g))
    results.append(scores("reciprocal mean", ranked, time.perf_counter() - start))
    start = time.perf_counter()
    expanded = query.with_features(average_query_expansion(query.features, gallery.features))
    results.append(scores("query expansion", evaluate(expanded, gallery), time.perf_counter() - start))
    return results


def _spread(rows: np.ndarray, count: int) -> np.ndarray:
    """At most `count` of `rows`, evenly spaced."""
    return rows[np.unique(np.linspace(0, len(rows) - 1, min(count, len(rows))).round().astype(int))]


def _rank_lists(name: str, query: Features, gallery: Features, rows: np.ndarray, top: int) -> list[dict[str, Any]]:
    def image(images: Features, i: int) -> dict[str, Any]:
        return {"path": images.paths[i], "pid": int(images.pids[i]), "camid": int(images.camids[i])}

    shown = query.take(rows)
    ranked = rank(shown, gallery, top=top)
    lists = []
    for q in range(len(shown)):
        pairs = [(int(g), float(d)) for g, d in zip(ranked.indices[q], ranked.distances[q], strict=True) if g >= 0]
        found = [
            {**image(gallery, g), "correct": bool(gallery.pids[g] == shown.pids[q]), "distance": d} for g, d in pairs
        ]
        lists.append({"result": name, "query": image(shown, q), "gallery": found})
    return lists
