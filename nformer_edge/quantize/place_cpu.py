"""Static INT8 for the backbone as Q/DQ nodes, in the form that onnxruntime's CPU kernels want; what stays in float.

Unsigned activations (the kernels' products are u8 x s8), quantized biases, signed weights with one scale a channel.
TensorRT wants another form of the same ranges: `quantize_tensorrt`. The head stays as it is: Q/DQ next to a Scan body
ends onnxruntime.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Collection, Sequence
from pathlib import Path

import onnx
from onnxruntime.quantization import QuantType
from onnxruntime.quantization.qdq_quantizer import QDQQuantizer
from onnxruntime.quantization.shape_inference import quant_pre_process

from nformer_edge.core.errors import ArtifactError
from nformer_edge.core.spec import CalibrationMethod as Method
from nformer_edge.core.spec import PreprocessSpec
from nformer_edge.quantize.fp16 import PRODUCTS
from nformer_edge.quantize.placement import Placement
from nformer_edge.quantize.ranges import CALIBRATED, Ranges, calibrate


def measure_ranges(source: Path, paths: Sequence[str], spec: PreprocessSpec, method: Method = "percentile") -> Ranges:
    """Calibrates a float backbone as `export` wrote it. See `ranges.calibrate`."""
    return measure_all_ranges(source, paths, spec, (method,))[method]


def measure_all_ranges(
    source: Path, paths: Sequence[str], spec: PreprocessSpec, methods: Sequence[Method]
) -> dict[Method, Ranges]:
    """The same by several methods, the images run once."""
    with tempfile.TemporaryDirectory() as folder:
        return calibrate(_prepared(source, Path(folder)), paths, spec, methods)


def quantize_backbone(
    source: Path, out: Path, ranges: Ranges, *, reduce_range: bool = False, exclude: Collection[str] = ()
) -> dict[str, dict[str, int]]:
    """Writes `source` with Q/DQ nodes for onnxruntime's CPU kernels to `out`.

    Args:
        source: a float backbone as `export` wrote it.
        out: the file to write.
        ranges: of its tensors.
        reduce_range: 7-bit weights, for x86 CPUs without VNNI, whose 16-bit sums of two u8 x s8 products saturate.
        exclude: names of nodes that stay in float, beside those that always do.

    Returns:
        `audit` of what was written.

    Raises:
        ArtifactError: if less than half of the products, not counting the excluded ones, came out quantized.
        UsageError: for a name in `exclude` that no node has.
    """
    model = place_for_cpu(source, ranges, reduce_range=reduce_range).without(exclude)
    onnx.save(model, out)
    counts = audit(model)
    require_quantized(out.name, counts, excluded_products(model, exclude))
    return counts


def place_for_cpu(source: Path, ranges: Ranges, *, reduce_range: bool = False) -> Placement:
    """Q/DQ in every node of a float backbone that the CPU's INT8 kernels can take. Arguments as above."""
    options = {"ActivationSymmetric": False, "WeightSymmetric": True, "QuantizeBias": True}
    with tempfile.TemporaryDirectory() as folder:
        model = onnx.load(_prepared(source, Path(folder)))
    plain = onnx.ModelProto()
    plain.CopyFrom(model)
    floats = float_nodes(model)
    quantizer = QDQQuantizer(
        model,
        True,
        reduce_range,
        QuantType.QInt8,
        QuantType.QUInt8,
        ranges.for_onnxruntime(),
        [],
        floats,
        CALIBRATED,
        options,
    )
    return Placement(plain, quantizer.quantize_model(), quantized_nodes(plain))


def quantized_nodes(model: onnx.ModelProto) -> list[str]:
    """Names of the nodes that the CPU's placement quantizes."""
    floats = set(float_nodes(model))
    return [n.name for n in model.graph.node if n.op_type in CALIBRATED and n.name not in floats]


def _prepared(source: Path, folder: Path) -> Path:
    """With the types and shapes of all tensors, which calibrator and quantizer look up."""
    prepared = folder / "prepared.onnx"
    quant_pre_process(source, prepared, skip_optimization=True, skip_symbolic_shape=True)
    return prepared


def require_quantized(where: str, counts: dict[str, dict[str, int]], excluded: int = 0) -> None:
    """Raises ArtifactError unless at least half of the products are in INT8, `excluded` ones not counted."""
    total, quantized = (sum(c[key] for c in counts.values()) for key in ("total", "int8"))
    if not 2 * quantized >= total - excluded > 0:
        raise ArtifactError(
            where,
            f"{quantized} of {total} products in INT8",
            "at least half of those not excluded",
            "Exclude fewer nodes, or build FP16 or FP32."
            if excluded
            else "Report this with the versions of onnx and onnxruntime.",
        )


def excluded_products(model: onnx.ModelProto, exclude: Collection[str]) -> int:
    """How many of the nodes named are products."""
    return sum(n.op_type in PRODUCTS and n.name in exclude for n in model.graph.node)


def float_nodes(model: onnx.ModelProto) -> list[str]:
    """Names of the nodes that stay in float: the channel gates, and the neck after the global pooling.

    The neck's batch norm, folded into its product, subtracts a mean that is large against what is left of it, so each
    step of an INT8 range is felt. On the demo's ResNet-18 (256 calibration images, percentile) the cosine to FP32 over
    134 queries is 0.925 at the lowest and 0.964 on average with the neck in INT8, 0.987 and 0.995 without. It is one
    product of a pooled vector: it costs nothing.
    """
    return channel_gates(model) + [n.name for n in model.graph.node if n.op_type in ("Gemm", "MatMul")]


def channel_gates(model: onnx.ModelProto) -> list[str]:
    """Names of the nodes from a global pooling to a sigmoid, and of the products with it: OSNet's channel gates.

    They stay in float. A gate is a handful of numbers that scale whole channels, so it costs nothing and errs
    everywhere: on Market-1501 with the published OSNet x0.25 (64 calibration images, percentile) the lowest cosine to
    FP32 over 120 queries is 0.938 with gates in INT8 and 0.988 without.
    """
    makers = {name: node for node in model.graph.node for name in node.output}
    kept: list[str] = []
    for node in model.graph.node:
        if node.op_type != "Sigmoid":
            continue
        path, back = [node.name], makers.get(node.input[0])
        while back is not None and back.op_type in ("Conv", "Relu"):
            path.append(back.name)
            back = makers.get(back.input[0])
        if back is not None and back.op_type == "GlobalAveragePool":
            scaled = [n.name for n in model.graph.node if n.op_type == "Mul" and node.output[0] in n.input]
            kept += [*path, back.name, *scaled]
    return kept


def audit(model: onnx.ModelProto) -> dict[str, dict[str, int]]:
    """Of each kind of product in the graph, how many there are and how many take INT8 from both sides.

    Returns:
        Such as ``{"Conv": {"total": 53, "int8": 53}}``.
    """
    makers = {name: node.op_type for node in model.graph.node for name in node.output}
    total: Counter[str] = Counter()
    quantized: Counter[str] = Counter()
    for node in model.graph.node:
        if node.op_type in PRODUCTS:
            total[node.op_type] += 1
            quantized[node.op_type] += all(makers.get(name) == "DequantizeLinear" for name in node.input[:2])
    return {kind: {"total": total[kind], "int8": quantized[kind]} for kind in sorted(total)}
