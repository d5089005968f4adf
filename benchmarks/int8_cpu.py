"""INT8 against FP32 on this CPU: our engines for onnxruntime and OpenVINO, PyTorch, and NNCF's INT8 in OpenVINO.

    pip install -e '.[bench]'
    python benchmarks/int8_cpu.py --arch resnet50 resnet18 osnet_x0_25 -o int8_cpu.json

The first run makes the models and calibrates, which takes minutes (`--prepare` does that alone). Without NNCF its line
is left out. At the end stands what ``build-engine --precision auto`` takes, by its own clock.

Weights are random unless `--model` names a checkpoint (time does not depend on them), with the batch norms' statistics
taken from training images of the generated dataset; the same images calibrate both INT8 models. NNCF is what a user of
OpenVINO would otherwise pick: `nncf.quantize` with its defaults on the same FP32 file.

Each contender runs in a process of its own, opened once. Each round sends one batch to every contender, beginning with
another one each time, with a pause before each so that no other's waiting threads still spin. A speed-up is the median
over rounds of one round's ratio; in brackets its 5th to 95th percentile.
"""

from __future__ import annotations

import argparse
import importlib.util
import multiprocessing
import os
import time
import typing
from collections.abc import Callable, Sequence
from dataclasses import asdict
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from nformer_edge.backends.build import build_engine, describe_engine
from nformer_edge.backends.open import open_model
from nformer_edge.backends.spec import EngineSpec
from nformer_edge.core.artifact import atomic_write_json
from nformer_edge.core.errors import BackendError
from nformer_edge.core.machine import VNNI, conditions, instruction_sets, machine, versions
from nformer_edge.core.spec import TRUNKS, BackboneSpec, CalibrationMethod, ModelSpec
from nformer_edge.core.terminal import PROGRESS
from nformer_edge.core.values import to_json
from nformer_edge.data.batches import iter_batches
from nformer_edge.data.calibration import calibration_set
from nformer_edge.data.generate import generate_dataset
from nformer_edge.data.readers import read_dataset
from nformer_edge.data.records import Dataset
from nformer_edge.metrics.agreement import cosines
from nformer_edge.report.benchmark import summarize
from nformer_edge.report.table import format_table

Run = Callable[[np.ndarray], np.ndarray]
Counts = dict[str, int]

#: Name: what runs it, and the file or the engine in the work folder.
CONTENDERS = {
    "onnxruntime FP32": ("engine", "onnxruntime_fp32"),
    "onnxruntime INT8": ("engine", "onnxruntime_int8"),
    "PyTorch eager FP32": ("pytorch", "model.safetensors"),
    "OpenVINO FP32": ("engine", "openvino_fp32"),
    "OpenVINO BF16": ("engine", "openvino_bf16"),
    "OpenVINO INT8": ("engine", "openvino_int8"),
    "OpenVINO INT8, NNCF": ("openvino", "nncf.xml"),
}
BASELINES = ("onnxruntime FP32", "PyTorch eager FP32")

#: Engines of ours: backend and precision.
ENGINES = (
    *(("onnxruntime", precision) for precision in ("fp32", "int8")),
    *(("openvino", precision) for precision in ("fp32", "bf16", "int8")),
)

#: Seconds before each run. onnxruntime's, OpenMP's and TBB's threads spin for some milliseconds after theirs.
PAUSE = 0.05

#: Images of queries on which outputs are compared with PyTorch's.
COMPARED = 64

#: Of a layer that computes in INT8, in OpenVINO's words.
_INT8 = ("i8", "u8")


def random_checkpoint(path: Path, arch: str, calibration: Sequence[str]) -> None:
    """A seeded model whose batch norms know the statistics of `calibration`: else all its features look alike."""
    import torch

    from nformer_edge.model.backbone import Backbone
    from nformer_edge.model.checkpoint import save_checkpoint

    torch.manual_seed(0)
    spec = ModelSpec(BackboneSpec(arch, 512, "fc" if arch.startswith("osnet") else "bnneck"))
    backbone = Backbone(spec.backbone).train()
    norms = [m for m in backbone.modules() if isinstance(m, (torch.nn.BatchNorm1d, torch.nn.BatchNorm2d))]
    for norm in norms:
        norm.momentum = None  # a plain mean over batches
    with torch.inference_mode():
        for images in iter_batches(calibration, spec.preprocess, 16):
            backbone(torch.from_numpy(images))
    save_checkpoint(path, spec, backbone.eval())


def quantize_by_nncf(source: Path, out: Path, images: Sequence[np.ndarray]) -> None:
    os.environ.setdefault("NNCF_CI", "1")  # it reports its use to its makers otherwise
    import nncf
    import openvino

    openvino.save_model(nncf.quantize(openvino.Core().read_model(source), nncf.Dataset(images)), out)


def prepare(work: Path, args: argparse.Namespace) -> None:
    """Makes whatever is not in `work` yet: data, checkpoint, bundle, both INT8 models."""
    from nformer_edge.exporting.export import export_bundle
    from nformer_edge.model.checkpoint import load_checkpoint

    dataset = dataset_in(work)
    chosen = [r.path for r in calibration_set(dataset, args.calib_num, seed=0)]
    model = work / "model.safetensors"
    if not model.exists():
        if args.model:
            model.symlink_to(Path(args.model).resolve())
        else:
            random_checkpoint(model, work.name, chosen)
    if not (work / "bundle").exists():
        export_bundle(model, work / "bundle")
    table = work / "onnxruntime_int8" / "calibration.json"
    for backend, precision in ENGINES:
        out = work / f"{backend}_{precision}"
        if out.exists():
            continue
        images = (table if table.exists() else dataset) if precision == "int8" else None
        spec = EngineSpec(backend, precision, calib_method=args.calib_method, calib_num=args.calib_num)
        try:
            build_engine(work / "bundle", out, spec, images)
        except BackendError as e:  # no BF16 on this CPU
            print(f"left out: {backend} {precision}: {e}")
    if not (work / "auto").exists():
        spec = EngineSpec(precision="auto", calib_method=args.calib_method, calib_num=args.calib_num)
        build_engine(work / "bundle", work / "auto", spec, dataset)
    if importlib.util.find_spec("nncf") and not (work / "nncf.xml").exists():
        preprocess = load_checkpoint(model).spec.preprocess
        images = list(iter_batches(chosen, preprocess, 1))
        quantize_by_nncf(work / "bundle/backbone.onnx", work / "nncf.xml", images)


def dataset_in(work: Path) -> Dataset:
    folder = work.parent / "data"
    return read_dataset(folder) if folder.exists() else generate_dataset(folder)


def open_pytorch(path: Path, threads: int) -> tuple[Run, Counts]:
    import torch

    from nformer_edge.model.checkpoint import load_checkpoint

    torch.set_num_threads(threads)
    backbone = load_checkpoint(path).backbone
    assert backbone is not None, "a benchmark of backbones"
    backbone.eval()
    total = sum(isinstance(m, torch.nn.Conv2d) for m in backbone.modules())

    def run(images: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return backbone(torch.from_numpy(images)).numpy()

    return run, {"int8": 0, "total": total}


def open_engine(path: Path, threads: int) -> tuple[Run, Counts]:
    runner = open_model(path, intra_op_threads=threads)
    audit = describe_engine(path).audit
    found = audit["backbone"].multiplications if audit else {}
    counts = {"int8": found["int8"].built if "int8" in found else 0, "total": sum(c.asked for c in found.values())}
    return runner.__enter__().embed, counts


def open_openvino(path: Path, threads: int) -> tuple[Run, Counts]:
    import openvino

    options = {
        "INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1, "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",  # of what is not INT8: it takes BF16 by itself where the CPU has it
    }  # fmt: skip
    compiled = openvino.Core().compile_model(path, "CPU", options)
    facts = [op.get_rt_info() for op in compiled.get_runtime_model().get_ops()]
    types = [f["runtimePrecision"].astype(str) for f in facts if "Convolution" in f["layerType"].astype(str)]
    request = compiled.create_infer_request()

    def run(images: np.ndarray) -> np.ndarray:
        return np.array(request.infer([images], share_inputs=True)[0])

    return run, {"int8": sum(t in _INT8 for t in types), "total": len(types)}


OPENERS = {"pytorch": open_pytorch, "engine": open_engine, "openvino": open_openvino}


def serve(pipe: Connection, backend: str, path: Path, threads: int) -> None:
    """A contender's process: opens the model, then answers batches with seconds and features until None comes."""
    run, counts = OPENERS[backend](path, threads)
    pipe.send(counts)
    while (images := pipe.recv()) is not None:
        start = time.perf_counter()
        features = run(images)
        pipe.send((time.perf_counter() - start, features))


class Contender:
    """One model in a process of its own."""

    def __init__(self, name: str, work: Path, threads: int) -> None:
        backend, file = CONTENDERS[name]
        context = multiprocessing.get_context("spawn")
        self._pipe, other = context.Pipe()
        self._process = context.Process(target=serve, args=(other, backend, work / file, threads), daemon=True)
        self._process.start()
        other.close()
        files = [(work / file).resolve(), (work / file).with_suffix(".bin"), work / file / "backbone.onnx"]
        self.size_mb = sum(f.stat().st_size for f in files if f.is_file()) / 1e6
        self.convolutions: Counts = self._pipe.recv()

    def __call__(self, images: np.ndarray) -> tuple[float, np.ndarray]:
        """Seconds of one batch, and its features."""
        time.sleep(PAUSE)
        self._pipe.send(images)
        seconds, features = self._pipe.recv()
        return seconds, features

    def close(self) -> None:
        self._pipe.send(None)
        self._process.join()


def take_turns(contenders: dict[str, Contender], images: np.ndarray, rounds: int, warmup: int) -> dict[str, np.ndarray]:
    """Milliseconds [rounds] of each contender."""
    names = list(contenders)
    taken = {name: np.empty(rounds) for name in names}
    for i in tqdm(range(-warmup, rounds), desc=f"batch {len(images)}", unit="round", **PROGRESS):
        for turn in range(len(names)):
            name = names[(i + turn) % len(names)]
            seconds, _ = contenders[name](images)
            if i >= 0:
                taken[name][i] = 1000 * seconds
    return taken


def speed_up(baseline: np.ndarray, taken: np.ndarray) -> dict[str, float]:
    low, median, high = np.quantile(baseline / taken, [0.05, 0.5, 0.95])
    return {"median": float(median), "p5": float(low), "p95": float(high)}


def compare_outputs(contenders: dict[str, Contender], images: list[np.ndarray]) -> dict[str, dict[str, float]]:
    """Cosine of each contender's features to PyTorch's."""
    features = {name: np.concatenate([c(batch)[1] for batch in images]) for name, c in contenders.items()}
    found = {name: cosines(f, features["PyTorch eager FP32"]) for name, f in features.items()}
    return {name: {"min": float(c.min()), "mean": float(c.mean())} for name, c in found.items()}


def measure(work: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Opens every contender, and times them in turn at each batch size."""
    from nformer_edge.model.checkpoint import load_checkpoint

    queries = [r.path for r in dataset_in(work).query]
    spec = load_checkpoint(work / "model.safetensors").spec.preprocess
    images = list(iter_batches(queries[:COMPARED], spec, max(args.batch)))
    before = conditions()
    there = [name for name, (_, file) in CONTENDERS.items() if (work / file).exists()]
    contenders = {name: Contender(name, work, args.threads) for name in there}
    models = {
        name: {"size_mb": c.size_mb, "convolutions": c.convolutions, "cosine": cosine}
        for (name, c), cosine in zip(contenders.items(), compare_outputs(contenders, images).values(), strict=True)
    }
    runs = []
    for batch in args.batch:
        taken = take_turns(contenders, images[0][:batch], args.rounds, args.warmup)
        for name, times in taken.items():
            ratios = {base: speed_up(taken[base], times) for base in BASELINES}
            latency = {"latency": to_json(summarize(times)), "latency_ms": times.tolist()}
            runs.append({"name": name, "batch": batch, **latency, "speed_up_over": ratios})
    for contender in contenders.values():
        contender.close()
    return {
        "kind": "int8_cpu", "machine": asdict(machine()),
        "conditions": to_json({"before": before, "after": conditions()}),
        "versions": versions("openvino", "nncf", "onnxruntime", "torch"), "vnni": has_vnni(),
        "auto": str(describe_engine(work / "auto").choice), "arch": work.name,
        "weights": args.model or "random", "threads": args.threads, "rounds": args.rounds,
        "calibration": {"num": args.calib_num, "method": args.calib_method}, "models": models, "runs": runs,
    }  # fmt: skip


def has_vnni() -> bool:
    return any(name in VNNI for name in instruction_sets())


def _lines(result: dict[str, Any]) -> list[list[str]]:
    lines = []
    for name, model in result["models"].items():
        counts, cosine = model["convolutions"], model["cosine"]
        line = [name, f"{model['size_mb']:.1f}", f"{counts['int8']} of {counts['total']}" if counts["int8"] else "-",
                f"{cosine['min']:.4f} / {cosine['mean']:.4f}"]  # fmt: skip
        for run in (r for r in result["runs"] if r["name"] == name):
            line.append(f"{run['latency']['p50_ms']:.1f}")
            ratios = [run["speed_up_over"][base] for base in BASELINES]
            line += [f"{r['median']:.2f} ({r['p5']:.2f} to {r['p95']:.2f})" for r in ratios]
        lines.append(line)
    return lines


def print_table(result: dict[str, Any]) -> None:
    headers = [result["arch"], "MB", "INT8 multiplications", "cosine to PyTorch, min / mean"]
    for batch in dict.fromkeys(r["batch"] for r in result["runs"]):
        headers += [f"batch {batch}, ms", "speed-up on onnxruntime FP32", "on PyTorch"]
    print(format_table(headers, _lines(result)))
    print(f"build-engine --precision auto: {result['auto']}")
    if result["weights"] == "random":
        print(
            "Weights are random: how much rounding changes their features tells nothing of a trained model's accuracy."
        )
    if not result["vnni"]:
        print("This CPU multiplies INT8 without VNNI (7-bit weights, two instructions where VNNI has one): what INT8 "
              "gains on a CPU that has it must be measured on one.")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--arch", nargs="+", choices=list(TRUNKS), default=["resnet50"])
    parser.add_argument("--model", metavar="CHECKPOINT", help="trained weights, instead of random ones")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--warmup", type=int, default=2, help="rounds before the clock counts")
    parser.add_argument("--calib-num", type=int, default=64)
    parser.add_argument("--calib-method", choices=typing.get_args(CalibrationMethod), default="minmax")
    parser.add_argument("--work", metavar="DIR", default="runs/int8_cpu", help="folder of the models, kept")
    parser.add_argument("--prepare", action="store_true", help="make the models and end")
    parser.add_argument("-o", "--output", metavar="FILE", default="int8_cpu.json")
    args = parser.parse_args()
    results = []
    for arch in args.arch:
        work = Path(args.work) / arch
        work.mkdir(parents=True, exist_ok=True)
        prepare(work, args)
        if not args.prepare:
            results.append(measure(work, args))
            print_table(results[-1])
            atomic_write_json(args.output, {"kind": "int8_cpu", "architectures": results})


if __name__ == "__main__":
    main()
