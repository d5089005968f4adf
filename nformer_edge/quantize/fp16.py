"""FP16 as types in the graph: what a strongly typed network of TensorRT 10, 11 or TensorRT-RTX takes as it stands.

The policy. In the backbone everything is FP16 but the norms that stayed nodes of their own (IBN's), the last pooling
and the neck: a neck subtracts a mean that is large against what it leaves. In the head the multiplications
with a constant weight are FP16, and all else is FP32: L2 norm, layer norms, the affinities and their factors, both
custom operators (softmax among them), residual sums, and GELU, whose cube leaves FP16's range at 40. Multiplications
accumulate in float32.
That is the least: `quantize.overflow` finds what else FP16 would not hold, on real images.

The pass is ours: `onnxconverter-common` and `onnxruntime.transformers.float16` know no local functions, cast around
nodes of a foreign domain by the wrong type, and take op types where a policy is about places.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, TensorProto, TypeProto, helper, numpy_helper, version_converter

from nformer_edge.core.errors import ArtifactError, BackendError
from nformer_edge.exporting.session import open_session
from nformer_edge.ops.contract import DOMAIN

#: Convolutions and matrix multiplications: what precision is about.
MULTIPLICATIONS = ("Conv", "Gemm", "MatMul")

#: From the backbone's output back to its last pooling.
_TAIL = (
    *("Flatten", "Gemm", "MatMul", "Relu", "Identity", "BatchNormalization", "Reshape", "Squeeze", "Add", "Mul"),
    "LpNormalization",
)

#: A pooling, and what generalized-mean pooling (GeM) is made of besides: powers reach far beyond FP16.
_POOLINGS = ("GlobalAveragePool", "ReduceMean")
_POWERS = ("Pow", "Clip", "Max", "Reciprocal")

_NORMS = ("InstanceNormalization", "LayerNormalization", "GroupNormalization", "LpNormalization")

#: Scales of Q/DQ may be float16 from this opset on.
_HALF_SCALES = 19


def makers(model: ModelProto) -> dict[str, NodeProto]:
    """Which node makes a tensor."""
    return {name: node for node in model.graph.node for name in node.output}


def drop_unused(model: ModelProto) -> None:
    """Drops the constants that no node reads."""
    used = {name for node in model.graph.node for name in node.input}
    kept = [t for t in model.graph.initializer if t.name in used]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)


def backbone_float32(model: ModelProto) -> set[str]:
    """Names of the nodes that stay FP32: what normalizes pixels, norms, and from the last pooling (GeM with its powers)
    to the output."""
    made_by = makers(model)
    kept = {node.name for node in model.graph.node if node.op_type in _NORMS} | set(pixel_nodes(model))
    tail: tuple[str, ...] = _TAIL + _POWERS + _POOLINGS
    waiting = [(o.name, tail) for o in model.graph.output]
    while waiting:
        name, wanted = waiting.pop()
        node = made_by.get(name)
        if node is None or node.name in kept or node.op_type not in wanted:
            continue
        kept.add(node.name)
        before = _POWERS if node.op_type in _POOLINGS or wanted is not tail else tail
        waiting += [(name, before) for name in node.input]
    return kept


def pixel_nodes(model: ModelProto) -> list[str]:
    """Names of the nodes between uint8 images and the first multiplication: they make the model's numbers of pixels."""
    inputs = [i.name for i in model.graph.input if i.type.tensor_type.elem_type == TensorProto.UINT8]
    made, names = set(inputs), []
    for node in model.graph.node if inputs else ():
        if node.op_type not in (*MULTIPLICATIONS, "QuantizeLinear") and made & set(node.input):
            made |= set(node.output)
            names.append(node.name)
    return names


def head_float16(model: ModelProto) -> set[str]:
    """Names of the head's nodes that become FP16: multiplications with a constant weight."""
    constants = {t.name for t in model.graph.initializer}
    return {n.name for n in model.graph.node if n.op_type in ("Gemm", "MatMul") and set(n.input[:2]) & constants}


def unfit_weights(model: ModelProto) -> dict[str, str]:
    """Of the nodes with a constant that FP16 does not hold, by name, why: they stay FP32, whatever the policy."""
    beyond = {}
    for tensor in model.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT:
            values = numpy_helper.to_array(tensor)
            if values.size and not np.abs(values).max() <= np.finfo(np.float16).max:
                beyond[tensor.name] = f"a constant of {np.abs(values).max():.3g}"
    return {n.name: beyond[name] for n in model.graph.node for name in n.input if name in beyond}


def multiplication_types(model: ModelProto) -> dict[str, str]:
    """``int8``, ``fp16`` or ``fp32`` of each multiplication and custom node, by its name, as the graph's types say."""
    typed = {**_types(model), **{t.name: t.data_type for t in model.graph.initializer}}
    made_by = makers(model)
    found = {}
    for node in model.graph.node:
        if node.op_type in MULTIPLICATIONS or node.domain == DOMAIN:
            quantized = all(n in made_by and made_by[n].op_type == "DequantizeLinear" for n in node.input[:2])
            half = typed.get(node.input[0]) == TensorProto.FLOAT16
            found[node.name] = "int8" if quantized else "fp16" if half else "fp32"
    return found


def to_half(model: ModelProto, nodes: Iterable[str]) -> ModelProto:
    """A copy in which `nodes` compute in FP16, with casts where FP32 and FP16 meet; inputs and outputs stay FP32.

    Args:
        model: a float32 graph, with Q/DQ or without; local functions are left as they are, and so are their nodes.
        nodes: names of nodes of its main graph.

    Raises:
        ArtifactError: for a weight beyond FP16's range.
    """
    half = set(nodes)
    if any(n.op_type in ("QuantizeLinear", "DequantizeLinear") and n.name in half for n in model.graph.node):
        model = version_converter.convert_version(model, max(_HALF_SCALES, _opset(model)))
    return _Halving(model, half).run()


def _opset(model: ModelProto) -> int:
    return next(o.version for o in model.opset_import if o.domain in ("", "ai.onnx"))


def holds_half(model: ModelProto) -> bool:
    """Whether any tensor of the main graph is FP16, as far as onnx can tell."""
    return TensorProto.FLOAT16 in (*_types(model).values(), *(t.data_type for t in model.graph.initializer))


def for_cpu(model: ModelProto) -> ModelProto:
    """A copy of a graph with FP16 types that onnxruntime computes on a CPU with every rounding that the types say.

    It has few FP16 kernels there: it casts around the others, then drops casts that follow one another, and with them
    the rounding; where FP16 overflows, such a run shows nothing. Two Identities behind each FP16 tensor keep them
    apart: one alone, between nodes that it casts around, it would compute in float32 too. The multiplications are still
    summed in float32. To be run with onnxruntime's optimizations switched off.
    """
    held = ModelProto()
    held.CopyFrom(model)
    types = _types(model)
    del held.graph.node[:]
    for node in model.graph.node:
        copy = held.graph.node.add()
        copy.CopyFrom(node)
        for i, name in enumerate(node.output):
            if types.get(name) == TensorProto.FLOAT16:
                copy.output[i], between = f"{name}_computed", f"{name}_rounded"
                for source, made in ((copy.output[i], between), (between, name)):
                    held.graph.node.append(helper.make_node("Identity", [source], [made], name=f"{made}/Identity"))
    return held


def plain_features(graph: bytes, images: np.ndarray) -> np.ndarray:
    """What a quantized backbone's arithmetic gives, each node for itself on the CPU.

    With onnxruntime's optimizations its INT8 kernels would take over, whose 16-bit sums saturate on CPUs without VNNI.
    What the graph holds in FP16 is rounded to it, and overflows as it does there: see `for_cpu`.

    Args:
        graph: an ONNX file.
        images: float32 [B, 3, H, W].

    Returns:
        float32 [B, D].

    Raises:
        BackendError: if a number is not finite: a device would give the same, and the self-test could pass nowhere.
    """
    model = for_cpu(onnx.load_from_string(graph))
    session = open_session(model.SerializeToString(), "backbone", optimize=False)
    features = np.asarray(session.run(["features"], {"images": images})[0])
    lost = int((~np.isfinite(features)).any(axis=1).sum())
    if lost:
        got = f"{lost} of {len(features)} golden images whose features overflow FP16"
        raise BackendError("backbone", got, "none", "Build it in FP32, or in INT8 without FP16.")
    return features


def tensor_types(model: ModelProto) -> dict[str, TypeProto.Tensor]:
    """Type and shape of each tensor of the main graph that are known, but for initializers."""
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=False)
    infos = (*inferred.graph.value_info, *inferred.graph.input, *inferred.graph.output)
    return {info.name: info.type.tensor_type for info in infos}


def _types(model: ModelProto) -> dict[str, int]:
    return {name: found.elem_type for name, found in tensor_types(model).items()}


class _Halving:
    def __init__(self, model: ModelProto, half: set[str]) -> None:
        self._half = half
        self._result = ModelProto()
        self._result.CopyFrom(model)
        del self._result.graph.value_info[:], self._result.graph.node[:]
        self._nodes = list(model.graph.node)
        self._floats = {name for name, kind in _types(model).items() if kind == TensorProto.FLOAT}
        self._weights = {t.name: t for t in model.graph.initializer if t.data_type == TensorProto.FLOAT}
        self._outputs = {o.name for o in model.graph.output}
        self._made_half: dict[str, str] = {}  # of a tensor that an FP16 node makes: what it is called now
        self._cast: dict[tuple[str, int], str] = {}

    def run(self) -> ModelProto:
        for node in self._nodes:
            copy = NodeProto()
            copy.CopyFrom(node)
            for i, name in enumerate(node.input):
                copy.input[i] = self._as_half(name) if node.name in self._half else self._as_float(name)
            if node.name in self._half:
                for i, name in enumerate(node.output):
                    if name in self._floats:
                        self._made_half[name] = copy.output[i] = f"{name}_fp16" if name in self._outputs else name
            self._result.graph.node.append(copy)
        for name in self._outputs & set(self._made_half):
            self._result.graph.node.append(_cast(self._made_half[name], name, TensorProto.FLOAT))
        drop_unused(self._result)
        return self._result

    def _as_half(self, name: str) -> str:
        if name in self._made_half:
            return self._made_half[name]
        if name in self._weights:
            return self._half_weight(name)
        return self._converted(name, TensorProto.FLOAT16) if name in self._floats else name

    def _as_float(self, name: str) -> str:
        made = self._made_half.get(name)
        return self._converted(made, TensorProto.FLOAT) if made is not None else name

    def _converted(self, name: str, kind: int) -> str:
        if (name, kind) not in self._cast:
            made = f"{name}_as_{'fp16' if kind == TensorProto.FLOAT16 else 'fp32'}"
            self._cast[name, kind] = made
            self._result.graph.node.append(_cast(name, made, kind))
        return self._cast[name, kind]

    def _half_weight(self, name: str) -> str:
        made = f"{name}_fp16"
        if (name, TensorProto.FLOAT16) not in self._cast:
            values = numpy_helper.to_array(self._weights[name])
            if values.size and not np.abs(values).max() <= np.finfo(np.float16).max:
                got = f"a weight of {np.abs(values).max():g}"
                raise ArtifactError(name, got, "at most 65504, FP16's largest", "Build it in FP32.")
            self._cast[name, TensorProto.FLOAT16] = made
            self._result.graph.initializer.append(numpy_helper.from_array(values.astype(np.float16), made))
        return made


def _cast(source: str, made: str, kind: int) -> NodeProto:
    return helper.make_node("Cast", [source], [made], name=f"{made}/Cast", to=kind)
