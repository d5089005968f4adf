from __future__ import annotations

import json

import numpy as np
import pytest

from nformer_edge.core.errors import GateError, UsageError
from nformer_edge.ops.contract import draw_landmarks
from nformer_edge.report.parity import parity
from nformer_edge.report.verdict import describe_causes, describe_failures, format_parity, require_passed


def noise(scale):
    return lambda x: (
        x + np.random.default_rng(7).normal(scale=scale, size=x.shape).astype(np.float32) * np.float32(np.abs(x).mean())
    )


def with_nan(x):
    x = x.copy()
    x[0, 0] = np.nan
    return x


@pytest.fixture
def run(dataset, opener, grid_runner):
    def go(draws=500, **engine):
        runners = {"ref": grid_runner("ref"), "engine": grid_runner("engine", **engine)}
        result = parity("ref", "engine", dataset, draws=draws, opener=opener(**runners))
        json.dumps(result, allow_nan=False)
        return result

    return go


def statuses(result):
    return {s["stage"]: s["status"] for s in result["stages"]}


def gate(result, stage, name):
    return next(g for s in result["stages"] if s["stage"] == stage for g in s["gates"] if g["gate"] == name)


def test_an_equal_engine_passes_every_gate(run):
    result = run()
    assert result["passed"]
    assert statuses(result) == {"backbone": "passed", "head": "passed", "end_to_end": "passed"}
    assert result["blame"] is None
    require_passed(result)


def test_a_backbone_that_drifts_is_to_blame_and_the_head_is_not(run):
    result = run(distort=noise(0.05))
    assert statuses(result)["backbone"] == "failed"
    assert statuses(result)["head"] == "passed"
    assert result["blame"] == "backbone"
    with pytest.raises(GateError, match=r"backbone fp32, tensor.*to blame: backbone") as caught:
        require_passed(result)
    assert caught.value.exit_code == 1
    assert "missed by" in str(caught.value)


def test_a_head_that_drifts_is_to_blame_and_the_backbone_is_not(run):
    result = run(distort_head=noise(0.05))
    assert statuses(result) == {"backbone": "passed", "head": "failed", "end_to_end": "failed"}
    assert result["blame"] == "head"


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_one_nan_fails_in_every_precision(run, precision):
    result = run(distort=with_nan, precision=precision)
    assert statuses(result)["backbone"] == "failed"
    assert gate(result, "backbone", "rank1_agreement")["measured"] is None
    assert result["blame"] == "backbone"
    with pytest.raises(GateError, match="not a number"):
        require_passed(result)


def test_swapped_rows_fail(run):
    result = run(distort=lambda x: x[::-1])
    assert gate(result, "backbone", "cosine_min")["status"] == "failed"
    assert gate(result, "backbone", "rank1_agreement")["status"] == "failed"


def test_half_precision_rounding_passes_as_fp16_and_fails_as_fp32(run):
    def rounded(x):
        return x.astype(np.float16).astype(np.float32)

    assert gate(run(distort=rounded, precision="fp16"), "backbone", "tensor")["status"] == "passed"
    assert gate(run(distort=rounded, precision="fp16"), "backbone", "cosine_min")["status"] == "passed"
    assert gate(run(distort=lambda x: x * np.float32(1.002)), "backbone", "tensor")["status"] == "failed"


def test_few_queries_leave_a_small_loss_undecided_and_nothing_is_raised(run):
    result = run(distort=noise(0.08), precision="int8", draws=2000)
    kept = gate(result, "backbone", "mAP_kept")
    assert kept["status"] == "undecided"
    assert kept["lower"] < 0.99 < kept["upper"]
    if result["status"] == "undecided":
        assert not result["passed"]
        require_passed(result)


def test_int8_with_few_queries_and_no_loss_is_undecided_and_not_passed(run):
    result = run(precision="int8")
    for kept in ("mAP_kept", "rank1_kept"):
        found = gate(result, "backbone", kept)
        assert (found["measured"], found["status"]) == (1, "undecided")
        assert found["lower"] == pytest.approx(0.05 ** (1 / 24))
    assert (result["status"], result["passed"]) == ("undecided", False)
    require_passed(result)


def test_differences_are_stored_beside_the_ratios(run):
    (backbone,) = run(distort=noise(0.3))["stages"][0]["runs"]
    for figure in ("mAP", "rank1"):
        found = backbone["differences"][figure]
        lost = backbone["scores"]["engine"][figure] - backbone["scores"]["reference"][figure]
        assert found["value"] == pytest.approx(lost)
        assert found["lower"] <= found["value"] <= found["upper"]


def test_cosines_of_every_image_are_counted_stage_by_stage(run):
    result = run(distort=noise(0.3))
    images = result["data"]["query"] + result["data"]["gallery"]
    counted = [s["cosines"] for s in result["stages"]]
    assert [sum(c["counts"]) + c["not_finite"] for c in counted] == [images, 3 * images, 3 * images]
    assert sum(counted[0]["counts"][-8:]) == 0  # the backbone drifted
    assert counted[1]["counts"][-1] == 3 * images  # the head did not


class Unlucky:
    """A head that drifts under one landmark seed alone."""

    def __init__(self, base, landmarks):
        self.base, self.landmarks = base, landmarks

    def __getattr__(self, name):
        return getattr(self.base, name)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None

    def relate(self, features, landmarks=None):
        related = self.base.relate(features, landmarks)
        return noise(0.5)(related) if np.array_equal(landmarks, self.landmarks) else related


def test_the_head_is_judged_under_three_landmark_seeds_and_the_worst_decides(dataset, opener, grid_runner):
    rows = len(dataset.query) + len(dataset.gallery)
    head = grid_runner().spec.head
    unlucky = Unlucky(grid_runner("engine"), draw_landmarks(rows, head.layers, head.landmarks, 2))
    runners = opener(ref=grid_runner("ref"), engine=unlucky)
    result = parity("ref", "engine", dataset, draws=100, opener=runners)
    assert result["landmark_seeds"] == [0, 1, 2]
    backbone, head, end_to_end = result["stages"]
    assert [r["landmark_seed"] for r in backbone["runs"]] == [None]
    for stage in (head, end_to_end):
        assert [(r["landmark_seed"], r["status"]) for r in stage["runs"]] == [
            (0, "passed"), (1, "passed"), (2, "failed"),
        ]  # fmt: skip
        assert {g["landmark_seed"] for g in stage["gates"] if g["status"] == "failed"} == {2}
    assert result["blame"] == "head"
    assert "with landmark seed 2" in describe_failures(result)[0]
    assert "head by landmark seed: 0: passed (mAP" in format_parity(result)
    spared = parity("ref", "engine", dataset, draws=100, opener=runners, landmark_seeds=(0, 1))
    assert spared["passed"]


def test_models_that_are_no_files_are_not_compared_layer_by_layer_and_it_is_said(run):
    result = run(distort=noise(0.05))
    (backbone,) = result["layers"]
    assert (backbone["stage"], backbone["nodes"]) == ("backbone", [])
    assert f"backbone: not compared layer by layer: {backbone['note']}" in describe_causes(result)
    assert result["input"] == {"images": 4, "error": 0, "preprocess": []}


def test_gates_follow_the_precision_of_each_stage(run):
    result = run(precision={"backbone": "int8", "head": "fp32"})
    assert [s["precision"] for s in result["stages"]] == ["int8", "fp32", "int8"]
    assert gate(result, "backbone", "cosine_min")["kind"] == "alarm"


def test_reciprocal_neighbors_are_a_gate_of_the_backbone_alone(run):
    stages = {s["stage"]: [g["gate"] for g in s["gates"]] for s in run()["stages"]}
    assert "reciprocal_jaccard" in stages["backbone"]
    assert "reciprocal_jaccard" not in stages["head"]


def test_an_engine_without_the_references_head_is_refused(run):
    with pytest.raises(UsageError, match="head"):
        run(head=False)


def test_a_limit_takes_images_evenly(dataset, opener, grid_runner):
    runners = {"ref": grid_runner(), "engine": grid_runner()}
    result = parity("ref", "engine", dataset, limit=20, draws=100, opener=opener(**runners))
    assert result["data"] == {"name": "people", "query": 20, "gallery": 20}
