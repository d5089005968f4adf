"""How fast a model is, by MLPerf LoadGen's conventions.

JSON of a benchmark (milliseconds; a percentile that the count does not allow is null)::

    {"kind": "benchmark", "version": 1, "machine": {...}, "conditions": {"before": {...}, "after": {...}},
     "model": {...}, "data": {"name", "images", "gallery"}, "threads": null, "clock": "time.perf_counter_ns",
     "peak_memory_mib": 512.0 or null,
     "runs": [{"scenario": "SingleStream" | "MultiStream" | "Offline",
               "name": the scenario, with "(short: 40 of 64 samples)" where it is no valid run,
               "pipeline": "backbone" | "+NFormer", "valid", "count", "required", "warmup", "batch", "gallery",
               "percentile": "p90", "early_stopping_ms": 12.3 or null        (not Offline),
               "latency": {"count", "mean_ms", "min_ms", "max_ms", "p50_ms", "p90_ms", "p95_ms", "p99_ms", "p99.9_ms"},
               "stages": {"decode": {as latency}, ...}, "images_per_second", "ms_per_image"}]}

JSON of a comparison: ``{"kind": "comparison", ..., "models": [{...}], "runs": [{"label", "latency", "latency_ms"}],
"ratios": [{"label", "baseline", "pairs", "median", "p5", "p95"}]}``; a ratio is a model's latency over the first's in
the same round, so under 1 is faster.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np
from tqdm import tqdm

from nformer_edge.backends.runner import Runner
from nformer_edge.core.errors import UsageError
from nformer_edge.core.machine import conditions, machine
from nformer_edge.core.spec import check_at_least
from nformer_edge.core.terminal import PROGRESS
from nformer_edge.core.values import to_json
from nformer_edge.gallery.embed import embed_records
from nformer_edge.report.latency import early_stopping_estimate, min_samples, percentile_name, summarize
from nformer_edge.report.models import Data, Opener, describe_model, open_dataset, open_model
from nformer_edge.report.pipeline import STAGES, Pipeline

VERSION = 1

#: Scenario: percentile that is reported, images in one query.
SCENARIOS: dict[str, tuple[float, int]] = {"SingleStream": (0.90, 1), "MultiStream": (0.99, 8)}

#: Samples of MLPerf's one Offline query (inference rules, "Scenarios").
OFFLINE_SAMPLES = 24_576


def benchmark(
    model_path: str | os.PathLike[str],
    data: Data,
    *,
    single_stream: int = 130,
    multi_stream: int = 0,
    offline: int = 0,
    batch: int = 32,
    gallery: int = 500,
    warmup: int = 8,
    max_seconds: float | None = None,
    threads: int | None = None,
    label: str | None = None,
    layout: str = "auto",
    opener: Opener | None = None,
) -> dict[str, Any]:
    """Times a checkpoint, bundle or engine, image files in and ranked gallery out, with and without its head.

    Args:
        model_path: the model.
        data: a dataset or its folder; its query images are the requests, in turn.
        single_stream: queries of one image, one after the other; 0 leaves the scenario out. 64 make a valid run.
        multi_stream: queries of eight images; 662 make a valid run.
        offline: images of the one big query.
        batch: images that the backbone sees at once in Offline.
        gallery: gallery images that are searched, and that the head sees with each query.
        warmup: queries before the clock counts.
        max_seconds: ends a scenario early; what that makes of it stands in its name.
        threads: of the backend; its own choice if None.
    """
    dataset = open_dataset(data, layout)
    requests = [r.path for r in dataset.query]
    for name, value in (("batch", batch), ("gallery", gallery)):
        check_at_least(name, value, 1)
    before = conditions()
    runs = []
    with open_model(model_path, threads, opener) as runner:
        features = embed_records(runner, dataset.gallery[:gallery], batch=batch).features
        for with_head in (False, True) if runner.has_head else (False,):
            for scenario, count in (("SingleStream", single_stream), ("MultiStream", multi_stream)):
                if count:
                    pipeline = Pipeline(runner, features, with_head=with_head, batch=SCENARIOS[scenario][1])
                    runs.append(_stream(pipeline, requests, scenario, count, warmup, max_seconds))
            if offline:
                pipeline = Pipeline(runner, features, with_head=with_head, batch=batch)
                runs.append(_offline(pipeline, requests, offline, warmup))
        model = describe_model(model_path, runner, label)
    return {
        "kind": "benchmark",
        "version": VERSION,
        "machine": to_json(machine()),
        "conditions": to_json({"before": before, "after": conditions()}),
        "model": model,
        "data": {"name": dataset.name, "images": len(requests), "gallery": len(features)},
        "threads": threads,
        "clock": "time.perf_counter_ns",
        "peak_memory_mib": _peak_memory_mib(),
        "runs": runs,
    }


def _peak_memory_mib() -> float | None:
    """Of this process since it began, whatever ran in it."""
    try:
        import resource
    except ImportError:  # not on Windows
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _take(requests: list[str], first: int, count: int) -> list[str]:
    return [requests[i % len(requests)] for i in range(first, first + count)]


def run_name(scenario: str, count: int, required: int) -> str:
    """The scenario's name, saying so where the run is too short to be valid."""
    return scenario if count >= required else f"{scenario} (short: {count:,} of {required:,} samples)"


def _stream(
    pipeline: Pipeline, requests: list[str], scenario: str, count: int, warmup: int, max_seconds: float | None
) -> dict[str, Any]:
    """Queries one after the other; the next is issued when the last is answered."""
    percentile, images = SCENARIOS[scenario]
    for i in range(warmup):
        pipeline(_take(requests, i * images, images))
    timings: list[dict[str, float]] = []
    start = time.perf_counter()
    for i in tqdm(range(count), desc=scenario, unit="query", **PROGRESS):
        timings.append(pipeline(_take(requests, (warmup + i) * images, images))[1])
        if max_seconds is not None and time.perf_counter() - start > max_seconds:
            break
    total = [t["total"] for t in timings]
    required = min_samples(percentile)
    return _run(pipeline, scenario, timings, required, warmup, images) | {
        "percentile": percentile_name(percentile),
        "early_stopping_ms": early_stopping_estimate(total, percentile),
        "images_per_second": 1000 * images * len(total) / sum(total),
        "ms_per_image": sum(total) / (images * len(total)),
    }


def _offline(pipeline: Pipeline, requests: list[str], images: int, warmup: int) -> dict[str, Any]:
    """One query of many images: throughput, no percentiles."""
    if warmup:
        pipeline(_take(requests, 0, min(warmup, images)))
    _, timing = pipeline(_take(requests, 0, images))
    run = _run(pipeline, "Offline", [timing], OFFLINE_SAMPLES, min(warmup, images), pipeline.batch)
    return run | {
        "name": run_name("Offline", images, OFFLINE_SAMPLES),
        "valid": images >= OFFLINE_SAMPLES,
        "count": images,
        "images_per_second": 1000 * images / timing["total"],
        "ms_per_image": timing["total"] / images,
    }


def _run(
    pipeline: Pipeline, scenario: str, timings: list[dict[str, float]], required: int, warmup: int, batch: int
) -> dict[str, Any]:
    return {
        "scenario": scenario,
        "name": run_name(scenario, len(timings), required),
        "pipeline": "+NFormer" if pipeline.head else "backbone",
        "valid": len(timings) >= required,
        "count": len(timings),
        "required": required,
        "warmup": warmup,
        "batch": batch,
        "gallery": len(pipeline.gallery),
        "latency": summarize([t["total"] for t in timings]),
        "stages": {s: summarize([t[s] for t in timings]) for s in STAGES if s in timings[0]},
    }


def compare(
    model_paths: Sequence[str | os.PathLike[str]],
    data: Data,
    *,
    rounds: int = 64,
    gallery: int = 500,
    warmup: int = 8,
    with_head: bool = True,
    threads: int | None = None,
    labels: Sequence[str] | None = None,
    layout: str = "auto",
    opener: Opener | None = None,
) -> dict[str, Any]:
    """Times several models on the same single-image queries in turn, and reports ratios pair by pair.

    Each round sends one query to every model, beginning with another one each time, so that a slow minute of the
    machine falls on all alike.

    Raises:
        UsageError: for fewer than two models, or labels that are not one a model.
    """
    if len(model_paths) < 2 or (labels is not None and len(labels) != len(model_paths)):
        raise UsageError(
            "models",
            f"{len(model_paths)} models, {len(labels or model_paths)} labels",
            "two or more, and as many labels",
            "Name the models to compare.",
        )
    check_at_least("rounds", rounds, 1)
    dataset = open_dataset(data, layout)
    requests = [r.path for r in dataset.query]
    before = conditions()
    with ExitStack() as stack:
        runners: list[Runner] = [stack.enter_context(open_model(p, threads, opener)) for p in model_paths]
        pipelines = []
        for runner in runners:
            features = embed_records(runner, dataset.gallery[:gallery]).features
            pipelines.append(Pipeline(runner, features, with_head=with_head and runner.has_head, batch=1))
        latency = _interleave(pipelines, requests, rounds, warmup)
        models = [
            describe_model(p, r, labels[i] if labels else None)
            for i, (p, r) in enumerate(zip(model_paths, runners, strict=True))
        ]
    names = [m["label"] for m in models]
    return {
        "kind": "comparison",
        "version": VERSION,
        "machine": to_json(machine()),
        "conditions": to_json({"before": before, "after": conditions()}),
        "models": models,
        "data": {"name": dataset.name, "images": len(requests), "gallery": len(pipelines[0].gallery)},
        "threads": threads,
        "pipeline": [("+NFormer" if p.head else "backbone") for p in pipelines],
        "warmup": warmup,
        "runs": [
            {
                "label": n,
                "name": run_name("SingleStream", rounds, min_samples(0.9)),
                "latency": summarize(row),
                "latency_ms": row.tolist(),
            }
            for n, row in zip(names, latency, strict=True)
        ],
        "ratios": [_ratio(names[0], n, row / latency[0]) for n, row in zip(names[1:], latency[1:], strict=True)],
    }


def _interleave(pipelines: list[Pipeline], requests: list[str], rounds: int, warmup: int) -> np.ndarray:
    """Milliseconds [models, rounds]."""
    latency = np.empty((len(pipelines), rounds))
    for i in range(warmup):
        for pipeline in pipelines:
            pipeline(_take(requests, i, 1))
    for i in tqdm(range(rounds), desc="comparing", unit="round", **PROGRESS):
        for turn in range(len(pipelines)):
            which = (i + turn) % len(pipelines)
            latency[which, i] = pipelines[which](_take(requests, warmup + i, 1))[1]["total"]
    return latency


def _ratio(baseline: str, label: str, ratios: np.ndarray) -> dict[str, Any]:
    low, median, high = np.quantile(ratios, [0.05, 0.5, 0.95])
    return {
        "label": label,
        "baseline": baseline,
        "pairs": len(ratios),
        "median": float(median),
        "p5": float(low),
        "p95": float(high),
    }
