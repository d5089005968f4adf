"""A gallery that changes (`nformer_edge.gallery.live`): what queries, additions and removals cost, and what is found.

Times are of one run, all ways in turn, against float32 unit rows that are kept: `G @ q` and `argpartition`. The head
starts from the split ``train`` of the store by the recipe of `market_head.py`, or as the gated default. Galleries of
`--sizes` are made of random rows and lists: only their times mean anything.

    python benchmarks/gallery.py market1501.npz --weights market1501 --model model.bundle -o gallery.json
    python benchmarks/gallery.py msmt17.npz --weights msmt17 --rule affinity --sizes -o gallery_affinity.json
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import torch
from market_head import RECIPES

from nformer_edge.backends.open import open_model
from nformer_edge.core.artifact import atomic_write_json
from nformer_edge.core.features import Features, load_features
from nformer_edge.core.machine import machine
from nformer_edge.core.spec import BackboneSpec, HeadSpec, ModelSpec
from nformer_edge.core.values import JSON, to_json
from nformer_edge.gallery.live import LiveHead
from nformer_edge.metrics.distance import unit_rows
from nformer_edge.metrics.ranking import evaluate
from nformer_edge.model.gated import Head, head_numbers
from nformer_edge.model.per_query import gallery_pass
from nformer_edge.ops.contract import draw_landmarks
from nformer_edge.report.table import format_table
from nformer_edge.training.config import HeadConfig
from nformer_edge.training.head import train_head

#: On a machine with other work, the CPU time of one thread (`taskset -c 0`, OMP_NUM_THREADS=1).
CLOCK = time.process_time if "--cpu-time" in sys.argv else time.perf_counter

SHORTLISTS = (200, 500, 2000)

#: Of the gated head, by weights: as `gated_head.py` is called.
GATED = {
    "market1501": HeadConfig(epochs=0, views=1, start="reciprocal_mean"),
    "msmt17": HeadConfig(epochs=0, views=1, start="camera_discriminant", power=0.7),
}


def live_of(head: Head) -> LiveHead:
    model = ModelSpec(BackboneSpec(features=head.spec.features), head.spec)
    numbers = head_numbers(head)
    return LiveHead.open(SimpleNamespace(name="", spec=model, landmark_seed=0, head_numbers=lambda: numbers))


def in_turn(ways: dict[str, Callable[[int], object]], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of each way: median and least over the rounds."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for i in range(-1, rounds):
        for name, way in ways.items():
            since = CLOCK()
            way(max(i, 0))
            times[name].append(1e3 * (CLOCK() - since))
    return {name: [float(np.median(t[1:])), min(t[1:])] for name, t in times.items()}


def asking(live: LiveHead, unit: np.ndarray, queries: np.ndarray, shortlists: tuple[int, ...]) -> dict:
    wanted = unit_rows(queries)

    def nearest(i: int) -> np.ndarray:
        scores = unit @ wanted[i]
        best = np.argpartition(-scores, 10)[:10]
        return best[np.argsort(-scores[best])]

    ways: dict[str, Callable[[int], object]] = {"G @ q, argpartition": nearest}
    ways["quick"] = lambda i: live.ask(queries[i : i + 1])
    for count in shortlists:
        ways[f"shortlist {count}"] = lambda i, count=count: live.ask(queries[i : i + 1], among=count)
    return ways


def upkeep(live: LiveHead, gallery: np.ndarray, model: str | None) -> dict[str, float]:
    """Milliseconds an image, 32 at once, the layers included; the gallery is as before afterwards."""
    found = {}
    for name in ("first", "add", "first", "add"):  # what the first call costs beside is not counted
        since = CLOCK()
        live.add(gallery[:32])
        live.settle()
        found[name] = 1e3 * (CLOCK() - since) / 32
        since = CLOCK()
        live.remove(np.arange(len(live) - 32, len(live)))
        live.settle()
        found["remove"] = 1e3 * (CLOCK() - since) / 32
    if model:
        with open_model(model) as runner:
            size = runner.spec.preprocess
            images = np.random.default_rng(0).standard_normal((32, 3, size.height, size.width), np.float32)
            runner.embed(images)
            since = CLOCK()
            runner.embed(images)
            found[f"embed ({runner.name}, {runner.backend})"] = 1e3 * (CLOCK() - since) / 32
    del found["first"]
    return found


@torch.inference_mode()
def against_pytorch(head: Head, live: LiveHead, gallery: np.ndarray, queries: np.ndarray) -> dict[str, float]:
    """The largest difference of a score of an exact query, the rows that it changes, and PyTorch's time."""
    landmarks = draw_landmarks(len(gallery), head.spec.layers, head.spec.landmarks, 0)
    passed = gallery_pass(head, torch.from_numpy(gallery), torch.from_numpy(landmarks))
    unit, differences, changed, seconds = torch.nn.functional.normalize, [], [], []
    alone = unit(passed.embeddings)
    for query in queries:
        since = CLOCK()
        answer = passed.ask(torch.from_numpy(query[None]))
        seconds.append(CLOCK() - since)
        rows = alone.clone()
        rows[answer.image[1:]] = unit(answer.x[1:])
        changed.append([int(((rows - alone).norm(dim=1) > least).sum()) for least in (0, 1e-6, 1e-4)])
        scores = (rows @ unit(answer.x[0], dim=0)).numpy()
        differences.append(np.abs(scores - live.ask(query[None], exact=True)[0]).max())
    names = ("rows changed", "rows changed by 1e-6", "rows changed by 1e-4")
    return {
        "largest difference of a score": float(max(differences)),
        **dict(zip(names, np.mean(changed, axis=0).tolist(), strict=True)),
        "PyTorch, ms a query": 1e3 * float(np.median(seconds)),
    }


def ranked(
    query: Features, unit: np.ndarray, gallery: Features, ask: Callable[[np.ndarray], np.ndarray]
) -> list[float]:
    """mAP and Rank-1; who is not on the shortlist follows it by cosine."""
    cosine = unit_rows(query.features) @ unit.T
    scores = np.concatenate([ask(row[None]) for row in query.features])
    found = evaluate(query, gallery, distances=np.where(np.isneginf(scores), 3 - cosine, 1 - scores))
    return [100 * found.mAP, 100 * float(found.cmc[0])]


def made(live: LiveHead, size: int) -> np.ndarray:
    """Gives a gated head a gallery of random rows and lists. Returns its rows."""
    rng, listed = np.random.default_rng(0), live.spec.listed
    rows = rng.standard_normal((size, live.spec.features), np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    state = live.state()
    names = rng.integers(0, size, (size, state["names"].shape[1]), np.int32)
    names[:, 0] = np.arange(size)
    scores = np.broadcast_to(np.linspace(1, 0.2, names.shape[1], dtype=np.float32), names.shape)
    live.restore({**state, "unit": rows, "length": np.ones(size, np.float32), "names": names, "scores": scores})
    for layer in range(1, live.spec.layers):
        live._rows[f"x{layer}"] = live._rows["unit"]
    live._rows["out"] = live._rows["unit"]
    live._moved[:] = False
    assert listed <= names.shape[1]
    return live._rows["unit"][:size]


def table(title: str, times: dict[str, list[float]]) -> None:
    first = next(iter(times.values()))
    rows = [
        [n, f"{t[0]:.2f}", f"{t[1]:.2f}", f"{t[0] / first[0]:.1f}", f"{t[1] / first[1]:.1f}"] for n, t in times.items()
    ]
    print(format_table([f"{title}: one query", "median ms", "least ms", "x the first", "x, least"], rows), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store")
    parser.add_argument("--weights", choices=tuple(GATED), required=True)
    parser.add_argument("--rule", choices=("gated", "features", "affinity"), default="gated")
    parser.add_argument("--model", help="checkpoint, bundle or engine whose embedding is timed")
    parser.add_argument("--sizes", type=int, nargs="*", default=[100_000, 1_000_000], help="of made galleries")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--sample", type=int, default=0, help="queries, evenly spaced, that are ranked all ways")
    parser.add_argument("--cpu-time", action="store_true", help="measure CPU time")
    parser.add_argument("-o", "--output", required=True)
    args = parser.parse_args()
    sets = load_features(args.store)
    query, gallery = sets["query"], sets["gallery"]
    spec, config = HeadSpec.gated(gallery.features.shape[1]), GATED[args.weights]
    if args.rule != "gated":
        spec, config = RECIPES[args.weights][args.rule]
    head, _ = train_head([sets["train"]], spec, config)
    live, queries = live_of(head), query.take(np.linspace(0, len(query) - 1, args.rounds).astype(int)).features
    since = CLOCK()
    live.build(gallery.features)
    live.settle()
    result: dict[str, JSON] = {"store": args.store, "weights": args.weights, "rule": args.rule}
    result["clock"] = "cpu" if args.cpu_time else "wall"
    result["build_seconds"] = CLOCK() - since
    rows_memory = sum(x.nbytes for x in live._rows.values()) / len(live)
    result["bytes_a_row"] = {"features": 4 * spec.features, "state": rows_memory}
    print(f"built {len(live):,} rows in {result['build_seconds']:.1f} s; {rows_memory:,.0f} bytes a row", flush=True)
    result["against_pytorch"] = to_json(
        against_pytorch(head, live, gallery.features, queries[:: max(args.rounds // 5, 1)])
    )
    print(result["against_pytorch"], flush=True)
    unit = unit_rows(gallery.features)
    ways = asking(live, unit, queries, SHORTLISTS)
    ways["exact"] = lambda i: live.ask(queries[i : i + 1], exact=True)
    times = {str(len(live)): in_turn(ways, args.rounds)}
    table(f"{len(live):,} rows", times[str(len(live))])
    result["upkeep_ms_an_image"] = to_json(upkeep(live, query.features, args.model))
    print(result["upkeep_ms_an_image"], flush=True)
    if args.sample:
        some = query.take(np.linspace(0, len(query) - 1, args.sample).astype(int))
        accuracy = {"cosine": ranked(some, unit, gallery, lambda row: unit_rows(row) @ unit.T)}
        accuracy["quick"] = ranked(some, unit, gallery, live.ask)
        accuracy["exact"] = ranked(some, unit, gallery, lambda row: live.ask(row, exact=True))
        for count in SHORTLISTS:
            accuracy[f"shortlist {count}"] = ranked(
                some, unit, gallery, lambda row, count=count: live.ask(row, among=count)
            )
        result["accuracy"], result["sample"] = to_json(accuracy), args.sample
        print(
            format_table(
                [f"{args.sample} queries", "mAP", "Rank-1"],
                [[n, *map("{:.1f}".format, a)] for n, a in accuracy.items()],
            )
        )
    for size in args.sizes if args.rule == "gated" else ():
        unit = made(live, size)
        times[str(size)] = in_turn(asking(live, unit, queries, SHORTLISTS[:2]), args.rounds)
        table(f"{size:,} rows", times[str(size)])
    result |= {"one_query_ms": to_json(times), "machine": to_json(machine())}
    atomic_write_json(args.output, result)


if __name__ == "__main__":
    main()
