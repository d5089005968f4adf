"""What INT8 costs on a dataset's whole test split: FP32 and INT8 engines for the CPU, with and without the head.

    python benchmarks/market_int8.py osnet.safetensors --data Market-1501-v15.09.15 --work runs/market_int8
    python benchmarks/market_int8.py osnet.safetensors --data Market-1501-v15.09.15 --work runs/market_int8 \\
        --head head.safetensors --calib-num 512 --calib-method auto

A head is a checkpoint (`nformer-edge train --features`), or `--train-head STORE` makes one of that store's split
``train`` by `market_head.py`'s recipe. `--int8 ENGINE` takes an INT8 engine that was built otherwise, such as to a
budget. Everything stays in `--work`: bundle, engines, and one feature store an engine, so that a second run embeds
nothing again. What is there is taken as it is, so give other settings another folder. The table has mAP and Rank-1 in
percent with two-sided 95 % intervals, and INT8 less FP32 in points, paired query by query; then come each engine's
queries against the other's gallery.
"""

from __future__ import annotations

import argparse
import typing
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from nformer_edge.backends.build import build_engine
from nformer_edge.backends.open import open_model
from nformer_edge.backends.spec import EngineSpec
from nformer_edge.core.artifact import atomic_write_json, read_manifest
from nformer_edge.core.features import Features, load_features, save_features
from nformer_edge.core.machine import machine
from nformer_edge.core.spec import CalibrationChoice
from nformer_edge.data.readers import read_dataset
from nformer_edge.data.records import Dataset, ImageRecord
from nformer_edge.exporting.export import export_bundle
from nformer_edge.gallery.embed import embed_dataset
from nformer_edge.gallery.protocols import relate_sets
from nformer_edge.metrics.bootstrap import Interval, mean_interval, paired_difference
from nformer_edge.metrics.ranking import evaluate
from nformer_edge.model.checkpoint import load_checkpoint, save_checkpoint
from nformer_edge.model.nformer import NFormer
from nformer_edge.report.cross_model import cross_model
from nformer_edge.report.models import open_store
from nformer_edge.report.table import format_table
from nformer_edge.training.head import train_head

PRECISIONS = ("fp32", "int8")

Pair = tuple[Features, Features]


def some_people(dataset: Dataset, people: int | None, seed: int = 0) -> Dataset:
    """With the queries and gallery images of `people` test identities alone; as it is if None."""
    if people is None:
        return dataset
    known = sorted({r.pid for r in dataset.query})
    chosen = set(np.random.default_rng(seed).permutation(known)[:people].tolist())

    def of(records: Sequence[ImageRecord]) -> tuple[ImageRecord, ...]:
        return tuple(r for r in records if r.pid in chosen)

    return replace(dataset, query=of(dataset.query), gallery=of(dataset.gallery))


def head_by_recipe(store: str, weights: str, rule: str) -> NFormer:
    """A head of the store's split ``train``, as `market_head.py` makes it."""
    from market_head import RECIPES

    spec, config = RECIPES[weights][rule]
    train = load_features(store)["train"]
    return train_head([train.view(v) for v in range(config.views)], spec, config)[0]


def model_with_head(args: argparse.Namespace, work: Path) -> Path:
    """The checkpoint to export: the one given, with the head that was asked for in it."""
    if not (args.head or args.train_head):
        return Path(args.checkpoint)
    path = work / "model.safetensors"
    if not path.exists():
        head = (
            load_checkpoint(args.head).head if args.head else head_by_recipe(args.train_head, args.weights, args.rule)
        )
        if head is None:
            raise SystemExit(f"{args.head}: no head in it")
        loaded = load_checkpoint(args.checkpoint)
        save_checkpoint(path, replace(loaded.spec, head=head.spec), loaded.backbone, head)
    return path


def engines(args: argparse.Namespace, work: Path) -> dict[str, Path]:
    """Builds what is not there yet."""
    if not (work / "bundle").exists():
        export_bundle(model_with_head(args, work), work / "bundle")
    built = {precision: work / precision for precision in PRECISIONS}
    if args.int8:
        built["int8"] = Path(args.int8)
    for precision, path in built.items():
        if not path.exists():
            spec = EngineSpec(
                "onnxruntime",
                precision,
                calib_method=args.calib_method,
                calib_num=args.calib_num,
                seed=args.seed,  # type: ignore[arg-type]
            )
            build_engine(work / "bundle", path, spec, args.data if precision == "int8" else None)
    return built


def embedded(engine: Path, store: Path, dataset: Dataset, threads: int | None) -> Pair:
    """Features of queries and gallery: those in `store` where this engine made them of these images, else made now."""
    with open_model(engine, intra_op_threads=threads) as runner:
        if store.exists() and (stored := open_store(store)):
            query, gallery = stored
            same = (len(query), len(gallery)) == (len(dataset.query), len(dataset.gallery))
            if same and query.model == runner.sha256:
                return query, gallery
        sets = embed_dataset(runner, dataset, ("query", "gallery"), decoders=threads)
    save_features(store, sets)
    return sets["query"], sets["gallery"]


def compare(fp32: Pair, int8: Pair) -> dict[str, Any]:
    """Both precisions' scores with intervals, and their paired differences, as fractions."""
    reference, found = evaluate(*fp32), evaluate(*int8)
    valid = reference.valid
    result: dict[str, Any] = {"queries": int(valid.sum())}
    for metric, ours, theirs in (
        ("mAP", found.ap[valid], reference.ap[valid]),
        ("rank1", (found.first_hit[valid] == 1).astype(float), (reference.first_hit[valid] == 1).astype(float)),
    ):
        result[metric] = {
            "fp32": asdict(mean_interval(theirs)), "int8": asdict(mean_interval(ours)),
            "difference": asdict(paired_difference(ours, theirs)),
        }  # fmt: skip
    return result


def compare_related(built: dict[str, Path], pairs: dict[str, Pair], seed: int, threads: int | None) -> dict[str, Any]:
    """The same after the head, which each engine runs over its own features, queries and gallery in one set."""
    related = {}
    for precision, path in built.items():
        with open_model(path, intra_op_threads=threads) as runner:
            related[precision] = relate_sets(runner, *pairs[precision], seed=seed)
    return compare(related["fp32"], related["int8"])


def facts_of(built: dict[str, Path]) -> dict[str, Any]:
    """What stands in the engines' manifests."""
    facts = {}
    for precision, path in built.items():
        manifest = read_manifest(path, "engine")
        size = manifest["files"]["backbone.onnx"]["bytes"] / 1e6
        kept = ("precision", "audit", "calibration", "float_nodes", "built_for")
        facts[precision] = {"backbone_mb": size, **{k: manifest[k] for k in kept if k in manifest}}
    return facts


def _cell(values: dict[str, float], sign: str = "") -> str:
    found = Interval(**values)
    return f"{100 * found.value:{sign}.2f} ({100 * found.lower:{sign}.2f} to {100 * found.upper:{sign}.2f})"


def _line(name: str, result: dict[str, Any]) -> list[str]:
    cells = [_cell(result[m][p], "+" if p == "difference" else "") for m in ("mAP", "rank1")
             for p in (*PRECISIONS, "difference")]  # fmt: skip
    return [name, *cells]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("checkpoint", help="with a backbone; a head in it is measured too")
    parser.add_argument("--data", required=True, metavar="DIR")
    parser.add_argument("--work", required=True, metavar="DIR", help="where everything is kept")
    parser.add_argument("--head", metavar="CHECKPOINT", help="a head trained on this backbone's features")
    parser.add_argument("--train-head", metavar="STORE", help="or: make one of this store by the recipe of --weights")
    parser.add_argument("--weights", choices=("market1501", "msmt17"), default="market1501")
    parser.add_argument("--rule", choices=("features", "affinity"), default="features")
    parser.add_argument("--int8", metavar="ENGINE", help="an INT8 engine of the same bundle (default: build one)")
    parser.add_argument("--calib-num", type=int, default=256, help="training images (default 256)")
    parser.add_argument("--calib-method", choices=typing.get_args(CalibrationChoice), default="percentile")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of calibration images")
    parser.add_argument("--landmark-seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--people", type=int, help="only so many test identities, to try it out")
    parser.add_argument("--threads", type=int)
    parser.add_argument("-o", "--output", metavar="FILE", help="default: market_int8.json in --work")
    args = parser.parse_args()
    work = Path(args.work)
    work.mkdir(parents=True, exist_ok=True)
    built = engines(args, work)
    dataset = some_people(read_dataset(args.data), args.people)
    stores = {precision: work / f"{precision}.npz" for precision in PRECISIONS}
    pairs = {p: embedded(built[p], stores[p], dataset, args.threads) for p in PRECISIONS}
    results = {"backbone": compare(pairs["fp32"], pairs["int8"])}
    with open_model(built["fp32"], intra_op_threads=args.threads) as runner:
        seeds = args.landmark_seeds if runner.has_head else []
    for seed in seeds:
        results[f"+NFormer, landmark seed {seed}"] = compare_related(built, pairs, seed, args.threads)
    mixed = cross_model([stores[p] for p in PRECISIONS])
    document = {
        "kind": "market_int8", "machine": asdict(machine()), "data": dataset.name,
        "images": {"query": len(dataset.query), "gallery": len(dataset.gallery)}, "people": args.people,
        "engines": facts_of(built), "results": results, "cross_model": mixed.to_json(),
    }  # fmt: skip
    atomic_write_json(args.output or work / "market_int8.json", document)
    headers = ["", "FP32 mAP", "INT8 mAP", "difference", "FP32 Rank-1", "INT8 Rank-1", "difference"]
    print(format_table(headers, [_line(name, result) for name, result in results.items()]))
    print(mixed)


if __name__ == "__main__":
    main()
