"""Q/DQ nodes for TensorRT in a float backbone, from the ranges that serve onnxruntime too.

TensorRT fuses a multiplication with what follows it up to the next Q, so its form is not the CPU kernels': activations
are signed and symmetric, in front of each multiplication and nowhere behind one; biases stay in float; both branches of
a residual sum are quantized, so that the sum is fused with the convolution before it and passes int8 on; weights are
signed with one scale an output channel. What stays in float is the same as on the CPU.

On Market-1501 with the published OSNet x0.25 (64 calibration images, percentile, 40 queries), computed node by node in
onnxruntime, the cosine to FP32 is 0.990 at the lowest and 0.997 on average; 0.992 and 0.997 with FP16 types around the
convolutions; 0.992 and 0.997 with the CPU's placement of the same ranges.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
from onnx import ModelProto, NodeProto, helper, numpy_helper

from nformer_edge.quantize.fp16 import MULTIPLICATIONS, drop_unused, makers, multiplication_types
from nformer_edge.quantize.placement import as_exported, require_nodes
from nformer_edge.quantize.placement_cpu import excluded_multiplications, float_nodes, require_quantized
from nformer_edge.quantize.values import Ranges

#: The largest INT8 of a symmetric range.
_STEPS = 127.0


def place_for_tensorrt(model: ModelProto, ranges: Ranges, exclude: Collection[str] = ()) -> ModelProto:
    """A copy of a float backbone with Q/DQ nodes.

    Args:
        model: as `export` wrote it, float32.
        ranges: of its tensors.
        exclude: names of nodes that get none, beside those that never do.

    Raises:
        ArtifactError: if a tensor has no range, or less than half of the multiplications, not counting the excluded
            ones, came out quantized.
        UsageError: for a name in `exclude` that no node has.
    """
    model = as_exported(model)
    require_nodes(model, exclude)
    placed = _Placement(model, ranges, exclude).run()
    require_quantized(multiplication_types(placed), excluded_multiplications(model, exclude))
    return placed


def quantized_sums(model: ModelProto) -> list[str]:
    """Names of the residual sums: additions of two activations, one of them a convolution's own output."""
    constants = {t.name for t in model.graph.initializer}
    made_by = makers(model)

    def is_multiplication(name: str) -> bool:
        maker = made_by.get(name)
        return maker is not None and maker.op_type in MULTIPLICATIONS

    return [
        n.name
        for n in model.graph.node
        if n.op_type == "Add" and not set(n.input) & constants and any(is_multiplication(name) for name in n.input)
    ]


class _Placement:
    def __init__(self, model: ModelProto, ranges: Ranges, exclude: Collection[str]) -> None:
        self._ranges = ranges
        self._model = ModelProto()
        self._model.CopyFrom(model)
        self._weights = {t.name: t for t in model.graph.initializer}
        self._float = {*float_nodes(model), *exclude}
        self._sums = set(quantized_sums(model)) - self._float
        self._done: dict[str, str] = {}  # a tensor -> what stands for it behind Q and DQ

    def run(self) -> ModelProto:
        nodes = list(self._model.graph.node)
        del self._model.graph.node[:]
        for node in nodes:
            if node.op_type in MULTIPLICATIONS and node.name not in self._float and node.input[1] in self._weights:
                node.input[0] = self._activation(node.input[0])
                node.input[1] = self._weight(node)
            elif node.name in self._sums:
                for i, name in enumerate(node.input):
                    node.input[i] = self._activation(name)
            self._model.graph.node.append(node)
        drop_unused(self._model)
        del self._model.graph.value_info[:]
        return self._model

    def _activation(self, name: str) -> str:
        if name not in self._done:
            scale = np.asarray(half_scale(self._ranges.largest(name) / _STEPS), np.float32)
            quantized = f"{name}_int8"
            self._constant(f"{name}_scale", scale)
            self._constant(f"{name}_zero", np.zeros((), np.int8))
            self._add("QuantizeLinear", [name, f"{name}_scale", f"{name}_zero"], quantized)
            self._done[name] = self._dequantized(name, quantized)
        return self._done[name]

    def _weight(self, node: NodeProto) -> str:
        name = node.input[1]
        if name not in self._done:
            values = numpy_helper.to_array(self._weights[name])
            axis = _channels(node)
            others = tuple(i for i in range(values.ndim) if i != axis)
            scale = half_scale(np.abs(values).max(axis=others) / _STEPS)
            shape = [-1 if i == axis else 1 for i in range(values.ndim)]
            steps = np.clip(np.rint(values / scale.reshape(shape)), -_STEPS, _STEPS).astype(np.int8)
            self._constant(f"{name}_int8", steps)
            self._constant(f"{name}_scale", scale.astype(np.float32))
            self._constant(f"{name}_zero", np.zeros(scale.shape, np.int8))
            self._done[name] = self._dequantized(name, f"{name}_int8", axis=axis)
        return self._done[name]

    def _dequantized(self, name: str, quantized: str, **attributes: int) -> str:
        made = f"{name}_dequantized"
        self._add("DequantizeLinear", [quantized, f"{name}_scale", f"{name}_zero"], made, **attributes)
        return made

    def _constant(self, name: str, values: np.ndarray) -> None:
        self._model.graph.initializer.append(numpy_helper.from_array(values, name))

    def _add(self, kind: str, inputs: list[str], output: str, **attributes: int) -> None:
        self._model.graph.node.append(helper.make_node(kind, inputs, [output], name=f"{output}/{kind}", **attributes))


def half_scale(scale: np.ndarray | float) -> np.ndarray:
    """The smallest number of FP16 that is at least `scale`: in a graph of FP16 types the scales are FP16 too.

    Rounded up, no value leaves the range; rounded before the weights are divided by it, they lose nothing by it.
    """
    wanted = np.maximum(np.asarray(scale, np.float64), np.finfo(np.float16).smallest_subnormal)
    rounded = wanted.astype(np.float16)
    return np.where(rounded < wanted, np.nextafter(rounded, np.float16(np.inf)), rounded).astype(np.float32)


def _channels(node: NodeProto) -> int:
    """The axis of a weight's output channels."""
    if node.op_type == "Conv":
        return 0
    transposed = next((a.i for a in node.attribute if a.name == "transB"), 0)
    return 0 if transposed else 1
