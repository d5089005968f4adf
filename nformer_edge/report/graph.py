"""An ONNX graph to look into: where a tensor comes from, its values in stock onnxruntime, and what rounding costs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, TypeProto, ValueInfoProto, helper, numpy_helper, shape_inference

from nformer_edge.exporting.session import open_session
from nformer_edge.ops.contract import DOMAIN
from nformer_edge.quantize.fp16 import for_cpu, holds_half, makers

#: Operators that only say how a tensor is held. A build puts them in; they are nobody's work.
_CARRIERS = ("QuantizeLinear", "DequantizeLinear", "Cast")

#: Attributes that a prepared graph has for TensorRT's parser alone.
_PARSERS = ("plugin_version", "plugin_namespace")

#: Types of what only a build in a lower precision has.
_LOWER = (TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.INT8, TensorProto.UINT8)


class Graph:
    """A model's main graph.

    One with FP16 tensors is computed with every rounding that its types say, node by node: `quantize.fp16.for_cpu`. Any
    other runs as onnxruntime serves it, in its integer kernels where it has them.

    Args:
        model: with local functions for nodes of ours; they are taken from `like` where it has none.
        like: another graph of the same model. Carriers that it has too are work like any other node.
    """

    def __init__(self, model: ModelProto, like: ModelProto | None = None) -> None:
        self.model = _runnable(model, like)
        self.constants = {t.name: t for t in model.graph.initializer}
        self.inputs = {i.name for i in model.graph.input} - set(self.constants)
        self.makers = makers(self.model)
        self._fixed = {*self.constants, *(n.output[0] for n in self.model.graph.node if n.op_type == "Constant")}
        self._half = holds_half(self.model)
        shared = {n.name for n in like.graph.node} if like is not None else {n.name for n in model.graph.node}
        self._carriers = {n.name for n in self.model.graph.node if n.op_type in _CARRIERS and n.name not in shared}
        self.rounded: dict[str, tuple[NodeProto, NodeProto]] = {}  # a tensor -> the Q and the DQ that its readers see
        for node in self.model.graph.node:
            source = self.makers.get(node.input[0]) if node.op_type == "DequantizeLinear" else None
            if source is not None and source.op_type == "QuantizeLinear":
                self.rounded.setdefault(self.origin(source.input[0]), (source, node))

    def origin(self, name: str) -> str:
        """The tensor that `name` holds in another form: back through quantization and casts to who computed it."""
        while (maker := self.makers.get(name)) is not None and maker.name in self._carriers:
            name = maker.input[0]
        return name

    def maker(self, name: str) -> NodeProto | None:
        """Who computes a tensor; None for an input or a constant."""
        return self.makers.get(self.origin(name))

    def reads(self, node: NodeProto) -> list[str]:
        """The tensors that a node computes from, as their makers call them; constants are left out."""
        return [name for name in (self.origin(n) for n in node.input if n) if name not in self._fixed]

    def has(self, name: str) -> bool:
        """Whether the graph computes, or is given, a tensor of this name."""
        return name in self.makers or name in self.inputs

    def carried(self) -> list[str]:
        """Tensors that hang on the inputs' values, in the order of computation; shapes and constants are none."""
        known, found = set(self.inputs), []
        for node in self.model.graph.node:
            if node.op_type not in ("Shape", "Size") and known & set(node.input):
                known |= set(node.output)
                found += [name for name in node.output if name]
        return found

    def values(self, names: Sequence[str], feed: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The tensors `names` as their readers see them: quantized and back where the graph does that.

        Only what they hang on is computed, and a quantized tensor is looked at behind its Q, where looking does not
        keep onnxruntime from its integer kernels.
        """
        return self._run(list(self.model.graph.node), names, feed, {}) if names else {}

    def alone(self, name: str, given: Mapping[str, np.ndarray], feed: Mapping[str, np.ndarray]) -> np.ndarray:
        """`name` as its maker computes it from the values `given` of tensors that it reads, and from `feed`."""
        types = self._inferred()
        kinds = {n: types[n].elem_type if n in types else TensorProto.FLOAT for n in given if n not in self.inputs}
        nodes = [n for n in self.model.graph.node if not set(n.output) & kinds.keys()]
        typed = {n: v.astype(helper.tensor_dtype_to_np_dtype(kinds[n])) if n in kinds else v for n, v in given.items()}
        return self._run(nodes, [name], {**feed, **typed}, kinds)[name]

    def groups(self, names: Sequence[str], samples: int, limit: int) -> list[list[str]]:
        """`names` in their order, in lists whose values take at most `limit` bytes, or hold one name.

        `samples` is what a free dimension stands for, such as the batch.
        """
        inferred = self._inferred()
        found: list[list[str]] = []
        room = 0
        for name in names:
            dims = inferred[name].shape.dim if name in inferred else ()
            size = 4 * math.prod(d.dim_value or samples for d in dims)
            if not found or size > room:
                found.append([])
                room = limit
            found[-1].append(name)
            room -= size
        return found

    def _inferred(self) -> dict[str, TypeProto.Tensor]:
        """Type and shape of each tensor, as far as onnx can tell."""
        inferred = shape_inference.infer_shapes(self.model, strict_mode=False).graph
        infos = (*inferred.value_info, *inferred.input, *inferred.output)
        return {info.name: info.type.tensor_type for info in infos if info.type.tensor_type.elem_type}

    def _run(
        self, nodes: list[NodeProto], names: Sequence[str], feed: Mapping[str, np.ndarray], kinds: Mapping[str, int]
    ) -> dict[str, np.ndarray]:
        wanted = {}
        for name in names:
            if (pair := self.rounded.get(self.origin(name))) is None:
                wanted[name] = name
                continue
            seen = helper.make_node("DequantizeLinear", [pair[0].output[0], *pair[1].input[1:]], [f"{name}/seen"])
            seen.attribute.extend(pair[1].attribute)
            nodes = [*nodes, seen]
            wanted[name] = seen.output[0]
        given = [*self.model.graph.input, *(helper.make_tensor_value_info(n, k, None) for n, k in kinds.items())]
        model = _pruned(self.model, nodes, given, set(wanted.values()))
        if self._half:
            model = for_cpu(model)
        session = open_session(model.SerializeToString(), "layers", optimize=not self._half)
        taken = {i.name for i in session.get_inputs()}
        found = session.run(list(wanted.values()), {n: v for n, v in feed.items() if n in taken})
        return dict(zip(names, found, strict=True))


def _runnable(model: ModelProto, like: ModelProto | None) -> ModelProto:
    """A copy that stock onnxruntime runs: nodes of our domain have their bodies, every node has a name."""
    copy = ModelProto()
    copy.CopyFrom(model)
    if like is not None and not copy.functions:
        copy.functions.extend(like.functions)
    for i, node in enumerate(copy.graph.node):
        node.name = node.name or f"{node.op_type} {i}"
        if node.domain == DOMAIN:
            kept = [a for a in node.attribute if a.name not in _PARSERS]
            del node.attribute[:]
            node.attribute.extend(kept)
    return copy


def _pruned(
    model: ModelProto, nodes: Sequence[NodeProto], inputs: Sequence[ValueInfoProto], outputs: set[str]
) -> ModelProto:
    """A model of those `nodes`, `inputs` and constants of `model` that `outputs` hang on."""
    kept, needed = [], set(outputs)
    for node in reversed(nodes):  # readers before makers: a file stands in the order of computation
        if needed & set(node.output):
            kept.append(node)
            needed |= set(node.input)
    given = [i for i in inputs if i.name in needed]
    found = [helper.ValueInfoProto(name=name) for name in sorted(outputs)]  # onnxruntime finds their types
    constants = [t for t in model.graph.initializer if t.name in needed]
    graph = helper.make_graph(kept[::-1], model.graph.name, given, found, constants)
    versions = {"opset_imports": model.opset_import, "ir_version": model.ir_version}
    return helper.make_model(graph, **versions, functions=model.functions)


def constant(graph: Graph, name: str) -> np.ndarray | None:
    """The values of an initializer or of a Constant node's output; None for anything else."""
    maker, held = graph.makers.get(name), graph.constants.get(name)
    if maker is not None and maker.op_type == "Constant" and maker.attribute[0].name == "value":
        held = maker.attribute[0].t
    return None if held is None else numpy_helper.to_array(held)


def is_rounded(engine: Graph) -> bool:
    """Whether anything in the graph is held in a lower precision than float32."""
    return bool(engine.rounded) or any(t.data_type in _LOWER for t in engine.constants.values())


def fake_quantized(reference: Graph, engine: Graph, ranges: Mapping[str, tuple[float, float]]) -> ModelProto:
    """The engine's graph with the reference's constants, rounded as the engine rounds its own: what rounding costs.

    `ranges` are the lowest and highest value, in the reference on the images that are compared, of each tensor that the
    engine quantizes. The distance from the reference is what the precision costs when nothing is wrong with the build.
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
