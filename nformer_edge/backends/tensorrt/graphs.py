"""A bundle's ONNX files as a TensorRT takes them: types or flags by its version, nodes of ours for plugin or parser."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import onnx
from onnx import ModelProto, version_converter

from nformer_edge.backends.tensorrt import surgery
from nformer_edge.backends.tensorrt.plugin.library import Operators
from nformer_edge.core.errors import BackendError
from nformer_edge.core.spec import Precision
from nformer_edge.exporting.bundle import BACKBONE, HEAD, Bundle
from nformer_edge.ops.contract import DOMAIN
from nformer_edge.quantize.fp16 import (
    backbone_float32,
    head_float16,
    makers,
    multiplication_types,
    tensor_types,
    to_half,
    unfit_weights,
)
from nformer_edge.quantize.placement_tensorrt import place_for_tensorrt
from nformer_edge.quantize.values import Ranges

#: The newest opset that TensorRT 8.5 and 8.6 parse.
_OPSET_OF_8 = 17


@dataclass(frozen=True)
class PreparedGraph:
    """One part, ready to be parsed."""

    path: Path  # the ONNX file
    asked: dict[str, str]  # "int8", "fp16" or "fp32" of each multiplication and custom node
    flags: tuple[str, ...] = ()  # for TensorRT 8, which precisions must be allowed
    float32: tuple[str, ...] = ()  # for TensorRT 8, nodes that must not lose FP32
    #: Nodes that are FP32 because FP16 would not hold their numbers and not by policy, with the reason.
    beyond: dict[str, str] = field(default_factory=dict)

    def float_layers(self) -> tuple[list[str], list[str]]:
        """Of `float32`, the names of nodes that compute in floats, and of those that write floats alone.

        They differ by RowTopK: see `weakly_typed`.
        """
        model = onnx.load(self.path)
        floats = {name for name, found in tensor_types(model).items() if found.elem_type == onnx.TensorProto.FLOAT}
        kept = [node for node in model.graph.node if node.name in set(self.float32)]
        writing = [node.name for node in kept if set(node.output) <= floats]
        return writing + [node.name for node in kept if node.domain == DOMAIN and node.name not in writing], writing


def prepare_backbone(
    bundle: Bundle,
    folder: Path,
    precision: Precision,
    ranges: Ranges | None = None,  # for INT8
    *,
    typed: bool = True,  # the precision stands in the graph's types; else (TensorRT 8) it is FP32, with Q/DQ for INT8
    unfit: Mapping[str, str] | None = None,  # nodes whose numbers FP16 does not hold: `Overflow.unfit`
    exclude: Collection[str] = (),  # for INT8, nodes that are not quantized, beside those that never are
) -> PreparedGraph:
    """Writes the backbone into `folder`. One that another tool has quantized or halved is taken as it stands.

    INT8 quantizes what the CPU's INT8 does; what is left is FP16, the neck FP32. Raises BackendError for another tool's
    graph without `typed`.
    """
    model = onnx.load_from_string(bundle.backbone)
    path = folder / f"prepared-{BACKBONE}"
    if bundle.backbone_precision != "fp32" and not typed:
        got, expected = f"a backbone in {bundle.backbone_precision}, for TensorRT 8", "FP32, which its flags reduce"
        raise BackendError("bundle", got, expected, "Build the bundle that this was made from.")
    if bundle.backbone_precision != "fp32":
        onnx.save(model, path)
        return PreparedGraph(path, multiplication_types(model))
    policy, unfit = backbone_float32(model), {**(unfit or {}), **unfit_weights(model)}
    if precision == "int8":
        assert ranges is not None, "build_engine measured them"
        model = place_for_tensorrt(model, ranges, exclude)
    half = {n.name for n in model.graph.node} - policy if precision != "fp32" else set()
    return _written(model, half, unfit, path, precision, typed)


def prepare_head(
    bundle: Bundle,
    folder: Path,
    precision: Precision,
    *,
    typed: bool = True,
    operators: Operators = "library",
    unfit: Mapping[str, str] | None = None,
) -> PreparedGraph:
    """Writes the head into `folder`, in FP16 for INT8 too: it is never quantized. The rest is as for the backbone.

    Where the two operators are nodes for a plugin, their bodies are taken out of the file, because TensorRT 10.0 to
    10.6 prefers a body to a plugin. Where they are inlined, the parser does it.
    """
    model = onnx.load_from_string(bundle.head)
    edits: list[surgery.Edit] = [surgery.fold]
    if operators != "inlined":
        del model.functions[:]
        edits.append(surgery.name_plugins("" if operators == "library" else DOMAIN))
    model = surgery.operate(model, *edits)
    reduced: Precision = "fp32" if precision == "fp32" else "fp16"
    half = head_float16(model) if reduced == "fp16" else set()
    return _written(model, half, {**(unfit or {}), **unfit_weights(model)}, folder / f"prepared-{HEAD}", reduced, typed)


def _written(
    model: ModelProto, half: set[str], unfit: Mapping[str, str], path: Path, precision: Precision, typed: bool
) -> PreparedGraph:
    beyond = {name: unfit[name] for name in sorted(half & unfit.keys())}
    half = half - beyond.keys() - _dequantizers(model, set(beyond))
    halved = to_half(model, half) if half else model
    asked = multiplication_types(halved)
    if typed:
        onnx.save(halved, path)
        return PreparedGraph(path, asked, beyond=beyond)
    model = version_converter.convert_version(model, _OPSET_OF_8)
    kept = {n.name for n in model.graph.node} - half  # FP32 is held layer by layer, by name
    model = surgery.operate(model, surgery.split_layer_norms, surgery.split_l2_norms, surgery.split_gemms(kept))
    onnx.save(model, path)
    flags = {"fp32": (), "fp16": ("FP16",), "int8": ("FP16", "INT8")}[precision]
    float32 = sorted(n.name for n in model.graph.node if n.name not in half) if flags else ()
    return PreparedGraph(path, asked, flags, tuple(float32), beyond)


def _dequantizers(model: ModelProto, nodes: set[str]) -> set[str]:
    """Names of the DequantizeLinear that these nodes alone read: in their type, nothing stands between the two."""
    made_by = makers(model)
    read = {made_by[name].name for n in model.graph.node if n.name in nodes for name in n.input if name in made_by}
    others = {name for n in model.graph.node if n.name not in nodes for name in n.input}
    found = [n for n in model.graph.node if n.op_type == "DequantizeLinear" and n.output[0] not in others]
    return {n.name for n in found if n.name in read}
