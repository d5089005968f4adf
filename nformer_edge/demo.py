"""The main job as one function: person images in, an INT8 engine and the proof of its accuracy out."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nformer_edge.core.artifact import atomic_write_json
from nformer_edge.core.values import Result
from nformer_edge.data.generate import GenerateSpec, generate_dataset
from nformer_edge.data.records import Dataset
from nformer_edge.data.summary import format_summary
from nformer_edge.report.summary import format_summary as format_models
from nformer_edge.report.table import format_gates

Say = Callable[[str], None]

PYTORCH, ONNX_FP32, ONNX_INT8 = "PyTorch FP32", "ONNX FP32", "INT8"


def run_demo(out: str | os.PathLike[str], *, seed: int = 0, tiny: bool = False, say: Say = print) -> dict[str, Any]:
    """Draws a dataset, trains both stages, exports, builds FP32 and INT8 engines, judges and times them, reports.

    Every step is the public function behind the command of the same name, and leaves its file in `out`.

    Args:
        out: folder for everything that is made; earlier results of a demo there are replaced.
        seed: everything random follows from it.
        tiny: a small dataset and a short training: shows the road, not the accuracy.
        say: takes each line of progress.

    Returns:
        JSON of kind ``demo``: ``results`` (training, evaluations, parities, benchmarks, comparison), ``parity`` (the
        parities alone), ``report`` (the page's path), ``seconds`` a step and ``summary`` (the table).
    """
    out = Path(out)
    clock = _Clock(say)
    with clock("make-data"):
        dataset = generate_dataset(out / "data", GenerateSpec.tiny(seed) if tiny else GenerateSpec(seed), force=True)
    say(format_summary(dataset))
    models, training = _make_models(out, dataset, seed, tiny, clock)
    results: list[Any] = [training, *_measure(models, dataset, tiny, clock)]
    plain = [r.to_json() if isinstance(r, Result) else r for r in results]
    for number, result in enumerate(plain):
        atomic_write_json(out / "results" / f"{number:02d}-{result['kind']}.json", result)
    with clock("report"):
        from nformer_edge.report.html.page import write_report

        page = write_report(results, out / "report.html", "nformer-edge demo")
    judged = [r for r in plain if r["kind"] == "parity"]
    table = format_models(results)
    told = {"parity": judged, "report": str(page), "seconds": clock.seconds, "summary": table}
    return {"kind": "demo", "results": plain, **told}


def _make_models(out: Path, dataset: Dataset, seed: int, tiny: bool, clock: _Clock) -> tuple[dict[str, Path], Result]:
    """Checkpoint, FP32 and INT8 engine by their label, and the training's history."""
    from nformer_edge.backends.build import EngineSpec, build_engine
    from nformer_edge.backends.onnxruntime.build import NAME
    from nformer_edge.exporting.export import export_bundle
    from nformer_edge.training.config import TrainConfig, configure
    from nformer_edge.training.train import train

    checkpoint, bundle = out / "model.safetensors", out / "bundle"
    config = TrainConfig.demo(seed)
    if tiny:
        config = configure("demo", seed=seed, imgsz=(64, 32), epochs=2, head_epochs=1)
    with clock("train"):
        training = train(dataset, checkpoint, config)
    with clock("export"):
        export_bundle(checkpoint, bundle, landmark_seed=seed)
    models = {PYTORCH: checkpoint, ONNX_FP32: out / "engine-fp32", ONNX_INT8: out / "engine-int8"}
    with clock("build-engine FP32"):
        build_engine(bundle, models[ONNX_FP32], EngineSpec(backend=NAME, precision="fp32"))
    with clock("build-engine INT8"):
        spec = EngineSpec(backend=NAME, precision="int8", seed=seed)
        build_engine(bundle, models[ONNX_INT8], spec, calib_data=dataset.root)
    return models, training


def _measure(models: dict[str, Path], dataset: Dataset, tiny: bool, clock: _Clock) -> list[Any]:
    from nformer_edge.report.accuracy import evaluate
    from nformer_edge.report.benchmark import benchmark, compare
    from nformer_edge.report.parity import parity

    results: list[Any] = []
    for label, path in models.items():
        with clock(f"evaluate {label}"):
            results.append(evaluate(path, dataset, label=label, rerank=label == PYTORCH))
    for label in (ONNX_FP32, ONNX_INT8):
        with clock(f"parity {label}"):
            results.append(parity(models[PYTORCH], models[label], dataset, reference_label=PYTORCH, engine_label=label))
    queries = 8 if tiny else 64
    for label, path in models.items():
        with clock(f"benchmark {label}"):
            results.append(benchmark(path, dataset, single_stream=queries, label=label))
    with clock("benchmark, all in turn"):
        results.append(compare(list(models.values()), dataset, rounds=queries, labels=list(models)))
    return results


class _Clock:
    """Says each step as it begins and keeps how long it took."""

    def __init__(self, say: Say) -> None:
        self.say = say
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, step: str) -> Iterator[None]:
        self.say(f"== {step}")
        start = time.perf_counter()
        yield
        self.seconds[step] = time.perf_counter() - start
        self.say(f"   {self.seconds[step]:.1f} s")


def format_demo(result: dict[str, Any]) -> str:
    """What the demo ends with: the gates, those that failed by name, one table, and where the report is."""
    from nformer_edge.report.verdict import describe_failures

    gates = "\n\n".join(format_gates(judged) for judged in result["parity"])
    failed = [f"FAILED {j['engine']['label']}: {line}" for j in result["parity"] for line in describe_failures(j)]
    verdict = "\n".join(failed) or "no gate failed"
    total = sum(result["seconds"].values())
    return f"\n{gates}\n\n{verdict}\n\n{result['summary']}\n\n{total:.0f} s in all\nreport: {result['report']}"
