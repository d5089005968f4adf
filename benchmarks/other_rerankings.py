"""k-reciprocal re-ranking (20, 6, 0.3) of the same features by other projects' own files, called as each project does.

    python benchmarks/other_rerankings.py market1501.npz --torchreid deep-person-reid/torchreid/utils/rerank.py \\
        --baseline Person_reID_baseline_pytorch/re_ranking.py --strong reid-strong-baseline/utils/re_ranking.py

The first 400 queries of the store, and 3,000 gallery images drawn from seed 0. mAP and Rank-1 by our own scoring.
"""

from __future__ import annotations

import argparse
import runpy
from collections.abc import Callable, Iterator

import numpy as np
import torch

from nformer_edge.core.features import load_features
from nformer_edge.metrics.distance import unit_rows
from nformer_edge.metrics.ranking import evaluate
from nformer_edge.metrics.rerank import k_reciprocal_distances
from nformer_edge.report.table import format_table

QUERIES, IMAGES = 400, 3000


def three(distance: Callable[[np.ndarray, np.ndarray], np.ndarray], q: np.ndarray, g: np.ndarray) -> list[np.ndarray]:
    """Query to gallery, queries among themselves, gallery among itself."""
    return [distance(q, g), distance(q, q), distance(g, g)]


def squared(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (a**2).sum(1)[:, None] + (b**2).sum(1)[None] - 2 * a @ b.T


def rankings(args: argparse.Namespace, query: np.ndarray, gallery: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """What each way is called, and its distances [Q, G]."""
    q, g = unit_rows(query), unit_rows(gallery)
    yield "cosine, not re-ranked", 1 - q @ g.T
    yield "ours", k_reciprocal_distances(query, gallery)
    if args.torchreid:
        run = runpy.run_path(args.torchreid)["re_ranking"]
        yield "torchreid, default metric", run(*three(squared, query, gallery))
        yield "torchreid, cosine", run(*three(lambda a, b: 1 - a @ b.T, q, g))
        yield "torchreid's file, Euclidean", run(*three(lambda a, b: np.sqrt(np.maximum(squared(a, b), 0)), q, g))
    if args.baseline:
        run = runpy.run_path(args.baseline)["re_ranking"]
        yield "Person_reID_baseline_pytorch", run(*three(lambda a, b: a @ b.T, q, g))
    if args.strong:
        run = runpy.run_path(args.strong)["re_ranking"]
        yield "reid-strong-baseline", run(torch.from_numpy(q), torch.from_numpy(g), 20, 6, 0.3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store", help="features of a test split: `nformer-edge embed`")
    for name in ("torchreid", "baseline", "strong"):
        parser.add_argument(f"--{name}", metavar="FILE")
    args = parser.parse_args()
    split = load_features(args.store)
    chosen = np.sort(np.random.default_rng(0).permutation(len(split["gallery"]))[:IMAGES])
    query, gallery = split["query"].take(np.arange(QUERIES)), split["gallery"].take(chosen)
    rows: list[list[str]] = []
    for name, distances in rankings(args, query.features.astype(np.float32), gallery.features.astype(np.float32)):
        score = evaluate(query, gallery, distances=distances.astype(np.float32))
        rows.append([name, f"{score.mAP:.5f}", f"{score.rank(1):.5f}"])
    print(format_table(["re-ranked by", "mAP", "Rank-1"], rows))


if __name__ == "__main__":
    main()
