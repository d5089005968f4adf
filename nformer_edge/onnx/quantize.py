"""Static INT8 for the backbone as Q/DQ nodes. The head stays as it is: Q/DQ next to a Scan body ends onnxruntime.

Every backend wants its own form: onnxruntime's CPU kernels unsigned activations (their products are u8 x s8) with
quantised biases, TensorRT signed symmetric ones without. Weights are signed, one scale a channel, for both.
"""

from __future__ import annotations

import contextlib
import io
import math
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process
from tqdm import tqdm

from nformer_edge.core.errors import ArtifactError
from nformer_edge.core.spec import CalibrationMethod as Method
from nformer_edge.core.spec import PreprocessSpec
from nformer_edge.core.terminal import PROGRESS
from nformer_edge.data.batches import iter_batches

#: Images whose activations are held at once. All of them are kept while a histogram is taken: ResNet-50 at 256 x 128
#: makes some 100 MB an image.
CALIBRATION_BATCH = 4

#: What is a product, and so what an INT8 build is about.
PRODUCTS = ("Conv", "Gemm", "MatMul")

_METHODS = {
    "minmax": CalibrationMethod.MinMax,
    "entropy": CalibrationMethod.Entropy,
    "percentile": CalibrationMethod.Percentile,
}


class BatchReader(CalibrationDataReader):  # type: ignore[misc]
    """Feeds the calibrator one batch at a time and tells it how many there are, so that it never holds two."""

    def __init__(self, paths: Sequence[str], spec: PreprocessSpec, batch: int = CALIBRATION_BATCH) -> None:
        self._count = math.ceil(len(paths) / batch)
        self._batches: Iterator[np.ndarray] = iter_batches(paths, spec, batch)
        self._left = 0
        self._bar = tqdm(total=len(paths), desc="calibrating", unit="img", **PROGRESS)

    def __len__(self) -> int:
        return self._count

    def set_range(self, start_index: int, end_index: int) -> None:
        """The next `end_index` - `start_index` batches may be taken."""
        self._left = end_index - start_index

    def get_next(self) -> dict[str, np.ndarray] | None:
        """The next batch, or None at the end of the range."""
        if self._left == 0:
            return None
        self._left -= 1
        images = next(self._batches)
        self._bar.update(len(images))
        return {"images": images}


def quantize_backbone(
    source: Path,
    out: Path,
    paths: Sequence[str],
    spec: PreprocessSpec,
    *,
    method: Method = "percentile",
    target: Literal["cpu", "tensorrt"] = "cpu",
    reduce_range: bool = False,
) -> dict[str, dict[str, int]]:
    """Writes `source` with Q/DQ nodes to `out`.

    Args:
        source: a float backbone as `export` wrote it.
        out: the file to write.
        paths: calibration images.
        spec: their preprocessing.
        method: how ranges follow from activations.
        target: whose form of Q/DQ.
        reduce_range: 7-bit weights, for x86 CPUs without VNNI, whose 16-bit sums of two u8 x s8 products saturate.

    Returns:
        `audit` of what was written.

    Raises:
        DataError: for an image that cannot be read.
        ArtifactError: if less than half of the products came out quantised.
    """
    tensorrt = target == "tensorrt"
    options: dict[str, Any] = {
        "CalibStridedMinMax": 1,  # one batch at a time, for every method
        "CalibTensorRangeSymmetric": tensorrt,
        "ActivationSymmetric": tensorrt,
        "WeightSymmetric": True,
        "QuantizeBias": not tensorrt,
    }
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):  # onnxruntime prints
        prepared = Path(folder) / "prepared.onnx"
        quant_pre_process(source, prepared, skip_optimization=True, skip_symbolic_shape=True)
        quantize_static(
            prepared, out, BatchReader(paths, spec), quant_format=QuantFormat.QDQ, per_channel=True,
            reduce_range=reduce_range, activation_type=QuantType.QInt8 if tensorrt else QuantType.QUInt8,
            weight_type=QuantType.QInt8, calibrate_method=_METHODS[method], extra_options=options,
            nodes_to_exclude=float_nodes(onnx.load(prepared)),
        )  # fmt: skip
    counts = audit(onnx.load(out))
    total, quantized = (sum(c[key] for c in counts.values()) for key in ("total", "int8"))
    if not 2 * quantized >= total > 0:
        raise ArtifactError(
            out.name, got=f"{quantized} of {total} products in INT8", expected="at least half",
            mend="Report this with the versions of onnx and onnxruntime.",
        )  # fmt: skip
    return counts


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
