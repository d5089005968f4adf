"""Engines of a bundle whose backbone another tool has quantized: its types are built as they stand."""

from __future__ import annotations

import importlib.util

import onnx
import pytest

from nformer_edge.backends.build import build_engine
from nformer_edge.backends.spec import EngineSpec
from nformer_edge.backends.tensorrt.graphs import prepare_backbone
from nformer_edge.core.artifact import OWN_FIELDS, atomic_folder, read_manifest, write_manifest
from nformer_edge.core.errors import BackendError, UsageError
from nformer_edge.exporting.bundle import BACKBONE, GOLDEN, open_bundle
from nformer_edge.quantize.fp16 import backbone_float32, to_half
from nformer_edge.quantize.placement_tensorrt import place_for_tensorrt
from nformer_edge.quantize.values import Ranges


@pytest.fixture(scope="module")
def quantized(tiny_bundle, tmp_path_factory):
    """The backbone alone, with Q/DQ nodes and FP16 around them, as a bundle."""
    model = onnx.load(tiny_bundle / BACKBONE)
    kept = backbone_float32(model)
    reach = {name: (-8.0, 8.0) for node in model.graph.node for name in (*node.input, *node.output)}
    placed = place_for_tensorrt(model, Ranges("minmax", reach))
    manifest = read_manifest(tiny_bundle, "bundle")
    manifest["model"] = {**manifest["model"], "head": None}
    path = tmp_path_factory.mktemp("typed") / "bundle"
    with atomic_folder(path, "bundle") as folder:
        onnx.save(to_half(placed, {n.name for n in placed.graph.node} - kept), folder / BACKBONE)
        (folder / GOLDEN).write_bytes((tiny_bundle / GOLDEN).read_bytes())
        fields = {k: v for k, v in manifest.items() if k not in OWN_FIELDS}
        write_manifest(folder, "bundle", fields | {"precision": {"backbone": "int8"}})
    return path


def test_int8_on_top_of_int8_is_refused(quantized, tiny_market, tmp_path):
    with pytest.raises(UsageError, match="int8 for a backbone that is in int8 already"):
        build_engine(quantized, tmp_path / "engine", EngineSpec("onnxruntime", "int8"), tiny_market)


def test_tensorrt_8_is_refused_what_stands_in_types(quantized, tmp_path):
    with pytest.raises(BackendError, match="for TensorRT 8"):
        prepare_backbone(open_bundle(quantized), tmp_path, "fp16", typed=False)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_the_graph_is_taken_as_it_stands(quantized, tmp_path, precision):
    prepared = prepare_backbone(open_bundle(quantized), tmp_path, precision)
    assert prepared.path.read_bytes() == onnx.load(quantized / BACKBONE).SerializeToString()
    assert {"int8", "fp16"} <= set(prepared.asked.values())


def test_an_engine_for_onnxruntime_says_what_its_backbone_is_in(quantized, tmp_path):
    engine = build_engine(quantized, tmp_path / "engine", EngineSpec("onnxruntime"))
    assert read_manifest(engine, "engine")["precision"] == {"backbone": "int8"}


@pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason="no package tensorrt_rtx")
def test_tensorrt_rtx_builds_every_product_in_the_type_that_stands_there(quantized, tmp_path):
    spec = EngineSpec("tensorrt-rtx", batch=(1, 2, 4), capabilities=("8.6",))
    manifest = read_manifest(build_engine(quantized, tmp_path / "engine", spec), "engine")
    multiplications = manifest["audit"]["backbone"]["multiplications"]
    assert manifest["precision"] == {"backbone": "int8"}
    assert all(counts["built"] == counts["asked"] for counts in multiplications.values())
    assert multiplications["int8"]["asked"] > 100
