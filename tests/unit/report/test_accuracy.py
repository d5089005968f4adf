from __future__ import annotations

import json

import numpy as np
import pytest

from nformer_edge.core.errors import ArtifactError, DataError, UsageError
from nformer_edge.core.features import Features, save_features
from nformer_edge.data.records import Dataset
from nformer_edge.report.accuracy import evaluate_model
from nformer_edge.report.models import model_sizes, stage_precision
from nformer_edge.report.table import format_evaluation, summary_rows


def by_name(result):
    return {r["name"]: r for r in result["results"]}


def test_backbone_and_head_and_baselines_are_scored(dataset, opener, grid_runner):
    result = evaluate_model("m", dataset, rerank=True, opener=opener(m=grid_runner()), label="made")
    json.dumps(result, allow_nan=False)
    assert list(by_name(result)) == ["backbone", "+NFormer", "k-reciprocal", "reciprocal mean", "query expansion"]
    assert result["data"] == {"name": "people", "query": 24, "gallery": 54, "source": "images"}
    assert result["model"]["label"] == "made"
    assert all(0.2 < r["mAP"] <= 1 and len(r["cmc"]) == 50 for r in result["results"])


def test_a_model_without_head_has_no_nformer_row(dataset, opener, grid_runner):
    result = evaluate_model("m", dataset, opener=opener(m=grid_runner(head=False)))
    assert list(by_name(result)) == ["backbone"]


def test_several_seeds_give_each_draws_figures(dataset, opener, grid_runner):
    result = evaluate_model("m", dataset, seeds=(3, 4, 5), opener=opener(m=grid_runner()))
    nformer = by_name(result)["+NFormer"]
    assert nformer["seeds"] == [3, 4, 5]
    assert nformer["mAP"] == pytest.approx(np.mean(nformer["mAP_by_seed"]))


def test_rank_lists_say_what_is_right_and_what_is_wrong(dataset, opener, grid_runner):
    result = evaluate_model("m", dataset, rank_lists=3, top=5, opener=opener(m=grid_runner()))
    assert [r["result"] for r in result["rank_lists"]] == ["backbone"] * 3 + ["+NFormer"] * 3
    for ranked in result["rank_lists"]:
        assert len(ranked["gallery"]) == 5
        assert [g["correct"] for g in ranked["gallery"]] == [
            g["pid"] == ranked["query"]["pid"] for g in ranked["gallery"]
        ]
        distances = [g["distance"] for g in ranked["gallery"]]
        assert distances == sorted(distances)


def test_a_feature_store_scores_as_the_images_it_came_from(dataset, opener, grid_runner, tmp_path):
    runner = grid_runner()
    from_images = evaluate_model("m", dataset, opener=opener(m=runner))
    from nformer_edge.gallery.embed import embed_records

    sets = {s: embed_records(runner, dataset.split(s)) for s in ("query", "gallery")}
    save_features(tmp_path / "f.npz", sets)
    stored = evaluate_model("m", tmp_path / "f.npz", opener=opener(m=runner))
    alone = evaluate_model(None, tmp_path / "f.npz")
    assert by_name(stored)["+NFormer"]["mAP"] == pytest.approx(by_name(from_images)["+NFormer"]["mAP"], abs=1e-9)
    assert by_name(alone)["backbone"]["mAP"] == pytest.approx(by_name(from_images)["backbone"]["mAP"], abs=1e-9)
    assert alone["model"] is None


def test_images_without_a_model_and_half_a_store_are_refused(dataset, tmp_path):
    with pytest.raises(UsageError, match="model"):
        evaluate_model(None, dataset)
    half = Features(np.ones((1, 2), np.float32), np.ones(1), np.ones(1), ("a",))
    save_features(tmp_path / "half.npz", {"query": half})
    with pytest.raises(ArtifactError, match="gallery"):
        evaluate_model(None, tmp_path / "half.npz")


def test_a_dataset_without_queries_is_refused(dataset, opener, grid_runner):
    with pytest.raises(DataError, match="query"):
        evaluate_model("m", Dataset("none", "nowhere", gallery=dataset.gallery), opener=opener(m=grid_runner()))


def test_precision_of_the_whole_is_that_of_its_coarsest_stage(grid_runner):
    runner = grid_runner(precision={"backbone": "int8", "head": "fp16"})
    assert [stage_precision(runner, s) for s in ("backbone", "head", "end_to_end")] == ["int8", "fp16", "int8"]
    assert stage_precision(grid_runner(precision="fp16"), "head") == "fp16"
    with pytest.raises(ArtifactError, match="precision"):
        stage_precision(grid_runner(precision="int4"), "head")


def test_sizes_count_models_and_not_what_lies_beside_them(tmp_path):
    for name, size in (("backbone.onnx", 4000), ("nformer.onnx", 1000), ("golden.npz", 9000), ("manifest.json", 70)):
        (tmp_path / name).write_bytes(b"x" * size)
    assert model_sizes(tmp_path) == {"backbone": 0.004, "head": 0.001, "total": 0.005}


def test_sizes_of_a_checkpoint_are_told_by_stage(tmp_path):
    header = json.dumps({
        "__metadata__": {"spec": "{}"},
        "backbone.a": {"dtype": "F32", "shape": [10], "data_offsets": [0, 40]},
        "head.b": {"dtype": "F32", "shape": [5], "data_offsets": [40, 60]},
    }).encode()  # fmt: skip
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 60)
    assert model_sizes(path) == {"backbone": 40 / 1e6, "head": 20 / 1e6, "total": 60 / 1e6}


def test_both_protocols_stand_side_by_side_where_pytorch_runs_the_head(tiny_checkpoint, tiny_bundle, tiny_market):
    with_both = evaluate_model(tiny_checkpoint, tiny_market, seeds=(0, 1), rank_lists=0, threads=1)
    joint, alone = (by_name(with_both)[name] for name in ("+NFormer", "+NFormer per-query"))
    assert (joint["protocol"], alone["protocol"]) == ("joint", "per-query")
    assert (alone["seeds"], len(alone["mAP_by_seed"]), alone["exact"]) == ([0, 1], 2, True)
    text = format_evaluation(with_both)
    assert "+NFormer, joint" in text
    assert "+NFormer, per-query" in text
    assert {r.stage for r in summary_rows([with_both])} == {"backbone", "+NFormer", "+NFormer per-query"}
    assert with_both["per_query"] is None
    json.dumps(with_both)

    without = evaluate_model(tiny_bundle, tiny_market, rank_lists=0, threads=1)
    assert "+NFormer per-query" not in by_name(without)
    assert "no per-query protocol: onnxruntime runs the head as one graph" in format_evaluation(without)


def test_every_figure_has_an_interval_that_narrows_with_the_queries(dataset, opener, grid_runner):
    runner = grid_runner()
    result = evaluate_model("m", dataset, seeds=(0, 1), rerank=True, rank_lists=0, opener=opener(m=runner))
    for row in result["results"]:
        for figure, value in (("mAP", row["mAP"]), ("rank1", row["cmc"][0])):
            lower, upper = row[f"{figure}_interval"]
            assert 0 <= lower <= value <= upper <= 1
    whole = by_name(result)["backbone"]["mAP_interval"]
    few = Dataset("few", dataset.root, query=dataset.query[::4], gallery=dataset.gallery)
    half = by_name(evaluate_model("m", few, rank_lists=0, opener=opener(m=runner)))["backbone"]["mAP_interval"]
    assert half[1] - half[0] > whole[1] - whole[0] > 0
    assert f"({100 * whole[0]:.1f} to {100 * whole[1]:.1f})" in format_evaluation(result)
