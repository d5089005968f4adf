"""Surgery on exported graphs, by onnx-graphsurgeon: nodes for a plugin, constants folded, nodes taken apart.

What it does not carry over is carried here: it drops a model's metadata and doc string, and version 0.6.1 cannot write
a local function with an empty list among its attributes, which our operators' bodies have. So functions never reach it.

TensorRT 8 is told layer by layer, and by name, what must not lose FP32. Its parser makes several layers of some nodes
and gives the node's name to one of them, or to none: the squares under a ReduceL2, a Gemm's bias and, in 8.6, a whole
LayerNormalization go without (8.5 has none of these). So for TensorRT 8 these nodes are split until each is one layer.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx import ModelProto

from nformer_edge.backends.tensorrt.plugin.library import ATTENTIONS
from nformer_edge.ops.contract import DOMAIN, RECIPROCAL_NEIGHBOR_ATTENTION

Edit = Callable[[Any], None]


def operate(model: ModelProto, *edits: Edit) -> ModelProto:
    """A copy of `model` with `edits` made one after the other, sorted, and without what nobody reads.

    Local functions, metadata, opsets, and the names and types of inputs and outputs stay as they are.
    """
    typed = onnx.shape_inference.infer_shapes(model)  # `fold` computes with the sizes that are known
    del typed.functions[:]
    graph = gs.import_onnx(typed)
    for edit in edits:
        edit(graph)
    result: ModelProto = gs.export_onnx(graph.cleanup().toposort(), do_type_check=False)
    result.functions.extend(model.functions)
    result.metadata_props.extend(model.metadata_props)
    result.doc_string = model.doc_string
    kept = {name for node in result.graph.node if node.domain == DOMAIN for name in node.output}
    others = [info for info in result.graph.value_info if info.name not in kept]
    for info in others:  # what nobody can infer stays
        result.graph.value_info.remove(info)
    for node in result.graph.node:
        while node.input and not node.input[-1]:
            node.input.pop()
    return result


def fold(graph: Any) -> None:
    """Computes beforehand what hangs on no input's values: constants, and sizes that are the same for every input."""
    graph.fold_constants()


def name_plugins(namespace: str) -> Edit:
    """Makes our two operators' nodes name their plugin: by this the parser finds it, from TensorRT 10.15 on by both."""

    def name(graph: Any) -> None:
        for node in graph.nodes:
            if node.domain == DOMAIN:
                node.attrs |= {"plugin_version": "1", "plugin_namespace": namespace}
                if namespace and node.op == RECIPROCAL_NEIGHBOR_ATTENTION:
                    node.op = ATTENTIONS[len(node.inputs)]

    return name


def split_layer_norms(graph: Any) -> None:
    """Each LayerNormalization of an opset-17 graph becomes ten nodes, as in ONNX's own body of it."""
    for node in [n for n in graph.nodes if n.op == "LayerNormalization"]:
        x, scale, *bias = node.inputs
        axis = int(node.attrs.get("axis", -1))
        axes = list(range(axis if axis < 0 else axis - len(x.shape), 0))
        epsilon = gs.Constant(f"{node.name}/epsilon", np.array(node.attrs.get("epsilon", 1e-5), np.float32))
        split = _Split(graph, node)
        below = split("Sub", x, split("ReduceMean", x, axes=axes, keepdims=1))
        variance = split("ReduceMean", split("Mul", below, below), axes=axes, keepdims=1)
        unit = split("Div", below, split("Sqrt", split("Add", variance, epsilon)))
        scaled = split("Mul", unit, scale)
        split.ends_in(split("Add", scaled, bias[0]) if bias else scaled)


def split_l2_norms(graph: Any) -> None:
    """Each ReduceL2 of an opset-17 graph becomes squares, their sum and its root."""
    for node in [n for n in graph.nodes if n.op == "ReduceL2"]:
        x = node.inputs[0]
        split = _Split(graph, node)
        axes = gs.Constant(f"{node.name}/axes", np.array(node.attrs["axes"], np.int64))
        summed = split("ReduceSum", split("Mul", x, x), axes, keepdims=node.attrs.get("keepdims", 1))
        split.ends_in(split("Sqrt", summed))


def split_gemms(names: Collection[str]) -> Edit:
    """The edit that makes each of these Gemms a MatMul, which keeps the name, and an Add of the bias.

    Only those of a constant weight and factors of 1 are touched, as layers of a network are.
    """

    def edit(graph: Any) -> None:
        for node in [n for n in graph.nodes if n.op == "Gemm" and n.name in names]:
            x, weight, *bias = node.inputs
            attributes = node.attrs
            plain = attributes.get("alpha", 1.0) == attributes.get("beta", 1.0) == 1.0 and not attributes.get("transA")
            if not bias or not plain or not isinstance(weight, gs.Constant):
                continue
            if attributes.get("transB"):
                weight = gs.Constant(f"{weight.name}/transposed", np.ascontiguousarray(weight.values.T))
            split = _Split(graph, node)
            multiplied = split("MatMul", x, weight)
            multiplied.inputs[0].name = node.name
            split.ends_in(split("Add", multiplied, bias[0]))

    return edit


class _Split:
    """Adds nodes to stand for one, in its type; their names begin with its name."""

    def __init__(self, graph: Any, node: Any) -> None:
        self._graph, self._node, self._count = graph, node, 0

    def __call__(self, kind: str, *inputs: Any, **attributes: object) -> Any:
        self._count += 1
        name = f"{self._node.name}/{kind}_{self._count}"
        made = gs.Variable(f"{name}_output", self._node.outputs[0].dtype)
        self._graph.nodes.append(gs.Node(kind, name, dict(attributes), list(inputs), [made]))
        return made

    def ends_in(self, last: Any) -> None:
        """The node that makes `last` makes what the split node made."""
        maker, output = last.inputs[0], self._node.outputs[0]
        self._node.outputs.clear()
        maker.outputs = [output]
