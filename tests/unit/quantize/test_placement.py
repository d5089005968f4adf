"""Nodes left in float: the graph that comes out, what onnxruntime makes of it, and what is judged together."""

from __future__ import annotations

from itertools import chain

import numpy as np
import onnx
import pytest
from onnxruntime.quantization import QuantType
from onnxruntime.quantization.qdq_quantizer import QDQQuantizer

from nformer_edge.core.errors import ArtifactError, UsageError
from nformer_edge.core.preprocess import preprocess_files
from nformer_edge.core.spec import PreprocessSpec
from nformer_edge.exporting.session import open_session
from nformer_edge.quantize.calibrate import CALIBRATED, measure_ranges
from nformer_edge.quantize.fp16 import multiplication_types
from nformer_edge.quantize.placement import FOLLOWERS, as_exported, node_groups
from nformer_edge.quantize.placement_cpu import (
    excluded_multiplications,
    float_nodes,
    for_onnxruntime,
    place_for_cpu,
    quantize_backbone,
    quantized_nodes,
    require_quantized,
)
from nformer_edge.quantize.placement_tensorrt import place_for_tensorrt


@pytest.fixture(scope="module")
def ranges(tiny_bundle, tiny_market):
    images = [str(p) for p in sorted((tiny_market / "bounding_box_train").iterdir())[:4]]
    return measure_ranges((tiny_bundle / "backbone.onnx").read_bytes(), images, PreprocessSpec(64, 32), ["minmax"])[
        "minmax"
    ]


@pytest.fixture(scope="module")
def placement(tiny_bundle, ranges):
    return place_for_cpu((tiny_bundle / "backbone.onnx").read_bytes(), ranges, reduce_range=True)


@pytest.fixture(scope="module")
def groups(placement):
    return node_groups(placement.plain, quantized_nodes(placement.plain))


def features(model, images=None):
    """Each node for itself: what onnxruntime makes of a graph with fewer nodes in INT8 is judged in `engine`."""
    session = open_session(model.SerializeToString(), "graph", threads=1, optimize=False)
    if images is None:
        images = np.random.default_rng(0).normal(0, 1, (2, 3, 64, 32)).astype(np.float32)
    return session.run(None, {"images": images})[0]


def excluding(placement, ranges, names):
    """The same by onnxruntime's quantizer alone."""
    plain = onnx.ModelProto()
    plain.CopyFrom(placement.plain)
    options = {"ActivationSymmetric": False, "WeightSymmetric": True, "QuantizeBias": True}
    left = [*float_nodes(plain), *names]
    return QDQQuantizer(
        plain, True, True, QuantType.QInt8, QuantType.QUInt8, for_onnxruntime(ranges), [], left, CALIBRATED, options
    ).quantize_model()


def test_with_every_node_quantized_it_is_what_onnxruntime_placed(placement):
    ours, theirs = placement.without(), placement.placed
    onnx.checker.check_model(ours, full_check=True)
    assert {n.name: (list(n.input), list(n.output)) for n in ours.graph.node} == {
        n.name: (list(n.input), list(n.output)) for n in theirs.graph.node
    }
    assert {t.name for t in ours.graph.initializer} == {t.name for t in theirs.graph.initializer}


def test_without_some_nodes_it_computes_what_onnxruntimes_quantizer_makes(placement, ranges, groups):
    members = list(chain.from_iterable(list(groups.values())[4:80]))
    ours, theirs = placement.without(members), excluding(placement, ranges, members)
    onnx.checker.check_model(ours, full_check=True)
    assert multiplication_types(ours) == multiplication_types(theirs)
    np.testing.assert_allclose(features(ours), features(theirs), rtol=1e-5, atol=1e-5)


def test_with_no_node_quantized_it_is_the_float_graph(placement, groups):
    model = placement.without(list(chain.from_iterable(groups.values())))
    assert not [n for n in model.graph.node if n.op_type in ("QuantizeLinear", "DequantizeLinear")]
    np.testing.assert_array_equal(features(model), features(placement.plain))


def test_a_node_left_out_has_its_float_weights_and_fewer_bytes_are_int8(placement, groups):
    name = next(n for n in groups if len(groups[n]) == 2)
    model = placement.without(groups[name])
    constants = {t.name: t for t in model.graph.initializer}
    for node in model.graph.node:
        if node.name in groups[name]:
            assert constants[node.input[1]].data_type == onnx.TensorProto.FLOAT
    fewer, all_of_them = (list(multiplication_types(m).values()) for m in (model, placement.without()))
    assert fewer.count("int8") == all_of_them.count("int8") - 2


def test_convolutions_in_a_row_and_the_sums_of_a_block_are_judged_together(placement, groups):
    kinds = {n.name: n.op_type for n in placement.plain.graph.node}
    assert len(groups) == 92
    assert all(len({kinds[n] for n in members}) == 1 for members in groups.values())
    assert sum(len(m) == 2 and kinds[n] == "Conv" for n, m in groups.items()) == 60  # OSNet's light 3 x 3
    assert sum(len(m) == 3 and kinds[n] == "Add" for n, m in groups.items()) == 6  # the sum of a block's four streams
    members = list(chain.from_iterable(groups.values()))
    quantized = [n for n in quantized_nodes(placement.plain) if kinds[n] not in FOLLOWERS]
    assert sorted(members) == sorted(quantized)


def test_both_placements_refuse_a_name_that_is_not_there(placement, ranges):
    with pytest.raises(UsageError, match=r"got '/trunk/conv1/Conv'.*Did you mean '/trunk/conv1/conv/Conv'"):
        placement.without(["/trunk/conv1/Conv"])
    with pytest.raises(UsageError, match="exclude_nodes: got 'x'"):
        place_for_tensorrt(placement.plain, ranges, ["x"])


def test_an_engine_with_nothing_left_in_int8_is_refused(placement, ranges):
    everything = quantized_nodes(placement.plain)
    model = placement.without(everything)
    with pytest.raises(ArtifactError, match=r"got 0 of 188 multiplications in INT8.*Exclude fewer nodes"):
        require_quantized(multiplication_types(model), excluded_multiplications(model, everything))
    with pytest.raises(ArtifactError, match="Exclude fewer nodes"):
        place_for_tensorrt(placement.plain, ranges, everything)


def graph_of_others(constant_nodes):
    """A small backbone with a batch norm behind a convolution and one behind its Gemm; constants as nodes or not."""
    rng = np.random.default_rng(0)
    norms = {f"{kind}{i}": rng.uniform(0.5, 2, size) for i, size in ((1, 16), (2, 8)) for kind in "sbmv"}
    arrays = {"w": rng.normal(size=(16, 3, 3, 3)), "g": rng.normal(size=(16, 8)), "gb": rng.normal(size=8), **norms}
    tensors = [onnx.numpy_helper.from_array(values.astype(np.float32), name) for name, values in arrays.items()]
    node = onnx.helper.make_node
    nodes = [
        node("Conv", ["images", "w"], ["c"], name="conv"),
        node("BatchNormalization", ["c", *(f"{kind}1" for kind in "sbmv")], ["n"], name="norm", epsilon=0.1),
        node("Relu", ["n"], ["r"], name="relu"),
        node("GlobalAveragePool", ["r"], ["p"], name="pool"),
        node("Flatten", ["p"], ["f"], name="flatten"),
        node("Gemm", ["f", "g", "gb"], ["y"], name="gemm"),
        node("BatchNormalization", ["y", *(f"{kind}2" for kind in "sbmv")], ["features"], name="neck"),
    ]
    if constant_nodes:
        nodes = [node("Constant", [], [t.name], name=f"make {t.name}", value=t) for t in tensors] + nodes
    ends = [("images", ["B", 3, 64, 32]), ("features", ["B", 8])]
    (images,), (found,) = ([onnx.helper.make_tensor_value_info(name, 1, shape)] for name, shape in ends)
    graph = onnx.helper.make_graph(nodes, "others", [images], [found], [] if constant_nodes else tensors)
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=9)


@pytest.mark.parametrize("constant_nodes", [False, True])
def test_graphs_of_others_are_quantized_with_constant_nodes_and_unfolded_batch_norms(constant_nodes, tiny_market):
    model = graph_of_others(constant_nodes)
    files, size = sorted((tiny_market / "bounding_box_train").iterdir())[:2], PreprocessSpec(64, 32)
    measured = measure_ranges(model.SerializeToString(), list(map(str, files)), size, ["minmax"])["minmax"]
    seen = preprocess_files(files, size)
    placed = quantize_backbone(model.SerializeToString(), measured, reduce_range=True)
    onnx.checker.check_model(placed, full_check=True)
    for found in (placed, place_for_tensorrt(model, measured)):
        assert multiplication_types(found) == {"conv": "int8", "gemm": "fp32"}
        assert "BatchNormalization" not in {n.op_type for n in found.graph.node}
        expected = features(model, seen)
        assert np.linalg.norm(features(found, seen) - expected) <= 0.05 * np.linalg.norm(expected)


def test_a_graph_in_the_form_of_our_export_computes_the_same_and_what_cannot_be_folded_stays():
    model = graph_of_others(constant_nodes=True)
    np.testing.assert_allclose(features(as_exported(model)), features(model), rtol=1e-4, atol=1e-5)
    model.graph.output.append(
        onnx.helper.make_tensor_value_info("c", 1, ["B", 16, 62, 30])
    )  # it is read elsewhere, too
    kept = [n.name for n in as_exported(model).graph.node if n.op_type == "BatchNormalization"]
    assert kept == ["norm"]
