from __future__ import annotations

import json

import numpy as np
import pytest

from nformer_edge.core.errors import UsageError
from nformer_edge.core.machine import conditions, machine
from nformer_edge.core.values import dumps, to_json
from nformer_edge.report.benchmark import benchmark, compare
from nformer_edge.report.pipeline import Pipeline


def test_a_run_is_named_short_until_it_has_enough_samples(dataset, opener, grid_runner):
    short = benchmark("m", dataset, single_stream=40, multi_stream=3, warmup=2, opener=opener(m=grid_runner()))
    json.dumps(short, allow_nan=False)
    names = {(r["pipeline"], r["name"]) for r in short["runs"]}
    assert ("backbone", "SingleStream (short: 40 of 64 samples)") in names
    assert ("+NFormer", "MultiStream (short: 3 of 662 samples)") in names
    assert all(r["early_stopping_ms"] is None and not r["valid"] for r in short["runs"])
    long = benchmark("m", dataset, single_stream=64, warmup=2, opener=opener(m=grid_runner(head=False)))
    (run,) = long["runs"]
    assert run["name"] == "SingleStream"
    assert run["early_stopping_ms"] == run["latency"]["max_ms"]
    assert run["latency"]["p95_ms"] is None


def test_stages_are_told_apart_and_do_not_exceed_the_whole(dataset, opener, grid_runner):
    result = benchmark("m", dataset, single_stream=5, warmup=1, opener=opener(m=grid_runner()))
    backbone, nformer = result["runs"]
    assert list(backbone["stages"]) == ["decode", "preprocess", "backbone", "search"]
    assert list(nformer["stages"]) == ["decode", "preprocess", "backbone", "head", "search"]
    for run in result["runs"]:
        assert sum(s["mean_ms"] for s in run["stages"].values()) <= run["latency"]["mean_ms"]
        assert run["warmup"] == 1


def test_offline_counts_images_and_is_short_below_mlperfs_count(dataset, opener, grid_runner):
    result = benchmark("m", dataset, single_stream=0, offline=60, batch=16, opener=opener(m=grid_runner()))
    run = result["runs"][0]
    assert run["name"] == "Offline (short: 60 of 24,576 samples)"
    assert run["images_per_second"] == pytest.approx(1000 * 60 / run["latency"]["mean_ms"])


def test_a_time_limit_shows_in_the_name(dataset, opener, grid_runner):
    result = benchmark(
        "m", dataset, single_stream=64, warmup=0, max_seconds=0, opener=opener(m=grid_runner(head=False))
    )
    assert result["runs"][0]["name"] == "SingleStream (short: 1 of 64 samples)"


def test_a_pipeline_ranks_as_the_search_does(dataset, grid_runner):
    runner = grid_runner()
    from nformer_edge.gallery.embed import embed_records

    gallery = embed_records(runner, dataset.gallery).features
    ranked, stages = Pipeline(runner, gallery, with_head=False, top=5)([r.path for r in dataset.query[:3]])
    query = embed_records(runner, dataset.query[:3]).features
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (query, gallery)]
    assert (ranked == np.argsort(-(unit[0] @ unit[1].T), axis=1)[:, :5]).all()
    assert stages["total"] > 0


def test_copies_that_a_device_reports_are_taken_out_of_its_stage(dataset, grid_runner):
    runner = grid_runner(head=False)
    gallery = runner.embed(np.random.default_rng(0).normal(size=(5, 3, 32, 16)).astype(np.float32))
    runner.copy_ms = (1000.0, 2000.0)
    _, stages = Pipeline(runner, gallery, with_head=False)([dataset.query[0].path])
    assert (stages["copy_in"], stages["copy_out"]) == (1000.0, 2000.0)
    assert stages["backbone"] < 0


def test_models_are_compared_in_turn_pair_by_pair(dataset, opener, grid_runner):
    calls = []

    class Slow(grid_runner):
        def embed(self, images):
            calls.append(self.name)
            for _ in range(200 if self.name == "slow" else 1):
                result = super().embed(images)
            return result

    runners = opener(fast=Slow("fast"), slow=Slow("slow"))
    result = compare(["fast", "slow"], dataset, rounds=6, warmup=0, with_head=False, labels=["a", "b"], opener=runners)
    json.dumps(result, allow_nan=False)
    one_by_one = calls[-12:]
    assert one_by_one == ["fast", "slow", "slow", "fast"] * 3
    (ratio,) = result["ratios"]
    pairs = np.divide(result["runs"][1]["latency_ms"], result["runs"][0]["latency_ms"])
    assert ratio["median"] == pytest.approx(np.median(pairs))
    assert ratio["median"] > 1
    assert (ratio["label"], ratio["baseline"], ratio["pairs"]) == ("b", "a", 6)


def test_one_model_alone_cannot_be_compared(dataset, opener, grid_runner):
    with pytest.raises(UsageError, match="two or more"):
        compare(["m"], dataset, opener=opener(m=grid_runner()))


def test_the_machine_is_described_in_plain_json():
    described = json.loads(dumps(to_json({"machine": machine(), "conditions": conditions()})))
    assert described["machine"]["cores"] >= 1
    assert described["machine"]["versions"]["numpy"] == np.__version__
