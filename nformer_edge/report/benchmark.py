"""How fast a model is, by MLPerf LoadGen's conventions, early stopping included. The clock is `time.perf_counter_ns`.

Early stopping (mlcommons/inference, `loadgen/early_stopping.cc` and `results.cc`): with n samples, the p-th
percentile is below the t-th largest sample with confidence c if at most t of n samples would exceed the true
percentile with a chance below 1 - c, that is if the binomial distribution's P(X <= t; n, 1 - p) < 1 - c. The
estimate is the t-th largest sample for the largest such t; with t = 1 not yet allowed the run is too short.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cache
from itertools import repeat
from typing import ClassVar, Literal

import numpy as np
from tqdm import tqdm

from nformer_edge.core.errors import UsageError
from nformer_edge.core.machine import Conditions, MachineFacts, conditions, machine
from nformer_edge.core.spec import check_at_least
from nformer_edge.core.terminal import PROGRESS
from nformer_edge.core.values import Result
from nformer_edge.gallery.embed import embed_records
from nformer_edge.report.models import Data, MeasuredData, MeasuredModel, Source, open_dataset, open_model
from nformer_edge.report.pipeline import STEPS, Pipeline, Reply
from nformer_edge.report.table import format_table, number

Scenario = Literal["SingleStream", "MultiStream", "Offline"]

#: Of each scenario with a percentile to report, its name, and the images in one query.
SCENARIOS: dict[Scenario, tuple[str, int]] = {"SingleStream": ("p90", 1), "MultiStream": ("p99", 8)}

#: How sure early stopping is.
CONFIDENCE = 0.99

#: Samples of MLPerf's one Offline query (inference rules, "Scenarios").
OFFLINE_SAMPLES = 24_576


@dataclass(frozen=True)
class Latency:
    """Milliseconds of a run. A percentile that the count does not allow is null; the median is always given.

    Args:
        count: samples.
        mean_ms: their mean.
        min_ms: the smallest.
        max_ms: the largest.
        p50_ms: the median, as LoadGen reads a percentile p of n samples: sorted[floor(n p)].
        p90_ms: from 64 samples on.
        p95_ms: from 130 samples on.
        p99_ms: from 662 samples on.
        p99_9_ms: from 6,636 samples on.
    """

    count: int
    mean_ms: float
    min_ms: float
    max_ms: float
    p50_ms: float
    p90_ms: float | None
    p95_ms: float | None
    p99_ms: float | None
    p99_9_ms: float | None

    @property
    def percentiles(self) -> dict[str, float | None]:
        """By their names in tables."""
        return dict(zip(PERCENTILES, (self.p50_ms, self.p90_ms, self.p95_ms, self.p99_ms, self.p99_9_ms), strict=True))


#: Percentiles by their names in tables.
PERCENTILES = {"p50": 0.5, "p90": 0.9, "p95": 0.95, "p99": 0.99, "p99.9": 0.999}


def _binomial(successes: int, trials: int, chance: float) -> float:
    ways = math.lgamma(trials + 1) - math.lgamma(successes + 1) - math.lgamma(trials - successes + 1)
    return math.exp(ways + successes * math.log(chance) + (trials - successes) * math.log1p(-chance))


def overlatency_odds(overlatency: int, samples: int, percentile: float) -> float:
    """Chance that at most `overlatency` of `samples` exceed the true `percentile`."""
    return math.fsum(_binomial(x, samples, 1 - percentile) for x in range(overlatency + 1))


def allowed_overlatency(samples: int, percentile: float, confidence: float = CONFIDENCE) -> int:
    """The largest t with P(X <= t; samples, 1 - percentile) < 1 - confidence; 0 if not even t = 1 is allowed."""
    odds = itertools.accumulate(_binomial(t, samples, 1 - percentile) for t in range(samples + 1))
    return max(sum(1 for _ in itertools.takewhile(lambda total: total < 1 - confidence, odds)) - 1, 0)


@cache
def min_samples(percentile: float, confidence: float = CONFIDENCE) -> int:
    """Fewest samples that give an early-stopping estimate: 64 for p90, 130 for p95, 662 for p99, 6,636 for p99.9."""
    return next(n for n in itertools.count(1) if overlatency_odds(1, n, percentile) < 1 - confidence)


def early_stopping_estimate(samples: Sequence[float] | np.ndarray, percentile: float) -> float | None:
    """A value that the true percentile does not exceed, with 99 % confidence; None if the run is too short."""
    allowed = allowed_overlatency(len(samples), percentile)
    return float(np.sort(np.asarray(samples))[len(samples) - allowed]) if allowed else None


def summarize(latency_ms: Sequence[float] | np.ndarray) -> Latency:
    """The statistics of a run's samples, in milliseconds."""
    ordered = np.sort(np.asarray(latency_ms, dtype=np.float64))
    count = len(ordered)

    def at(percentile: float) -> float | None:
        return float(ordered[int(count * percentile)]) if count >= min_samples(percentile) else None

    ends = float(ordered[0]), float(ordered[-1]), float(ordered[count // 2])
    return Latency(count, float(ordered.mean()), *ends, *(at(p) for p in list(PERCENTILES.values())[1:]))


@dataclass(frozen=True)
class Run:
    """One scenario of a benchmark.

    Args:
        scenario: as MLPerf names it.
        name: the scenario; with "(short: 40 of 64 samples)" where the run is not valid.
        pipeline: backbone, or +NFormer where the head is run.
        count: queries timed; of Offline, images.
        required: count from which the run is valid.
        warmup: queries before the clock counts.
        batch: images that the backbone sees at once.
        latency: from issue to reply.
        steps: latency of each step: decode, preprocess, copy_in, backbone, head, copy_out, search.
        images_per_second: throughput.
        percentile: which one `early_stopping_ms` estimates, such as p90; null for Offline.
        early_stopping_ms: value that the percentile does not exceed, with 99 % confidence; null if the run is short.
    """

    scenario: Scenario
    name: str
    pipeline: str
    count: int
    required: int
    warmup: int
    batch: int
    latency: Latency
    steps: Mapping[str, Latency]
    images_per_second: float
    percentile: str | None = None
    early_stopping_ms: float | None = None

    @property
    def percentiles(self) -> dict[str, float | None]:
        """Milliseconds by name; Offline has none."""
        return dict.fromkeys(PERCENTILES) if self.scenario == "Offline" else self.latency.percentiles


@dataclass(frozen=True)
class Benchmark(Result):
    """The latency and throughput of a model, from image file to ranked gallery, with and without its head.

    Args:
        machine: where it was measured.
        conditions: of the machine, before and after the measurement.
        model: what was measured.
        data: number of different query images, and of gallery images searched.
        intra_op_threads: of the backend; null for its own choice.
        peak_memory_mib: of this process since it began; null where the system does not report it.
        runs: one for each scenario and pipeline.
    """

    kind: ClassVar[str] = "benchmark"
    version: ClassVar[int] = 2

    machine: MachineFacts
    conditions: tuple[Conditions, Conditions]
    model: MeasuredModel
    data: MeasuredData
    intra_op_threads: int | None
    peak_memory_mib: float | None
    runs: tuple[Run, ...]

    def __str__(self) -> str:
        body, steps = [], []
        for run in self.runs:
            figures = [run.early_stopping_ms, *run.percentiles.values()]
            shown = [number(v) or "-" for v in figures]
            body.append([run.pipeline, run.name, *shown, number(run.images_per_second)])
            means = ", ".join(f"{name} {number(s.mean_ms, 2)}" for name, s in run.steps.items())
            steps.append(f"{run.pipeline}, {run.scenario}, mean ms a query: {means}")
        headers = ["pipeline", "run", "early stop", *PERCENTILES, "images/s"]
        about = f"{self.model.label}, {self.data.gallery:,} in the gallery; ms from issue to reply"
        return "\n".join([about, format_table(headers, body, left=2), *steps])


@dataclass(frozen=True)
class ComparedRun:
    """One model of a comparison. A ratio is its latency over the first model's in the same round: below 1 is faster.

    Args:
        label: of the model.
        name: the scenario; with "(short: 40 of 64 samples)" where the run is not valid.
        pipeline: backbone, or +NFormer where the head is run.
        latency: from issue to reply.
        latency_ms: of each round.
        ratio: median over the rounds.
        ratio_p5: 5th percentile.
        ratio_p95: 95th percentile.
    """

    label: str
    name: str
    pipeline: str
    latency: Latency
    latency_ms: tuple[float, ...]
    ratio: float
    ratio_p5: float
    ratio_p95: float


@dataclass(frozen=True)
class Comparison(Result):
    """The latency of several models that are timed in turn on the same queries.

    Args:
        machine: where it was measured.
        conditions: of the machine, before and after the measurement.
        models: the first is the baseline.
        data: number of different query images, and of gallery images searched.
        intra_op_threads: of the backends; null for their own choice.
        warmup: rounds before the clock counts.
        runs: one for each model.
    """

    kind: ClassVar[str] = "comparison"
    version: ClassVar[int] = 2

    machine: MachineFacts
    conditions: tuple[Conditions, Conditions]
    models: tuple[MeasuredModel, ...]
    data: MeasuredData
    intra_op_threads: int | None
    warmup: int
    runs: tuple[ComparedRun, ...]

    def __str__(self) -> str:
        body = []
        for run in self.runs:
            ratios = [number(v, 3) for v in (run.ratio, run.ratio_p5, run.ratio_p95)]
            body.append([run.label, run.name, number(run.latency.p50_ms), *ratios])
        return format_table(["model", "run", "p50 ms", "ratio", "p5", "p95"], body, left=2)


def benchmark(
    model: Source,
    data: Data,
    *,
    single_stream: int = 130,
    multi_stream: int = 0,
    offline: int = 0,
    batch: int = 32,
    gallery: int = 500,
    warmup: int = 8,
    max_seconds: float | None = None,
    intra_op_threads: int | None = None,
    label: str | None = None,
    layout: str = "auto",
) -> Benchmark:
    """Times a model from image files to a ranked gallery, with and without its head.

    Args:
        model: an open model, or the path of a checkpoint, bundle or engine.
        data: a dataset or its folder; its query images are the requests, in turn.
        single_stream: queries of one image, one after the other; 0 for none. 64 make a valid run.
        multi_stream: queries of eight images; 662 make a valid run.
        offline: images of the one big query.
        batch: images that the backbone sees at once in Offline.
        gallery: gallery images that are searched, and that the head sees with each query.
        warmup: queries before the clock counts.
        max_seconds: ends a scenario early; its name then says that the run is short.
        intra_op_threads: of the backend; its own choice if None.
        label: what the report calls the model.
        layout: of the dataset's folder.
    """
    dataset = open_dataset(data, layout, labels=False).asking()
    requests = [r.path for r in dataset.query]
    for name, value in (("batch", batch), ("gallery", gallery)):
        check_at_least(name, value, 1)
    before = conditions()
    runs = []
    with open_model(model, intra_op_threads) as runner:
        searched = embed_records(runner, dataset.gallery[:gallery], batch=batch)
        for with_head in (False, True) if runner.has_head else (False,):
            for scenario, count in zip(SCENARIOS, (single_stream, multi_stream), strict=True):
                if count:
                    pipeline = Pipeline(runner, searched, with_head=with_head, batch=SCENARIOS[scenario][1])
                    runs.append(_stream(pipeline, requests, scenario, count, warmup, max_seconds))
            if offline:
                pipeline = Pipeline(runner, searched, with_head=with_head, batch=batch)
                runs.append(_offline(pipeline, requests, offline, min(warmup, offline)))
        measured = MeasuredModel.of(model, runner, label)
    measured_on = MeasuredData(dataset.name, len(requests), len(searched))
    around = before, conditions()
    return Benchmark(machine(), around, measured, measured_on, intra_op_threads, _peak_memory_mib(), tuple(runs))


def _peak_memory_mib() -> float | None:
    try:
        import resource
    except ImportError:  # not on Windows
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _take(requests: list[str], first: int, count: int) -> list[str]:
    return [requests[i % len(requests)] for i in range(first, first + count)]


def run_name(scenario: str, count: int, required: int) -> str:
    """The scenario's name; a run that is too short to be valid says so."""
    return scenario if count >= required else f"{scenario} (short: {count:,} of {required:,} samples)"


def _stream(
    pipeline: Pipeline, requests: list[str], scenario: Scenario, count: int, warmup: int, max_seconds: float | None
) -> Run:
    """Queries one after the other; the next is issued when the last is answered."""
    percentile, images = SCENARIOS[scenario]
    for i in range(warmup):
        pipeline(_take(requests, i * images, images))
    replies: list[Reply] = []
    start = time.perf_counter()
    for i in tqdm(range(count), desc=scenario, unit="query", **PROGRESS):
        replies.append(pipeline(_take(requests, (warmup + i) * images, images)))
        if max_seconds is not None and time.perf_counter() - start > max_seconds:
            break
    required = min_samples(PERCENTILES[percentile])
    run = _run(pipeline, scenario, replies, len(replies), required, warmup, images)
    bound = early_stopping_estimate([r.total_ms for r in replies], PERCENTILES[percentile])
    return replace(run, percentile=percentile, early_stopping_ms=bound)


def _offline(pipeline: Pipeline, requests: list[str], images: int, warmup: int) -> Run:
    """One query of many images: throughput, no percentiles."""
    if warmup:
        pipeline(_take(requests, 0, warmup))
    reply = pipeline(_take(requests, 0, images))
    return _run(pipeline, "Offline", [reply], images, OFFLINE_SAMPLES, warmup, images)


def _run(
    pipeline: Pipeline, scenario: Scenario, replies: list[Reply], count: int, required: int, warmup: int, images: int
) -> Run:
    total = [r.total_ms for r in replies]
    steps = {s: summarize([r.step_ms[s] for r in replies]) for s in STEPS if s in replies[0].step_ms}
    named = scenario, run_name(scenario, count, required), pipeline.name
    figures = summarize(total), steps, 1000 * images * len(total) / sum(total)
    return Run(*named, count, required, warmup, pipeline.batch, *figures)


def compare(
    models: Sequence[Source],
    data: Data,
    *,
    rounds: int = 64,
    gallery: int = 500,
    warmup: int = 8,
    with_head: bool = True,
    intra_op_threads: int | None = None,
    labels: Sequence[str] | None = None,
    layout: str = "auto",
) -> Comparison:
    """Times several models on the same single-image queries in turn, and gives ratios pair by pair.

    Each round sends one query to every model, beginning with another one each time, so that a slow minute of the
    machine affects all equally.

    Raises:
        UsageError: for fewer than two models, or labels that are not one a model.
    """
    named = len(labels or models)
    if len(models) < 2 or named != len(models):
        expected = "two or more, and as many labels"
        raise UsageError("models", f"{len(models)} models, {named} labels", expected, "Name the models to compare.")
    check_at_least("rounds", rounds, 1)
    dataset = open_dataset(data, layout, labels=False).asking()
    requests = [r.path for r in dataset.query]
    before = conditions()
    with ExitStack() as stack:
        runners = [stack.enter_context(open_model(m, intra_op_threads)) for m in models]
        pipelines = []
        for runner in runners:
            searched = embed_records(runner, dataset.gallery[:gallery])
            pipelines.append(Pipeline(runner, searched, with_head=with_head and runner.has_head, batch=1))
        latency = _interleave(pipelines, requests, rounds, warmup)
        opened = zip(models, runners, labels or repeat(None, len(models)), strict=True)
        measured = tuple(MeasuredModel.of(*one) for one in opened)
    name = run_name("SingleStream", rounds, min_samples(0.9))
    runs = []
    for described, pipeline, row in zip(measured, pipelines, latency, strict=True):
        low, middle, high = np.quantile(row / latency[0], [0.05, 0.5, 0.95]).tolist()
        figures = summarize(row), tuple(row.tolist()), middle, low, high
        runs.append(ComparedRun(described.label, name, pipeline.name, *figures))
    measured_on = MeasuredData(dataset.name, len(requests), len(pipelines[0].gallery))
    around = before, conditions()
    return Comparison(machine(), around, measured, measured_on, intra_op_threads, warmup, tuple(runs))


def _interleave(pipelines: list[Pipeline], requests: list[str], rounds: int, warmup: int) -> np.ndarray:
    """Milliseconds [models, rounds]."""
    latency = np.empty((len(pipelines), rounds))
    for i in range(warmup):
        for pipeline in pipelines:
            pipeline(_take(requests, i, 1))
    for i in tqdm(range(rounds), desc="comparing", unit="round", **PROGRESS):
        for turn in range(len(pipelines)):
            which = (i + turn) % len(pipelines)
            latency[which, i] = pipelines[which](_take(requests, warmup + i, 1)).total_ms
    return latency
