"""The layer-wise comparison names the node that was broken, whatever the precision, and clears what was not."""

from __future__ import annotations

import re
import shutil
from dataclasses import fields

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from nformer_edge.backends.engine import EngineManifest
from nformer_edge.backends.spec import BuildSpec
from nformer_edge.backends.tensorrt.graphs import prepare_head
from nformer_edge.cli import main
from nformer_edge.core.artifact import write_manifest
from nformer_edge.core.errors import ArtifactError
from nformer_edge.core.values import to_table
from nformer_edge.exporting.bundle import ModelManifest, open_bundle
from nformer_edge.exporting.session import open_session
from nformer_edge.ops.contract import draw_landmarks
from nformer_edge.quantize.fp16 import backbone_float32, to_half
from nformer_edge.quantize.placement_cpu import quantize_backbone
from nformer_edge.quantize.placement_tensorrt import place_for_tensorrt
from nformer_edge.quantize.values import Ranges
from nformer_edge.report.graph import Graph, is_rounded, steps
from nformer_edge.report.layers import compare_graphs, difference, read_graphs


@pytest.fixture(scope="module")
def backbone(bundle):
    return onnx.load(bundle / "backbone.onnx")


@pytest.fixture(scope="module")
def images():
    return {"images": np.random.default_rng(0).normal(size=(2, 3, 64, 32)).astype(np.float32)}


@pytest.fixture(scope="module")
def rows():
    rng = np.random.default_rng(1)
    people = np.repeat(rng.normal(size=(10, 32)), 4, axis=0)
    features = (people + 0.5 * rng.normal(size=people.shape)).astype(np.float32)
    return {"features": features, "landmarks": draw_landmarks(40, 2, 3, 0)}


@pytest.fixture(scope="module")
def ranges(backbone, images):
    """What the float backbone spans on the very images: of a build whose calibration has nothing to be blamed for."""
    graph = Graph(backbone)
    values = {**images, **graph.values(graph.carried(), images)}
    return Ranges("minmax", {n: (float(v.min()), float(v.max())) for n, v in values.items() if v.dtype == np.float32})


def weight(model, node):
    """The initializer that is the second input of a node."""
    name = next(n for n in model.graph.node if n.name == node).input[1]
    return next(t for t in model.graph.initializer if t.name == name)


def broken(model, node, change):
    """A copy of a model after `change` to a node's weight."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    held = weight(copy, node)
    held.CopyFrom(numpy_helper.from_array(change(numpy_helper.to_array(held)), held.name))
    return copy


def convolution(model, number):
    return [n.name for n in model.graph.node if n.op_type == "Conv"][number]


def test_a_graph_is_inside_its_band_against_itself(backbone, images):
    found = compare_graphs("backbone", "fp32", backbone, backbone, images)
    assert found.first is None
    assert found.compared == found.tensors
    assert all(n.error <= 1e-5 for n in found.nodes)


def test_a_broken_weight_is_named_and_its_inputs_are_cleared(backbone, images):
    node = convolution(backbone, 9)
    found = compare_graphs("backbone", "fp32", backbone, broken(backbone, node, lambda w: w[::-1].copy()), images)
    first = found.first
    assert (first.node, first.op) == (node, "Conv")
    assert first.inputs
    assert first.inputs_inside
    assert first.own_error == pytest.approx(first.error, rel=1e-2)


def test_half_precision_is_cleared_and_a_broken_weight_in_it_named(backbone, images):
    half = to_half(backbone, {n.name for n in backbone.graph.node} - backbone_float32(backbone))
    assert is_rounded(Graph(half, backbone))
    assert compare_graphs("backbone", "fp16", backbone, half, images).first is None
    node = convolution(backbone, 5)
    found = compare_graphs("backbone", "fp16", backbone, broken(half, node, lambda w: w * np.float16(1.1)), images)
    assert found.first.node == node
    assert found.first.inputs_inside


def chain(factor):
    """A float model of a product, one `factor` times as large, and one that takes the factor back."""
    rng = np.random.default_rng(2)
    weights = {"w": 1.0, "up": factor, "down": 1 / factor}
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["B", 16]) for name in ("images", "features")]
    nodes = [
        helper.make_node("MatMul", ["images", "w"], ["a"], name="plain"),
        helper.make_node("MatMul", ["a", "up"], ["b"], name="large"),
        helper.make_node("MatMul", ["b", "down"], ["features"], name="small"),
    ]
    held = [numpy_helper.from_array((rng.normal(size=(16, 16)) * f).astype(np.float32), n) for n, f in weights.items()]
    graph = helper.make_graph(nodes, "chain", ends[:1], ends[1:], held)
    return helper.make_model(graph, ir_version=9, opset_imports=[helper.make_opsetid("", 18)])


@pytest.mark.parametrize(("factor", "overflows"), [(1e2, False), (1e4, True)])
def test_a_product_that_overflows_in_float16_is_named_though_float32_kernels_would_hold_it(factor, overflows):
    model = chain(factor)
    half = to_half(model, {n.name for n in model.graph.node})
    feed = {"images": np.random.default_rng(3).normal(size=(4, 16)).astype(np.float32)}
    assert np.isfinite(Graph(half, model).values(["features"], feed)["features"]).all() != overflows
    first = compare_graphs("backbone", "fp16", model, half, feed).first
    assert (first and first.node) == ("large" if overflows else None)
    assert first is None or (first.inputs_inside and not np.isfinite(first.own_error))


def test_int8_without_float16_is_looked_at_in_the_kernels_that_would_run(bundle, backbone, images, ranges):
    model = quantize_backbone((bundle / "backbone.onnx").read_bytes(), ranges)
    (served,) = open_session(model.SerializeToString(), "int8").run(["features"], images)
    graph = Graph(model, backbone)
    np.testing.assert_array_equal(graph.values(["features"], images)["features"], served)


@pytest.fixture(scope="module", params=["onnxruntime", "tensorrt"])
def quantize(request, bundle, backbone):
    """A float backbone with Q/DQ nodes, by either placement."""

    def place(ranges):
        if request.param == "tensorrt":
            return place_for_tensorrt(backbone, ranges)
        return quantize_backbone((bundle / "backbone.onnx").read_bytes(), ranges)

    return place


def test_int8_is_cleared_and_a_wrong_range_named(quantize, backbone, images, ranges):
    assert compare_graphs("backbone", "int8", backbone, quantize(ranges), images).first is None
    tensor = "/trunk/conv3/conv3.0/conv1/relu/Relu_output_0"
    low, high = ranges.table[tensor]
    wrong = Ranges("minmax", ranges.table | {tensor: (low / 8, high / 8)})
    first = compare_graphs("backbone", "int8", backbone, quantize(wrong), images).first
    assert first.tensor == tensor
    assert first.node.startswith("/trunk/conv3/conv3.0/conv1/")
    assert first.inputs_inside


def test_the_head_is_compared_with_its_operators_bodies(bundle, rows):
    head = onnx.load(bundle / "nformer.onnx")
    assert compare_graphs("head", "fp32", head, head, rows).first is None
    node = next(n.name for n in head.graph.node if n.op_type == "Gemm" and "mlp" in n.name)
    found = compare_graphs("head", "fp32", head, broken(head, node, lambda w: w * np.float32(2)), rows)
    assert found.first.node == node
    assert found.first.inputs_inside


def test_a_head_prepared_for_the_plugin_runs_with_the_references_bodies(bundle, rows, tmp_path):
    prepared = onnx.load(prepare_head(open_bundle(bundle), tmp_path, "fp16").path)
    assert not prepared.functions
    head = onnx.load(bundle / "nformer.onnx")
    found = compare_graphs("head", "fp16", head, prepared, rows)
    assert found.compared == found.tensors
    assert found.first is None


def test_numbers_that_are_not_finite_are_out_of_any_band(backbone, images):
    node = convolution(backbone, 3)
    found = compare_graphs("backbone", "fp32", backbone, broken(backbone, node, lambda w: w * np.inf), images)
    assert found.first.node == node
    assert not np.isfinite(found.first.error)


def test_values_are_held_group_by_group_within_the_limit(backbone, images):
    graph = Graph(backbone)
    names = graph.carried()
    groups = graph.groups(names, 2, 1 << 18)
    assert [n for g in groups for n in g] == names
    assert len(groups) > 2
    for group in groups:
        held = sum(v.nbytes for v in graph.values(group, images).values())
        assert held <= 1 << 18 or len(group) == 1


def test_whole_numbers_are_compared_by_the_share_that_differ():
    assert difference(np.array([1, 2, 3, 5]), np.array([1, 2, 3, 4])).error == 0.25
    assert difference(np.zeros(3), np.zeros(3)).error == 0
    assert difference(np.zeros((2, 2)), np.zeros(4)).error == np.inf
    assert difference(np.array([0.9, 0.0]), np.array([1.0, 0.0])).sqnr_db == pytest.approx(20)


@pytest.mark.parametrize(("kind", "zero"), [(np.dtype(np.uint8), 51), (np.dtype(np.int8), 0)])
def test_steps_cover_a_range_with_zero_in_it(kind, zero):
    scale, found = steps((-1.0, 4.0), kind)
    assert found == zero
    info = np.iinfo(kind)
    assert (info.max - found) * scale == pytest.approx(4.0)


def test_a_tensor_that_differs_without_a_trace_in_the_output_is_counted_and_nobody_blamed(backbone, images):
    """As in a graph of another version, where a name can stand for something else."""
    other = onnx.ModelProto()
    other.CopyFrom(backbone)
    features = other.graph.node[-1].input[0]
    twice = onnx.helper.make_node("Add", [features, features], ["twice"], name="twice")
    half = onnx.helper.make_node("Sub", ["twice", features], ["half"], name="half")
    other.graph.node.insert(len(other.graph.node) - 1, twice)
    other.graph.node.insert(len(other.graph.node) - 1, half)
    other.graph.node[-1].input[0] = "half"
    renamed = {features: "kept", "twice": features}
    for node in other.graph.node:
        node.input[:] = [renamed.get(n, n) for n in node.input]
        node.output[:] = [renamed.get(n, n) for n in node.output]
    found = compare_graphs("backbone", "fp32", backbone, other, images)
    assert (found.outside, found.first) == (1, None)


def test_a_plan_alone_cannot_be_compared_and_the_graph_that_was_parsed_can(tiny_bundle, tmp_path):
    bundle = open_bundle(tiny_bundle).manifest
    model = {field.name: getattr(bundle, field.name) for field in fields(ModelManifest)}
    manifest = EngineManifest(**model, versions={}, backend="tensorrt", why="", spec=BuildSpec(), bundle_sha256="")
    (tmp_path / "backbone.engine").write_bytes(b"plan")
    write_manifest(tmp_path, "engine", to_table(manifest))
    with pytest.raises(ArtifactError, match=r"a plan for tensorrt.*prepared-backbone\.onnx.*--keep-graphs"):
        read_graphs(tmp_path, ("backbone",))
    shutil.copy(tiny_bundle / "backbone.onnx", tmp_path / "prepared-backbone.onnx")
    write_manifest(tmp_path, "engine", to_table(manifest))
    assert read_graphs(tmp_path, ("backbone",))["backbone"].graph.node


def test_the_graph_of_a_checkpoint_is_the_one_that_its_bundle_has(checkpoint, bundle, images):
    traced, exported = (read_graphs(path, ("backbone",))["backbone"] for path in (checkpoint, bundle))
    found = compare_graphs("backbone", "fp32", traced, exported, images)
    assert (found.compared, found.outside) == (found.tensors, 0)


def test_the_command_prints_every_tensor_and_the_seeds_that_it_was_given(checkpoint, bundle, tiny_market, capsys):
    asked = ("--data", tiny_market, "--layers", "--landmark-seeds", 3, 5, "--threads", 1)
    assert main(["parity", str(checkpoint), str(bundle), *map(str, asked)]) == 0
    printed = capsys.readouterr().out
    assert "head, all images, landmark seed 3: passed (mAP" in printed
    assert "landmark seed 5: passed" in printed
    assert re.search(r"backbone: every tensor compared \(\d+\) is inside its band", printed)
    table = printed[printed.index("backbone, 4 images") :]
    assert "SQNR dB" in table
    assert "/trunk/conv1/conv/Conv " in table
    assert "head, 18 rows" in table
