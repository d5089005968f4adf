"""Graphs and commands for a TensorRT 8 without our Python: what its trtexec is told, and that the graphs are right."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
from pathlib import Path

import numpy as np
import onnx
import pytest
from helpers.planted import BAD, colored_people, planted_bundle

from nformer_edge.backends.spec import BuildSpec, EngineSpec
from nformer_edge.cli import main
from nformer_edge.core.artifact import read_manifest
from nformer_edge.core.errors import ArtifactError, UsageError
from nformer_edge.exporting.session import open_session
from nformer_edge.metrics.agreement import cosines
from nformer_edge.ops.bodies import functions
from nformer_edge.quantize.prepare import CalibrationData
from nformer_edge.quantize.spec import BudgetSpec
from nformer_edge.quantize.values import BudgetSearch
from nformer_edge.targets.trtexec import prepare_for_target, prepare_for_trtexec

KNOWN = set((Path(__file__).parents[2] / "helpers" / "operators_of_tensorrt_8.5.txt").read_text().split())


@pytest.fixture(scope="module")
def xavier(tiny_bundle, tiny_market, tmp_path_factory):
    """By the recipe: INT8."""
    spec, out = EngineSpec(calib_num=4, calib_method="minmax"), tmp_path_factory.mktemp("xavier") / "graphs"
    return Path(prepare_for_target(tiny_bundle, out, "jetson-xavier-jp51", spec, tiny_market).graphs)


@pytest.fixture
def told(xavier, tmp_path):
    """Runs the script with a trtexec that writes down what it is told: of each graph, flag -> value."""
    trtexec, said = tmp_path / "trtexec", tmp_path / "said"
    trtexec.write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" . >> {shlex.quote(str(said))}\n')
    trtexec.chmod(0o755)
    environment = {**os.environ, "TRTEXEC": str(trtexec), "PLUGIN": "/lib/plugins.so"}
    subprocess.run([str(xavier / "build.sh")], check=True, env=environment, cwd=tmp_path)
    calls = [call.split("\n") for call in said.read_text().strip().removesuffix("\n.").split("\n.\n")]
    flags = [{name: value for name, _, value in (o.lstrip("-").partition("=") for o in call)} for call in calls]
    return {call["onnx"]: call for call in flags}


def test_trtexec_is_asked_for_both_stages_with_the_recipes_sizes(told):
    backbone, head = told["prepared-backbone.onnx"], told["prepared-nformer.onnx"]
    assert (backbone["saveEngine"], head["saveEngine"]) == ("backbone.engine", "nformer.engine")
    assert backbone["minShapes"] == "images:1x3x64x32"
    assert backbone["maxShapes"] == "images:32x3x64x32"
    assert head["optShapes"] == "features:2000x32,landmarks:2x3"
    assert head["plugins"] == "/lib/plugins.so"
    assert "plugins" not in backbone
    for call in (backbone, head):
        assert (call["memPoolSize"], call["precisionConstraints"]) == ("workspace:1024", "obey")
        assert {"fp16", "noTF32", "buildOnly"} <= call.keys()
    assert "int8" in backbone
    assert "int8" not in head


def names(flag):
    return {part.removesuffix(":fp32") for part in flag.split(",")}


def test_trtexec_holds_to_float32_what_the_policy_keeps_there(told, xavier):
    head = onnx.load(xavier / "prepared-nformer.onnx")
    kinds = {n.name: n.op_type for n in head.graph.node}
    computing, writing = (names(told["prepared-nformer.onnx"][f]) for f in ("layerPrecisions", "layerOutputTypes"))
    assert {kinds[n] for n in computing - writing} == {"RowTopK"}
    assert {"ReciprocalNeighborAttention", "ReduceMean", "Sqrt", "Tanh", "MatMul"} <= {kinds[n] for n in writing}
    assert not {"Gemm", "Shape", "Cast"} & {kinds[n] for n in computing}
    neck = names(told["prepared-backbone.onnx"]["layerPrecisions"])
    assert any(name.endswith("/Gemm") for name in neck)
    assert not any("/trunk/" in name for name in neck)


def test_the_graphs_are_what_tensorrt_8_5_reads(xavier):
    for file in ("prepared-backbone.onnx", "prepared-nformer.onnx"):
        model = onnx.load(xavier / file)
        onnx.checker.check_model(model, full_check=True)
        assert {o.domain: o.version for o in model.opset_import}[""] == 17
        assert {n.op_type for n in model.graph.node if not n.domain} <= KNOWN
        assert not model.functions


def test_the_graphs_compute_what_the_bundle_does(xavier):
    with np.load(xavier / "golden.npz") as z:
        golden = dict(z)
    head = onnx.load(xavier / "prepared-nformer.onnx")
    for node in head.graph.node:
        if node.domain:
            kept = [a for a in node.attribute if not a.name.startswith("plugin_")]
            del node.attribute[:]
            node.attribute.extend(kept)
    head = onnx.version_converter.convert_version(head, 18)
    head.functions.extend(functions(18))
    found = run(head, {"features": golden["head_input"], "landmarks": golden["landmarks"]})
    np.testing.assert_allclose(found, golden["embeddings"], atol=5e-6)
    features = run(onnx.load(xavier / "prepared-backbone.onnx"), {"images": golden["images"]})
    assert cosines(features, golden["features"]).min() >= 0.9  # INT8, of an untrained model


def run(model, feed):
    session = open_session(model.SerializeToString(), "graph", threads=1, optimize=False)
    return session.run(None, feed)[0]


def test_the_folder_says_what_it_is_and_that_overflow_was_searched(xavier):
    manifest = read_manifest(xavier, "graphs")
    assert manifest["fp16"]["searched"]["images"] == 4
    assert manifest["calibration"]["num"] == 4
    assert (manifest["landmark_seed"], manifest["preprocess"]["height"]) == (7, 64)
    assert os.access(xavier / "build.sh", os.X_OK)


def test_a_head_in_int8_is_refused(tiny_bundle, tmp_path):
    with pytest.raises(UsageError, match="head_precision: got 'int8', expected fp32"):
        prepare_for_trtexec(tiny_bundle, tmp_path / "a", BuildSpec(head_precision="int8"))
    assert not (tmp_path / "a").exists()


def test_int8_without_images_is_refused_and_float32_needs_no_precision_flags(tiny_bundle, tmp_path):
    with pytest.raises(UsageError, match="calib_data"):
        prepare_for_trtexec(tiny_bundle, tmp_path / "a", BuildSpec(precision="int8"))
    assert not (tmp_path / "a").exists()
    prepare_for_trtexec(tiny_bundle, tmp_path / "b", BuildSpec())
    script = (tmp_path / "b" / "build.sh").read_text()
    assert not any(flag in script for flag in ("--fp16", "--int8", "layerPrecisions", "memPoolSize"))


def test_the_command_prepares_for_xavier_unless_told_otherwise(tiny_bundle, tmp_path, capsys):
    assert main(["prepare", str(tiny_bundle), "--fp16", "-o", str(tmp_path / "g"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["graphs"] == str(tmp_path / "g")
    assert read_manifest(tmp_path / "g", "graphs")["spec"]["workspace"] == 1.0
    assert main(["prepare", str(tiny_bundle), "--target", "jetson-xaver", "-o", str(tmp_path / "h")]) == 2
    assert "Did you mean 'jetson-xavier-jp51'?" in capsys.readouterr().err


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    return planted_bundle(tmp_path_factory.mktemp("planted") / "bundle")


@pytest.fixture(scope="module")
def people(tmp_path_factory):
    return colored_people(tmp_path_factory.mktemp("people") / "data")


@pytest.fixture(params=["function", "command"])
def prepared(request, planted, people, tmp_path):
    """Prepares the planted bundle in INT8 by keyword arguments: its manifest's fields and its folder."""

    def prepare(method, *, budget=None, exclude=()):
        out = tmp_path / "graphs"
        if request.param == "function":
            spec = EngineSpec(precision="int8", calib_num=16, calib_method=method, exclude_nodes=exclude or None)
            prepare_for_target(planted, out, "jetson-xavier-jp51", spec, CalibrationData(people, budget=budget))
        else:
            words = ["--int8", "--calib-num", "16", "--calib-method", method, "--calib-data", people]
            words += ["--max-map-drop", budget.max_map_drop, "--budget-images", budget.images] if budget else []
            words += ["--exclude-nodes", *exclude] if exclude else []
            assert main(["prepare", str(planted), *map(str, words), "-o", str(out)]) == 0
        return read_manifest(out, "graphs"), out

    return prepare


def test_the_calibration_method_is_chosen_by_people_held_out(prepared):
    manifest, folder = prepared("auto")
    chosen = manifest["calibration"]
    assert set(chosen["auto"]["scores"]) == {"minmax", "entropy", "percentile", "mse"}
    assert (
        chosen["method"] == json.loads((folder / "calibration.json").read_text())["method"] in chosen["auto"]["scores"]
    )
    assert manifest["spec"]["calib_method"] == "auto"


def test_a_budget_leaves_the_planted_node_in_float(prepared):
    manifest, folder = prepared("minmax", budget=BudgetSpec(max_map_drop=1.0, images=24))
    assert manifest["float_nodes"] == manifest["spec"]["exclude_nodes"] == [BAD]
    search = BudgetSearch.from_json(json.loads((folder / "budget.json").read_text()))
    assert (search.float_nodes, search.budget.images) == ((BAD,), 24)
    assert float_convolutions(folder) == {BAD}


def test_excluded_nodes_stay_in_float(prepared):
    manifest, folder = prepared("minmax", exclude=("third",))
    assert manifest["float_nodes"] == ["third"]
    assert float_convolutions(folder) == {"third"}


def float_convolutions(folder):
    graph = onnx.load(folder / "prepared-backbone.onnx").graph
    makers = {name: n.op_type for n in graph.node for name in n.output}
    return {n.name for n in graph.node if n.op_type == "Conv" and makers.get(n.input[1]) != "DequantizeLinear"}


def test_a_target_of_tensorrt_10_gets_typed_graphs_and_the_flags_of_10(tiny_bundle, tiny_market, tmp_path):
    spec = EngineSpec(calib_num=4, calib_method="minmax")
    made = prepare_for_target(tiny_bundle, tmp_path / "g", "jetson-orin-jp62", spec, tiny_market)
    script = (Path(made.graphs) / "build.sh").read_text()
    assert script.count("--stronglyTyped") == script.count("--skipInference") == 2
    assert '--staticPlugins="$PLUGIN"' in script
    for old in ("--int8", "--fp16", "--precisionConstraints", "--layerPrecisions", "--buildOnly", "--plugins="):
        assert old not in script


def test_a_target_of_another_backend_is_not_prepared_for_trtexec(tiny_bundle, tmp_path):
    with pytest.raises(UsageError, match="build-engine BUNDLE --target cpu"):
        prepare_for_target(tiny_bundle, tmp_path / "g", "cpu")


def test_graphs_are_replaced_only_by_force(tiny_bundle, tmp_path):
    spec = EngineSpec(precision="fp32")
    for force in (False, True):
        prepare_for_target(tiny_bundle, tmp_path / "g", "jetson-xavier-jp51", spec, force=force)
    with pytest.raises(ArtifactError, match="--force"):
        prepare_for_target(tiny_bundle, tmp_path / "g", "jetson-xavier-jp51", spec)
