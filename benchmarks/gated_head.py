"""From feature stores to the gated head's table by composition on Market-1501's test split, beside its fair rivals.

The store has the splits ``train``, ``query`` and ``gallery``. The gates are those of the package, learnt on training
people (`benchmarks/gates.py`); the map, where there is one, is fitted to the split ``train``. Nothing is chosen here.

    python benchmarks/gated_head.py msmt17.npz --start camera_discriminant --power 0.7 -o gated_msmt17.json
    python benchmarks/gated_head.py market1501.npz --start reciprocal_mean -o gated_market1501.json
"""

from __future__ import annotations

import argparse
import time
from functools import partial

import numpy as np
import torch

from nformer_edge.core.artifact import atomic_write_json
from nformer_edge.core.features import Features, load_features
from nformer_edge.core.machine import machine
from nformer_edge.core.spec import GATED_UNTOLD, HeadSpec
from nformer_edge.core.values import JSON, to_json
from nformer_edge.metrics.composition import SIZES, thin, typical_images
from nformer_edge.metrics.ranking import evaluate
from nformer_edge.metrics.rerank import k_reciprocal_distances
from nformer_edge.model.gated import GatedHead
from nformer_edge.ops.contract import draw_landmarks
from nformer_edge.report.table import format_table
from nformer_edge.training.config import HeadConfig
from nformer_edge.training.head import train_head
from nformer_edge.training.relate import per_query, relate

Pair = tuple[Features, Features]

#: Images a person that the head is also told whatever the gallery holds.
ANYWAY = (1, 4, 8)


def scored(pair: Pair, distances: np.ndarray | None = None) -> list[float]:
    found = evaluate(*pair, distances=distances)
    return [100 * found.mAP, 100 * float(found.cmc[0])]


@torch.inference_mode()
def mapped(head: GatedHead, query: Features, gallery: Features) -> Pair:
    """The features that the head compares: its map, less the set's center."""
    rows = torch.from_numpy(np.concatenate([query.features, gallery.features]))
    landmarks = torch.from_numpy(draw_landmarks(len(rows), head.spec.layers, len(rows), 0))
    found = head.mapped(rows, landmarks).numpy()
    return query.with_features(found[: len(query)]), gallery.with_features(found[len(query) :])


def rows_of(head: GatedHead, query: Features, gallery: Features, seeds: int, alone: bool) -> dict[str, list[float]]:
    """mAP and Rank-1 of each method on one set."""
    pair = mapped(head, query, gallery)
    found = {"cosine": scored((query, gallery)), "cosine, mapped": scored(pair)}
    distances = k_reciprocal_distances(pair[0].features, pair[1].features)
    found["k-reciprocal, mapped"] = scored(pair, distances)
    there = np.isin(gallery.pids, query.pids)
    typical = typical_images(np.unique(gallery.pids[there], return_counts=True)[1])
    for told, images in (("", GATED_UNTOLD), (", told", typical), *((f", told {n}", n) for n in ANYWAY)):
        head.tell(images)
        nearby = per_query(head, query, gallery, 0, follow=False)
        found[f"head, per query, nearby{told}"] = scored((nearby.query, nearby.gallery), nearby.distances)
        if images in ANYWAY and told != ", told":
            continue
        joint = np.array([scored(relate(head, query, gallery, seed)) for seed in range(seeds)])
        found[f"head, joint{told}"] = joint.mean(axis=0).tolist()
        found[f"its range over landmark seeds{told}"] = np.ptp(joint, axis=0).tolist()
        if alone:
            exact = per_query(head, query, gallery, 0)
            found[f"head, per query, exact{told}"] = scored((exact.query, exact.gallery), exact.distances)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store")
    parser.add_argument("--start", default="reciprocal_mean", help="of HeadConfig: reciprocal_mean leaves the features")
    parser.add_argument("--power", type=float, default=1.0)
    parser.add_argument("--seeds", type=int, default=5, help="landmark seeds of the joint protocol")
    parser.add_argument("--alone", type=int, default=2, help="sizes, from 1 up, with the exact per-query protocol")
    parser.add_argument("--other-site", type=int, help="camera that the map does not see; the gallery is its images")
    parser.add_argument("-o", "--output", required=True)
    args = parser.parse_args()
    since, sets = time.perf_counter(), load_features(args.store)
    train, query, gallery = sets["train"], sets["query"], sets["gallery"]
    if args.other_site is not None:
        train = train.take(train.camids != args.other_site)
        query = query.take(query.camids != args.other_site)
        gallery = gallery.take(gallery.camids == args.other_site)
    spec = HeadSpec.gated(train.features.shape[1])
    config = HeadConfig(epochs=0, views=1, start=args.start, power=args.power)
    head, _ = train_head([train], spec, config)
    assert isinstance(head, GatedHead)
    table: dict[str, dict[str, list[float]]] = {}
    one = partial(rows_of, head, seeds=args.seeds)
    for place, images in enumerate((2,) if args.other_site is not None else SIZES):
        asks, stays = thin(query, gallery, images)
        table["all" if images is None else str(images)] = one(
            query.take(asks), gallery.take(stays), alone=place < args.alone
        )
        print(f"{images or 'all'}: {time.perf_counter() - since:.0f} s", flush=True)
    if args.other_site is None:
        table["full split"] = one(query, gallery, alone=False)
    names = list(dict.fromkeys(name for found in table.values() for name in found))
    cells = [[n, *("/".join(f"{x:.1f}" for x in f[n]) if n in f else "-" for f in table.values())] for n in names]
    print(format_table(("mAP/Rank-1", *table), cells))
    result: dict[str, JSON] = {"store": args.store, "start": args.start, "power": args.power, "seeds": args.seeds}
    result |= {"other_site": args.other_site, "table": to_json(table), "machine": to_json(machine())}
    atomic_write_json(args.output, result)


if __name__ == "__main__":
    main()
