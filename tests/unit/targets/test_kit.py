"""Kits: written from a manifest, whole or not at all; nothing is left to fill in."""

from __future__ import annotations

import configparser
import dataclasses
import hashlib
import re

import numpy as np
import pytest

from nformer_edge.backends.build import build_engine
from nformer_edge.backends.open import open_model
from nformer_edge.backends.spec import EngineSpec
from nformer_edge.core.errors import ArtifactError, UsageError
from nformer_edge.core.preprocess import normalize
from nformer_edge.exporting.bundle import open_bundle
from nformer_edge.exporting.export import export_bundle
from nformer_edge.exporting.session import open_session
from nformer_edge.metrics.agreement import ROUNDING, row_errors
from nformer_edge.model.checkpoint import load_checkpoint, save_checkpoint
from nformer_edge.targets.kit import KITS, MODEL, write_kit


@pytest.mark.parametrize("name", KITS)
def test_a_kit_has_the_verified_model_and_no_placeholder_left(name, tiny_bundle, tmp_path):
    kit = write_kit(name, tiny_bundle, tmp_path / "kit").path
    assert open_bundle(kit / MODEL).sha256 == open_bundle(tiny_bundle).sha256
    texts = [p.read_text() for p in kit.rglob("*") if p.is_file() and p.parent.name != MODEL and p.suffix != ".onnx"]
    assert (kit / "README.md").is_file()
    assert not [found for text in texts for found in re.findall(r"@[A-Z][A-Z0-9_]*@", text)]
    assert "64" in "".join(texts)
    with pytest.raises(ArtifactError, match="an earlier kit"):
        write_kit(name, tiny_bundle, kit)
    write_kit(name, tiny_bundle, kit, force=True)


def test_a_misspelt_kit_is_refused_with_the_nearest_name(tiny_bundle, tmp_path):
    with pytest.raises(UsageError, match="triton"):
        write_kit("trition", tiny_bundle, tmp_path / "kit")


def test_a_damaged_model_makes_no_kit(tiny_bundle, tmp_path):
    kit = write_kit("triton", tiny_bundle, tmp_path / "kit").path
    graph = kit / MODEL / "backbone.onnx"
    graph.write_bytes(graph.read_bytes()[:-1] + b"!")
    with pytest.raises(ArtifactError, match="backbone"):
        write_kit("triton", kit / MODEL, tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_tritons_copy_of_the_graph_is_the_models_own(tiny_bundle, tmp_path):
    kit = write_kit("triton", tiny_bundle, tmp_path / "kit").path
    digest = hashlib.sha256((tiny_bundle / "backbone.onnx").read_bytes()).hexdigest()
    assert hashlib.sha256((kit / "models/backbone/1/model.onnx").read_bytes()).hexdigest() == digest


def deepstream(kit, rgb):
    """What DeepStream's formula, with the kit's keys, makes of uint8 [B, H, W, 3] RGB; both files say the same."""
    parsed = configparser.ConfigParser()
    parsed.read(kit / "config_infer_reid.txt")
    keys = parsed["property"]
    tracker = dict(re.findall(r"^  (\w+): (.*?)(?:  #.*)?$", (kit / "tracker_reid.yml").read_text(), re.M))
    offsets = [float(x) for x in keys["offsets"].split(";")]
    for name, key in (("inputOrder", "network-input-order"), ("colorFormat", "model-color-format")):
        assert tracker[name] == keys[key]
    assert float(tracker["netScaleFactor"]) == float(keys["net-scale-factor"])
    assert tracker["offsets"] == str([*offsets]).replace(".0", "")
    assert (tracker["keepAspc"], keys["maintain-aspect-ratio"]) == ("0", "0")
    colors = rgb[..., ::-1] if keys["model-color-format"] == "1" else rgb
    y = np.float32(keys["net-scale-factor"]) * (colors.astype(np.float32) - np.float32(offsets))
    return y if keys["network-input-order"] == "1" else np.ascontiguousarray(np.moveaxis(y, -1, 1))


def features_in_deepstream(kit, rgb):
    session = open_session((kit / "backbone.onnx").read_bytes(), "backbone.onnx")
    return session.run(None, {"images": deepstream(kit, rgb)})[0]


@pytest.fixture(scope="module")
def crops(tiny_bundle):
    """Pixels, and the features of the Python path."""
    rgb = np.random.default_rng(3).integers(0, 256, (3, 64, 32, 3), np.uint8)
    with open_model(tiny_bundle) as runner:
        return rgb, runner.embed(normalize(rgb, runner.spec.preprocess))


def test_deepstream_loses_nothing_with_a_graph_that_normalizes(tiny_checkpoint, crops, tmp_path):
    bundle = export_bundle(tiny_checkpoint, tmp_path / "b", input="uint8", input_layout="NHWC", input_channels="BGR")
    kit = write_kit("deepstream", bundle, tmp_path / "kit").path
    rgb, expected = crops
    assert row_errors(features_in_deepstream(kit, rgb), expected).max() <= ROUNDING
    assert row_errors(features_in_deepstream(kit, rgb[..., ::-1]), expected).max() > 100 * ROUNDING


def test_deepstreams_one_scale_loses_what_three_deviations_had_and_the_kit_says_so(tiny_bundle, crops, tmp_path):
    kit = write_kit("deepstream", tiny_bundle, tmp_path / "kit").path
    rgb, expected = crops
    found = features_in_deepstream(kit, rgb)
    cosines = np.sum(found * expected, 1) / np.linalg.norm(found, axis=1) / np.linalg.norm(expected, axis=1)
    assert (cosines > 0.97).all()
    assert row_errors(found, expected).max() > 100 * ROUNDING
    assert "loses none" in (kit / "README.md").read_text()


def test_deepstream_gets_no_graph_that_it_cannot_run(tiny_bundle, tmp_path):
    engine = build_engine(tiny_bundle, tmp_path / "engine", EngineSpec("onnxruntime", "fp32"))
    with pytest.raises(UsageError, match="TensorRT"):
        write_kit("deepstream", engine, tmp_path / "kit")


def test_a_model_without_a_head_has_a_kit_without_one(tiny_checkpoint, tmp_path):
    whole = load_checkpoint(tiny_checkpoint)
    save_checkpoint(tmp_path / "m.safetensors", dataclasses.replace(whole.spec, head=None), whole.backbone, None)
    bundle = export_bundle(tmp_path / "m.safetensors", tmp_path / "b")
    kit = write_kit("triton", bundle, tmp_path / "kit").path
    assert sorted(p.name for p in (kit / "models").iterdir()) == ["backbone", "gallery"]
