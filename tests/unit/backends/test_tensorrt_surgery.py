"""Graphs that onnx-graphsurgeon was at: what it must not lose, and that they still compute the same."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper, version_converter

from nformer_edge.backends.tensorrt.plugin.library import ATTENTIONS
from nformer_edge.backends.tensorrt.surgery import (
    fold,
    name_plugins,
    operate,
    split_gemms,
    split_l2_norms,
    split_layer_norms,
)
from nformer_edge.exporting.session import open_session
from nformer_edge.ops.bodies import functions
from nformer_edge.ops.contract import DOMAIN


@pytest.fixture(scope="module")
def head(tiny_bundle):
    return onnx.load(tiny_bundle / "nformer.onnx")


@pytest.fixture(scope="module")
def feed(tiny_bundle):
    with np.load(tiny_bundle / "golden.npz") as z:
        return {"features": z["head_input"], "landmarks": z["landmarks"]}


def run(model, feed):
    session = open_session(model.SerializeToString(), "graph", threads=1)
    return session.run(None, feed)[0]


def test_an_operation_keeps_functions_metadata_opsets_names_types_and_numbers(head, feed):
    model = operate(head, fold)
    onnx.checker.check_model(model, full_check=True)
    assert [f.SerializeToString() for f in model.functions] == [f.SerializeToString() for f in head.functions]
    assert {p.key: p.value for p in model.metadata_props} == {p.key: p.value for p in head.metadata_props} != {}
    assert {o.domain: o.version for o in model.opset_import} == {o.domain: o.version for o in head.opset_import}
    for what in ("doc_string", "producer_name", "producer_version", "ir_version"):
        assert getattr(model, what) == getattr(head, what) != ""
    for ends in ("input", "output"):
        assert [e.SerializeToString() for e in getattr(model.graph, ends)] == [
            e.SerializeToString() for e in getattr(head.graph, ends)
        ]
    kept = {n.name: n.op_type for n in model.graph.node}
    assert kept.items() <= {n.name: n.op_type for n in head.graph.node}.items()
    np.testing.assert_array_equal(run(model, feed), run(head, feed))
    assert head.functions  # the one that was given is as it was


def test_folding_leaves_no_constant_node_and_no_size_that_every_input_has(head):
    kinds = [n.op_type for n in operate(head, fold).graph.node]
    assert "Constant" not in kinds
    assert kinds.count("Shape") < [n.op_type for n in head.graph.node].count("Shape")


@pytest.mark.parametrize("namespace", ["", "nformer"])
def test_our_nodes_name_their_plugin_and_no_others_do(head, namespace):
    for node in operate(head, name_plugins(namespace)).graph.node:
        named = {a.name: a.s for a in node.attribute if a.name.startswith("plugin")}
        assert named == (
            {"plugin_version": b"1", "plugin_namespace": namespace.encode()} if node.domain == DOMAIN else {}
        )
        scales = [a.f for a in node.attribute if a.name == "scale"]
        assert len(scales) == (node.op_type == "ReciprocalNeighborAttention")


@pytest.mark.parametrize("inputs", ["a, b, v, n, t", "a, b, v, n, t, c"])
def test_a_gated_attention_is_another_plugin_only_where_the_plan_carries_the_kernels(inputs):
    given = "float[2, N, 5] a, float[2, N, 5] b, float[2, N, 9] v, int32[1, N, 4] n, float[1, N] t, int32[N] c"
    node = f"y = nformer.ReciprocalNeighborAttention <scale = 1.0> ({inputs})"
    text = f'<ir_version: 9, opset_import: ["": 18, "nformer": 2]> g ({given}) => (float[2, N, 9] y) {{ {node} }}'
    model = onnx.parser.parse_model(text)
    for namespace, name in (("", "ReciprocalNeighborAttention"), ("nformer", ATTENTIONS[inputs.count(",") + 1])):
        made = operate(model, name_plugins(namespace))
        assert [n.op_type for n in made.graph.node] == [name]
        assert {o.domain: o.version for o in made.opset_import} == {"": 18, "nformer": 2}


@pytest.fixture(scope="module")
def split(head):
    """The head as TensorRT 8 gets it, but for the plugin's names."""
    bare = onnx.ModelProto()
    bare.CopyFrom(head)
    del bare.functions[:]
    bare = version_converter.convert_version(bare, 17)
    every = {n.name for n in bare.graph.node}
    return operate(bare, fold, split_layer_norms, split_l2_norms, split_gemms(every))


def test_a_split_head_computes_the_same(split, head, feed):
    onnx.checker.check_model(split, full_check=True)
    whole = version_converter.convert_version(split, 18)  # as the bodies are
    whole.functions.extend(functions(18))
    np.testing.assert_allclose(run(whole, feed), run(head, feed), atol=2e-6)


def test_a_split_head_has_only_nodes_that_the_parser_of_tensorrt_8_5_knows(split, head):
    known = set((Path(__file__).parents[2] / "helpers" / "operators_of_tensorrt_8.5.txt").read_text().split())
    assert "LayerNormalization" not in known
    assert {n.op_type for n in split.graph.node if not n.domain} <= known
    assert not {n.op_type for n in split.graph.node} & {"LayerNormalization", "ReduceL2", "Gemm"}
    assert not any("" in n.input for n in split.graph.node)


def test_names_of_split_nodes_begin_with_the_old_ones_and_products_keep_theirs(split, head):
    names = [n.name for n in split.graph.node]
    assert len(set(names)) == len(names)
    old = {n.name: n.op_type for n in head.graph.node}
    for node in split.graph.node:
        assert node.name in old or node.name.rpartition("/")[0] in old
    multiplications = {n.name for n in split.graph.node if n.op_type == "MatMul"}
    assert multiplications == {name for name, kind in old.items() if kind in ("Gemm", "MatMul")}


def small(node, shape, *constants):
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, size) for name, size in (("x", shape), ("y", None))]
    weights = [numpy_helper.from_array(values, name) for name, values in constants]
    graph = helper.make_graph([node], "g", ends[:1], ends[1:], weights)
    return helper.make_model(graph, ir_version=9, opset_imports=[helper.make_opsetid("", 17)])


@pytest.mark.parametrize(("axis", "with_bias"), [(-1, True), (-1, False), (1, True), (-2, True)])
def test_a_split_layer_norm_has_the_axes_the_epsilon_and_the_bias_of_the_whole_one(axis, with_bias):
    rng = np.random.default_rng(0)
    size = (4,) if axis == -1 else (3, 4)
    values = [(name, rng.standard_normal(size).astype(np.float32)) for name in ("g", "b")[: 1 + with_bias]]
    node = helper.make_node(
        "LayerNormalization", ["x", *(n for n, _ in values)], ["y"], name="norm", axis=axis, epsilon=0.1
    )
    model = small(node, [2, 3, 4], *values)
    made = operate(model, split_layer_norms)
    onnx.checker.check_model(made, full_check=True)
    feed = {"x": rng.standard_normal((2, 3, 4)).astype(np.float32)}
    np.testing.assert_allclose(run(made, feed), run(model, feed), atol=1e-6)


@pytest.mark.parametrize("trans", [0, 1])
def test_a_split_gemm_has_the_weight_the_right_way_round(trans):
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((3, 4) if trans else (4, 3)).astype(np.float32)
    node = helper.make_node("Gemm", ["x", "w", "b"], ["y"], name="neck", transB=trans)
    model = small(node, [2, 4], ("w", weight), ("b", rng.standard_normal(3).astype(np.float32)))
    made = operate(model, split_gemms({"neck"}))
    assert [(n.op_type, n.name) for n in made.graph.node] == [("MatMul", "neck"), ("Add", "neck/Add_2")]
    feed = {"x": rng.standard_normal((2, 4)).astype(np.float32)}
    np.testing.assert_allclose(run(made, feed), run(model, feed), atol=1e-6)


def test_a_gemm_with_factors_is_left_whole(head):
    node = helper.make_node("Gemm", ["x", "w", "b"], ["y"], name="m", alpha=2.0)
    model = small(node, [2, 4], ("w", np.ones((4, 3), np.float32)), ("b", np.ones(3, np.float32)))
    assert [n.op_type for n in operate(model, split_gemms({"m"})).graph.node] == ["Gemm"]
