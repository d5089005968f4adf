"""Time and peak memory of nformer.onnx in stock onnxruntime, and whether it equals PyTorch. Prints JSON.

    python benchmarks/onnx_head_memory.py --images 20000
    python benchmarks/onnx_head_memory.py --features 512
    python benchmarks/onnx_head_memory.py --rule affinity --threads 2

PyTorch computes with the plain operators of `nformer_edge.ops.reference`. Where two images are, to a row, equally near
to less than float32 can tell, any backend may take either as its k-th neighbor, and rows that see it differ by more
than rounding: ``border_ties`` counts such rows, so that ``rows_outside_tolerance`` can be read.

The peak is that of a process of its own which loads onnxruntime and numpy alone; PyTorch runs in another. The head is
seeded and untrained (the gated one has its learnt gates), the input clustered like people: neither time nor memory
depends on the weights.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np

from nformer_edge.core.spec import HeadSpec

SHOTS = 25  # images a person


K = 20


def make_input(images: int, features: int, seed: int) -> np.ndarray:  # [N, D]
    rng = np.random.default_rng(seed)
    people = rng.standard_normal((-(-images // SHOTS), features))
    rows = np.repeat(people, SHOTS, axis=0)[:images] + 0.7 * rng.standard_normal((images, features))
    return rows.astype(np.float32)


def make_spec(args: argparse.Namespace) -> HeadSpec:
    return HeadSpec.gated(args.features) if args.rule == "gated" else HeadSpec(args.features, rule=args.rule)


def run_reference(folder: Path, args: argparse.Namespace) -> None:
    """Writes nformer.onnx and PyTorch's output."""
    import torch

    from nformer_edge.exporting.trace import trace_head
    from nformer_edge.model.gated import GatedHead, make_head, start_as_gates
    from nformer_edge.ops import reference as ops
    from nformer_edge.ops.contract import draw_landmarks
    from nformer_edge.ops.operators import using

    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    spec = make_spec(args)
    head = make_head(spec).eval()
    if isinstance(head, GatedHead):
        start_as_gates(head, torch.zeros(1, spec.features), None)
    (folder / "nformer.onnx").write_bytes(trace_head(head, args.opset).SerializeToString())
    landmarks = draw_landmarks(args.images, spec.layers, spec.landmarks, 0)
    rows = make_input(args.images, spec.features, args.seed)
    with torch.no_grad(), using(ops):
        start = time.perf_counter()
        output = head(torch.from_numpy(rows), torch.from_numpy(landmarks)).numpy()
        seconds = time.perf_counter() - start
    np.savez(folder / "reference.npz", landmarks=landmarks, output=output, seconds=seconds)


def run_onnxruntime(folder: Path, args: argparse.Namespace) -> None:
    import resource

    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = args.threads
    with np.load(folder / "reference.npz") as z:
        landmarks = z["landmarks"]
    session = onnxruntime.InferenceSession(folder / "nformer.onnx", options, providers=["CPUExecutionProvider"])
    rows = make_input(args.images, session.get_inputs()[0].shape[1], args.seed)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    (output,) = session.run(None, {"features": rows, "landmarks": landmarks})
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    np.savez(folder / "onnxruntime.npz", output=output, seconds=seconds, peak_kib=peak, before_kib=before)


def border_ties(rows: np.ndarray) -> int:
    """Rows whose k-th and next cosine differ, in float64, by less than float32 resolves at 1."""
    unit = rows.astype(np.float64) / np.linalg.norm(rows.astype(np.float64), axis=1, keepdims=True)
    ties = 0
    for start in range(0, len(unit), 500):
        best = -np.partition(-(unit[start : start + 500] @ unit.T), K, axis=1)[:, : K + 1]
        best.sort(axis=1)
        ties += int((best[:, 1] - best[:, 0] < 2.0**-23).sum())
    return ties


def compare(folder: Path, args: argparse.Namespace) -> dict[str, object]:
    from nformer_edge.metrics.agreement import ROUNDING, cosines, row_errors

    with np.load(folder / "reference.npz") as z:
        reference, reference_seconds = z["output"], float(z["seconds"])
    with np.load(folder / "onnxruntime.npz") as z:
        output, seconds = z["output"], float(z["seconds"])
        peak, before = int(z["peak_kib"]) / 1024, int(z["before_kib"]) / 1024
    per_row = row_errors(output, reference)
    outside = int(np.sum(~(per_row <= ROUNDING)))
    cosine = cosines(output, reference)
    rows = make_input(args.images, reference.shape[1], args.seed)
    ties = border_ties(rows) if args.rule == "features" else None  # the other rule ranks anew in each layer
    spec = make_spec(args)
    return {
        "kind": "benchmark", "name": "onnx_head_memory", "rule": args.rule, "images": args.images,
        "features": spec.features, "layers": spec.layers, "heads": spec.heads, "k": spec.k,
        "landmarks": spec.landmarks, "opset": args.opset,
        "threads": args.threads, "onnxruntime_s": round(seconds, 3), "pytorch_s": round(reference_seconds, 3),
        "peak_rss_mib": round(peak, 1), "rss_before_run_mib": round(before, 1),
        "worst_row_error": float(per_row.max()), "rows_outside_rounding": outside,
        "border_ties": ties,
        "cosine_min": float(cosine.min()), "cosine_mean": float(cosine.mean()),
        "machine": {"cpu": _cpu(), "cores": os.cpu_count(), "system": platform.platform()},
        "versions": {name: version(name) for name in ("onnxruntime", "torch", "numpy", "onnx")},
    }  # fmt: skip


def _cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor()
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=20000, help="N (default 20000)")
    parser.add_argument("--features", type=int, default=256, help="D (default 256)")
    parser.add_argument("--rule", choices=("gated", "features", "affinity"), default="gated")
    parser.add_argument("--seed", type=int, default=0, help="of the input (default 0)")
    parser.add_argument("--opset", type=int, default=18)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--stage", choices=("reference", "onnxruntime"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.stage:
        {"reference": run_reference, "onnxruntime": run_onnxruntime}[args.stage](args.folder, args)
        return
    with tempfile.TemporaryDirectory() as folder:
        for stage in ("reference", "onnxruntime"):
            command = [sys.executable, __file__, *sys.argv[1:], "--stage", stage, "--folder", folder]
            subprocess.run(command, check=True, stdout=sys.stderr)
        print(json.dumps(compare(Path(folder), args), indent=2))


if __name__ == "__main__":
    main()
