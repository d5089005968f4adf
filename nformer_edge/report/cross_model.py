"""Mixed fleets: queries that one model embedded against a gallery that another embedded, in every pairing.

JSON of a result (fractions 0 to 1, distances cosine)::

    {"kind": "fleet", "version": 1, "machine": {...},
     "models": [{"label", "path", ...}], the first of which is the reference,
     "data": {"name", "query", "gallery", "source": "images" | "features"},
     "wanted_false_match_rate": 0.001, "pairs": {"genuine", "impostor"}, "draws": 10000,
     "pairings": [{"query": label, "gallery": label, "mAP", "rank1", "queries",
                   "mAP_kept": {"value", "lower", "upper"}, "rank1_kept": {...},
                   "threshold", "false_match_rate", "true_match_rate",
                   "at_reference_threshold": {"false_match_rate", "true_match_rate"}}]}

"Kept" is of the reference with itself, with two-sided 95 % bounds by the paired bootstrap; null where nothing can be
told. Backbone features are what devices hand to each other, so it is these that are ranked; the head is not run.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import Any

from nformer_edge.core.errors import DataError, UsageError
from nformer_edge.core.features import Features
from nformer_edge.core.machine import machine
from nformer_edge.core.values import to_json
from nformer_edge.data.records import Dataset
from nformer_edge.gallery.embed import embed_dataset
from nformer_edge.metrics.bootstrap import DRAWS, TWO_SIDED, paired_ratio
from nformer_edge.metrics.ranking import RankingResult, evaluate
from nformer_edge.metrics.verification import Operating, Rates, fit_threshold
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

VERSION = 1

Pair = tuple[Features, Features]


def fleet(
    models: Sequence[str | os.PathLike[str]],
    data: Data | None = None,
    *,
    false_match_rate: float = 0.001,
    batch: int = 32,
    draws: int = DRAWS,
    seed: int = 0,
    threads: int | None = None,
    layout: str = "auto",
    opener: Opener | None = None,
) -> dict[str, Any]:
    """Accuracy and re-fitted threshold of every pairing of query model and gallery model.

    Args:
        models: checkpoints, bundles, engines, or feature stores that `embed` wrote. Each is a query side and a gallery
            side; the first with itself is what the others are held against.
        data: a dataset or its folder; may be left out where all `models` are feature stores.
        false_match_rate: wanted share of different people's pairs across cameras that are taken for one person.
        draws: of the bootstrap.
        seed: of the bootstrap.

    Returns:
        the JSON that this module's docstring describes.

    Raises:
        UsageError: for fewer than two models, a model without `data`, or a rate that the pairs cannot tell.
        DataError: if two models did not embed the same images, or to vectors of different length.
    """
    if len(models) < 2:
        raise UsageError("models", len(models), "at least two", "Name one for each kind of device.")
    stores = all(is_feature_store(p) for p in models)
    dataset = None if stores or data is None else open_dataset(data, layout)
    described: list[dict[str, Any]] = []
    embedded: list[Pair] = []
    for path in models:
        model, pair = _embedded(path, dataset, batch, threads, opener)
        described.append(model)
        embedded.append(pair)
        _check_same_images(described[0]["label"], embedded[0], model["label"], pair)
    _tell_apart(described)
    pairings, first = _pairings([m["label"] for m in described], embedded, false_match_rate, draws, seed)
    return {
        "kind": "fleet",
        "version": VERSION,
        "machine": to_json(machine()),
        "models": described,
        "data": describe_data(models[0] if dataset is None else dataset, *embedded[0]),
        "wanted_false_match_rate": false_match_rate,
        "pairs": {"genuine": first.genuine, "impostor": first.impostor},
        "draws": draws,
        "pairings": pairings,
    }


def _embedded(
    path: str | os.PathLike[str], dataset: Dataset | None, batch: int, threads: int | None, opener: Opener | None
) -> tuple[dict[str, Any], Pair]:
    """A model's description and its features of queries and gallery; the model is closed again."""
    if is_feature_store(path):
        return {"label": os.path.basename(str(path)).removesuffix(".npz"), "path": str(path)}, open_features(path)
    if dataset is None:
        raise UsageError(str(path), "a model and no data", "a dataset", "Name it with --data.")
    with open_model(path, threads, opener) as runner:
        query, gallery = embed_dataset(runner, dataset, ("query", "gallery"), batch).values()
        return describe_model(path, runner), (query, gallery)


def _check_same_images(name: str, reference: Pair, other_name: str, other: Pair) -> None:
    for split, ours, theirs in zip(("query", "gallery"), reference, other, strict=True):
        files = [[os.path.basename(p) for p in s.paths] for s in (ours, theirs)]
        same = len(ours) == len(theirs) and files[0] == files[1]
        if not (same and (ours.pids == theirs.pids).all() and (ours.camids == theirs.camids).all()):
            raise DataError(
                f"{other_name}: {split}",
                f"other images, labels or another order than {name}",
                f"the same {len(ours)} images",
                "Embed the same dataset with both.",
            )
        if ours.features.shape[1] != theirs.features.shape[1]:
            raise DataError(
                f"{other_name}: {split}",
                f"{theirs.features.shape[1]} numbers a row",
                f"{ours.features.shape[1]}, as {name}",
                "A fleet shares one checkpoint.",
            )


def _tell_apart(models: list[dict[str, Any]]) -> None:
    """Adds the path to labels that several models have."""
    labels = [m["label"] for m in models]
    for model in models:
        if labels.count(model["label"]) > 1:
            model["label"] = f"{model['label']} ({model['path']})"


def _pairings(
    labels: list[str], embedded: list[Pair], rate: float, draws: int, seed: int
) -> tuple[list[dict[str, Any]], Operating]:
    """Each query model with each gallery model, the reference's own first; and the reference's threshold."""
    reference: tuple[RankingResult, Operating] | None = None
    results = []
    for i, (query, _) in enumerate(embedded):
        for j, (_, gallery) in enumerate(embedded):
            ranked = evaluate(query, gallery)
            fitted = fit_threshold(query, gallery, rate, also_at=reference[1].threshold if reference else None)
            reference = reference or (ranked, fitted)
            results.append(
                {
                    "query": labels[i],
                    "gallery": labels[j],
                    "mAP": ranked.mAP,
                    "rank1": ranked.rank(1),
                    "queries": int(ranked.valid.sum()),
                    **_kept(ranked, reference[0], draws, seed),
                    "threshold": fitted.threshold,
                    **_rates(fitted.rates),
                    "at_reference_threshold": _rates(fitted.elsewhere or fitted.rates),
                }
            )
    assert reference is not None, "there are at least two models"
    return results, reference[1]


def _rates(rates: Rates) -> dict[str, float]:
    return {"false_match_rate": rates.false_match, "true_match_rate": rates.true_match}


def _kept(ranked: RankingResult, reference: RankingResult, draws: int, seed: int) -> dict[str, Any]:
    valid = reference.valid  # labels alone decide it: the same in every pairing
    kept = {}
    for name, (ours, theirs) in {
        "mAP_kept": (ranked.ap[valid], reference.ap[valid]),
        "rank1_kept": (ranked.hits(1)[valid], reference.hits(1)[valid]),
    }.items():
        ratio = paired_ratio(ours, theirs, draws, seed, TWO_SIDED)
        kept[name] = {n: v if math.isfinite(v := getattr(ratio, n)) else None for n in ("value", "lower", "upper")}
    return kept
