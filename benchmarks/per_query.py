"""The two query protocols on real features, and how near the shortcuts are to one whole pass a query.

`--sample` queries, spread evenly, are ranked three ways: by a whole pass of the head over the gallery and that query
alone (its landmarks projected anew, as the head by itself does it), by the incremental passes of `gallery.protocols`,
and with the gallery frozen. With `--sample 0` only the protocols' figures over all queries are made.

    python benchmarks/per_query.py market1501.npz --head head.safetensors -o per_query.json
    python benchmarks/per_query.py market1501.npz --rule affinity --landmarks 1024

Without `--head` the head starts as a mean over reciprocal neighbors of the split ``train`` and is not trained.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import asdict
from typing import Any

import numpy as np
import torch

from nformer_edge.core.artifact import atomic_write_json
from nformer_edge.core.features import Features, load_features
from nformer_edge.core.machine import machine
from nformer_edge.core.spec import HeadSpec
from nformer_edge.metrics.distance import cosine_distances, unit_rows
from nformer_edge.metrics.ranking import evaluate, rank
from nformer_edge.model.checkpoint import load_checkpoint
from nformer_edge.model.nformer import NFormer
from nformer_edge.model.start import start_as_reciprocal_mean
from nformer_edge.ops.contract import draw_landmarks
from nformer_edge.report.table import format_table
from nformer_edge.training.relate import per_query


def joint(head: NFormer, query: Features, gallery: Features, seed: int) -> tuple[Features, Features]:
    rows = np.concatenate([query.features, gallery.features])
    landmarks = draw_landmarks(len(rows), head.spec.layers, head.spec.landmarks, seed)
    with torch.inference_mode():
        related = head(torch.from_numpy(rows), torch.from_numpy(landmarks)).numpy()
    return query.with_features(related[: len(query)]), gallery.with_features(related[len(query) :])


def whole_passes(head: NFormer, query: Features, gallery: Features, seed: int) -> np.ndarray:
    """Distances [Q, G], one pass of the head over [gallery; query] for each query."""
    landmarks = torch.from_numpy(draw_landmarks(len(gallery), head.spec.layers, head.spec.landmarks, seed))
    distances = np.empty((len(query), len(gallery)), np.float32)
    for i, own in enumerate(query.features):
        with torch.inference_mode():
            related = head(torch.from_numpy(np.concatenate([gallery.features, own[None]])), landmarks).numpy()
        rows = unit_rows(related)
        distances[i] = cosine_distances(rows[-1:], rows[:-1])[0]
    return distances


def against(query: Features, gallery: Features, reference: np.ndarray, found: np.ndarray) -> dict[str, float]:
    """How far `found` [Q, G] ranks from `reference`: the largest difference of a distance, of an AP; who leads."""
    first, second = (evaluate(query, gallery, distances=d) for d in (reference, found))
    a, b = (rank(query, gallery, distances=d).indices for d in (reference, found))
    difference = np.abs(first.ap - second.ap)[first.valid]
    return {
        "distance_max": float(np.abs(reference - found).max()),
        "ap_mean": float(difference.mean()),
        "ap_max": float(difference.max()),
        "rank1_same": float((a[:, 0] == b[:, 0]).mean()),
        "top10_overlap": float(np.mean([len(set(x) & set(y)) / len(x) for x, y in zip(a, b, strict=True)])),
    }


def timed(head: NFormer, query: Features, gallery: Features, seed: int, follow: bool) -> dict[str, Any]:
    start = time.perf_counter()
    found = per_query(head, query, gallery, seed, follow)
    seconds = time.perf_counter() - start
    result = evaluate(found.query, found.gallery, distances=found.distances)
    return {
        "mAP": result.mAP, "rank1": result.rank(1), "seconds": seconds, "changed_rows": found.changed,
        "exact": found.exact,
    }  # fmt: skip


def make_head(args: argparse.Namespace, sets: dict[str, Features]) -> NFormer:
    if args.head:
        head = load_checkpoint(args.head).head
        if head is None:
            raise SystemExit(f"{args.head}: no head in it")
        return head
    features = torch.from_numpy(sets["train"].features)
    head = NFormer(HeadSpec(features.shape[1], layers=3, heads=1, landmarks=args.landmarks, rule=args.rule)).eval()
    start_as_reciprocal_mean(head, features, strength=2.0, sharpness=4.0 if args.rule == "affinity" else 3.0)
    return head


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("features", metavar="STORE", help="feature store with query and gallery")
    parser.add_argument("--head", metavar="CHECKPOINT", help="checkpoint with a head (default: one that only starts)")
    parser.add_argument("--rule", choices=("features", "affinity"), default="features")
    parser.add_argument("--landmarks", type=int, default=1024)
    parser.add_argument("--sample", type=int, default=50, help="queries that get a whole pass each")
    parser.add_argument("--no-protocols", action="store_true", help="the sample alone")
    parser.add_argument("--seed", type=int, default=0, help="of the landmarks")
    parser.add_argument("-o", "--output", metavar="FILE", default="per_query.json")
    args = parser.parse_args()
    sets = load_features(args.features)
    query, gallery = sets["query"], sets["gallery"]
    head = make_head(args, sets)
    modes = [True, False]
    kept = ", lists kept" if head.spec.rule == "affinity" else ""
    names = {True: f"per-query{kept}", False: "per-query, gallery frozen"}
    document: dict[str, Any] = {"kind": "per_query", "machine": asdict(machine()), "seed": args.seed, "protocols": {}}
    if args.sample:
        chosen = query.take(np.linspace(0, len(query) - 1, args.sample).round().astype(int))
        start = time.perf_counter()
        reference = whole_passes(head, chosen, gallery, args.seed)
        document["whole_pass_seconds"] = (time.perf_counter() - start) / len(chosen)
        document["sample"] = {
            names[m]: against(chosen, gallery, reference, per_query(head, chosen, gallery, args.seed, m).distances)
            for m in modes
        }
        keys = list(next(iter(document["sample"].values())))
        print(format_table([f"against {args.sample} whole passes", *keys],
                           [[n, *(f"{s[k]:.2g}" for k in keys)] for n, s in document["sample"].items()]))  # fmt: skip
        print(f"a whole pass takes {document['whole_pass_seconds']:.1f} s")
        atomic_write_json(args.output, document)
    if not args.no_protocols:
        start = time.perf_counter()
        result = evaluate(*joint(head, query, gallery, args.seed))
        seconds = time.perf_counter() - start
        document["protocols"]["joint"] = {"mAP": result.mAP, "rank1": result.rank(1), "seconds": seconds}
        for mode in modes:
            document["protocols"][names[mode]] = timed(head, query, gallery, args.seed, mode)
        rows = [
            [n, f"{100 * p['mAP']:.1f}", f"{100 * p['rank1']:.1f}", f"{p['seconds']:.0f}",
             f"{p.get('changed_rows', 0):.0f}"]
            for n, p in document["protocols"].items()
        ]  # fmt: skip
        print(format_table(["protocol", "mAP", "Rank-1", "seconds", "changed rows a query"], rows))
        atomic_write_json(args.output, document)


if __name__ == "__main__":
    main()
