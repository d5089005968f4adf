"""A bundle's ONNX files as a TensorRT takes them: types or flags by its version, nodes of ours for plugin or parser."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import onnx
from onnx import ModelProto, helper, version_converter

from nformer_edge.core.ops import DOMAIN
from nformer_edge.core.spec import Precision
from nformer_edge.engine.backend import OpenBundle
from nformer_edge.onnx.bundle import BACKBONE, HEAD, read_graph
from nformer_edge.onnx.half import backbone_float32, head_float16, product_types, to_half
from nformer_edge.onnx.quantize_tensorrt import place_for_tensorrt
from nformer_edge.onnx.ranges import Ranges

#: The newest opset that TensorRT 8.5 and 8.6 parse.
_OPSET_OF_8 = 17


@dataclass(frozen=True)
class PreparedGraph:
    """One stage, ready to be parsed.

    Args:
        path: the ONNX file.
        asked: ``int8``, ``fp16`` or ``fp32`` of each product and custom node.
        flags: for TensorRT 8, which precisions must be allowed.
        float32: for TensorRT 8, nodes that must not lose FP32.
    """

    path: Path
    asked: dict[str, str]
    flags: tuple[str, ...] = ()
    float32: tuple[str, ...] = ()


def prepare_backbone(
    bundle: OpenBundle, folder: Path, precision: Precision, ranges: Ranges | None = None, *, typed: bool = True
) -> PreparedGraph:
    """Writes the backbone into `folder`.

    Args:
        bundle: verified.
        folder: where the file goes.
        precision: INT8 quantises what the CPU's INT8 does; what is left is FP16, the neck FP32.
        ranges: for INT8.
        typed: the precision stands in the graph's types; otherwise (TensorRT 8) the graph is FP32, with Q/DQ for INT8.
    """
    model = _read(bundle, BACKBONE)
    kept = backbone_float32(model)
    if precision == "int8":
        assert ranges is not None, "build_engine measured them"
        model = place_for_tensorrt(model, ranges)
    half = {n.name for n in model.graph.node} - kept if precision != "fp32" else set()
    return _written(model, half, folder / f"prepared-{BACKBONE}", precision, typed, kept)


def prepare_head(
    bundle: OpenBundle, folder: Path, precision: Precision, *, typed: bool = True, plugin: bool = True
) -> PreparedGraph:
    """Writes the head into `folder`.

    Args:
        bundle: verified.
        folder: where the file goes.
        precision: FP16 for INT8 too: the head is never quantised.
        typed: as for the backbone.
        plugin: the two operators are nodes for our plugin. Their bodies are taken out of the file, because TensorRT
            10.0 to 10.6 prefers a body to a plugin. Otherwise the bodies stay, for the parser to inline.
    """
    model = _read(bundle, HEAD)
    if plugin:
        del model.functions[:]
        for node in model.graph.node:
            if node.domain == DOMAIN:  # by these two attributes the parser finds a creator, from 10.15 on by both
                node.attribute.append(helper.make_attribute("plugin_version", "1"))
                node.attribute.append(helper.make_attribute("plugin_namespace", ""))
    half = head_float16(model) if precision != "fp32" else set()
    kept = {n.name for n in model.graph.node} - half
    stage: Precision = "fp32" if precision == "fp32" else "fp16"
    return _written(model, half, folder / f"prepared-{HEAD}", stage, typed, kept)


def _read(bundle: OpenBundle, name: str) -> ModelProto:
    return onnx.load_from_string(read_graph(bundle.folder, bundle.manifest, name))


def _written(
    model: ModelProto, half: set[str], path: Path, precision: Precision, typed: bool, kept: set[str]
) -> PreparedGraph:
    halved = to_half(model, half) if half else model
    asked = product_types(halved)
    if typed:
        onnx.save(halved, path)
        return PreparedGraph(path, asked)
    onnx.save(version_converter.convert_version(model, _OPSET_OF_8), path)
    flags = {"fp32": (), "fp16": ("FP16",), "int8": ("FP16", "INT8")}[precision]
    return PreparedGraph(path, asked, flags, tuple(sorted(kept)) if flags else ())
