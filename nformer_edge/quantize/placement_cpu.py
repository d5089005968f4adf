"""Static INT8 for the backbone as Q/DQ nodes, in the form that onnxruntime's CPU kernels want; what stays in float.

Unsigned activations (the kernels multiply u8 by s8), quantized biases, signed weights with one scale a channel.
TensorRT wants another form of the same ranges: `placement_tensorrt`. The head stays as it is: Q/DQ next to a Scan body
ends onnxruntime.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper
from onnxruntime.quantization import CalibrationMethod, QuantType
from onnxruntime.quantization.calibrate import TensorData, TensorsData
from onnxruntime.quantization.qdq_quantizer import QDQQuantizer

from nformer_edge.core.errors import ArtifactError
from nformer_edge.quantize.calibrate import CALIBRATED, with_shapes
from nformer_edge.quantize.fp16 import MULTIPLICATIONS, makers, multiplication_types, pixel_nodes
from nformer_edge.quantize.placement import Placement
from nformer_edge.quantize.values import Ranges


def quantize_backbone(
    backbone: bytes, ranges: Ranges, *, reduce_range: bool = False, exclude: Collection[str] = ()
) -> onnx.ModelProto:
    """A float backbone with Q/DQ nodes for onnxruntime's CPU kernels.

    Args:
        backbone: its ONNX file, as `export` wrote it.
        ranges: of its tensors.
        reduce_range: 7-bit weights, for x86 CPUs without VNNI, whose 16-bit sums of two u8 x s8 products saturate.
        exclude: names of nodes that stay in float, beside those that always do.

    Raises:
        ArtifactError: if less than half of the multiplications came out quantized; of those that are not left in float
            on purpose, where some are excluded.
        UsageError: for a name in `exclude` that no node has.
    """
    placement = place_for_cpu(backbone, ranges, reduce_range=reduce_range)
    model = placement.without(exclude)
    excluded = {*exclude, *float_nodes(placement.plain)} if exclude else ()
    require_quantized(multiplication_types(model), excluded_multiplications(model, excluded))
    return model


def place_for_cpu(backbone: bytes, ranges: Ranges, *, reduce_range: bool = False) -> Placement:
    """Q/DQ in every node of a float backbone that the CPU's INT8 kernels can take. Arguments as above."""
    options = {"ActivationSymmetric": False, "WeightSymmetric": True, "QuantizeBias": True}
    with tempfile.TemporaryDirectory() as folder:
        model = onnx.load(with_shapes(backbone, Path(folder)))
    plain = onnx.ModelProto()
    plain.CopyFrom(model)
    measured, types = for_onnxruntime(ranges), (QuantType.QInt8, QuantType.QUInt8)
    quantizer = QDQQuantizer(model, True, reduce_range, *types, measured, [], float_nodes(model), CALIBRATED, options)
    try:
        return Placement(plain, quantizer.quantize_model(), quantized_nodes(plain))
    except (KeyError, ValueError) as e:  # a tensor without a range
        expected = "one for every tensor that is quantized"
        raise ArtifactError("calibration", f"no range ({e})", expected, "Calibrate again, with this bundle.") from e


def for_onnxruntime(ranges: Ranges) -> TensorsData:
    """Ranges as onnxruntime's quantizer takes them."""
    ends = {name: [np.float32(end) for end in pair] for name, pair in ranges.table.items()}
    data = {name: TensorData(lowest=low, highest=high) for name, (low, high) in ends.items()}
    return TensorsData(CalibrationMethod.MinMax, data)


def quantized_nodes(model: onnx.ModelProto) -> list[str]:
    """Names of the nodes that the CPU's placement quantizes."""
    floats = set(float_nodes(model))
    return [n.name for n in model.graph.node if n.op_type in CALIBRATED and n.name not in floats]


def slower_nodes(model: onnx.ModelProto, int8: Mapping[str, float], plain: Mapping[str, float]) -> list[str]:
    """Names of the nodes that INT8 does not make faster, by each node's time in INT8 and in float.

    A node without times of its own, such as a sum that is part of a convolution, follows those whose results it reads.
    """
    quantized = set(quantized_nodes(model))
    in_float = {node.name for node in model.graph.node if node.name not in quantized}
    made_by, slower = makers(model), []
    for node in model.graph.node:
        if node.name not in quantized:
            continue
        read = {made_by[name].name for name in node.input if name in made_by}
        if node.name in int8 and node.name in plain:
            slow = int8[node.name] >= plain[node.name]
        else:
            slow = bool(read) and read <= in_float
        if slow:
            in_float.add(node.name)
            slower.append(node.name)
    return slower


def require_quantized(types: Mapping[str, str], excluded: int = 0) -> None:
    """Raises ArtifactError unless at least half of the multiplications are in INT8, `excluded` ones not counted.

    Args:
        types: of each multiplication, by its name: `fp16.multiplication_types`.
        excluded: how many were left in float on purpose.
    """
    total, quantized = len(types), Counter(types.values())["int8"]
    if not 2 * quantized >= total - excluded > 0:
        expected = "at least half of those not excluded"
        hint = "Exclude fewer nodes, or build FP16 or FP32." if excluded else "Report this with the version of onnx."
        raise ArtifactError("backbone", f"{quantized} of {total} multiplications in INT8", expected, hint)


def excluded_multiplications(model: onnx.ModelProto, exclude: Collection[str]) -> int:
    """How many of the nodes named are multiplications."""
    return sum(n.op_type in MULTIPLICATIONS and n.name in exclude for n in model.graph.node)


def float_nodes(model: onnx.ModelProto) -> list[str]:
    """Names of the nodes that stay in float: what normalizes pixels, the channel gates, and the neck after the global
    pooling.

    The neck's batch norm, folded into the Gemm before it, subtracts a mean that is large against what is left of it, so
    each step of an INT8 range is felt. On the demo's ResNet-18 (256 calibration images, percentile) the cosine to FP32
    over 134 queries is 0.925 at the lowest and 0.964 on average with the neck in INT8, 0.987 and 0.995 without. It is
    one Gemm of a pooled vector: it costs nothing.
    """
    neck = [n.name for n in model.graph.node if n.op_type in ("Gemm", "MatMul", "BatchNormalization")]
    return pixel_nodes(model) + channel_gates(model) + neck


def channel_gates(model: onnx.ModelProto) -> list[str]:
    """Names of the nodes of channel gates: a tensor times a branch of itself that begins with a global pooling.

    By structure, whatever makes the branch: OSNet's ends in a sigmoid, MobileNetV3's in a hard one. They stay in float.
    A gate is a handful of numbers that scale whole channels, so it costs nothing and errs everywhere: on Market-1501
    with the published OSNet x0.25 (64 calibration images, percentile) the lowest cosine to FP32 over 120 queries is
    0.938 with gates in INT8 and 0.988 without.
    """
    makers = {name: node for node in model.graph.node for name in node.output}
    constants = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer if len(t.dims) < 2}
    given = [
        (n.output[0], a.t)
        for n in model.graph.node
        if n.op_type == "Constant"
        for a in n.attribute
        if a.name == "value"
    ]
    constants |= {name: numpy_helper.to_array(tensor) for name, tensor in given}
    inputs = {value.name for value in model.graph.input} - constants.keys()
    kept: dict[str, None] = {}
    for node in model.graph.node:
        if node.op_type == "Mul":
            for scaled, gate in (node.input, reversed(node.input)):
                branch = _branch(gate, scaled, makers, inputs, constants)
                kept |= dict.fromkeys([*branch, node.name] if branch else ())
    return list(kept)


def _branch(
    gate: str,
    scaled: str,
    makers: Mapping[str, onnx.NodeProto],
    inputs: Collection[str],
    constants: Mapping[str, np.ndarray],
) -> list[str]:
    """Names of the nodes between the global pooling of `scaled` and `gate`; none if it is made of anything else."""
    found: dict[str, None] = {}
    waiting, pooled = [gate], False
    while waiting:
        name = waiting.pop()
        if name == scaled or name in inputs:
            return []
        node = makers.get(name)
        if node is None or node.name in found:
            continue
        found[node.name] = None
        if node.input and node.input[0] == scaled and _pools_all(node, constants):
            pooled = True
        else:
            waiting += node.input
    return list(found) if pooled else []


def _pools_all(node: onnx.NodeProto, constants: Mapping[str, np.ndarray]) -> bool:
    """Whether a node makes one number of each channel [N, C, H, W]."""
    if node.op_type not in ("ReduceMean", "ReduceMax"):
        return node.op_type in ("GlobalAveragePool", "GlobalMaxPool")
    axes = next((list(a.ints) for a in node.attribute if a.name == "axes"), [])
    if len(node.input) > 1:
        axes = constants.get(node.input[1], np.empty(0)).ravel().tolist()
    return {int(axis) % 4 for axis in axes} == {2, 3}
