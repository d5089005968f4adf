"""From feature stores to the table of Market-1501: baselines, and NFormer by both neighbor rules over landmark seeds.

The store has the splits ``train`` (with as many views as the recipes ask for), ``query`` and ``gallery``. Heads are
trained on ``train`` by the recipes below, which were chosen by `head_ablation.py` on held-out training identities;
query and gallery are read for the final figures alone.

    python benchmarks/market_head.py msmt17.npz --weights msmt17 -o market_head_msmt17.json
"""

from __future__ import annotations

import argparse
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from nformer_edge.core.artifact import atomic_write_json
from nformer_edge.core.features import Features, load_features
from nformer_edge.core.machine import machine
from nformer_edge.core.spec import HeadSpec
from nformer_edge.metrics.ranking import evaluate
from nformer_edge.metrics.rerank import average_query_expansion, k_reciprocal_distances, reciprocal_mean
from nformer_edge.report.table import format_table
from nformer_edge.training.config import HeadConfig, read_config
from nformer_edge.training.head import train_head
from nformer_edge.training.relate import per_query, relate

Recipe = tuple[HeadSpec, HeadConfig]


def _recipe(name: str) -> Recipe:
    """That of a configuration beside this script."""
    config = read_config(Path(__file__).with_name(name))
    assert config.model.head is not None
    return config.model.head, config.head


#: By weights, then by neighbor rule.
RECIPES: dict[str, dict[str, Recipe]] = {
    "market1501": {
        "features": (
            HeadSpec(512, layers=3, heads=4, k=15, landmarks=1024, rule="features"),
            HeadConfig(epochs=0, views=1, start="reciprocal_mean", spread=2.25, strength=2.0, sharpness=4.0),
        ),
        "affinity": (
            HeadSpec(512, layers=3, heads=4, k=15, landmarks=1024, rule="affinity"),
            HeadConfig(epochs=0, views=1, start="reciprocal_mean", spread=2.25, strength=2.0, sharpness=4.0),
        ),
    },
    "msmt17": {
        "features": (
            HeadSpec(512, layers=3, heads=4, landmarks=1024, rule="features"),
            HeadConfig(epochs=0, views=1, start="discriminant", strength=2.0, sharpness=4.0),
        ),
        "affinity": _recipe("head_msmt17.toml"),
    },
}


def score(query: Features, gallery: Features, distances: np.ndarray | None = None) -> dict[str, float]:
    result = evaluate(query, gallery, distances=distances)
    return {"mAP": 100 * result.mAP, "rank1": 100 * float(result.cmc[0]), "mINP": 100 * result.mINP}


def baselines(query: Features, gallery: Features) -> dict[str, list[dict[str, float]]]:
    expanded = query.with_features(average_query_expansion(query.features, gallery.features))
    mean = reciprocal_mean(query.features, gallery.features)
    distances = k_reciprocal_distances(query.features, gallery.features)
    return {
        "cosine": [score(query, gallery)],
        "query expansion": [score(expanded, gallery)],
        "reciprocal mean": [score(query.with_features(mean[0]), gallery.with_features(mean[1]))],
        "k-reciprocal (20/6/0.3)": [score(query, gallery, distances)],
    }


def nformer(sets: dict[str, Features], recipe: Recipe, seeds: list[int], alone: bool) -> dict[str, Any]:
    """Trains one head and scores it by each landmark seed: queries and gallery in one set, and each query `alone`."""
    spec, config = recipe
    query, gallery = sets["query"], sets["gallery"]
    train = sets["train"]
    start = time.perf_counter()
    head, epochs = train_head([train.view(v) for v in range(config.views)], spec, config)
    seconds = time.perf_counter() - start
    scores: dict[str, list[dict[str, float]]] = {"joint": [score(*relate(head, query, gallery, seed=s)) for s in seeds]}
    if alone:
        found = [per_query(head, query, gallery, seed) for seed in seeds]
        scores["per-query"] = [score(p.query, p.gallery, p.distances) for p in found]
    return {
        "spec": asdict(spec), "config": asdict(config), "train_seconds": seconds, "epochs": epochs, "scores": scores,
    }  # fmt: skip


def _line(name: str, scores: list[dict[str, float]], seconds: float | None = None) -> list[str]:
    cells = []
    for key in ("mAP", "rank1"):
        values = [s[key] for s in scores]
        spread = f" ({min(values):.1f} to {max(values):.1f})" if len(values) > 1 else ""
        cells.append(f"{np.mean(values):.1f}{spread}")
    return [name, *cells, "" if seconds is None else f"{seconds:.0f}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("features", metavar="STORE", help="feature store with splits train, query and gallery")
    parser.add_argument("--weights", choices=tuple(RECIPES), required=True, help="whose features they are")
    parser.add_argument("--rules", nargs="+", choices=("features", "affinity"), default=["features", "affinity"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the landmarks")
    parser.add_argument("--per-query", action="store_true", help="also each query alone with the gallery")
    parser.add_argument("-o", "--output", metavar="FILE", default="market_head.json")
    args = parser.parse_args()
    sets = load_features(args.features)
    document: dict[str, Any] = {
        "kind": "market_head", "machine": asdict(machine()), "weights": args.weights, "seeds": args.seeds,
        "baselines": baselines(sets["query"], sets["gallery"]), "nformer": {},
    }  # fmt: skip
    body = [_line(name, scores) for name, scores in document["baselines"].items()]
    for rule in args.rules:
        trained = nformer(sets, RECIPES[args.weights][rule], args.seeds, args.per_query)
        document["nformer"][rule] = trained
        for protocol, scores in trained["scores"].items():
            body.append(_line(f"+NFormer, {rule} rule, {protocol}", scores, trained["train_seconds"]))
        atomic_write_json(args.output, document)
    print(format_table(["", "mAP", "Rank-1", "head's training, s"], body))


if __name__ == "__main__":
    main()
