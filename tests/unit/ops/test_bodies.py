"""The bodies in stock onnxruntime against plain numpy, and against the model's own operators."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from helpers.gated import FACTOR, gated_case, gated_formula
from onnx import TensorProto, helper

from nformer_edge.core.errors import UsageError
from nformer_edge.ops import bodies as operators
from nformer_edge.ops import reference as ops
from nformer_edge.ops.contract import (
    DOMAIN,
    GATED_OPSET_VERSION,
    NO_NEIGHBOR,
    OPSET_VERSION,
    RECIPROCAL_NEIGHBOR_ATTENTION,
    ROW_TOP_K,
)

ONNX_TYPE = {np.float32: TensorProto.FLOAT, np.float16: TensorProto.FLOAT16}


def session(function, inputs, output, opset=18, **attributes):
    """A model of one node of our domain with `function` as its body. Inputs: name -> element type."""
    axes = {"t": 2, "cameras": 1}
    node = helper.make_node(function.name, list(inputs), ["out"], domain=DOMAIN, **attributes)
    values = [helper.make_tensor_value_info(name, kind, [None] * axes.get(name, 3)) for name, kind in inputs.items()]
    graph = helper.make_graph([node], "g", values, [helper.make_tensor_value_info("out", output, [None] * 3)])
    version = GATED_OPSET_VERSION if "t" in inputs else OPSET_VERSION
    imports = [helper.make_opsetid("", opset), helper.make_opsetid(DOMAIN, version)]
    model = helper.make_model(graph, functions=[function], opset_imports=imports, ir_version=operators.IR_VERSION)
    onnx.checker.check_model(model, full_check=True)
    return onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])


def row_top_k(a, b, k, block=16, opset=18):
    kind = ONNX_TYPE[a.dtype.type]
    found = session(
        operators.row_top_k_function(opset, block=block), {"a": kind, "b": kind}, TensorProto.INT32, opset, k=k
    )
    return found.run(None, {"a": a, "b": b})[0]


def attention(a, b, v, neighbors, scale=None, t=None, cameras=None, block=16, opset=18):
    kind = ONNX_TYPE[a.dtype.type]
    kinds = {"a": kind, "b": kind, "v": kind, "neighbors": TensorProto.INT32, "t": TensorProto.FLOAT}
    feed = {"a": a, "b": b, "v": v, "neighbors": neighbors, "t": t, "cameras": cameras}
    feed = {name: x for name, x in feed.items() if x is not None}
    inputs = {name: kinds.get(name, TensorProto.INT32) for name in feed}
    given = {} if scale is None else {"scale": scale}
    given |= {} if cameras is None else {"camera_factor": FACTOR}
    function = operators.reciprocal_neighbor_attention_function(opset, inputs=len(feed), block=block)
    return session(function, inputs, kind, opset, **given).run(None, feed)[0]


def numpy_row_top_k(a, b, k):
    scores = a.astype(np.float32) @ b.astype(np.float32).swapaxes(1, 2)
    scores = np.where(np.isfinite(scores), scores, -np.inf)
    order = np.argsort(-scores, axis=2, kind="stable")[:, :, :k]
    order = np.where(np.take_along_axis(scores, order, 2) > -np.inf, order, NO_NEIGHBOR)
    return np.pad(order, ((0, 0), (0, 0), (0, k - order.shape[2])), constant_values=NO_NEIGHBOR).astype(np.int32)


def numpy_attention(a, b, v, neighbors, scale=None):
    heads, images, size = v.shape
    scale = size**-0.5 if scale is None else scale
    neighbors = np.broadcast_to(neighbors, (heads, *neighbors.shape[1:]))
    y = np.zeros(v.shape)
    for h in range(heads):
        for i in range(images):
            mine = [j for j in neighbors[h, i] if j >= 0 and i in neighbors[h, j]]
            if mine:
                weight = np.exp(scale * (b[h, mine].astype(float) @ a[h, i].astype(float)))
                y[h, i] = weight / weight.sum() @ v[h, mine].astype(float)
    return y


def distinct_scores(rng, heads, rows, columns, length):
    """Small integers: every score is exact, so that ties are ties in any order of summation."""
    return rng.integers(-9, 10, (heads, rows, length)), rng.integers(-9, 10, (heads, columns, length))


@pytest.mark.parametrize(
    ("heads", "rows", "columns", "k"),
    [(1, 37, 37, 5), (2, 16, 16, 20), (2, 33, 50, 7), (1, 50, 3, 4), (3, 1, 1, 1), (1, 1, 40, 40), (2, 17, 5, 12)],
)
def test_row_top_k_is_the_stable_sort_of_numpy_with_ties(heads, rows, columns, k):
    a, b = distinct_scores(np.random.default_rng(rows), heads, rows, columns, 5)
    for kind in (np.float32, np.float16):
        found = row_top_k(a.astype(kind), b.astype(kind), k)
        assert found.dtype == np.int32
        np.testing.assert_array_equal(found, numpy_row_top_k(a, b, k))


def test_row_top_k_breaks_ties_by_lower_column_when_all_are_equal():
    found = row_top_k(np.ones((1, 300, 4), np.float32), np.ones((1, 300, 4), np.float32), 6, block=128)
    np.testing.assert_array_equal(found, np.broadcast_to(np.arange(6, dtype=np.int32), (1, 300, 6)))


def test_row_top_k_of_no_image_is_empty():
    nothing = np.zeros((2, 0, 5), np.float32)
    assert row_top_k(nothing, nothing, 3).shape == (2, 0, 3)


def test_row_top_k_with_no_column_finds_nobody():
    found = row_top_k(np.ones((1, 4, 5), np.float32), np.zeros((1, 0, 5), np.float32), 3)
    np.testing.assert_array_equal(found, np.full((1, 4, 3), NO_NEIGHBOR))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 3e38])
def test_row_top_k_never_chooses_a_score_that_is_not_finite(bad):
    rng = np.random.default_rng(0)
    a, b = (rng.standard_normal((1, 40, 4)).astype(np.float32) + 3 for _ in range(2))
    b[0, 7] = bad
    found = row_top_k(a, b, 40)
    assert not (found == 7).any()
    np.testing.assert_array_equal(found[..., -1], np.full((1, 40), NO_NEIGHBOR))
    others = np.delete(b, 7, axis=1)
    clean = row_top_k(a, others, 39)
    np.testing.assert_array_equal(found[..., :39], clean + (clean >= 7))


@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("images", [1, 2, 31, 48])
def test_row_top_k_agrees_with_the_model_on_random_factors(heads, images):
    rng = np.random.default_rng(images)
    a, b = (rng.standard_normal((heads, images, 64)).astype(np.float32) for _ in range(2))
    expected = ops.row_top_k(torch.from_numpy(a), torch.from_numpy(b), 9).numpy()
    np.testing.assert_array_equal(row_top_k(a, b, 9), expected)


def random_neighbors(rng, lists, images, k):
    chosen = np.argsort(rng.random((lists, images, max(images, k))), axis=2)[:, :, :k]
    return np.where(chosen < images, chosen, NO_NEIGHBOR).astype(np.int32)


@pytest.mark.parametrize("scale", [None, 0.0, -1.5])
@pytest.mark.parametrize(
    ("heads", "lists", "images", "k"), [(2, 1, 37, 9), (2, 2, 16, 20), (1, 1, 1, 3), (3, 1, 33, 4)]
)
def test_attention_is_the_loop_of_numpy(heads, lists, images, k, scale):
    rng = np.random.default_rng(images)
    a, b = (rng.standard_normal((heads, images, 5)).astype(np.float32) for _ in range(2))
    v = rng.standard_normal((heads, images, 8)).astype(np.float32)
    neighbors = random_neighbors(rng, lists, images, k)
    found = attention(a, b, v, neighbors, scale)
    expected = numpy_attention(a, b, v, neighbors, scale)
    assert np.abs(found - expected).max() <= 1e-6
    lonely = ~expected.any(axis=2)
    assert (found[lonely] == 0).all()
    model = ops.reciprocal_neighbor_attention(*map(torch.from_numpy, (a, b, v, neighbors)), scale=scale)
    assert np.abs(found - model.numpy()).max() <= 1e-6


@pytest.mark.parametrize("opset", operators.OPSETS)
def test_both_bodies_say_the_same_in_every_opset(opset):
    a, b = (x.astype(np.float32) for x in distinct_scores(np.random.default_rng(3), 2, 21, 21, 4))
    neighbors = row_top_k(a, b, 6, opset=opset)
    np.testing.assert_array_equal(neighbors, numpy_row_top_k(a, b, 6))
    assert np.abs(attention(a, b, a, neighbors, opset=opset) - numpy_attention(a, b, a, neighbors)).max() <= 1e-5


def test_attention_of_a_row_without_reciprocal_neighbor_is_exactly_zero():
    neighbors = np.array([[[1], [2], [0]]], np.int32)  # a ring: nobody chose back
    ones = np.ones((1, 3, 2), np.float32)
    assert (attention(ones, ones, ones, neighbors) == 0).all()


def test_attention_accumulates_float16_in_float32():
    rng = np.random.default_rng(1)
    a, b = (rng.standard_normal((2, 40, 5)).astype(np.float16) for _ in range(2))
    v = rng.standard_normal((2, 40, 16)).astype(np.float16)
    neighbors = random_neighbors(rng, 1, 40, 12)
    found = attention(a, b, v, neighbors)
    assert found.dtype == np.float16
    exact = numpy_attention(a, b, v, neighbors)
    assert np.abs(found - exact).max() <= 2 * np.abs(exact.astype(np.float16) - exact).max()


def test_attention_keeps_a_bad_row_to_itself():
    rng = np.random.default_rng(2)
    a, b = (rng.standard_normal((1, 40, 5)).astype(np.float32) for _ in range(2))
    v = rng.standard_normal((1, 40, 8)).astype(np.float32)
    neighbors = random_neighbors(rng, 1, 40, 8)
    clean = attention(a, b, v, neighbors)
    v[0, 0] = np.nan
    counts = np.array([any(j == 0 and i in neighbors[0, 0] for j in neighbors[0, i]) for i in range(40)])
    found = attention(a, b, v, neighbors)
    counts[0] = True  # its own output may be anything
    assert not counts.all()
    np.testing.assert_array_equal(found[0, ~counts], clean[0, ~counts])


def test_attention_gives_a_huge_score_no_weight_beyond_its_own():
    v = np.array([[[1.0], [5.0]]], np.float32)
    a = np.array([[[3e38], [1.0]]], np.float32)
    b = np.array([[[3e38], [1.0]]], np.float32)  # image 0 overflows against itself, and counts for nothing there
    found = attention(a, b, v, np.array([[[0, 1], [0, 1]]], np.int32), scale=1.0)
    assert np.isfinite(found).all()
    assert found[0, 0, 0] == 5.0


def test_attention_of_no_image_is_empty():
    nothing = np.zeros((2, 0, 5), np.float32)
    assert attention(nothing, nothing, np.zeros((2, 0, 8), np.float32), np.zeros((1, 0, 4), np.int32)).shape == (
        2,
        0,
        8,
    )


GATED = [(2, 37, 9, 1, 1), (2, 16, 20, 2, 2), (3, 33, 4, 1, 3), (1, 1, 3, 1, 1)]


@pytest.mark.parametrize("cameras", [False, True])
@pytest.mark.parametrize(("heads", "rows", "k", "lists", "thresholds"), GATED)
def test_the_gated_body_is_the_dense_formula_and_the_reference(heads, rows, k, lists, thresholds, cameras):
    case = gated_case(heads, rows, 5, 8, k, lists=lists, thresholds=thresholds, cameras=cameras)
    a, b, v, neighbors, scale, t, known = case
    found = attention(*(x.numpy() if isinstance(x, torch.Tensor) else x for x in case))
    exact = gated_formula(a.double(), b.double(), v.double(), neighbors, scale, t.double(), known)
    assert np.abs(found - exact.numpy()).max() <= 2e-6
    model = ops.reciprocal_neighbor_attention(*case, FACTOR)
    assert np.abs(found - model.numpy()).max() <= 2e-6


@pytest.mark.parametrize("opset", operators.OPSETS)
@pytest.mark.parametrize("cameras", [False, True])
def test_the_gated_body_accumulates_float16_in_float32_in_every_opset(opset, cameras):
    case = gated_case(2, 40, 5, 16, 12, lists=1, thresholds=1, cameras=cameras)
    a, b, v, neighbors, scale, t, known = (x.numpy() if isinstance(x, torch.Tensor) else x for x in case)
    half = [x.astype(np.float16) for x in (a, b, v)]
    found = attention(*half, neighbors, scale, t, known, opset=opset)
    assert found.dtype == np.float16
    wide = attention(*(x.astype(np.float32) for x in half), neighbors, scale, t, known, opset=opset)
    np.testing.assert_array_equal(found, wide.astype(np.float16))


def test_the_gated_body_keeps_a_bad_row_to_itself():
    case = gated_case(1, 40, 5, 8, 8, lists=1, thresholds=1, cameras=False)
    a, b, v, neighbors, scale, t = (x.numpy().copy() if isinstance(x, torch.Tensor) else x for x in case[:6])
    neighbors[0, 1:][(neighbors[0, 1:] == 0)] = NO_NEIGHBOR  # as RowTopK never chooses a bad row
    clean = attention(a, b, v, neighbors, scale, t)
    for bad in (np.nan, np.inf, -np.inf):
        a[0, 0] = b[0, 0] = v[0, 0] = t[0, 0] = bad
        np.testing.assert_array_equal(attention(a, b, v, neighbors, scale, t)[0, 1:], clean[0, 1:])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_pair_without_a_finite_threshold_does_not_count_in_the_gated_body(bad):
    case = gated_case(1, 20, 5, 8, 20, lists=1, thresholds=1, cameras=False)
    a, b, v, neighbors, scale, t = (x.numpy().copy() if isinstance(x, torch.Tensor) else x for x in case[:6])
    t[0, 3] = bad
    found = attention(a, b, v, neighbors, scale, t)
    assert (found[0, 3] == 0).all()
    neighbors[neighbors == 3] = NO_NEIGHBOR
    t[0, 3] = 0
    np.testing.assert_array_equal(np.delete(found, 3, 1), np.delete(attention(a, b, v, neighbors, scale, t), 3, 1))


def test_the_gated_body_of_no_image_is_empty():
    nothing, lists, t = np.zeros((2, 0, 5), np.float32), np.zeros((1, 0, 4), np.int32), np.zeros((1, 0), np.float32)
    for cameras in (None, np.zeros(0, np.int32)):
        assert attention(nothing, nothing, nothing, lists, 1.0, t, cameras).shape == (2, 0, 5)


BODIES = [f for inputs in (4, 5, 6) for f in operators.functions(inputs=inputs)]


def name_of(function):
    return f"{function.name}-{len(function.input)}"


def test_bodies_hold_no_square_matrix():
    """Nothing in a body may depend on N twice: every MatMul stands inside the Scan, where rows are a block's."""
    for function in BODIES:
        scans = [n for n in function.node if n.op_type == "Scan"]
        assert len(scans) == 1
        assert scans[0].input[0] == "keys"
        assert not [n for n in function.node if n.op_type in ("MatMul", "Gemm", "TopK")]


@pytest.mark.parametrize("opset", operators.OPSETS)
def test_bodies_import_the_opset_of_their_model(opset):
    for function in operators.functions(opset):
        assert [(o.domain, o.version) for o in function.opset_import] == [("", opset)]
        assert function.domain == DOMAIN
    assert {f.name for f in operators.functions(opset)} == {ROW_TOP_K, RECIPROCAL_NEIGHBOR_ATTENTION}


@pytest.mark.parametrize("opset", [7, 17, 21])
def test_an_unknown_opset_is_refused_by_name(opset):
    with pytest.raises(UsageError, match=rf"opset: got {opset}, expected 18 \| 19 \| 20"):
        operators.functions(opset)


def nodes_of(graph):
    for node in graph:
        yield node
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from nodes_of(attribute.g.node)


@pytest.mark.parametrize("function", BODIES, ids=name_of)
def test_constants_are_value_tensors_but_for_attributes_which_are_cast_at_once(function):
    nodes = list(nodes_of(function.node))
    for node in (n for n in nodes if n.op_type == "Constant"):
        (attribute,) = node.attribute
        readers = {n.op_type for n in nodes if node.output[0] in n.input}
        assert attribute.name == "value" or (attribute.ref_attr_name and readers == {"Cast"})


@pytest.mark.parametrize("function", BODIES, ids=name_of)
def test_a_scan_body_captures_no_value(function):
    (scan,) = (node for node in function.node if node.op_type == "Scan")
    body = next(a.g for a in scan.attribute if a.name == "body")
    made = {value.name for value in body.input} | {name for node in body.node for name in node.output}
    assert {name for node in body.node for name in node.input} <= made


_PARSE = """
import sys
import tensorrt_rtx as trt
logger = trt.Logger(trt.Logger.ERROR)
network = trt.Builder(logger).create_network(0)
parser = trt.OnnxParser(network, logger)
assert parser.parse(sys.stdin.buffer.read()), [str(parser.get_error(i)) for i in range(parser.num_errors)]
print(tuple(network.get_output(0).shape))
"""


@pytest.mark.optional
@pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason="no package tensorrt_rtx to parse with")
@pytest.mark.parametrize("inputs", ["a, b, v, n", "a, b, v, n, t", "a, b, v, n, t, c"])
def test_tensorrt_rtx_parses_every_variant_of_the_attention(inputs):
    taken = inputs.count(",") + 1
    given = "float[2, N, 5] a, float[2, N, 5] b, float[2, N, 9] v, int32[1, N, 4] n, float[1, N] t, int32[N] c"
    node = f"y = nformer.ReciprocalNeighborAttention <scale = 1.0> ({inputs})"
    versions = f'"": 18, "nformer": {OPSET_VERSION if taken == 4 else GATED_OPSET_VERSION}'
    model = onnx.parser.parse_model(
        f"<ir_version: 9, opset_import: [{versions}]> g ({given}) => (float[2, N, 9] y) {{ {node} }}"
    )
    model.functions.extend(operators.functions(inputs=taken))
    command = [sys.executable, "-c", _PARSE]  # TensorRT writes to standard error, and a fault of it would end the tests
    done = subprocess.run(command, input=model.SerializeToString(), capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout.decode().strip() == "(2, -1, 9)"
