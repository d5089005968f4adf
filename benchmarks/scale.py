"""A gallery in a vector store (`gallery.shortlist`) at growing sizes: what is found, and what it costs.

The gallery is a store's split ``gallery`` and, up to each of `--sizes`, distractors: a training image's feature and
half the difference of two others. Smaller sizes take images evenly spaced. The gated head starts from the split
``train``, as in `gallery.py`; its landmarks are drawn from the gallery's own images. Rows that are not on a
shortlist follow it by cosine.

    python benchmarks/scale.py market1501.npz --in numpy --sizes 10000 100000 1000000 -o scale.json
    python benchmarks/scale.py market1501.npz --in milvus --sizes 100000 -o milvus.json
    python benchmarks/scale.py market1501.npz --in qdrant --sizes 4000 -o qdrant.json
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from gallery import GATED

from nformer_edge.core.artifact import atomic_write_json
from nformer_edge.core.features import Features, load_features
from nformer_edge.core.machine import machine
from nformer_edge.core.spec import BackboneSpec, HeadSpec, ModelSpec
from nformer_edge.core.values import JSON, to_json
from nformer_edge.gallery.held import Where
from nformer_edge.gallery.shortlist.base import NumpyShortlist, Shortlist
from nformer_edge.gallery.shortlist.gallery import ShortlistGallery
from nformer_edge.gallery.shortlist.milvus import MilvusShortlist
from nformer_edge.gallery.shortlist.qdrant import QdrantShortlist
from nformer_edge.metrics.ranking import evaluate
from nformer_edge.model.gated import head_numbers
from nformer_edge.report.table import format_table
from nformer_edge.training.head import train_head

STORES: dict[str, Callable[[str, int], Shortlist]] = {
    "numpy": lambda folder, features: NumpyShortlist(features),
    "milvus": lambda folder, features: MilvusShortlist(f"{folder}/milvus.db", features),
    "qdrant": lambda folder, features: QdrantShortlist(f"{folder}/qdrant", features),
}

#: Images that are added in one call.
CHUNK = 20_000


def model_of(train: Features, weights: str) -> SimpleNamespace:
    """What a gallery asks of an open model, of a head alone."""
    head, _ = train_head([train], HeadSpec.gated(train.features.shape[1]), GATED[weights])
    numbers = head_numbers(head)
    spec = ModelSpec(BackboneSpec(features=head.spec.features), head.spec)
    return SimpleNamespace(
        name=weights, backend="features", precision={"backbone": "fp32"}, spec=spec, sha256=train.model, checkpoint="",
        landmark_seed=0, has_head=True, accuracy=None, head_numbers=lambda: numbers,
    )  # fmt: skip


def distractors(train: np.ndarray, count: int, seed: int) -> np.ndarray:
    """float32 [count, D]."""
    rng = np.random.default_rng(seed)
    own, one, other = rng.integers(0, len(train), (3, count))
    return train[own] + (train[one] - train[other]) / 2


def fill(gallery: ShortlistGallery, known: Features, train: np.ndarray, size: int) -> float:
    """Adds `known` under numbers, then distractors. Returns seconds."""
    since = time.perf_counter()
    gallery.add(known.with_features(known.features), [f"{i:09}" for i in range(len(known))], times=0)
    for start in range(len(known), size, CHUNK):
        count = min(CHUNK, size - start)
        names = [f"{i:09}" for i in range(start, start + count)]
        gallery.add(Features(distractors(train, count, start)), names, times=0)
    return time.perf_counter() - since


def measured(
    store: Shortlist, model: SimpleNamespace, sets: dict[str, Features], size: int, args: argparse.Namespace
) -> dict[str, JSON]:
    query, known = sets["query"], sets["gallery"]
    if size < len(known):
        known = known.take(np.linspace(0, len(known) - 1, size).astype(int))
    query = query.take(np.linspace(0, len(query) - 1, args.queries).astype(int))
    gallery = ShortlistGallery(model, store, head=True)
    seconds = fill(gallery, known, sets["train"].features, size)
    print(f"{store.name}: {size:,} rows in {seconds:.1f} s", flush=True)

    # the truth: every row's cosine, as the head compares them
    prepared = gallery._prepare
    asked = prepared(query.features)["unit"]
    exact = np.empty((len(query), size), np.float32)
    exact[:, : len(known)] = asked @ prepared(known.features)["unit"].T
    for start in range(len(known), size, CHUNK):
        rows = prepared(distractors(sets["train"].features, min(CHUNK, size - start), start))["unit"]
        exact[:, start : start + len(rows)] = asked @ rows.T
    pids, camids = np.zeros(size, np.int64), np.zeros(size, np.int64)
    pids[: len(known)], camids[: len(known)] = known.pids, known.camids
    labels = Features(np.broadcast_to(np.float32(1), (size, 1)), pids, camids)

    def ranked(scores: np.ndarray) -> list[float]:
        found = evaluate(query, labels, distances=1 - scores)
        return [100 * found.mAP, 100 * float(found.cmc[0])]

    result: dict[str, JSON] = {"rows": size, "seconds_to_add": seconds, "cosine": ranked(exact)}
    for count in args.shortlist:
        scores, recalls, times = exact - 3, [], {"store": [], "store and head": []}
        for i in range(len(query)):
            since = time.perf_counter()
            (hits,) = store.nearest(asked[i : i + 1], count, Where())
            times["store"].append(1e3 * (time.perf_counter() - since))
            best = {f"{j:09}" for j in np.argpartition(-exact[i], count)[:count]}
            recalls.append(len(best & {*hits.ids}) / count)
            since = time.perf_counter()
            found = gallery.search(query.take(np.array([i])), count, shortlist=count)
            times["store and head"].append(1e3 * (time.perf_counter() - since))
            scores[i, [int(name) for name in found.ids[0]]] = found.scores[0]
        milliseconds = {name: float(np.median(t)) for name, t in times.items()}
        result[f"shortlist {count}"] = {
            "recall": float(np.mean(recalls)), "mAP, Rank-1": ranked(scores), "median ms": to_json(milliseconds),
            "least ms": {name: min(t) for name, t in times.items()},
        }  # fmt: skip
        row = [str(count), f"{np.mean(recalls):.4f}", *(f"{x:.1f}" for x in ranked(scores)), *milliseconds.values()]
        print(format_table(["M", "recall", "mAP", "Rank-1", *times], [[*map(str, row)]]), flush=True)
    result["peak_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store")
    parser.add_argument("--weights", choices=tuple(GATED), default="market1501")
    parser.add_argument("--in", dest="kind", choices=tuple(STORES), default="numpy", help="where rows lie")
    parser.add_argument("--sizes", type=int, nargs="+", default=[10_000, 100_000])
    parser.add_argument("--shortlist", type=int, nargs="+", default=[200, 500])
    parser.add_argument("--queries", type=int, default=200)
    parser.add_argument("-o", "--output", required=True)
    args = parser.parse_args()
    sets = load_features(args.store)
    model, results = model_of(sets["train"], args.weights), []
    for size in args.sizes:
        with tempfile.TemporaryDirectory() as folder:
            store = STORES[args.kind](folder, sets["train"].features.shape[1])
            results.append(measured(store, model, sets, size, args))
            files = [path.stat().st_size for path in Path(folder).rglob("*") if path.is_file()]
            results[-1]["bytes_on_disk"] = sum(files)
            store.close()
    found: dict[str, JSON] = {
        "features": args.store,
        "in": args.kind,
        "queries": args.queries,
        "sizes": to_json(results),
    }
    atomic_write_json(args.output, {**found, "machine": to_json(machine())})


if __name__ == "__main__":
    main()
