"""What rounding alone costs: a build's graph with the constants that its float graph asks for.

Where a build quantizes or halves, this fake-quantized reference does so too, but its weights are the reference's,
rounded, and the range of each quantized activation is what the reference itself spans on the images that are compared.
Its distance from the reference is what the build's precision costs when nothing is wrong with it.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, numpy_helper

from nformer_edge.report.graph import Graph, constant

#: Types of what only a build in a lower precision has.
_LOWER = (TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.INT8, TensorProto.UINT8)


def is_rounded(engine: Graph) -> bool:
    """Whether anything in the graph is held in a lower precision than float32."""
    return bool(engine.rounded) or any(t.data_type in _LOWER for t in engine.constants.values())


def fake_quantized(reference: Graph, engine: Graph, ranges: Mapping[str, tuple[float, float]]) -> ModelProto:
    """The engine's graph with the reference's constants, rounded as the engine rounds its own.

    Args:
        reference: the float graph.
        engine: of the same model.
        ranges: lowest and highest value of each tensor that the engine quantizes.
    """
    model = ModelProto()
    model.CopyFrom(engine.model)
    named = {n.name: n for n in reference.model.graph.node}
    for node in model.graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            _rescale(model, engine, node, ranges)
        elif (same := named.get(node.name)) is not None:
            _reweigh(model, reference, engine, node, same)
    return model


def _rescale(model: ModelProto, engine: Graph, node: NodeProto, ranges: Mapping[str, tuple[float, float]]) -> None:
    """Gives a Q, or the DQ behind it, the scale and zero point of the reference's own range."""
    source = node if node.op_type == "QuantizeLinear" else engine.makers.get(node.input[0])
    if source is None or source.op_type != "QuantizeLinear" or len(node.input) < 3:
        return
    span = ranges.get(engine.origin(source.input[0]))
    old_scale, old_zero = (constant(engine, name) for name in node.input[1:3])
    if span is None or old_scale is None or old_zero is None or old_scale.size != 1:
        return
    scale, zero = steps(span, old_zero.dtype)
    for i, value in ((1, old_scale.dtype.type(scale)), (2, old_zero.dtype.type(zero))):
        node.input[i] = _added(model, f"{node.name}/{i}", np.broadcast_to(value, old_scale.shape).copy())


def steps(span: tuple[float, float], kind: np.dtype) -> tuple[float, int]:
    """Scale and zero point of a range: over all 256 steps for uint8, symmetric about 0 for int8."""
    low, high = min(span[0], 0.0), max(span[1], 0.0)
    tiny = float(np.finfo(np.float16).smallest_subnormal)
    if kind == np.int8:
        return max(max(-low, high) / 127, tiny), 0
    scale = max((high - low) / 255, tiny)
    return scale, round(-low / scale)


def _reweigh(model: ModelProto, reference: Graph, engine: Graph, node: NodeProto, same: NodeProto) -> None:
    """Gives a node the constants of the reference's node of the same name, in the engine's form."""
    for i, (name, ours) in enumerate(zip(list(node.input), same.input, strict=False)):
        wanted = constant(reference, ours) if ours else None
        if wanted is None or not name or wanted.dtype != np.float32:
            continue
        holder = engine.makers.get(name)
        if holder is not None and holder.op_type == "DequantizeLinear":
            value = _rounded_weight(engine, holder, wanted)
        else:
            held = constant(engine, name)
            value = wanted.astype(held.dtype) if held is not None and held.shape == wanted.shape else None
        if value is not None:
            node.input[i] = _added(model, f"{node.name}/{i}", value)


def _rounded_weight(engine: Graph, holder: NodeProto, wanted: np.ndarray) -> np.ndarray | None:
    """The reference's weight in the steps of a dequantized one, back in float. A bias, in int32, loses nothing."""
    held, scale = constant(engine, holder.input[0]), constant(engine, holder.input[1])
    if held is None or scale is None or held.shape != wanted.shape:
        return None
    if held.dtype == np.int32:
        return wanted.astype(scale.dtype)
    axis = next((a.i for a in holder.attribute if a.name == "axis"), 1)
    others = tuple(j for j in range(wanted.ndim) if scale.ndim == 0 or j != axis % wanted.ndim)
    top = 64 if np.abs(held.astype(np.int32)).max(initial=0) <= 64 else 127  # 7 bits for CPUs whose sums saturate
    step = np.maximum(np.abs(wanted).max(axis=others, keepdims=True, initial=0.0), 1e-12) / top
    return (np.rint(wanted / step) * step).astype(scale.dtype)


def _added(model: ModelProto, name: str, value: np.ndarray) -> str:
    model.graph.initializer.append(numpy_helper.from_array(value, name))
    return name
