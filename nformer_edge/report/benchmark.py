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
from functools import cache, partial
from itertools import repeat
from typing import ClassVar, Literal

import numpy as np
from tqdm import tqdm

from nformer_edge.backends.choice import settle
from nformer_edge.core.errors import GateError, UsageError
from nformer_edge.core.machine import Conditions, MachineFacts, conditions, machine, stable_clocks
from nformer_edge.core.spec import check_at_least
from nformer_edge.core.terminal import PROGRESS
from nformer_edge.core.values import Result
from nformer_edge.gallery.embed import embed_records
from nformer_edge.report.energy import Energy, Meter, find_sensors
from nformer_edge.report.loadgen import LoadGen, run_loadgen
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
class Deadline:
    """Whether a percentile is below a deadline, with 99 % confidence either way.

    Args:
        deadline_ms: what was asked for.
        status: passed where the early-stopping estimate is not above the deadline; failed where so many late queries
            have a chance below 1 % if the percentile were below it; else undecided.
        late: queries that took longer.
    """

    deadline_ms: float
    status: Literal["passed", "failed", "undecided"]
    late: int

    def __str__(self) -> str:
        return f"{self.status}, {self.late:,} above {self.deadline_ms:g} ms"


def judge_deadline(latency_ms: Sequence[float], deadline_ms: float, percentile: float) -> Deadline:
    """By the binomial distribution of early stopping; a run without a late query may still be too short to pass."""
    late, estimate = sum(ms > deadline_ms for ms in latency_ms), early_stopping_estimate(latency_ms, percentile)
    if estimate is not None and estimate <= deadline_ms:
        return Deadline(deadline_ms, "passed", late)
    by_chance = 1 - overlatency_odds(late - 1, len(latency_ms), percentile)
    return Deadline(deadline_ms, "failed" if by_chance < 1 - CONFIDENCE else "undecided", late)


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
        energy: joules while the queries were timed.
        deadline: the verdict on `percentile`, where a deadline was given.
        loadgen: what MLPerf's LoadGen says of the same queries, where it issued them.
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
    energy: Energy | None = None
    deadline: Deadline | None = None
    loadgen: LoadGen | None = None

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
        notes: what changed on the machine in between, and how its clocks are fixed.
    """

    kind: ClassVar[str] = "benchmark"
    version: ClassVar[int] = 3

    machine: MachineFacts
    conditions: tuple[Conditions, Conditions]
    model: MeasuredModel
    data: MeasuredData
    intra_op_threads: int | None
    peak_memory_mib: float | None
    runs: tuple[Run, ...]
    notes: tuple[str, ...] = ()

    def require_deadline(self) -> None:
        """Nothing where no run failed its deadline (undecided is not failed).

        Raises:
            GateError: naming each that did.
        """
        failed = [run for run in self.runs if run.deadline is not None and run.deadline.status == "failed"]
        if failed:
            got = ", ".join(f"{run.pipeline} {run.name}: {run.percentile} {run.deadline}" for run in failed)
            hint = "Build a faster engine (`build-engine --precision auto`), or allow more time."
            raise GateError("deadline", got, "the percentile below it", hint)

    def __str__(self) -> str:
        body, steps = [], []
        for run in self.runs:
            figures = [run.early_stopping_ms, *run.percentiles.values()]
            shown = [number(v) or "-" for v in figures]
            body.append([run.pipeline, run.name, *shown, number(run.images_per_second)])
            means = ", ".join(f"{name} {number(s.mean_ms, 2)}" for name, s in run.steps.items())
            named = f"{run.pipeline}, {run.scenario}"
            steps.append(f"{named}, mean ms a query: {means}")
            steps += [] if run.energy is None else [f"{named}: {run.energy}"]
            steps += [] if run.deadline is None else [f"{named}, {run.percentile}: {run.deadline}"]
            if run.loadgen is not None:
                said, valid = number(run.loadgen.early_stopping_ms) or "-", "valid" if run.loadgen.valid else "invalid"
                steps.append(f"{named}, LoadGen {run.loadgen.version}: {valid}, early stop {said} ms by its clock")
        headers = ["pipeline", "run", "early stop", *PERCENTILES, "images/s"]
        about = f"{self.model.label}, {self.data.gallery:,} in the gallery; ms from issue to reply"
        return "\n".join([about, format_table(headers, body, left=2), *steps, *(f"note: {n}" for n in self.notes)])


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
    deadline_ms: float | None = None,
    loadgen: bool = False,
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
        deadline_ms: of SingleStream's p90 and MultiStream's p99: each run says passed, failed or undecided.
        loadgen: MLPerf's LoadGen issues the queries of both, in its own order; `max_seconds` does not end it.

    Raises:
        UsageError: for a batch or a gallery below 1, or a deadline that is not above 0, or infinite.
    """
    dataset = open_dataset(data, layout, labels=False).asking()
    requests = [r.path for r in dataset.query]
    if deadline_ms is not None and not 0 < deadline_ms < math.inf:
        raise UsageError("deadline_ms", deadline_ms, "a time above 0", "Give milliseconds.")
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
                    run = _stream(pipeline, requests, scenario, count, warmup, max_seconds, loadgen)
                    runs.append(_judged(*run, deadline_ms))
            if offline:
                pipeline = Pipeline(runner, searched, with_head=with_head, batch=batch)
                runs.append(_offline(pipeline, requests, offline, min(warmup, offline)))
        measured = MeasuredModel.of(model, runner, label)
    measured_on = MeasuredData(dataset.name, len(requests), len(searched))
    around = before, conditions()
    told = intra_op_threads, _peak_memory_mib(), tuple(runs), _notes(*around)
    return Benchmark(machine(), around, measured, measured_on, *told)


def _judged(run: Run, latency_ms: list[float], deadline_ms: float | None) -> Run:
    if deadline_ms is None or run.percentile is None:
        return run
    return replace(run, deadline=judge_deadline(latency_ms, deadline_ms, PERCENTILES[run.percentile]))


def _notes(before: Conditions, after: Conditions) -> tuple[str, ...]:
    found, command = before.drift(after), stable_clocks(after, machine())
    hint = (f"clocks are not fixed: {command}",) if command else ()
    return (*(f"while it was timed, {what}" for what in found), *hint)


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
    pipeline: Pipeline,
    requests: list[str],
    scenario: Scenario,
    count: int,
    warmup: int,
    max_seconds: float | None,
    loadgen: bool,
) -> tuple[Run, list[float]]:
    """Queries one after the other; the next is issued when the last is answered. Returns their milliseconds, too."""
    percentile, images = SCENARIOS[scenario]
    for i in range(warmup):
        pipeline(_take(requests, i * images, images))
    replies: list[Reply] = []
    said = None
    with Meter(find_sensors()) as meter:
        if loadgen:

            def answer(rows: Sequence[int]) -> None:
                replies.append(pipeline([requests[i] for i in rows]))

            said = run_loadgen(answer, scenario, count, images, len(requests))
        else:
            start = time.perf_counter()
            for i in tqdm(range(count), desc=scenario, unit="query", **PROGRESS):
                replies.append(pipeline(_take(requests, (warmup + i) * images, images)))
                if max_seconds is not None and time.perf_counter() - start > max_seconds:
                    break
    required = min_samples(PERCENTILES[percentile])
    run = _run(pipeline, scenario, replies, len(replies), required, warmup, images)
    latency_ms = [r.total_ms for r in replies]
    bound = early_stopping_estimate(latency_ms, PERCENTILES[percentile])
    used = meter.energy(len(replies))
    return replace(run, percentile=percentile, early_stopping_ms=bound, energy=used, loadgen=said), latency_ms


def _offline(pipeline: Pipeline, requests: list[str], images: int, warmup: int) -> Run:
    """One query of many images: throughput, no percentiles."""
    if warmup:
        pipeline(_take(requests, 0, warmup))
    with Meter(find_sensors()) as meter:
        reply = pipeline(_take(requests, 0, images))
    run = _run(pipeline, "Offline", [reply], images, OFFLINE_SAMPLES, warmup, images)
    return replace(run, energy=meter.energy(images))


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
    machine affects all equally; before its turn a model answers the query untimed (`backends.choice.settle`).

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
            ask = partial(pipelines[which], _take(requests, warmup + i, 1))
            settle(ask)
            latency[which, i] = ask().total_ms
    return latency
