"""Channels filled up to whole blocks: the same numbers, and nothing else touched."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from nformer_edge.exporting.session import open_session
from nformer_edge.quantize.padding import BLOCK, pad_channels
from nformer_edge.quantize.placement_cpu import quantized_nodes, slower_nodes

IMAGES = np.random.default_rng(0).normal(0, 1, (2, 3, 64, 32)).astype(np.float32)


def run(model, images=IMAGES):
    return open_session(model.SerializeToString(), "graph", threads=1, optimize=False).run(None, {"images": images})[0]


@pytest.fixture(scope="module")
def backbone(tiny_bundle):
    return onnx.load(tiny_bundle / "backbone.onnx")


def widths(model):
    sizes = {t.name: t.dims[0] for t in model.graph.initializer}
    return {n.name: sizes[n.input[1]] for n in model.graph.node if n.op_type == "Conv"}


def test_padded_channels_change_no_feature(backbone):
    padded = pad_channels(backbone)
    onnx.checker.check_model(padded, full_check=True)
    expected = run(backbone)
    assert np.abs(run(padded) - expected).max() <= 1e-5 * np.abs(expected).max()
    assert [n.name for n in padded.graph.node] == [n.name for n in backbone.graph.node]
    changed = {
        (before, after) for before, after in zip(widths(backbone).values(), widths(padded).values(), strict=True)
    }
    assert (24, 32) in changed
    assert {pair for pair in changed if pair[0] != pair[1]} == {(24, 32)}
    assert pad_channels(padded) is None


def small(*middle, channels=20):
    """A convolution of 3 to `channels`, nodes from "a" to "b", and a convolution of as many to 4."""
    rng = np.random.default_rng(1)
    first, last = (rng.normal(size=s).astype(np.float32) for s in ((channels, 3, 1, 1), (4, channels, 1, 1)))
    nodes = [
        helper.make_node("Conv", ["images", "w"], ["a"], name="first"),
        *(helper.make_node(kind, read, [made], name=made, **how) for kind, read, made, how in middle),
        helper.make_node("Conv", ["b", "v"], ["features"], name="last"),
    ]
    given, made = (helper.make_tensor_value_info(n, 1, ["B", c, "H", "W"]) for n, c in (("images", 3), ("features", 4)))
    constants = [numpy_helper.from_array(first, "w"), numpy_helper.from_array(last, "v")]
    constants.append(numpy_helper.from_array(np.ones((1, channels, 1, 1), np.float32), "c"))
    graph = helper.make_graph(nodes, "small", [given], [made], constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def test_what_two_convolutions_share_is_padded_whole():
    model = small(("Relu", ["a"], "r", {}), ("Mul", ["a", "r"], "b", {}))
    padded = pad_channels(model)
    assert widths(padded) == {"first": 2 * BLOCK, "last": 4}
    assert np.array_equal(run(padded), run(model))


@pytest.mark.parametrize(
    "middle",
    [
        [("Add", ["a", "c"], "b", {})],  # a constant of as many channels
        [("ReduceMean", ["a"], "r", {"axes": [1]}), ("Mul", ["a", "r"], "b", {})],  # a map of one channel
        [("Split", ["a"], "r", {"axis": 1}), ("Identity", ["r"], "b", {})],
        [("InstanceNormalization", ["a", "c", "c"], "b", {})],
    ],
)
def test_channels_that_another_node_counts_are_left(middle):
    assert pad_channels(small(*middle)) is None


@pytest.mark.parametrize("channels", [4, BLOCK, 3 * BLOCK])
def test_whole_blocks_and_a_few_channels_are_left(channels):
    assert pad_channels(small(("Relu", ["a"], "b", {}), channels=channels)) is None


def test_nodes_that_int8_does_not_make_faster_are_named_with_those_that_follow_them(backbone):
    names = quantized_nodes(backbone)
    convolutions = [n.name for n in backbone.graph.node if n.op_type == "Conv" and n.name in names]
    one, two = dict.fromkeys(convolutions, 1.0), dict.fromkeys(convolutions, 2.0)
    gated = slower_nodes(backbone, one, two)  # sums of what the gates scaled, which is float
    assert {name.rpartition("/")[2].partition("_")[0] for name in gated} == {"Add"}
    assert set(slower_nodes(backbone, two, one)) == set(names)
    stem = convolutions[0]
    slow = set(slower_nodes(backbone, {**one, stem: 3.0}, two)) - set(gated)
    assert slow == {stem, "/trunk/conv1/relu/Relu", "/trunk/maxpool/MaxPool"}
