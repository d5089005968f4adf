"""What an INT8 engine built on a CPU with VNNI computes on a CPU with AVX2 alone, qemu's Haswell.

    nformer-edge build-engine bundle -o eight --backend onnxruntime --int8 --calib-data DATA
    nformer-edge build-engine bundle -o seven --backend onnxruntime --int8 --calib-data DATA --reduce-range
    python benchmarks/int8_elsewhere.py bundle eight seven --data DATA      # apt install qemu-user-static

Cosine of features, mean / lowest. onnxruntime runs the graphs itself: this package refuses to open `eight` there.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

RUN = """
import sys, numpy, onnxruntime
graph, images, out = sys.argv[1:]
session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
numpy.save(out, numpy.concatenate([session.run(None, {"images": image[None]})[0] for image in numpy.load(images)]))
"""


def features(graph: Path, images: np.ndarray, *emulator: str) -> np.ndarray:
    """Rows of unit length, by a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        given, made = Path(folder, "images.npy"), Path(folder, "features.npy")
        np.save(given, images)
        quiet = subprocess.DEVNULL if emulator else None  # qemu warns of features that it does not have
        subprocess.run([*emulator, sys.executable, "-c", RUN, graph, given, made], check=True, stderr=quiet)
        rows = np.load(made)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def main() -> None:
    from nformer_edge.backends.open import open_model
    from nformer_edge.core.preprocess import load_image, normalize, resize
    from nformer_edge.data.readers import read_dataset
    from nformer_edge.report.table import format_table

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("engines", type=Path, nargs="+")
    parser.add_argument("--data", required=True)
    parser.add_argument("--images", type=int, default=16, help="queries, spread evenly")
    parser.add_argument("--cpu", default="Haswell", help="one of `qemu-x86_64 -cpu help`")
    args = parser.parse_args()
    emulator = shutil.which("qemu-x86_64") or shutil.which("qemu-x86_64-static") or parser.error("no qemu-x86_64")
    queries = read_dataset(args.data).query
    with open_model(args.bundle) as runner:
        spec = runner.spec.preprocess
    chosen = [queries[i] for i in np.linspace(0, len(queries) - 1, args.images).astype(int)]
    images = normalize(np.stack([resize(load_image(query.path), spec) for query in chosen]), spec)
    exact, rows = features(args.bundle / "backbone.onnx", images), []
    for engine in args.engines:
        graph = engine / "backbone.onnx"
        here, there = features(graph, images), features(graph, images, emulator, "-cpu", args.cpu)
        pairs = ((here, exact), (there, exact), (there, here))
        cosines = [(a * b).sum(axis=1) for a, b in pairs]
        same = "yes" if np.array_equal(here, there) else "no"
        rows.append([engine.name, *(f"{c.mean():.4f} / {c.min():.4f}" for c in cosines), same])
    names = ["here, FP32", f"{args.cpu}, FP32", f"{args.cpu}, here"]
    print(format_table(["engine", *names, "same bits"], rows))


if __name__ == "__main__":
    main()
