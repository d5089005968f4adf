"""Dynamic INT8 for a head on a CPU: linear layers quantize what they read anew in each run. Nothing is calibrated."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

from nformer_edge.quantize.fp16 import drop_unused


def quantize_linear_layers(model: ModelProto, *, reduce_range: bool = False) -> ModelProto:
    """A copy whose multiplications with a constant weight are dynamic INT8, in the form that onnxruntime fuses.

    Args:
        model: a head as it is exported.
        reduce_range: 7-bit weights, for x86 CPUs without VNNI, whose 16-bit sums of two u8 x s8 products saturate.

    Weights have one scale a channel, what is read has one a tensor.
    """
    result = ModelProto()
    result.CopyFrom(model)
    nodes, graph = list(model.graph.node), result.graph
    weights = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    del graph.node[:]
    done: set[str] = set()
    for node in nodes:
        if node.op_type not in ("Gemm", "MatMul") or node.input[1] not in weights:
            graph.node.append(node)
            continue
        read = node.input[0]
        if read not in done:
            done.add(read)
            names = [f"{read}/{what}" for what in ("int8", "scale", "zero")]
            graph.node.append(helper.make_node("DynamicQuantizeLinear", [read], names))
        graph.node.extend(_in_int8(node, weights, graph, 63 if reduce_range else 127))
    drop_unused(result)
    return result


def _in_int8(node: NodeProto, weights: Mapping[str, np.ndarray], graph: GraphProto, most: int) -> list[NodeProto]:
    transposed = any(a.name == "transB" and a.i for a in node.attribute)
    weight = weights[node.input[1]].T if transposed else weights[node.input[1]]
    scale = np.maximum(np.abs(weight).max(axis=0), np.finfo(np.float32).tiny).astype(np.float32) / np.float32(most)
    made, read = node.output[0], node.input[0]
    constants = {
        "weight": np.clip(np.rint(weight / scale), -most, most).astype(np.int8),
        "weight_scale": scale,
        "weight_zero": np.zeros(len(scale), np.int8),
    }
    for what, values in constants.items():
        graph.initializer.append(numpy_helper.from_array(values, f"{made}/{what}"))
    product = f"{made}/product" if len(node.input) > 2 else made
    inputs = [f"{read}/int8", f"{made}/weight", f"{read}/zero", f"{made}/weight_zero"]
    found = [
        helper.make_node("MatMulInteger", inputs, [f"{made}/sum"]),
        helper.make_node("Cast", [f"{made}/sum"], [f"{made}/float"], to=TensorProto.FLOAT),
        helper.make_node("Mul", [f"{read}/scale", f"{made}/weight_scale"], [f"{made}/scale"]),
        helper.make_node("Mul", [f"{made}/float", f"{made}/scale"], [product]),
    ]
    return [*found, *([helper.make_node("Add", [product, node.input[2]], [made])] if product != made else [])]
