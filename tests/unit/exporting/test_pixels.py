"""`export --input uint8`: the graph normalizes pixels as the Python path does; features of length 1."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import onnx
import pytest

from nformer_edge.backends.build import build_engine
from nformer_edge.backends.open import open_model, self_test
from nformer_edge.backends.spec import EngineSpec
from nformer_edge.core.errors import UsageError
from nformer_edge.core.preprocess import normalize
from nformer_edge.exporting.export import export_bundle
from nformer_edge.exporting.session import open_session
from nformer_edge.metrics.agreement import ROUNDING, row_errors
from nformer_edge.model.checkpoint import load_checkpoint, save_checkpoint
from nformer_edge.model.nformer import NFormer
from nformer_edge.report.parity import parity


def pixels_and_reference(checkpoint, layout, channels):
    """uint8 images as a graph takes them, and PyTorch's features by the Python path."""
    rgb = np.random.default_rng(4).integers(0, 256, (3, 64, 32, 3), np.uint8)
    ordered = rgb[..., ::-1] if channels == "BGR" else rgb
    with open_model(checkpoint, reference=True) as reference:
        features = reference.embed(normalize(rgb, reference.spec.preprocess))
    return np.ascontiguousarray(ordered if layout == "NHWC" else np.moveaxis(ordered, -1, 1)), features


@pytest.mark.parametrize(("layout", "channels"), [("NCHW", "RGB"), ("NHWC", "BGR")])
def test_a_graph_that_takes_pixels_gives_the_features_of_the_python_path(layout, channels, tiny_checkpoint, tmp_path):
    bundle = export_bundle(
        tiny_checkpoint, tmp_path / "b", input="uint8", input_layout=layout, input_channels=channels, unit_features=True
    )
    pixels, expected = pixels_and_reference(tiny_checkpoint, layout, channels)
    session = open_session((bundle / "backbone.onnx").read_bytes(), "backbone.onnx")
    assert [(i.type, i.shape) for i in session.get_inputs()] == [("tensor(uint8)", ["B", *pixels.shape[1:]])]
    (found,) = session.run(None, {"images": pixels})
    expected = expected / np.linalg.norm(expected, axis=1, keepdims=True)
    assert row_errors(found, expected).max() <= ROUNDING
    wrong = pixels[..., ::-1] if layout == "NHWC" else pixels[:, ::-1]
    assert row_errors(session.run(None, {"images": wrong})[0], expected).max() > 1e-3
    with open_model(bundle) as runner:
        self_test(runner)
        rgb = np.moveaxis(pixels, 1, -1) if layout == "NCHW" else pixels[..., ::-1]
        np.testing.assert_array_equal(normalize(rgb, runner.spec.preprocess), pixels)
        np.testing.assert_array_equal(runner.embed(pixels), found)
        with pytest.raises(UsageError, match="float32"):
            runner.embed(pixels.astype(np.float32))


def test_int8_of_a_graph_that_takes_pixels_is_calibrated_by_pixels_and_normalizes_in_float(
    tiny_checkpoint, tiny_bundle, tiny_market, tmp_path
):
    bundle = export_bundle(tiny_checkpoint, tmp_path / "b", input="uint8")
    spec = EngineSpec("onnxruntime", "int8", calib_num=8, calib_method="minmax", reduce_range=True)
    engines = [build_engine(b, tmp_path / f"e{i}", spec, tiny_market) for i, b in enumerate((bundle, tiny_bundle))]
    tables = [json.loads((e / "calibration.json").read_text())["table"] for e in engines]
    shared = {name: table for name, table in tables[1].items() if name != "images"}
    assert {name: tables[0][name] for name in shared} == shared
    model = onnx.load(engines[0] / "backbone.onnx")
    assert [n.op_type for n in model.graph.node[:4]] == ["Cast", "Mul", "Sub", "QuantizeLinear"]
    pixels, _ = pixels_and_reference(tiny_checkpoint, "NCHW", "RGB")
    with open_model(engines[0]) as found, open_model(engines[1]) as plain:
        expected = plain.embed(normalize(np.moveaxis(pixels, 1, -1), plain.spec.preprocess))
        assert row_errors(found.embed(pixels), expected).max() <= ROUNDING


def test_parity_judges_a_graph_that_takes_pixels_against_the_checkpoint(tiny_checkpoint, tiny_market, tmp_path):
    bundle = export_bundle(tiny_checkpoint, tmp_path / "b", input="uint8", input_channels="BGR", unit_features=True)
    found = parity(tiny_checkpoint, bundle, tiny_market, draws=20, layers=True, landmark_seeds=(0,))
    assert found.input.error == 0
    assert found.parts[0].status != "failed"
    assert "takes pixels" in found.layers[0].note


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"input": "uint9"}, "Did you mean 'uint8'"),
        ({"input_layout": "NHWC"}, "input_layout: got NHWC for float32"),
        ({"input": "uint8", "input_channels": "GRB"}, "channels"),
    ],
)
def test_an_input_that_cannot_be_is_refused(settings, message, tiny_checkpoint, tmp_path):
    with pytest.raises(UsageError, match=message):
        export_bundle(tiny_checkpoint, tmp_path / "b", **settings)


def test_a_head_that_sees_the_length_of_features_refuses_length_1(tiny_checkpoint, tmp_path):
    loaded = load_checkpoint(tiny_checkpoint)
    spec = dataclasses.replace(loaded.spec, head=dataclasses.replace(loaded.spec.head, input_scale="none"))
    save_checkpoint(tmp_path / "m.safetensors", spec, loaded.backbone, NFormer(spec.head))
    with pytest.raises(UsageError, match="unit_features"):
        export_bundle(tmp_path / "m.safetensors", tmp_path / "b", unit_features=True)
