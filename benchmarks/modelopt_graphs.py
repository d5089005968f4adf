"""ModelOpt's graphs for TensorRT against ours, of the same bundle: how near to FP32, how large, how much of it INT8.

ModelOpt's bundles are made in its own environment, with the same calibration images:

    nformer-edge modelopt bundle --calib-data DIR -o modelopt-int8
    nformer-edge modelopt bundle --calib-data DIR --own-choice -o modelopt-int8-own
    nformer-edge modelopt bundle --calib-data DIR --fp16 -o modelopt-fp16

and are measured here, beside ours:

    python benchmarks/modelopt_graphs.py bundle modelopt-int8 modelopt-int8-own modelopt-fp16 --data DIR

Every graph is built by TensorRT-RTX, which parses and compiles it without a GPU, and audited. Accuracy is that of the
graph's arithmetic in onnxruntime on the CPU, node by node, on all images of `--people` test identities; "kept" is the
ratio of mAP to FP32's with its 95 % interval (paired bootstrap over queries).
"""

from __future__ import annotations

import argparse
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from market_int8 import some_people

from nformer_edge.backends.build import build_engine
from nformer_edge.backends.spec import EngineSpec
from nformer_edge.core.artifact import atomic_write_json, read_manifest
from nformer_edge.core.features import Features
from nformer_edge.core.machine import machine
from nformer_edge.core.spec import PreprocessSpec
from nformer_edge.data.batches import iter_batches
from nformer_edge.data.readers import read_dataset
from nformer_edge.data.records import Dataset
from nformer_edge.exporting.bundle import BACKBONE, open_bundle
from nformer_edge.metrics.agreement import cosines
from nformer_edge.metrics.bootstrap import TWO_SIDED, paired_ratio
from nformer_edge.metrics.ranking import evaluate
from nformer_edge.quantize.fp16 import plain_features
from nformer_edge.report.table import format_table

#: What a TensorRT engine's folder keeps of the graph that was parsed.
PARSED = f"prepared-{BACKBONE}"

BATCH = 16

Pair = tuple[Features, Features]


def embed(graph: Path, dataset: Dataset, spec: PreprocessSpec) -> Pair:
    """Features of queries and gallery by the graph's arithmetic."""
    sets = []
    for records in (dataset.query, dataset.gallery):
        paths = [r.path for r in records]
        batches = iter_batches(paths, spec, BATCH)
        features = np.concatenate([plain_features(graph.read_bytes(), images) for images in batches])
        pids, camids = (np.array([getattr(r, key) for r in records], np.int64) for key in ("pid", "camid"))
        sets.append(Features(features, pids, camids, tuple(paths)))
    return sets[0], sets[1]


def build(bundle: Path, out: Path, precision: str, args: argparse.Namespace) -> dict[str, Any]:
    """Builds one backbone, and tells what came of it."""
    spec = EngineSpec(
        "tensorrt-rtx", precision, calib_method=args.calib_method, calib_num=args.calib_num,  # type: ignore[arg-type]
        capabilities=(args.capability,), keep_graphs=True,
    )  # fmt: skip
    start = time.perf_counter()
    build_engine(bundle, out, spec, args.data if precision == "int8" else None)
    manifest = read_manifest(out, "engine")
    multiplications = manifest["audit"]["backbone"]["multiplications"]
    return {
        "seconds": time.perf_counter() - start,
        "multiplications": {
            kind: f"{counts['built']} of {counts['asked']}" for kind, counts in multiplications.items()
        },
        "graph_mb": manifest["files"][PARSED]["bytes"] / 1e6,
        "plan_mb": manifest["files"]["backbone.engine"]["bytes"] / 1e6,
    }


def judge(found: Pair, reference: Pair) -> dict[str, Any]:
    """How near the features are to the reference's, and how much of its mAP they keep."""
    both = [np.concatenate([s.features for s in pair]) for pair in (found, reference)]
    cosine = cosines(both[0], both[1])
    ours, theirs = evaluate(*found), evaluate(*reference)
    kept = paired_ratio(ours.ap[theirs.valid], theirs.ap[theirs.valid], quantiles=TWO_SIDED)
    return {
        "cosine": {"min": float(cosine.min()), "mean": float(cosine.mean())}, "mAP": ours.mAP, "rank1": ours.rank(1),
        "mAP_kept": {"value": kept.value, "lower": kept.lower, "upper": kept.upper},
    }  # fmt: skip


def _line(row: dict[str, Any]) -> list[str]:
    kept, cosine = row["mAP_kept"], row["cosine"]
    multiplications = ", ".join(f"{count} {kind.upper()}" for kind, count in row["multiplications"].items())
    return [
        row["name"], f"{cosine['min']:.4f} / {cosine['mean']:.4f}", f"{100 * row['mAP']:.2f}",
        f"{100 * row['rank1']:.2f}",
        f"{100 * kept['value']:.2f} % ({100 * kept['lower']:.2f} to {100 * kept['upper']:.2f})",
        multiplications, f"{row['graph_mb']:.2f}", f"{row['plan_mb']:.2f}",
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("bundle", help="the FP32 bundle that all come from")
    parser.add_argument("modelopt", nargs="*", help="bundles that `nformer-edge modelopt` made of it")
    parser.add_argument("--data", required=True, metavar="DIR")
    parser.add_argument("--people", type=int, default=60, help="test identities to measure on (default 60)")
    parser.add_argument("--calib-num", type=int, default=256, help="as ModelOpt had (default 256)")
    parser.add_argument("--calib-method", default="percentile", help="of our INT8 (default percentile)")
    parser.add_argument("--capability", default="8.6", help="to compile for (default 8.6)")
    parser.add_argument("-o", "--output", metavar="FILE", default="modelopt_graphs.json")
    args = parser.parse_args()
    preprocess = open_bundle(args.bundle).spec.preprocess
    dataset = some_people(read_dataset(args.data), args.people)
    asked = [(f"ours, {p.upper()}", Path(args.bundle), p) for p in ("fp32", "fp16", "int8")]
    asked += [(f"ModelOpt: {Path(folder).name}", Path(folder), "fp32") for folder in args.modelopt]  # its own types
    document: dict[str, Any] = {
        "kind": "modelopt", "machine": asdict(machine()), "data": dataset.name,
        "images": {"query": len(dataset.query), "gallery": len(dataset.gallery)},
        "calibration": {"num": args.calib_num, "method": args.calib_method}, "rows": [],
    }  # fmt: skip
    reference: Pair | None = None
    for name, bundle, precision in asked:
        with tempfile.TemporaryDirectory() as folder:
            engine = Path(folder) / "engine"
            row = {"name": name, **build(bundle, engine, precision, args)}
            found = embed(engine / PARSED, dataset, preprocess)
        reference = reference or found
        row |= judge(found, reference)
        if bundle != Path(args.bundle):
            manifest = read_manifest(bundle, "bundle")
            row |= {"made_by": manifest["made_by"], "calibration": manifest["calibration"]}
        document["rows"].append(row)
        atomic_write_json(args.output, document)
        print("  ".join(_line(row)), flush=True)
    headers = ["", "cosine to FP32, min / mean", "mAP", "Rank-1", "mAP kept", "multiplications as built", "graph, MB",
               "plan, MB"]  # fmt: skip
    print(format_table(headers, [_line(row) for row in document["rows"]]))


if __name__ == "__main__":
    main()
