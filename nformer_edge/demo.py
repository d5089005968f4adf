"""The main job as one function: person images in, an INT8 engine and the proof of its accuracy out."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from nformer_edge.core.spec import CalibrationChoice
from nformer_edge.core.values import Result
from nformer_edge.data.generate import GenerateSpec, generate_dataset
from nformer_edge.data.records import Dataset
from nformer_edge.data.summary import summarize
from nformer_edge.report.accuracy import Evaluation
from nformer_edge.report.benchmark import Benchmark, Comparison
from nformer_edge.report.parity import Parity
from nformer_edge.report.summary import format_ends
from nformer_edge.report.summary import format_summary as format_models
from nformer_edge.training.history import History

Say = Callable[[str], None]

PYTORCH, ONNX_FP32, ONNX_INT8 = "PyTorch FP32", "ONNX FP32", "INT8"


@dataclass(frozen=True)
class Demo(Result):
    """What the demo made and measured.

    Args:
        training: history of both stages.
        evaluations: of the checkpoint and both engines.
        parities: of both engines against the checkpoint.
        benchmarks: of all three.
        comparison: of all three, in turn.
        report: path of the HTML page.
        seconds: of each step.
    """

    kind: ClassVar[str] = "demo"
    version: ClassVar[int] = 2

    training: History
    evaluations: tuple[Evaluation, ...]
    parities: tuple[Parity, ...]
    benchmarks: tuple[Benchmark, ...]
    comparison: Comparison
    report: str
    seconds: Mapping[str, float]

    def __str__(self) -> str:
        judged = "\n\n".join(map(str, self.parities))
        failed = [f"FAILED {p.engine.label}: {line}" for p in self.parities for line in p.failures]
        verdict = "\n".join(failed) or "no gate failed"
        tables = format_models([*self.evaluations, *self.benchmarks]), format_ends(self.evaluations)
        total = f"{sum(self.seconds.values()):.0f} s in all\nreport: {self.report}"
        return "\n" + "\n\n".join([judged, verdict, *tables, total])


def run_demo(out: str | os.PathLike[str], *, seed: int = 0, tiny: bool = False, say: Say = print) -> Demo:
    """Draws a dataset, trains both stages, exports, builds FP32 and INT8 engines, judges and times them, reports.

    Every step is the public function behind the command of the same name, and leaves its file in `out`.

    Args:
        out: folder for everything that is made; earlier results of a demo there are replaced.
        seed: everything random follows from it.
        tiny: a small dataset and a short training: shows the way, not the accuracy.
        say: takes each line of progress.
    """
    from nformer_edge.report.accuracy import evaluate
    from nformer_edge.report.benchmark import benchmark, compare
    from nformer_edge.report.html.page import write_report
    from nformer_edge.report.parity import parity

    out = Path(out)
    clock = _Clock(say)
    with clock("make-data"):
        dataset = generate_dataset(out / "data", GenerateSpec.tiny(seed) if tiny else GenerateSpec(seed), force=True)
    say(str(summarize(dataset)))
    models, training = _make_models(out, dataset, seed, tiny, clock)
    evaluations, parities, benchmarks = [], [], []
    for label, path in models.items():
        with clock(f"evaluate {label}"):
            evaluations.append(evaluate(path, dataset, label=label, rerank=label == PYTORCH))
    for label, path in list(models.items())[1:]:
        with clock(f"parity {label}"):
            judged = parity(models[PYTORCH], path, dataset, reference_label=PYTORCH, engine_label=label)
            parities.append(judged)
    queries = 8 if tiny else 64
    for label, path in models.items():
        with clock(f"benchmark {label}"):
            benchmarks.append(benchmark(path, dataset, single_stream=queries, label=label))
    with clock("benchmark, all in turn"):
        comparison = compare(list(models.values()), dataset, rounds=queries, labels=list(models))
    results: list[Result] = [training, *evaluations, *parities, *benchmarks, comparison]
    for number, result in enumerate(results):
        result.save(out / "results" / f"{number:02d}-{result.kind}.json")
    with clock("report"):
        page = write_report(results, out / "report.html", "nformer-edge demo")
    measured = (tuple(evaluations), tuple(parities), tuple(benchmarks), comparison)
    return Demo(training, *measured, str(page), clock.seconds)


def _make_models(out: Path, dataset: Dataset, seed: int, tiny: bool, clock: _Clock) -> tuple[dict[str, Path], History]:
    """Checkpoint, FP32 and INT8 engine by their label, and the training's history."""
    from nformer_edge.backends.build import build_engine
    from nformer_edge.backends.onnxruntime.build import NAME
    from nformer_edge.backends.spec import EngineSpec
    from nformer_edge.exporting.export import export_bundle
    from nformer_edge.training.config import TrainConfig, configure
    from nformer_edge.training.train import train

    checkpoint, bundle = out / "model.safetensors", out / "bundle"
    config = TrainConfig.demo(seed)
    if tiny:
        config = configure("demo", seed=seed, imgsz=(64, 32), epochs=2, head_epochs=1)
    with clock("train"):
        training = train(dataset, checkpoint, config, force=True)
    with clock("export"):
        export_bundle(checkpoint, bundle, landmark_seed=seed, force=True)
    models = {PYTORCH: checkpoint, ONNX_FP32: out / "engine-fp32", ONNX_INT8: out / "engine-int8"}
    with clock("build-engine FP32"):
        build_engine(bundle, models[ONNX_FP32], EngineSpec(backend=NAME, precision="fp32"), force=True)
    with clock("build-engine INT8"):
        method: CalibrationChoice = "percentile" if tiny else "auto"  # auto holds people out; six are too few
        spec = EngineSpec(backend=NAME, precision="int8", calib_method=method, seed=seed)
        build_engine(bundle, models[ONNX_INT8], spec, calib_data=dataset.root, force=True)
    return models, training


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
