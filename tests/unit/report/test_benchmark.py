from __future__ import annotations

import json
import time

import numpy as np
import pytest

from nformer_edge.core.errors import GateError, UsageError
from nformer_edge.core.machine import conditions, machine
from nformer_edge.core.values import dumps, to_json
from nformer_edge.gallery import search
from nformer_edge.gallery.embed import embed_records
from nformer_edge.report.benchmark import (
    PERCENTILES,
    SCENARIOS,
    Benchmark,
    Comparison,
    benchmark,
    compare,
    early_stopping_estimate,
    judge_deadline,
)
from nformer_edge.report.loadgen import run_loadgen
from nformer_edge.report.pipeline import Pipeline


def found(runner, paths, gallery, head):
    """What `nformer-edge search` gives: the paths of the five best."""
    return [list(row) for row in search.search(runner, paths, gallery, top=5, head=head).paths]


def test_a_run_is_named_short_until_it_has_enough_samples(dataset, grid_runner):
    short = benchmark(grid_runner(), dataset, single_stream=40, multi_stream=3, warmup=2)
    assert Benchmark.from_json(json.loads(dumps(short.to_json()))) == short
    names = {(r.pipeline, r.name) for r in short.runs}
    assert ("backbone", "SingleStream (short: 40 of 64 samples)") in names
    assert ("+NFormer", "MultiStream (short: 3 of 662 samples)") in names
    assert all(r.early_stopping_ms is None and r.count < r.required for r in short.runs)
    long = benchmark(grid_runner(head=False), dataset, single_stream=64, warmup=2)
    (run,) = long.runs
    assert run.name == "SingleStream"
    assert run.early_stopping_ms == run.latency.max_ms
    assert run.latency.p95_ms is None


def test_steps_are_timed_apart_and_do_not_exceed_the_whole(dataset, grid_runner):
    result = benchmark(grid_runner(), dataset, single_stream=5, warmup=1)
    backbone, nformer = result.runs
    assert list(backbone.steps) == ["decode", "preprocess", "backbone", "search"]
    assert list(nformer.steps) == ["decode", "preprocess", "backbone", "head", "search"]
    for run in result.runs:
        assert sum(s.mean_ms for s in run.steps.values()) <= run.latency.mean_ms
        assert run.warmup == 1


def test_offline_counts_images_and_is_short_below_mlperfs_count(dataset, grid_runner):
    result = benchmark(grid_runner(), dataset, single_stream=0, offline=60, batch=16)
    run = result.runs[0]
    assert run.name == "Offline (short: 60 of 24,576 samples)"
    assert run.images_per_second == pytest.approx(1000 * 60 / run.latency.mean_ms)


def test_a_time_limit_shows_in_the_name(dataset, grid_runner):
    result = benchmark(grid_runner(head=False), dataset, single_stream=64, warmup=0, max_seconds=0)
    assert result.runs[0].name == "SingleStream (short: 1 of 64 samples)"


def test_a_request_ranks_as_the_search_command_does(dataset, grid_runner):
    runner = grid_runner()
    gallery = embed_records(runner, dataset.gallery)
    paths = [r.path for r in dataset.query[:3]]
    for with_head in (False, True):
        reply = Pipeline(runner, gallery, with_head=with_head, top=5)(paths)
        assert [[gallery.paths[g] for g in row] for row in reply.ranked] == found(runner, paths, gallery, with_head)
        assert 0 < sum(reply.step_ms.values()) <= reply.total_ms


def test_what_is_timed_is_the_search_itself(dataset, grid_runner, monkeypatch):
    calls = []
    real = search.top_matches

    def slow(query, gallery, top):
        calls.append((len(query), len(gallery)))
        time.sleep(0.02)
        return real(query, gallery, top)

    monkeypatch.setattr(search, "top_matches", slow)
    for run in benchmark(grid_runner(), dataset, single_stream=2, warmup=0).runs:
        assert run.steps["search"].min_ms >= 20
    assert calls == [(1, 54)] * 4


def test_copies_that_a_device_reports_are_taken_out_of_its_step(dataset, grid_runner):
    runner = grid_runner(head=False)
    gallery = embed_records(runner, dataset.gallery[:5])
    runner.copy_ms = (1000.0, 2000.0)
    step_ms = Pipeline(runner, gallery, with_head=False)([dataset.query[0].path]).step_ms
    assert (step_ms["copy_in"], step_ms["copy_out"]) == (1000.0, 2000.0)
    assert step_ms["backbone"] < 0


def test_models_are_compared_in_turn_pair_by_pair(dataset, grid_runner, monkeypatch):
    calls = []
    monkeypatch.setattr("nformer_edge.report.benchmark.settle", lambda ask: calls.append(ask.args[0]))

    class Slow(grid_runner):
        def embed(self, images):
            calls.append(self.name)
            for _ in range(200 if self.name == "slow" else 1):
                result = super().embed(images)
            return result

    models = [Slow("fast"), Slow("slow")]
    result = compare(models, dataset, rounds=6, warmup=0, with_head=False, labels=["a", "b"])
    assert Comparison.from_json(json.loads(dumps(result.to_json()))) == result
    one_by_one = calls[-24:]
    assert one_by_one[1::2] == ["fast", "slow", "slow", "fast"] * 3
    assert [paths for (paths,) in one_by_one[::4]] == [r.path for r in dataset.query[:6]]  # settled by the same query
    first, second = result.runs
    pairs = np.divide(second.latency_ms, first.latency_ms)
    assert second.ratio == pytest.approx(np.median(pairs))
    assert second.ratio > 1
    assert (first.label, second.label, first.ratio, second.latency.count) == ("a", "b", 1, 6)


def test_one_model_alone_cannot_be_compared(dataset, grid_runner):
    with pytest.raises(UsageError, match="two or more"):
        compare([grid_runner()], dataset)


def test_the_machine_is_described_in_plain_json():
    described = json.loads(dumps(to_json({"machine": machine(), "conditions": conditions()})))
    assert described["machine"]["cores"] >= 1
    assert described["machine"]["versions"]["numpy"] == np.__version__


@pytest.mark.parametrize(
    ("late", "count", "status"),
    [(0, 64, "passed"), (0, 63, "undecided"), (1, 64, "undecided"), (12, 64, "undecided"), (13, 64, "failed")],
)
def test_a_deadline_is_passed_failed_or_undecided_by_early_stopping(late, count, status):
    latency = [30.0] * late + [10.0] * (count - late)
    verdict = judge_deadline(latency, 20.0, 0.9)
    assert (verdict.status, verdict.late) == (status, late)


def test_a_deadline_that_equals_the_estimate_is_passed():
    latency = list(range(1, 1025))
    estimate = early_stopping_estimate(latency, 0.9)
    assert judge_deadline(latency, estimate, 0.9).status == "passed"
    assert judge_deadline(latency, estimate - 0.5, 0.9).status == "undecided"


def test_a_run_carries_its_deadline_and_its_energy(dataset, grid_runner):
    failed = benchmark(grid_runner(head=False), dataset, single_stream=64, warmup=0, deadline_ms=1e-6)
    assert Benchmark.from_json(json.loads(dumps(failed.to_json()))) == failed
    (run,) = failed.runs
    assert (run.deadline.status, run.deadline.late) == ("failed", 64)
    assert run.energy.joules is None or run.energy.joules > 0
    assert "failed, 64 above 1e-06 ms" in str(failed)
    with pytest.raises(GateError, match="p90 failed, 64 above"):
        failed.require_deadline()
    benchmark(grid_runner(head=False), dataset, single_stream=5, warmup=0, deadline_ms=1e6).require_deadline()


def test_a_deadline_is_a_time_above_zero(dataset, grid_runner):
    for wrong in (0, float("inf")):
        with pytest.raises(UsageError, match="above 0"):
            benchmark(grid_runner(), dataset, deadline_ms=wrong)


@pytest.mark.optional
@pytest.mark.parametrize(("scenario", "count"), [("SingleStream", 63), ("SingleStream", 1024), ("MultiStream", 700)])
def test_early_stopping_is_that_of_loadgen_on_its_own_times(scenario, count):
    pytest.importorskip("mlperf_loadgen", reason="LoadGen is missing: pip install 'nformer-edge[loadgen]'")
    percentile, images = SCENARIOS[scenario]
    said = run_loadgen(lambda rows: None, scenario, count, images, 40)
    assert said.count == len(said.latency_ms) == count
    ours = early_stopping_estimate(said.latency_ms, PERCENTILES[percentile])
    assert said.early_stopping_ms == ours
    assert said.valid == (ours is not None)


@pytest.mark.optional
def test_loadgen_issues_the_queries_and_passes_errors_on(dataset, grid_runner):
    pytest.importorskip("mlperf_loadgen", reason="LoadGen is missing: pip install 'nformer-edge[loadgen]'")
    result = benchmark(grid_runner(head=False), dataset, single_stream=64, warmup=1, loadgen=True)
    assert Benchmark.from_json(json.loads(dumps(result.to_json()))) == result
    (run,) = result.runs
    assert (run.count, run.loadgen.count, run.loadgen.valid) == (64, 64, True)
    assert run.latency.max_ms <= run.loadgen.early_stopping_ms  # its clock has ours inside

    def broken(rows):
        raise UsageError("query", rows)

    with pytest.raises(UsageError, match="query"):
        run_loadgen(broken, "SingleStream", 3, 1, 40)
