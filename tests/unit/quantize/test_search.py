"""INT8 to an accuracy budget: the planted node is found, restarts measure nothing twice, and what cannot be is said."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from helpers.planted import BAD, GOOD, SPEC, colored_people, planted_bundle

from nformer_edge.backends.build import EngineSummary, build_engine, describe_engine
from nformer_edge.backends.engine import open_engine
from nformer_edge.backends.open import open_model, self_test
from nformer_edge.backends.spec import EngineSpec, resolve
from nformer_edge.backends.tensorrt.graphs import prepare_backbone
from nformer_edge.core.errors import DataError, GateError, UsageError
from nformer_edge.core.journal import Journal
from nformer_edge.core.preprocess import preprocess_files
from nformer_edge.data.readers import read_dataset
from nformer_edge.data.records import Dataset
from nformer_edge.exporting.bundle import open_bundle
from nformer_edge.metrics.agreement import RankAgreement
from nformer_edge.quantize import prepare as prepared
from nformer_edge.quantize.calibrate import METHODS, measure_ranges
from nformer_edge.quantize.evaluator import Evaluator, hold_out
from nformer_edge.quantize.fp16 import multiplication_types
from nformer_edge.quantize.placement_cpu import place_for_cpu
from nformer_edge.quantize.prepare import CalibrationData
from nformer_edge.quantize.spec import BudgetSpec, read_exclude
from nformer_edge.quantize.values import BudgetSearch, HeldOutFacts, Ranges, Score, read_ranges

BUDGET = BudgetSpec(max_map_drop=1.0, images=24)


def spec(**settings):
    return EngineSpec(backend="onnxruntime", precision="int8", calib_num=16, calib_method="minmax", **settings)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return planted_bundle(tmp_path_factory.mktemp("planted") / "bundle")


@pytest.fixture(scope="module")
def people(tmp_path_factory):
    return colored_people(tmp_path_factory.mktemp("people") / "data")


@pytest.fixture(scope="module")
def built(bundle, people, tmp_path_factory):
    return build_engine(bundle, tmp_path_factory.mktemp("built") / "e", spec(), CalibrationData(people, budget=BUDGET))


@pytest.fixture
def scored(monkeypatch):
    """How often a backbone was scored."""
    calls = []
    score = Evaluator.score
    monkeypatch.setattr(Evaluator, "score", lambda self, model=None: (calls.append(1), score(self, model))[1])
    return calls


def images(people):
    return [str(p) for p in sorted((people / "bounding_box_train").iterdir())[:4]]


def measured(bundle, people, *methods):
    found = measure_ranges(
        (bundle / "backbone.onnx").read_bytes(), images(people), SPEC.preprocess, methods or ["minmax"]
    )
    return found if methods else found["minmax"]


def searched(engine):
    return BudgetSearch.from_json(json.loads((engine / "budget.json").read_text()))


def float_convolutions(model):
    makers = {name: n.op_type for n in model.graph.node for name in n.output}
    return {n.name for n in model.graph.node if n.op_type == "Conv" and makers.get(n.input[1]) != "DequantizeLinear"}


def test_the_search_leaves_the_planted_node_in_float_and_no_other(built):
    found = searched(built)
    whole, chosen = found.score(found.frontier[0]), found.score(found.frontier[found.chosen])
    assert found.float_nodes == (BAD,)
    assert found.nodes[0].node == BAD
    assert found.nodes[0].alone.map_drop >= 0.1
    assert found.nodes[0].left_out.mAP - whole.mAP >= 0.1
    assert whole.map_drop >= 0.1
    assert 100 * chosen.map_drop_upper <= BUDGET.max_map_drop
    assert float_convolutions(onnx.load(built / "backbone.onnx")) == {BAD}


def test_the_engine_says_what_was_searched_and_what_stays_in_float(built):
    manifest = open_engine(built).manifest
    assert manifest.float_nodes == manifest.spec.exclude_nodes == (BAD,)
    assert manifest.audit["backbone"].multiplications["int8"].built == 3
    told = describe_engine(built)
    assert "<- chosen" in str(told)
    assert told.budget.held_out.images == 24
    assert EngineSummary.from_json(told.to_json()) == told
    with open_model(built) as runner:
        self_test(runner)


def test_a_search_becomes_json_and_back_and_its_table_names_what_costs_most(built):
    found = searched(built)
    assert BudgetSearch.from_json(found.to_json()) == found
    for point in found.frontier:
        assert found.score(point).mAP == pytest.approx(found.score(found.fp32).mAP - found.score(point).map_drop)
    assert {row.node for row in found.nodes} == {BAD, *GOOD, "pool"}
    assert f"Conv {BAD}" in str(found)


def test_a_finished_search_is_not_measured_again(built, bundle, people, scored):
    first = searched(built)
    again = build_engine(bundle, built, spec(), CalibrationData(people, budget=BUDGET), force=True)
    again = searched(again)
    assert not scored
    assert (again.measured, again.reused) == (0, first.measured + first.reused)
    assert replace(again, seconds=first.seconds, measured=first.measured, reused=first.reused) == first


def test_another_budget_measures_nothing_that_is_known(built, bundle, people, scored, tmp_path):
    known = built.with_name("e.measured.jsonl")
    (tmp_path / "f.measured.jsonl").write_bytes(known.read_bytes())
    loose = build_engine(bundle, tmp_path / "f", spec(), CalibrationData(people, budget=BudgetSpec(100.0, images=24)))
    assert not scored
    assert searched(loose).chosen == 0
    assert open_engine(loose).manifest.float_nodes == ()


def test_a_killed_search_goes_on_to_the_same_engine(built, bundle, people, scored, tmp_path, monkeypatch):
    score = Evaluator.score

    def killed(self, model=None):
        if len(scored) == 5:
            raise KeyboardInterrupt
        return score(self, model)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Evaluator, "score", killed)
        build_engine(bundle, tmp_path / "e", spec(), CalibrationData(people, budget=BUDGET))
    assert not (tmp_path / "e").exists()
    journal = tmp_path / "e.measured.jsonl"
    journal.write_bytes(journal.read_bytes() + b'{"key": "half-writ')
    engine = build_engine(bundle, tmp_path / "e", spec(), CalibrationData(people, budget=BUDGET))
    sets = 11 + len(searched(engine).frontier) - 2  # whole, alone and left out; two sets of the frontier are known
    assert len(scored) == sets + 1  # and FP32
    assert searched(engine).float_nodes == (BAD,)


def test_a_budget_that_cannot_be_kept_says_the_best_and_keeps_the_search(bundle, people, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "nformer_edge.quantize.evaluator.rank_agreement",
        lambda *args: RankAgreement(1.0, 0.98, 1, 0, True, np.empty((0, 3), int)),
    )
    impossible = BudgetSpec(0.0, min_overlap=0.99, images=24)
    with pytest.raises(GateError, match=r"budget: got .* at best .*overlap@10 0.980.*at most 0 points"):
        build_engine(bundle, tmp_path / "e", spec(), CalibrationData(people, budget=impossible))
    assert not (tmp_path / "e").exists()
    assert json.loads((tmp_path / "e.budget.json").read_text())["chosen"] is None


def test_the_list_that_one_engine_chose_serves_another_build(built, bundle, people, tmp_path):
    names = read_exclude([str(built / "budget.json")])
    assert names == (BAD,)
    engine = build_engine(bundle, tmp_path / "e", spec(exclude_nodes=names), built / "calibration.json")
    assert float_convolutions(onnx.load(engine / "backbone.onnx")) == {BAD}


def test_tensorrt_leaves_the_same_nodes_unquantized(built, bundle, tmp_path):
    ranges = read_ranges(built / "calibration.json")
    graph = prepare_backbone(open_bundle(bundle), tmp_path, "int8", ranges, exclude=(BAD,))
    assert {name: graph.asked[name] for name in (BAD, *GOOD)} == {BAD: "fp16"} | dict.fromkeys(GOOD, "int8")
    assert list(multiplication_types(onnx.load(graph.path)).values()).count("int8") == 3


def test_a_node_that_is_not_there_is_refused_with_the_nearest_name(bundle, people, tmp_path):
    with pytest.raises(UsageError, match=r"exclude_nodes: got 'secnd'.*Did you mean 'second'"):
        build_engine(bundle, tmp_path / "e", spec(exclude_nodes=("secnd",)), people)
    ranges = measured(bundle, people)
    with pytest.raises(UsageError, match="Did you mean 'second'"):
        prepare_backbone(open_bundle(bundle), tmp_path, "int8", ranges, exclude=("secnd",))


def test_a_budget_may_ask_for_neighbors_alone_but_not_for_nothing():
    score = Score(0.9, 0.9, 0.4, 0.5, 0.96)
    assert BudgetSpec(min_overlap=0.95).holds(score)
    assert not BudgetSpec(min_overlap=0.97).holds(score)
    assert not BudgetSpec(max_map_drop=1.0, min_overlap=0.95).holds(score)
    assert str(BudgetSpec(0.5, 0.95)) == "at most 0.5 points of mAP lost and overlap@10 at least 0.95"
    for wrong in ({}, {"max_map_drop": -1.0}, {"min_overlap": 1.5}, {"max_map_drop": float("nan")}):
        with pytest.raises(UsageError):
            BudgetSpec(**wrong)


def test_names_to_exclude_are_read_from_text_and_json(tmp_path):
    (tmp_path / "names.txt").write_text("# the worst\nsecond\n\nthird  # and this\n")
    (tmp_path / "names.json").write_text('["first"]')
    sources = [str(tmp_path / "names.txt"), "third", "/fourth", str(tmp_path / "names.json")]
    assert read_exclude(sources) == ("second", "third", "/fourth", "first")
    (tmp_path / "budget.json").write_text('{"frontier": [], "chosen": null}')
    with pytest.raises(UsageError, match="expected a list of node names"):
        read_exclude([str(tmp_path / "budget.json")])


def test_all_methods_are_measured_in_one_go_and_stay_within_what_was_seen(bundle, people):
    tables = measured(bundle, people, *METHODS)
    assert set(tables) == set(METHODS)
    for name, (low, high) in tables["minmax"].table.items():
        for method in ("percentile", "mse"):
            found = tables[method].table[name]
            assert min(low, 0) - 1e-5 <= found[0] <= found[1] <= max(high, 0) + 1e-5
    alone = measured(bundle, people).table
    assert all(tables["minmax"].table[name] == pytest.approx(found) for name, found in alone.items())
    assert tables["mse"].table != tables["minmax"].table


def test_onnxruntime_does_not_quantize_again_what_was_left_in_float(bundle, people):
    """Its own exclusion is where it does, from 1.21 on: such a graph comes out worse than INT8."""
    ranges = measured(bundle, people)
    model = place_for_cpu((bundle / "backbone.onnx").read_bytes(), ranges).without([BAD])
    pixels = preprocess_files(images(people), SPEC.preprocess)
    found = []
    for level in ("ORT_DISABLE_ALL", "ORT_ENABLE_ALL"):
        options = ort.SessionOptions()
        options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, level)
        session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        found.append(session.run(None, {"images": pixels})[0])
    assert np.abs(found[1] - found[0]).max() <= 0.05 * np.abs(found[0]).max()


def test_auto_keeps_the_method_that_ranks_held_out_people_best(bundle, people, tmp_path, monkeypatch):
    worth = {"minmax": 0.2, "entropy": 0.3, "percentile": 0.9, "mse": 0.4}
    order = []

    def score(self, model=None):
        order.append(model)
        found = list(worth.values())[len(order) - 1]
        return {"backbone": Score(found, 0.0, 1 - found, 0.0, 0.5)}

    monkeypatch.setattr(Evaluator, "score", score)
    settings = EngineSpec(backend="onnxruntime", precision="int8", calib_num=8, calib_method="auto")
    engine = build_engine(bundle, tmp_path / "e", settings, people)
    told = open_engine(engine).manifest.calibration
    assert told.method == "percentile"
    assert {m: s["backbone"].mAP for m, s in told.auto.scores.items()} == worth
    assert json.loads((engine / "calibration.json").read_text())["method"] == "percentile"
    assert "chosen by mAP" in str(describe_engine(engine))
    assert len(set(told.images)) == told.num
    with open_model(engine) as runner:
        assert runner.calibrated_on == told.images


def test_auto_breaks_a_tie_of_map_by_the_overlap_at_10(monkeypatch):
    kept = {"minmax": (0.9991, 0.8), "entropy": (0.9988, 0.9), "percentile": (0.9989, 0.7), "mse": (0.5, 1.0)}
    assert (
        _chosen([{"backbone": Score(m, 1.0, 1 - m, 0.0, n)} for m, n in kept.values()], kept, monkeypatch) == "entropy"
    )


def test_auto_lets_the_worse_of_backbone_and_end_to_end_decide(monkeypatch):
    kept = {"minmax": (0.97, 0.99), "entropy": (0.98, 0.985), "percentile": (0.96, 0.999), "mse": (0.975, 0.98)}
    scores = [
        {scope: Score(0.9, 1.0, 0.0, 0.0, n) for scope, n in zip(("backbone", "end_to_end"), both, strict=True)}
        for both in kept.values()
    ]
    assert _chosen(scores, kept, monkeypatch) == "entropy"
    scores[1]["backbone"] = Score(0.9, 1.0, 0.02, 0.0, 1.0)  # what mAP loses comes first
    assert _chosen(scores, kept, monkeypatch) == "mse"


def _chosen(found, methods, monkeypatch):
    scores = iter(found)

    class Asked:
        scopes = tuple(found[0])
        held_out = type("H", (), {"facts": HeldOutFacts(2, 4, 4, "")})

        def facts(self):
            return {}

        def score(self, _):
            return next(scores)

    monkeypatch.setattr(
        "nformer_edge.quantize.placement_cpu.place_for_cpu", lambda *a, **k: type("P", (), {"without": dict})()
    )
    ranges = {m: Ranges(m, {}) for m in methods}
    bundle = type("B", (), {"backbone": b""})()
    return prepared.choose_method(bundle, ranges, Asked(), Journal(), reduced=False)[0]


def test_people_held_out_calibrate_nothing_and_each_can_be_found(people):
    dataset = read_dataset(people)
    rest, held_out = hold_out(dataset, 12, seed=0)
    theirs = {r.pid for r in held_out.records}
    assert len(theirs) == 3
    assert not theirs & {r.pid for r in rest.train}
    assert len(held_out.records) == len({r.path for r in held_out.records}) == 12
    for pid in theirs:
        assert len({r.camid for r in held_out.records if r.pid == pid}) == 3
    assert hold_out(dataset, 12, seed=0)[1] == held_out
    assert hold_out(dataset, 12, seed=1)[1] != held_out


def test_images_that_calibrate_and_images_that_judge_show_different_people(bundle, people, tmp_path):
    settings = EngineSpec(backend="onnxruntime", precision="int8", calib_method="auto")
    evaluator, rest = prepared._evaluator(
        open_bundle(bundle), resolve(settings), CalibrationData(people, budget_data=f"{people}/")
    )
    judged = {r.pid for r in evaluator.held_out.records}
    calibrated = {r.pid for r in rest.train}
    assert len(judged) == 4
    assert judged | calibrated == set(range(1, 21))
    assert not judged & calibrated


def test_too_few_people_to_hold_out_is_said(tiny_market):
    with pytest.raises(DataError, match="6 people, too few to hold two of them out"):
        hold_out(read_dataset(tiny_market), 600, seed=0)


@pytest.fixture
def crops(people):
    """The same images, as if nobody had said who they show."""
    images = tuple(replace(r, pid=-1, camid=-1) for r in read_dataset(people).train)
    assert len(images) >= 40
    return Dataset("crops", str(people), gallery=images, explicit=False)


def test_half_of_the_crops_that_nobody_labeled_compare_and_the_others_calibrate(crops):
    rest, held_out = hold_out(crops.as_training(), 600, seed=0)
    assert len(held_out.records) == len(crops.gallery) // 2
    assert not {r.path for r in rest.train} & {r.path for r in held_out.records}
    assert not held_out.labeled
    assert held_out.facts.identities == 0
    few = replace(crops, gallery=crops.gallery[:20])
    with pytest.raises(DataError, match="got 20 images, expected at least 22"):
        hold_out(few.as_training(), 600, seed=0)


def test_crops_that_nobody_labeled_are_compared_by_their_neighbors_alone(bundle, crops):
    _, held_out = hold_out(crops.as_training(), 600, seed=0)
    judge = Evaluator(open_bundle(bundle), held_out, intra_op_threads=1)
    same, whole = judge.score(onnx.load(bundle / "backbone.onnx"))["backbone"], judge.score()["backbone"]
    assert same.overlap_at_10 == whole.overlap_at_10 == 1
    assert np.isnan([same.mAP, same.map_drop_upper, whole.mAP]).all()
    rows = judge.held_out.label(np.eye(len(held_out.records), 8, dtype=np.float32) + 1)
    assert len(set(rows.pids)) == len(rows)  # so that the protocol leaves out the image itself, and nothing else


def test_auto_and_an_overlap_budget_need_no_labels_and_a_budget_of_map_does(bundle, crops, tmp_path):
    settings = EngineSpec(backend="onnxruntime", precision="int8", calib_num=8, calib_method="auto")
    engine = build_engine(bundle, tmp_path / "e", settings, CalibrationData(crops, budget=BudgetSpec(min_overlap=0.01)))
    told = str(describe_engine(engine))
    assert "nobody labeled them, so mAP could not be judged" in told
    search = BudgetSearch.from_json(json.loads((engine / "budget.json").read_text()))
    assert "people whom nobody named (no mAP)" in str(search)
    assert "nan" not in str(search)
    with pytest.raises(UsageError, match="Ask for --min-overlap"):
        build_engine(bundle, tmp_path / "f", settings, CalibrationData(crops, budget=BudgetSpec(0.5)))


def test_a_budget_needs_a_dataset_int8_and_the_stage_it_names(bundle, people, built, tmp_path):
    with pytest.raises(UsageError, match="budget_data: got no dataset"):
        build_engine(bundle, tmp_path / "e", spec(), CalibrationData(built / "calibration.json", budget=BUDGET))
    with pytest.raises(UsageError, match="budget_scope: got 'end_to_end', expected backbone"):
        build_engine(
            bundle,
            tmp_path / "e",
            spec(),
            CalibrationData(people, budget=BudgetSpec(1.0, images=24, scope="end_to_end")),
        )
    with pytest.raises(UsageError, match="max_map_drop: got a budget for fp32"):
        build_engine(bundle, tmp_path / "e", EngineSpec(backend="onnxruntime"), CalibrationData(budget=BUDGET))
    with pytest.raises(UsageError, match="exclude_nodes: got names with fp32"):
        resolve(EngineSpec(exclude_nodes=("a",)))


def test_a_table_of_ranges_can_be_searched_with_a_dataset_beside_it(bundle, people, built, tmp_path):
    table = built / "calibration.json"
    engine = build_engine(bundle, tmp_path / "e", spec(), CalibrationData(table, budget=BUDGET, budget_data=people))
    assert open_engine(engine).manifest.float_nodes == (BAD,)


def test_the_head_is_judged_with_the_backbone_and_without(tiny_bundle, people):
    _, held_out = hold_out(read_dataset(people), 12, seed=0)
    judge = Evaluator(open_bundle(tiny_bundle), held_out, intra_op_threads=1)
    found = judge.score(onnx.load(tiny_bundle / "backbone.onnx"))
    assert set(found) == {"backbone", "end_to_end"}
    assert found == judge.score()
    assert {score.map_drop for score in found.values()} == {0}


def test_a_backbone_that_gives_no_features_is_worth_nothing(bundle, people):
    _, held_out = hold_out(read_dataset(people), 12, seed=0)
    model = onnx.load(bundle / "backbone.onnx")
    for constant in model.graph.initializer:
        if constant.name.startswith("neck"):
            constant.CopyFrom(onnx.numpy_helper.from_array(np.zeros(list(constant.dims), np.float32), constant.name))
    score = Evaluator(open_bundle(bundle), held_out, intra_op_threads=1).score(model)["backbone"]
    assert (score.mAP, score.overlap_at_10) == (0, 0)


def test_a_journal_survives_half_written_lines_and_knows_nothing_of_other_facts(tmp_path):
    path = tmp_path / "j.jsonl"
    assert Journal(path).recall({"a": 1}, lambda: {"x": 0.1}) == {"x": 0.1}
    path.write_bytes(path.read_bytes() + b'{"key": "half')
    again = Journal(path)
    assert again.recall({"b": 2}, lambda: [1]) == [1]
    last = Journal(path)
    assert last.recall({"a": 1}, lambda: pytest.fail("measured again")) == {"x": 0.1}
    assert last.recall({"b": 2}, lambda: pytest.fail("measured again")) == [1]
    assert last.recall({"a": 2}, lambda: 3) == 3
    assert (last.reused, last.measured) == (2, 1)
