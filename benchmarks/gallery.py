"""A gallery that changes (`nformer_edge.gallery`): what queries, additions and removals cost, and what is found.

Times are of one run, all ways in turn, against float32 unit rows that are kept: `G @ q` and `argpartition`. The head
starts from the split ``train`` of the store by the recipe of `market_head.py`, or as the gated default. Galleries of
`--sizes` are made of random rows and lists: only their times mean anything.

    python benchmarks/gallery.py speed market1501.npz --weights market1501 --model model.bundle -o speed.json
    python benchmarks/gallery.py accuracy msmt17.npz --weights msmt17 --rule affinity --sample 200 --exact 40 -o a.json
    python benchmarks/gallery.py codes market1501.npz -o codes.json
    python benchmarks/gallery.py kept market1501.npz --weights market1501 -o kept.json
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace

import numpy as np
import torch
from market_head import RECIPES

from nformer_edge.backends.choice import settle
from nformer_edge.backends.open import open_model
from nformer_edge.core.artifact import atomic_write_json
from nformer_edge.core.features import Features, load_features
from nformer_edge.core.machine import machine
from nformer_edge.core.spec import BackboneSpec, HeadSpec, HeadState, ModelSpec, PreprocessSpec
from nformer_edge.core.values import JSON, to_json
from nformer_edge.exporting.export import export_bundle
from nformer_edge.gallery.codes import CODES, Code, measure_codes, nearest_rows
from nformer_edge.gallery.gallery import Gallery
from nformer_edge.gallery.held import Held
from nformer_edge.gallery.live import LiveHead
from nformer_edge.metrics.distance import unit_rows
from nformer_edge.metrics.ranking import evaluate
from nformer_edge.model.backbone import Backbone
from nformer_edge.model.checkpoint import save_checkpoint
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


def live_of(head: Head, kept: HeadState = "fp32") -> LiveHead:
    model = ModelSpec(BackboneSpec(features=head.spec.features), head.spec)
    numbers = head_numbers(head)
    return LiveHead.open(SimpleNamespace(name="", spec=model, landmark_seed=0, head_numbers=lambda: numbers), kept=kept)


def in_turn(ways: dict[str, Callable[[int], object]], rounds: int, settled: bool = False) -> dict[str, list[float]]:
    """Milliseconds of each way: median and least over the rounds.

    Args:
        settled: before its turn a way answers the query before, untimed, when no other one's threads spin: those of
            numpy's BLAS do for 0.1 s after a product.
    """
    times: dict[str, list[float]] = {name: [] for name in ways}
    for i in range(-1, rounds):
        for name, way in ways.items():
            if settled:
                settle(partial(way, max(i - 1, 0)))
            since = CLOCK()
            way(max(i, 0))
            times[name].append(1e3 * (CLOCK() - since))
    return {name: [float(np.median(t[1:])), min(t[1:])] for name, t in times.items()}


def asking_plainly(unit: np.ndarray, queries: np.ndarray) -> Callable[[int], object]:
    wanted = unit_rows(queries)

    def nearest(i: int) -> np.ndarray:
        scores = unit @ wanted[i]
        best = np.argpartition(-scores, 10)[:10]
        return best[np.argsort(-scores[best])]

    return nearest


def asking(live: LiveHead, unit: np.ndarray, queries: np.ndarray, shortlists: tuple[int, ...]) -> dict:
    ways: dict[str, Callable[[int], object]] = {"G @ q, argpartition": asking_plainly(unit, queries)}
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


def whole_pass(head: Head, rows: np.ndarray) -> list[float]:
    """Milliseconds, median and least of three, of what an engine does for a query without the live form."""
    spec = ModelSpec(BackboneSpec("osnet_x0_25", head.spec.features), head.spec, PreprocessSpec(64, 32))
    with tempfile.TemporaryDirectory() as folder:
        save_checkpoint(f"{folder}/model.safetensors", spec, Backbone(spec.backbone), head)
        with open_model(export_bundle(f"{folder}/model.safetensors", f"{folder}/bundle")) as runner:
            return in_turn({"relate": lambda i: runner.relate(rows)}, 3)["relate"]


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


def ranked(query: Features, gallery: Features, scores: np.ndarray, cosine: np.ndarray) -> list[float]:
    """mAP and Rank-1; who is not on a shortlist follows it by cosine."""
    found = evaluate(query, gallery, distances=np.where(np.isneginf(scores), 3 - cosine, 1 - scores))
    return [100 * found.mAP, 100 * float(found.cmc[0])]


def compared(quick: np.ndarray, exact: np.ndarray) -> dict[str, float]:
    """How far the quick answer is from the exact one: what nothing bounds beforehand."""
    off, best = np.abs(quick - exact), [np.argsort(-x, axis=1, kind="stable")[:, :10] for x in (quick, exact)]
    same = [len(np.intersect1d(*pair)) / 10 for pair in zip(*best, strict=True)]
    first = -np.sort(-exact, axis=1)[:, :10]
    return {
        "largest difference of a score": float(off.max()),
        "largest difference of a query's scores, median": float(np.median(off.max(axis=1))),
        "first score less the tenth, exact, median": float(np.median(first[:, 0] - first[:, -1])),
        "mean difference": float(off.mean()),
        "99.9 % of differences are below": float(np.quantile(off, 0.999)),
        "overlap@10": float(np.mean(same)),
        "same first match": float((best[0][:, 0] == best[1][:, 0]).mean()),
    }


def made(live: LiveHead, size: int) -> np.ndarray:
    """Gives a gated head a gallery of random rows and lists. Returns its rows."""
    rng, listed = np.random.default_rng(0), live.spec.listed
    rows = rng.standard_normal((size, live.spec.features), np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    state = live.state()
    names = rng.integers(0, size, (size, state["names"].shape[1]), np.int32)
    names[:, 0] = np.arange(size)
    scores = np.broadcast_to(np.linspace(1, 0.2, names.shape[1], dtype=np.float32), names.shape)
    live.restore(rows, {**state, "gave": np.zeros(size, bool), "names": names, "scores": scores})
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


def headed(args: argparse.Namespace, sets: dict[str, Features]) -> tuple[Head, LiveHead]:
    size = sets["gallery"].features.shape[1]
    spec, config = HeadSpec.gated(size), GATED[args.weights]
    if args.rule != "gated":
        spec, config = RECIPES[args.weights][args.rule]
    head, _ = train_head([sets["train"]], spec, config)
    return head, live_of(head)


def smaller_states(head: Head, live: LiveHead, gallery: np.ndarray) -> dict[str, LiveHead]:
    """The same gallery with the head's rows in fewer bytes."""
    found = {kept: live_of(head, kept) for kept in ("fp16", "int8")}
    for one in found.values():
        one.restore(gallery, live.state())
        one.settle()
    return found


def bytes_a_row(live: LiveHead) -> int:
    return sum(x[0].nbytes for x in live._rows.values())


def evenly(query: Features, count: int) -> Features:
    return query.take(np.linspace(0, len(query) - 1, count).astype(int))


def speed(args: argparse.Namespace, sets: dict[str, Features]) -> dict[str, JSON]:
    query, gallery = sets["query"], sets["gallery"]
    head, live = headed(args, sets)
    queries, since = evenly(query, args.rounds).features, CLOCK()
    live.build(gallery.features)
    live.settle()
    result: dict[str, JSON] = {"build_seconds": CLOCK() - since}
    smaller = smaller_states(head, live, gallery.features)
    sizes = {name: bytes_a_row(one) for name, one in {"fp32": live, **smaller}.items()}
    result["bytes_a_row"] = {"features": 4 * live.spec.features, "state": to_json(sizes)}
    print(f"built {len(live):,} rows in {result['build_seconds']:.1f} s; bytes a row: {sizes}", flush=True)
    result["against_pytorch"] = to_json(
        against_pytorch(head, live, gallery.features, queries[:: max(args.rounds // 5, 1)])
    )
    print(result["against_pytorch"], flush=True)
    unit = unit_rows(gallery.features)
    ways = asking(live, unit, queries, SHORTLISTS)
    ways["exact"] = lambda i: live.ask(queries[i : i + 1], exact=True)
    for name, one in smaller.items():
        ways[f"quick, {name} state"] = lambda i, one=one: one.ask(queries[i : i + 1])
    times = {str(len(live)): in_turn(ways, args.rounds, settled=args.settled)}
    table(f"{len(live):,} rows", times[str(len(live))])
    whole = whole_pass(head, np.concatenate([gallery.features, queries[:1]]))
    result["whole_pass_ms"] = to_json(whole)
    print("a whole pass of gallery and query by the exported head in onnxruntime, ms:", whole, flush=True)
    result["upkeep_ms_an_image"] = to_json(upkeep(live, query.features, args.model))
    print(result["upkeep_ms_an_image"], flush=True)
    for size in args.sizes if args.rule == "gated" else ():
        unit = made(live, size)
        times[str(size)] = in_turn(asking(live, unit, queries, SHORTLISTS[:2]), args.rounds, settled=args.settled)
        table(f"{size:,} rows", times[str(size)])
    return result | {"one_query_ms": to_json(times)}


def accuracy(args: argparse.Namespace, sets: dict[str, Features]) -> dict[str, JSON]:
    gallery, head, live = sets["gallery"], *headed(args, sets)
    live.build(gallery.features)
    unit = unit_rows(gallery.features)
    many, few = evenly(sets["query"], args.sample), evenly(sets["query"], args.exact or args.sample)
    cosine = {id(some): unit_rows(some.features) @ unit.T for some in (many, few)}
    ways: dict[str, tuple[Features, Callable[[np.ndarray], np.ndarray]]] = {
        "quick": (many, live.ask),
        "exact": (few, lambda row: live.ask(row, exact=True)),
    }
    if few is not many and len(few) < len(many):
        ways["quick, the queries of exact"] = few, live.ask
    smaller = smaller_states(head, live, gallery.features)
    for name, one in smaller.items():
        ways[f"quick, {name} state"] = many, one.ask
    for count in SHORTLISTS:
        ways[f"shortlist {count}"] = many, lambda row, count=count: live.ask(row, among=count)
    found = {"cosine": [len(many), *ranked(many, gallery, cosine[id(many)], cosine[id(many)])]}
    scores = {}
    for name, (some, ask) in ways.items():
        since = time.process_time()
        scores[name] = np.concatenate([ask(row[None]) for row in some.features])
        found[name] = [len(some), *ranked(some, gallery, scores[name], cosine[id(some)])]
        print(f"{name}: {found[name]}, {time.process_time() - since:.0f} s of CPU", flush=True)
    if args.rule == "gated":
        live.tell(Held.of_features(gallery).told_images)
        told = np.concatenate([live.ask(row[None]) for row in many.features])
        found["quick, told by the ids"] = [len(many), *ranked(many, gallery, told, cosine[id(many)])]
    rows = [[n, str(a[0]), f"{a[1]:.1f}", f"{a[2]:.1f}"] for n, a in found.items()]
    print(format_table([f"{args.weights}, {args.rule}", "queries", "mAP", "Rank-1"], rows))
    differs = compared(scores.get("quick, the queries of exact", scores["quick"]), scores["exact"])
    print(differs)
    sizes = {name: bytes_a_row(one) for name, one in {"fp32": live, **smaller}.items()}
    print("bytes a row", sizes)
    return {"accuracy": to_json(found), "quick_against_exact": to_json(differs), "bytes_a_row": to_json(sizes)}


def codes(args: argparse.Namespace, sets: dict[str, Features]) -> dict[str, JSON]:
    query, gallery = sets["query"], sets["gallery"]
    unit, queries = unit_rows(gallery.features), evenly(query, args.rounds).features
    ways = {"G @ q, argpartition": asking_plainly(unit, queries)}
    for name in CODES:
        code = Code.fit(name, gallery.features)
        columns = code.encode(gallery.features)
        columns |= code.complete(columns)
        ways[name] = lambda i, c=code, held=columns: nearest_rows(c, held, queries[i : i + 1], 10)
    times = in_turn(ways, args.rounds)
    table(f"{len(gallery):,} images", times)
    scores = measure_codes(query, gallery)
    rows = [[s.code, f"{s.bytes_per_image:,}", f"{100 * s.mAP:.2f}", f"{100 * s.rank1:.2f}"] for s in scores]
    print(format_table(["code", "bytes an image", "mAP", "Rank-1"], rows))
    return {"one_query_ms": to_json(times), "codes": to_json(scores)}


def kept(args: argparse.Namespace, sets: dict[str, Features]) -> dict[str, JSON]:
    """A `Gallery` in memory and in a folder: searched without the head, changed, opened with and without a state."""
    gallery, queries = sets["gallery"], evenly(sets["query"], args.rounds).features
    head, live = headed(args, sets)
    numbers, about = head_numbers(head), {"precision": {"backbone": "fp32"}, "checkpoint": "", "accuracy": None}
    runner = SimpleNamespace(
        **about, name="", backend="", spec=live.model, sha256="0" * 64, landmark_seed=0, has_head=True,
        head_numbers=lambda: numbers,
    )  # fmt: skip
    bare = Features(gallery.features, gallery.pids, gallery.camids)
    result: dict[str, JSON] = {}
    with tempfile.TemporaryDirectory() as folder:
        memory, disk = Gallery(runner), Gallery(runner, folder)
        ways = {"G @ q, argpartition": asking_plainly(unit_rows(gallery.features), queries)}
        for name, place in (("in memory", memory), ("in a folder", disk)):
            place.add(bare)
            ways[name] = lambda i, place=place: place.search(Features(queries[i : i + 1]), head=False)
        times = in_turn(ways, args.rounds)
        table(f"{len(gallery):,} images, no head", times)
        result["one_query_ms"] = to_json(times)
        for name, place in (("in memory", memory), ("in a folder", disk)):
            new = [Features(queries[:32], ids=tuple(f"new {i}" for _ in queries[:32])) for i in range(args.rounds)]
            added = in_turn({"add": lambda i, place=place, new=new: place.add(new[i])}, args.rounds)["add"]
            gone = in_turn({"remove": lambda i, place=place: _forget(place, i)}, args.rounds)["remove"]
            result[f"32 images {name}, ms"] = {"add": added, "remove": gone}
        query = Features(queries[:1])
        for name in ("open and search, all related", "open and search, state on the disk"):
            disk.close()
            since = CLOCK()
            disk = Gallery(runner, folder)
            disk.search(query, head=True, exact=False)
            result[f"{name}, s"] = CLOCK() - since
        result["file_mib"] = disk.stats().disk_mib
        disk.close()
    print({name: value for name, value in result.items() if name != "one_query_ms"})
    return result


def _forget(place: Gallery, i: int) -> None:
    if f"new {i}" in place.people():
        place.remove(f"new {i}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for run in (speed, accuracy, codes, kept):
        command = commands.add_parser(run.__name__)
        command.set_defaults(run=run)
        command.add_argument("store")
        command.add_argument("--rounds", type=int, default=20)
        command.add_argument("--cpu-time", action="store_true", help="measure CPU time")
        command.add_argument("-o", "--output", required=True)
        if run is not codes:
            command.add_argument("--weights", choices=tuple(GATED), required=True)
            command.add_argument("--rule", choices=("gated", "features", "affinity"), default="gated")
    of = commands.choices
    of["speed"].add_argument("--model", help="checkpoint, bundle or engine whose embedding is timed")
    of["speed"].add_argument("--settled", action="store_true", help="a way starts when no other one's threads spin")
    of["speed"].add_argument("--sizes", type=int, nargs="*", default=[100_000, 1_000_000], help="of made galleries")
    of["accuracy"].add_argument("--sample", type=int, default=600, help="queries, evenly spaced")
    of["accuracy"].add_argument("--exact", type=int, help="queries that are also asked exactly (default: all of them)")
    args = parser.parse_args()
    asked = {name: value for name, value in vars(args).items() if name not in ("run", "output", "cpu_time")}
    result = args.run(args, load_features(args.store))
    clock = "cpu" if args.cpu_time else "wall"
    atomic_write_json(args.output, to_json({**asked, "clock": clock, **result, "machine": machine()}))


if __name__ == "__main__":
    main()
