"""The search for numbers beyond FP16: what it measures, and that what it finds is what breaks an FP16 graph."""

from __future__ import annotations

import math

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from nformer_edge.core.errors import BackendError
from nformer_edge.exporting.session import open_session
from nformer_edge.metrics.agreement import cosines
from nformer_edge.quantize.fp16 import backbone_float32, for_cpu, head_float16, plain_features, to_half, unfit_weights
from nformer_edge.quantize.overflow import measure_reach
from nformer_edge.quantize.values import LARGEST, MARGIN, SMALLEST, Overflow, Reach, Searched


def unfit(reach):
    return Overflow(Searched(1, ""), {"part": reach}).unfit("part")


def run(model, feed):
    """Each node for itself, rounded to the types that the graph has."""
    session = open_session(for_cpu(model).SerializeToString(), "graph", threads=1, optimize=False)
    return session.run(None, feed)[0]


def graph_of(nodes, shape, *constants):
    """A float32 model from "x" to "y"."""
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, size) for name, size in (("x", shape), ("y", None))]
    graph = helper.make_graph(
        nodes, "g", ends[:1], ends[1:], [numpy_helper.from_array(np.asarray(v), n) for n, v in constants]
    )
    return helper.make_model(graph, ir_version=9, opset_imports=[helper.make_opsetid("", 18)])


def f32(*values):
    return np.array(values, np.float32)


def test_a_products_sums_are_measured_whatever_their_order():
    """1000 - 1000 is 0, and half-way it was 1000."""
    node = helper.make_node("Gemm", ["x", "w", "b"], ["y"], name="m", transB=1)
    model = graph_of([node], [2, 2], ("w", f32([1, 1])), ("b", f32(-3)))
    reach = measure_reach(model, [{"x": f32([1000, -1000], [0, 0])}, {"x": f32([2, -2], [0.5, 0])}])
    assert reach == {"m": Reach("Gemm", tensors=1000.0, sums=2003.0, faintest=0.5)}


@pytest.mark.parametrize(
    ("node", "constants", "sums"),
    [
        (helper.make_node("ReduceL2", ["x", "axes"], ["y"], name="m"), [("axes", np.array([1]))], 25.0),
        (helper.make_node("LpNormalization", ["x"], ["y"], name="m", axis=1), [], 25.0),
        (helper.make_node("LayerNormalization", ["x", "g"], ["y"], name="m"), [("g", f32(1, 1))], 25.0),
        (helper.make_node("ReduceMean", ["x", "axes"], ["y"], name="m"), [("axes", np.array([1]))], 7.0),
    ],
    ids=lambda value: getattr(value, "op_type", ""),
)
def test_squares_under_a_norm_and_sums_under_a_mean_are_measured(node, constants, sums):
    model = graph_of([node], [2, 2], *constants)
    found = measure_reach(model, [{"x": f32([3, -4], [1, 1])}])["m"]
    assert found.sums == sums
    assert found.tensors >= 4


def test_a_faint_row_is_found_and_a_row_of_zeros_is_not():
    model = graph_of([helper.make_node("Relu", ["x"], ["y"], name="m")], [3, 2])
    assert measure_reach(model, [{"x": f32([1, 1], [0, 0], [1e-6, 1e-7])}])["m"].faintest == pytest.approx(1e-6)
    assert measure_reach(model, [{"x": f32([0, 0], [0, 0], [0, 0])}])["m"].faintest == math.inf


def test_squares_that_vanish_are_found_though_what_is_squared_does_not():
    node = helper.make_node("ReduceL2", ["x", "axes"], ["y"], name="m")
    model = graph_of([node], [1, 2], ("axes", np.array([1])))
    found = measure_reach(model, [{"x": f32([3e-4, 4e-4])}])
    assert found["m"].faintest == pytest.approx(25e-8)
    assert unfit(found) == {"m": "numbers down to 2.5e-07"}


@pytest.mark.parametrize(
    ("reach", "words"),
    [
        (Reach("Conv", 16376.0, 16376.0, 1.0), ""),
        (Reach("Conv", 16377.0, 1.0, 1.0), "numbers up to 1.64e+04"),
        (Reach("Conv", 1.0, 5e5, 1.0), "sums up to 5e+05"),
        (Reach("Relu", 1.0, 0.0, 1e-5), "numbers down to 1e-05"),
        (Reach("Relu", math.nan, 0.0, 1.0), "numbers up to nan"),
        (Reach("Relu", math.inf, 0.0, 1.0), "numbers up to inf"),
    ],
)
def test_a_node_is_in_trouble_a_margin_before_fp16_ends(reach, words):
    assert (LARGEST / MARGIN, SMALLEST * MARGIN) == (16376, 2**-12)
    assert reach.trouble() == words


@pytest.fixture(scope="module")
def golden(tiny_bundle):
    with np.load(tiny_bundle / "golden.npz") as z:
        return dict(z)


@pytest.fixture(scope="module")
def scaled(tiny_bundle):
    """A backbone that gives the same features through a layer 1e6 times too large: ReLU lets a scale pass."""
    model = onnx.load(tiny_bundle / "backbone.onnx")
    first = next(n for n in model.graph.node if n.op_type == "Conv")
    pooled = next(n for n in model.graph.node if n.op_type == "MaxPool").output[0]
    readers = [n for n in model.graph.node if pooled in n.input]
    assert {n.op_type for n in readers} == {"Conv"}
    factors = dict.fromkeys(first.input[1:], 1e6) | {n.input[1]: 1e-6 for n in readers}
    for tensor in model.graph.initializer:
        if tensor.name in factors:
            values = numpy_helper.to_array(tensor) * np.float32(factors[tensor.name])
            tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    return model


def halved(model, *kept):
    return to_half(model, {n.name for n in model.graph.node} - backbone_float32(model) - {*kept})


def test_a_layer_whose_numbers_leave_fp16_is_found_and_fp16_then_has_no_infinity(scaled, golden):
    images = {"images": golden["images"]}
    assert cosines(run(scaled, images), golden["features"]).min() >= 0.99999
    found = unfit(measure_reach(scaled, [images]))
    beyond = set(found) | set(unfit_weights(scaled))
    kinds = [n.op_type for n in scaled.graph.node if n.name in beyond]
    assert {"Conv", "Relu", "MaxPool"} == set(kinds)
    assert len(kinds) < 8  # the layer and its readers, and not the whole network
    assert "numbers up to" in found[next(n.name for n in scaled.graph.node if n.op_type == "MaxPool")]
    weights = set(unfit_weights(scaled))
    assert not np.isfinite(run(halved(scaled, *weights), images)).all()  # the policy alone
    features = run(halved(scaled, *beyond), images)
    assert np.isfinite(features).all()
    assert cosines(features, golden["features"]).min() >= 0.9995


@pytest.fixture(name="there_and_back")
def _there_and_back():
    """Four times a number, then a quarter of that: in float32 it comes back as it was."""
    nodes = [
        helper.make_node("MatMul", ["images", "up"], ["large"], name="up"),
        helper.make_node("MatMul", ["large", "down"], ["features"], name="down"),
    ]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 1]) for name in ("images", "features")]
    weights = [numpy_helper.from_array(f32([factor]), name) for name, factor in (("up", 4), ("down", 0.25))]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], weights)
    return helper.make_model(graph, ir_version=9, opset_imports=[helper.make_opsetid("", 18)])


@pytest.mark.parametrize(("number", "float16"), [(3.0, 3.0), (2049.0, 2048.0)])
def test_plain_features_are_rounded_as_the_types_say(there_and_back, number, float16, tmp_path):
    half = to_half(there_and_back, {"up", "down"})
    onnx.save(half, tmp_path / "half.onnx")
    assert plain_features(there_and_back.SerializeToString(), f32([number])) == number
    assert plain_features(half.SerializeToString(), f32([number])) == float16


def test_plain_features_that_overflow_are_refused(there_and_back):
    half = to_half(there_and_back, {"up", "down"}).SerializeToString()
    assert plain_features(there_and_back.SerializeToString(), f32([-20000.0])) == -20000
    with pytest.raises(BackendError, match="got 1 of 1 golden images whose features overflow FP16"):
        plain_features(half, f32([-20000.0]))


def test_nothing_is_found_where_fp16_holds(tiny_bundle, golden):
    model = onnx.load(tiny_bundle / "backbone.onnx")
    found = unfit(measure_reach(model, [{"images": golden["images"]}]))
    assert not set(found) - backbone_float32(model)
    head = onnx.load(tiny_bundle / "nformer.onnx")
    found = unfit(measure_reach(head, [head_feed(golden)]))
    assert not set(found) & head_float16(head)


def test_a_graph_that_has_fp16_already_is_searched_where_it_is_float32(tiny_bundle, golden):
    model = onnx.load(tiny_bundle / "backbone.onnx")
    reach = measure_reach(halved(model), [{"images": golden["images"]}])
    assert reach["/pool/GlobalAveragePool"].sums > 0
    assert "/trunk/maxpool/MaxPool" not in reach


def head_feed(golden, scale=1.0):
    return {"features": golden["head_input"] * np.float32(scale), "landmarks": golden["landmarks"]}


def ranks(embeddings):
    """For each row, all others by distance."""
    unit = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
    return np.argsort(-(unit @ unit.T), axis=1, kind="stable")


def overlap(found, expected, top=10):
    """Mean share of the nearest `top` that both have."""
    return np.mean([len({*a} & {*b}) / top for a, b in zip(found[:, :top], expected[:, :top], strict=True)])


@pytest.mark.parametrize("scale", [1e3, 1e-3])
def test_a_scaled_input_does_not_change_the_ranking_of_an_fp16_head(tiny_bundle, golden, scale):
    """The head brings features to length 1 itself, in FP32: what goes in may have any length."""
    head = onnx.load(tiny_bundle / "nformer.onnx")
    half = to_half(head, head_float16(head))
    plain, other = (run(half, head_feed(golden, s)) for s in (1.0, scale))
    np.testing.assert_allclose(other, plain, atol=2e-3)
    assert overlap(ranks(other), ranks(plain)) >= 0.99
    assert overlap(ranks(other), ranks(run(head, head_feed(golden)))) >= 0.99


@pytest.fixture(scope="module", params=["features", "affinity"])
def unscaled(request, tmp_path_factory):
    """A head that takes features as long as they come, as the published one does."""
    import torch

    from nformer_edge.core.spec import HeadSpec
    from nformer_edge.exporting.trace import trace_head
    from nformer_edge.model.nformer import NFormer

    spec = HeadSpec(features=32, layers=2, heads=2, k=4, landmarks=3, rule=request.param, input_scale="none")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return trace_head(NFormer(spec), 18)


@pytest.mark.parametrize("scale", [1e3, 1.0, 1e-3])
def test_a_head_that_takes_features_as_they_come_ranks_in_fp16_as_in_float32_at_every_scale(unscaled, golden, scale):
    """Its scores grow with the fourth power of the input, so no scale ranks as another; each must rank as in FP32."""
    feed = head_feed(golden, scale)
    found = unfit(measure_reach(unscaled, [feed]))
    half = to_half(unscaled, head_float16(unscaled) - found.keys())
    expected, output = run(unscaled, feed), run(half, feed)
    assert np.isfinite(output).all()
    assert overlap(ranks(output), ranks(expected)) >= 0.98


def test_products_of_landmark_affinities_are_seen_to_grow_with_the_fourth_power(unscaled, golden):
    scores = {}
    for scale in (1e2, 1e3):
        reach = measure_reach(unscaled, [head_feed(golden, scale)])
        first = next(n for n in unscaled.graph.node if n.op_type == "ReciprocalNeighborAttention")
        scores[scale] = reach[first.name].sums
    assert scores[1e3] / scores[1e2] == pytest.approx(1e4, rel=0.05)  # the projections' biases are not 0


def test_what_the_policy_alone_lets_through_is_found_in_a_head_of_long_features(unscaled, golden):
    """The operators never choose a score that is not finite: an overflow in front of them comes out as a wrong answer
    that looks like a right one."""
    feed = head_feed(golden, 1e6)
    expected, policy = run(unscaled, feed), run(to_half(unscaled, head_float16(unscaled)), feed)
    assert not cosines(policy, expected).min() >= 0.99
    found = unfit(measure_reach(unscaled, [feed]))
    beyond = head_float16(unscaled) & found.keys()
    assert beyond
    searched = run(to_half(unscaled, head_float16(unscaled) - beyond), feed)
    assert cosines(searched, expected).min() >= 0.9995
