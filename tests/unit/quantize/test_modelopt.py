"""A bundle by way of ModelOpt: by the tool itself where it is installed, and elsewhere by one that stands in for it.

Its pins of onnx and onnxruntime exclude ours, so that the machine that has both is rare. The stand-in has its two
functions by their real names and arguments, and quantizes and halves by our own passes.
"""

from __future__ import annotations

import importlib.util
import re
import sys
import types

import numpy as np
import onnx
import pytest

from nformer_edge.backends.open import open_model, self_test
from nformer_edge.cli import main
from nformer_edge.core.artifact import read_manifest
from nformer_edge.core.errors import BackendError, DataError, UsageError
from nformer_edge.exporting.bundle import BACKBONE, HEAD, open_bundle
from nformer_edge.metrics.agreement import cosines
from nformer_edge.quantize.fp16 import backbone_float32, multiplication_types, to_half
from nformer_edge.quantize.modelopt import bundle_by_modelopt
from nformer_edge.quantize.placement_cpu import float_nodes
from nformer_edge.quantize.placement_tensorrt import place_for_tensorrt
from nformer_edge.quantize.values import Ranges

INSTALLED = importlib.util.find_spec("modelopt") is not None


class StandIn:
    """ModelOpt's functions, and what they were asked."""

    def __init__(self) -> None:
        self.asked: dict[str, object] = {}

    def quantize(self, onnx_path, quantize_mode="int8", calibration_data=None, calibration_method=None, **settings):
        self.asked = {"method": calibration_method, "images": calibration_data["images"], **settings}
        model = onnx.load(onnx_path)
        reach = {n: (-8.0, 8.0) for node in model.graph.node for n in (*node.input, *node.output)}
        onnx.save(place_for_tensorrt(model, Ranges("minmax", reach)), settings["output_path"])

    def convert_to_mixed_precision(self, onnx_path, low_precision_type="fp16", nodes_to_exclude=None, **settings):
        self.asked = {"nodes_to_exclude": nodes_to_exclude, **settings}
        model = onnx.load(onnx_path)
        kept = {n.name for n in model.graph.node if any(re.match(p, n.name) for p in nodes_to_exclude or ())}
        return to_half(model, {n.name for n in model.graph.node} - kept)


@pytest.fixture
def tool(monkeypatch):
    """The stand-in under ModelOpt's name, with a version."""
    made = StandIn()
    modules = {n: types.ModuleType(n) for n in ("modelopt", "modelopt.onnx", "modelopt.onnx.quantization",
                                                "modelopt.onnx.autocast")}  # fmt: skip
    modules["modelopt.onnx.quantization"].quantize = made.quantize
    modules["modelopt.onnx.autocast"].convert_to_mixed_precision = made.convert_to_mixed_precision
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr("nformer_edge.quantize.modelopt.version", lambda name: "0.0")
    return made


def plain(bundle):
    return onnx.load(bundle / BACKBONE)


def test_without_modelopt_the_error_names_the_extra(tiny_bundle, tiny_market, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "modelopt", None)
    with pytest.raises(BackendError, match=re.escape("pip install 'nformer-edge[modelopt]'")):
        bundle_by_modelopt(tiny_bundle, tmp_path / "out", tiny_market)
    assert not (tmp_path / "out").exists()


def test_a_quantized_bundle_says_so_and_runs_and_keeps_the_head(tool, tiny_bundle, tiny_market, tmp_path):
    out = bundle_by_modelopt(tiny_bundle, tmp_path / "out", tiny_market, calib_num=6, calib_method="minmax")
    manifest, source = read_manifest(out, "bundle"), read_manifest(tiny_bundle, "bundle")
    assert manifest["precision"] == {"backbone": "int8", "head": "fp32"}
    assert manifest["made_from"] == source["files"][BACKBONE]["sha256"]
    assert manifest["files"][HEAD] == source["files"][HEAD]
    assert manifest["calibration"]["num"] == 6
    assert manifest["landmark_seed"] == 7
    assert manifest["self_check"] == {}
    assert "int8" in multiplication_types(plain(out)).values()
    with open_model(out) as runner:
        assert runner.precision["backbone"] == "int8"
        assert set(self_test(runner)) == {"backbone", "head"}


def test_calibration_images_are_training_images_by_our_preprocessing(tool, tiny_bundle, tiny_market, tmp_path):
    bundle_by_modelopt(tiny_bundle, tmp_path / "out", tiny_market, calib_num=6)
    assert tool.asked["images"].shape == (6, 3, 64, 32)
    assert tool.asked["images"].dtype == np.float32
    assert tool.asked["calibration_shapes"] == "images:4x3x64x32"
    with pytest.raises(DataError, match="query image"):
        bundle_by_modelopt(tiny_bundle, tmp_path / "other", tiny_market / "query")


def test_what_our_int8_leaves_in_float_is_excluded_by_name_unless_it_chooses_alone(
    tool, tiny_bundle, tiny_market, tmp_path
):
    bundle_by_modelopt(tiny_bundle, tmp_path / "ours", tiny_market, calib_num=2)
    patterns = tool.asked["nodes_to_exclude"]
    model = plain(tiny_bundle)
    matched = {n.name for n in model.graph.node if any(re.match(p, n.name) for p in patterns)}
    assert matched == set(float_nodes(model))
    bundle_by_modelopt(tiny_bundle, tmp_path / "alone", tiny_market, calib_num=2, own_choice=True)
    assert tool.asked["nodes_to_exclude"] is None


def test_a_halved_bundle_keeps_our_float_nodes_and_float_ends(tool, tiny_bundle, tiny_market, tmp_path):
    out = bundle_by_modelopt(tiny_bundle, tmp_path / "out", tiny_market, precision="fp16", calib_num=2)
    kinds = multiplication_types(plain(out))
    assert {kind for name, kind in kinds.items() if name not in backbone_float32(plain(tiny_bundle))} == {"fp16"}
    found, before = (open_bundle(folder).golden for folder in (out, tiny_bundle))
    assert found["features"].dtype == np.float32
    assert cosines(found["features"], before["features"]).min() >= 0.9995


def test_a_bundle_that_is_quantized_already_is_refused(tool, tiny_bundle, tiny_market, tmp_path):
    out = bundle_by_modelopt(tiny_bundle, tmp_path / "out", tiny_market, calib_num=2)
    with pytest.raises(UsageError, match="got a backbone in int8"):
        bundle_by_modelopt(out, tmp_path / "again", tiny_market, calib_num=2)


def test_the_command_tells_what_it_wrote(tool, tiny_bundle, tiny_market, tmp_path, capsys):
    arguments = ["modelopt", str(tiny_bundle), "--calib-data", str(tiny_market), "--calib-num", "2"]
    assert main([*arguments, "-o", str(tmp_path / "out")]) == 0
    assert "backbone int8" in capsys.readouterr().out


@pytest.mark.skipif(not INSTALLED, reason="nvidia-modelopt is not installed: its pins of onnx exclude ours")
@pytest.mark.parametrize("precision", ["int8", "fp16"])
def test_modelopt_itself_makes_a_bundle_that_ranks_alike(tiny_bundle, tiny_market, tmp_path, precision):
    out = bundle_by_modelopt(tiny_bundle, tmp_path / "out", tiny_market, precision=precision, calib_num=8)
    found, before = (open_bundle(folder).golden for folder in (out, tiny_bundle))
    assert cosines(found["features"], before["features"]).min() >= {"int8": 0.97, "fp16": 0.998}[precision]
    counts = list(multiplication_types(plain(out)).values())
    assert 2 * counts.count(precision) >= len(counts)
