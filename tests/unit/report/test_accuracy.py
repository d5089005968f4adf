from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from nformer_edge.core.errors import ArtifactError, DataError, UsageError
from nformer_edge.core.features import Features, save_features
from nformer_edge.core.spec import BackboneSpec, HeadSpec, ModelSpec, PreprocessSpec
from nformer_edge.core.values import dumps
from nformer_edge.data.records import Dataset
from nformer_edge.gallery.model import Model
from nformer_edge.report.accuracy import Evaluation, evaluate
from nformer_edge.report.models import MeasuredData, model_sizes, precision_of
from nformer_edge.report.summary import summary_rows

SPLITS = ("query", "gallery")


RERANKED = ("k-reciprocal", "reciprocal mean", "query expansion", "graph propagation", "mutual sum")


def by_name(result):
    return {r.name: r for r in result.rankings}


def test_backbone_and_head_and_baselines_are_scored(dataset, grid_runner):
    result = evaluate(grid_runner(), dataset, rerank=True, label="made")
    assert Evaluation.from_json(json.loads(dumps(result.to_json()))) == result
    assert list(by_name(result)) == ["backbone", "+NFormer", *RERANKED]
    assert result.data == MeasuredData("people", 24, 54, "images")
    assert result.model.label == "made"
    assert all(0.2 < r.mAP <= 1 and len(r.cmc) == 50 for r in result.rankings)


def test_baselines_also_run_on_the_features_as_a_gated_head_compares_them(tmp_path):
    from nformer_edge.model.checkpoint import save_checkpoint
    from nformer_edge.model.gated import make_head

    spec = ModelSpec(BackboneSpec("osnet_x0_25", 24), HeadSpec.gated(24), PreprocessSpec(32, 16))
    head = make_head(spec.head)
    save_checkpoint(tmp_path / "head.safetensors", spec, None, head)
    rng = np.random.default_rng(0)
    pids, camids = np.arange(90) % 15, np.arange(90) % 4
    rows = 1 + rng.standard_normal((15, 24))[pids] + rng.standard_normal((90, 24))
    sets = Features(rows.astype(np.float32), pids + 1, camids, tuple(f"{i}.jpg" for i in range(90)))
    halves = {"query": sets.take(np.arange(30)), "gallery": sets.take(np.arange(30, 90))}
    save_features(tmp_path / "people.npz", halves)
    result = evaluate(tmp_path / "head.safetensors", tmp_path / "people.npz", rerank=True, draws=0, per_query=False)
    mapped = [f"{name}, mapped" for name in ("cosine", *RERANKED)]
    assert list(by_name(result)) == ["backbone", "+NFormer", *RERANKED, *mapped]
    assert by_name(result)["cosine, mapped"].mAP != by_name(result)["backbone"].mAP  # the center is taken off
    assert all(r.seconds > 0 for r in result.rankings)


def test_a_model_without_head_has_no_nformer_row(dataset, grid_runner):
    result = evaluate(grid_runner(head=False), dataset)
    assert list(by_name(result)) == ["backbone"]


def test_the_table_by_images_a_person_stands_beside_the_full_split(dataset, grid_runner):
    result = evaluate(grid_runner(), dataset)
    rows = result.composition.rows
    assert [(row.title, row.people, row.gallery) for row in rows] == [
        ("1", 12, 18), ("2", 12, 30), ("4", 12, 54), ("8", 12, 54), ("all", 12, 54)
    ]  # fmt: skip
    lines = str(result).splitlines()
    for row in rows:
        (line,) = [line for line in lines if line.split()[:2] == [row.title, "+NFormer"]]
        assert f"{100 * row.gain.mAP.value:+.1f}" in line
    assert any("12 people of people" in line for line in lines)
    assert evaluate(grid_runner(), dataset, draws=0).composition is None
    assert all(row.head is None for row in evaluate(grid_runner(head=False), dataset).composition.rows)


def test_white_images_are_noted_and_a_sound_set_is_not(dataset, grid_runner, tmp_path):
    assert evaluate(grid_runner(head=False), dataset).notes == ()
    Image.new("RGB", (32, 64), "white").save(tmp_path / "white.png")
    white = {s: tuple(replace(r, path=str(tmp_path / "white.png")) for r in dataset.split(s)) for s in SPLITS}
    result = evaluate(grid_runner(head=False), replace(dataset, **white))
    assert [note.partition(":")[0] for note in result.notes] == ["query", "gallery"]
    assert str(result).endswith(result.notes[1])


def test_several_seeds_give_each_draws_figures(dataset, grid_runner):
    result = evaluate(grid_runner(), dataset, seeds=(3, 4, 5))
    nformer = by_name(result)["+NFormer"]
    assert nformer.seeds == (3, 4, 5)
    assert nformer.mAP == pytest.approx(np.mean(nformer.mAP_by_seed))


def test_rank_lists_say_what_is_right_and_what_is_wrong(dataset, grid_runner):
    result = evaluate(grid_runner(), dataset, rank_lists=3, top=5)
    people = {r.path: r.pid for r in (*dataset.query, *dataset.gallery)}
    assert [r.ranking for r in result.rank_lists] == ["backbone"] * 3 + ["+NFormer"] * 3
    for ranked in result.rank_lists:
        assert len(ranked.gallery) == 5
        assert [g.correct for g in ranked.gallery] == [people[g.path] == people[ranked.query] for g in ranked.gallery]
        distances = [g.distance for g in ranked.gallery]
        assert distances == sorted(distances)


def test_a_feature_store_scores_as_the_images_it_came_from(dataset, grid_runner, tmp_path):
    runner = grid_runner()
    from_images = evaluate(runner, dataset)
    from nformer_edge.gallery.embed import embed_records

    sets = {s: embed_records(runner, dataset.split(s)) for s in ("query", "gallery")}
    save_features(tmp_path / "f.npz", sets)
    stored = evaluate(runner, tmp_path / "f.npz")
    alone = evaluate(None, tmp_path / "f.npz")
    assert by_name(stored)["+NFormer"].mAP == pytest.approx(by_name(from_images)["+NFormer"].mAP, abs=1e-9)
    assert by_name(alone)["backbone"].mAP == pytest.approx(by_name(from_images)["backbone"].mAP, abs=1e-9)
    assert alone.model is None


def test_images_without_a_model_and_half_a_store_are_refused(dataset, tmp_path):
    with pytest.raises(UsageError, match="model"):
        evaluate(None, dataset)
    half = Features(np.ones((1, 2), np.float32), np.ones(1), np.ones(1), ("a",))
    save_features(tmp_path / "half.npz", {"query": half})
    with pytest.raises(ArtifactError, match="gallery"):
        evaluate(None, tmp_path / "half.npz")


def test_a_dataset_without_queries_is_refused(dataset, grid_runner):
    with pytest.raises(DataError, match="query"):
        evaluate(grid_runner(), Dataset("none", "nowhere", gallery=dataset.gallery))


def test_precision_of_the_whole_is_that_of_its_coarsest_part(grid_runner):
    runner = grid_runner(precision={"backbone": "int8", "head": "fp16"})
    assert [precision_of(runner, s) for s in ("backbone", "head", "end_to_end")] == ["int8", "fp16", "int8"]
    assert precision_of(grid_runner(precision="fp16"), "head") == "fp16"
    with pytest.raises(ArtifactError, match="precision"):
        precision_of(grid_runner(precision="int4"), "head")


def test_sizes_count_models_and_not_what_lies_beside_them(tmp_path):
    for name, size in (("backbone.onnx", 4000), ("nformer.onnx", 1000), ("golden.npz", 9000), ("manifest.json", 70)):
        (tmp_path / name).write_bytes(b"x" * size)
    assert model_sizes(tmp_path) == {"backbone": 0.004, "head": 0.001, "total": 0.005}


def test_sizes_of_a_checkpoint_are_given_by_part(tmp_path):
    header = json.dumps({
        "__metadata__": {"spec": "{}"},
        "backbone.a": {"dtype": "F32", "shape": [10], "data_offsets": [0, 40]},
        "head.b": {"dtype": "F32", "shape": [5], "data_offsets": [40, 60]},
    }).encode()  # fmt: skip
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 60)
    assert model_sizes(path) == {"backbone": 40 / 1e6, "head": 20 / 1e6, "total": 60 / 1e6}


def test_both_protocols_stand_side_by_side_where_pytorch_runs_the_head(tiny_checkpoint, tiny_bundle, tiny_market):
    with_both = evaluate(tiny_checkpoint, tiny_market, seeds=(0, 1), rank_lists=0, intra_op_threads=1)
    joint, alone = (by_name(with_both)[name] for name in ("+NFormer", "+NFormer per-query"))
    assert (joint.protocol, alone.protocol) == ("joint", "per-query")
    assert (alone.seeds, len(alone.mAP_by_seed), alone.exact) == ((0, 1), 2, True)
    assert alone.changed_rows > 0
    text = str(with_both)
    assert "+NFormer, joint" in text
    assert "+NFormer, per-query" in text
    assert [r.ranking.name for r in summary_rows([with_both])] == ["backbone", "+NFormer", "+NFormer per-query"]
    assert with_both.no_per_query is None
    assert Evaluation.from_json(with_both.to_json()) == with_both

    without = evaluate(tiny_bundle, tiny_market, rank_lists=0, intra_op_threads=1)
    assert "+NFormer per-query" not in by_name(without)
    assert "no per-query protocol: onnxruntime runs the head as one graph" in str(without)


def test_every_figure_has_an_interval_that_narrows_with_the_queries(dataset, grid_runner):
    runner = grid_runner()
    result = evaluate(runner, dataset, seeds=(0, 1), rerank=True, rank_lists=0)
    for row in result.rankings:
        for value, (lower, upper) in ((row.mAP, row.mAP_interval), (row.cmc[0], row.rank1_interval)):
            assert 0 <= lower <= value <= upper <= 1
    whole = by_name(result)["backbone"].mAP_interval
    few = Dataset("few", dataset.root, query=dataset.query[::4], gallery=dataset.gallery)
    half = by_name(evaluate(runner, few, rank_lists=0))["backbone"].mAP_interval
    assert half[1] - half[0] > whole[1] - whole[0] > 0
    assert f"({100 * whole[0]:.1f} to {100 * whole[1]:.1f})" in str(result)


def test_an_evaluation_of_another_version_is_refused_with_the_way_out(dataset, grid_runner):
    plain = evaluate(grid_runner(), dataset).to_json()
    with pytest.raises(ArtifactError, match="Make it again"):
        Evaluation.from_json(plain | {"version": 2})
    del plain["rankings"][0]["mINP"]
    with pytest.raises(ArtifactError, match="mINP"):
        Evaluation.from_json(plain)


def test_an_open_model_is_evaluated_and_stays_open(dataset, grid_runner):
    class Closing(grid_runner):
        closed = False

        def __exit__(self, *_):
            self.closed = True

    runner = Closing()
    assert evaluate(Model(runner), dataset).rankings[0].mAP == evaluate(runner, dataset).rankings[0].mAP
    assert not runner.closed
