"""Files that refer outside themselves are refused by their bytes, wherever in the graph the reference hides."""

from __future__ import annotations

import contextlib

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from nformer_edge.core.errors import ArtifactError
from nformer_edge.exporting.wire import refuse_outside


def outside() -> TensorProto:
    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[4], data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="offset", value="0")
    tensor.external_data.add(key="location", value="weights.bin")
    return tensor


def model(*nodes: onnx.NodeProto, initializers=(), functions=()) -> bytes:
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, [4]) for n in "xy")
    graph = helper.make_graph(list(nodes), "g", [x], [y], list(initializers))
    return helper.make_model(graph, functions=list(functions)).SerializeToString()


ADD = helper.make_node("Add", ["x", "w"], ["y"])


def branch() -> onnx.GraphProto:
    constant = helper.make_node("Constant", [], ["w"], value=outside())
    return helper.make_graph([constant], "b", [], [helper.make_tensor_value_info("w", TensorProto.FLOAT, [4])])


def function() -> onnx.FunctionProto:
    nodes = [helper.make_node("Constant", [], ["w"], value=outside()), ADD]
    return helper.make_function("nformer", "F", ["x"], ["y"], nodes, [helper.make_opsetid("", 18)])


HIDDEN = {
    "an initializer": lambda: model(ADD, initializers=[outside()]),
    "a constant's value": lambda: model(helper.make_node("Constant", [], ["w"], value=outside()), ADD),
    "a branch of an If": lambda: model(
        helper.make_node("If", ["c"], ["w"], then_branch=branch(), else_branch=branch())
    ),
    "a function's body": lambda: model(helper.make_node("F", ["x"], ["y"], domain="nformer"), functions=[function()]),
    "a sparse constant": lambda: model(
        helper.make_node("Constant", [], ["w"], sparse_value=onnx.SparseTensorProto(values=outside(), dims=[4])), ADD
    ),
}


@pytest.mark.parametrize("place", HIDDEN)
def test_tensors_in_another_file_are_refused_wherever_they_hide(place: str) -> None:
    with pytest.raises(ArtifactError, match="another file"):
        refuse_outside(HIDDEN[place](), "m.onnx")


def test_operators_that_may_name_files_are_refused() -> None:
    node = helper.make_node(
        "EPContext", ["x"], ["y"], domain="com.microsoft", ep_cache_context="engine.bin", embed_mode=0
    )
    with pytest.raises(ArtifactError, match=r"domain 'com\.microsoft'"):
        refuse_outside(model(node), "m.onnx")


def test_a_tensor_that_only_holds_the_words_is_taken() -> None:
    words = np.frombuffer(b"\x0a\x08location\x12\x0bweights.bin ", np.uint8)
    refuse_outside(model(ADD, initializers=[numpy_helper.from_array(words, "w")]), "m.onnx")


@pytest.mark.parametrize("cut", range(1, 40))
def test_what_is_cut_short_is_an_error_of_ours(cut: int) -> None:
    whole = model(ADD, initializers=[numpy_helper.from_array(np.ones(4, np.float32), "w")])
    with contextlib.suppress(ArtifactError):  # a cut between two fields leaves a readable file
        refuse_outside(whole[:-cut], "m.onnx")


def test_the_graphs_of_a_bundle_are_taken(tiny_bundle) -> None:
    for name in ("backbone.onnx", "nformer.onnx"):
        refuse_outside((tiny_bundle / name).read_bytes(), name)
