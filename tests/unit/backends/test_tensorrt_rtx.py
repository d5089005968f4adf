"""Real TensorRT-RTX engines of the demo's model, compiled without a GPU, every layer in the type asked for."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest
from PIL import Image

from nformer_edge.backends.build import build_engine, describe_engine
from nformer_edge.backends.spec import EngineSpec, resolve
from nformer_edge.backends.tensorrt.job import run_job
from nformer_edge.backends.tensorrt_rtx import build as tensorrt_rtx
from nformer_edge.core.artifact import read_manifest
from nformer_edge.core.errors import BackendError
from nformer_edge.exporting.bundle import open_bundle
from nformer_edge.metrics.agreement import cosines
from nformer_edge.quantize.prepare import prepare

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None, reason="no package tensorrt_rtx: pip install '.[tensorrt-rtx]'"
)


def spec(precision, **settings):
    sizes = {"batch": (1, 8, 16), "gallery_size": (20, 500, 2000), "capabilities": ("8.9", "12.0")}
    return EngineSpec(backend="tensorrt-rtx", precision=precision, **{"calib_method": "minmax", **sizes, **settings})


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The demo's model as it stands before training, exported."""
    import torch

    from nformer_edge.exporting.export import export_bundle
    from nformer_edge.model.backbone import Backbone
    from nformer_edge.model.checkpoint import save_checkpoint
    from nformer_edge.model.nformer import NFormer
    from nformer_edge.training.config import configure

    folder = tmp_path_factory.mktemp("demo")
    model = configure("demo", rule="features").model
    with torch.random.fork_rng():
        torch.manual_seed(0)
        save_checkpoint(folder / "m.safetensors", model, Backbone(model.backbone), NFormer(model.head))
    return export_bundle(folder / "m.safetensors", folder / "bundle")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A folder of noise to calibrate with, in the size of the tiny models."""
    folder = tmp_path_factory.mktemp("images")
    for i in range(4):
        pixels = np.random.default_rng(i).integers(0, 255, (64, 32, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    return folder


def build(bundle, folder, wanted, calib_data=None):
    """What was built, and of each part the layers."""
    layers = {}

    def run(job):
        built = run_job(job)
        layers[job.part] = built.layers
        return built

    chosen, opened = resolve(wanted), open_bundle(bundle)
    low = prepare(opened, chosen, calib_data, folder, half=True)
    return tensorrt_rtx.build(opened, folder, chosen, low, run), layers


@pytest.fixture(scope="module")
def fp16(demo, tmp_path_factory):
    return build(demo, tmp_path_factory.mktemp("fp16"), spec("fp16"))


def counts(built, part):
    return {kind: (c.asked, c.built) for kind, c in built.audit[part].multiplications.items()}


def test_the_demos_backbone_in_fp16_has_every_convolution_in_fp16(fp16):
    made, layers = fp16
    assert made.precision == {"backbone": "fp16", "head": "fp16"}
    assert counts(made, "backbone") == {"fp16": (20, 20), "fp32": (1, 1)}
    assert made.audit["backbone"].other == {}
    for layer in layers["backbone"]:
        if {"fp32"} & {*layer.inputs, *layer.outputs}:  # the images' cast, the last pooling, the neck
            assert any("images_as_fp16" in node or "/pool" in node or "/neck" in node for node in layer.nodes)


def test_the_demos_head_in_fp16_has_its_projections_in_fp16_and_its_affinities_in_fp32(fp16):
    made, layers = fp16
    (projections, built), others = counts(made, "head")["fp16"], counts(made, "head")["fp32"]
    assert projections == built == sum(n.endswith("/Gemm") for n in named(layers["head"]))
    assert others[0] == others[1] > 0
    assert made.audit["head"].other == {}
    scores = [layer for layer in layers["head"] if "node_of_score" in layer.nodes and layer.kind == "gemm"]
    assert scores
    assert all(set(layer.inputs) == {"fp32"} for layer in scores)


def named(layers):
    return {node for layer in layers for node in layer.nodes}


def test_the_demos_backbone_in_int8_has_every_convolution_in_int8_and_its_neck_in_fp32(demo, images, tmp_path):
    made, layers = build(demo, tmp_path, spec("int8"), images)
    assert made.precision == {"backbone": "int8", "head": "fp16"}
    assert counts(made, "backbone") == {"int8": (20, 20), "fp32": (1, 1)}
    convolutions = [layer for layer in layers["backbone"] if layer.kind == "correlation"]
    assert len(convolutions) == 20
    assert all(set(layer.inputs) == {"int8"} for layer in convolutions)
    with np.load(tmp_path / "golden.npz") as found, np.load(demo / "golden.npz") as exported:
        assert cosines(found["features"], exported["features"]).min() >= 0.9
        assert not np.array_equal(found["features"], exported["features"])


def test_an_engine_is_plain_plans_with_a_manifest_that_tells_what_they_are(tiny_bundle, tmp_path):
    wanted = spec("fp16", gallery_size=(150, 200, 500), keep_graphs=True)
    engine = build_engine(tiny_bundle, tmp_path / "e", wanted)
    manifest = read_manifest(engine, "engine")
    graphs = {"prepared-backbone.onnx", "prepared-nformer.onnx", "compare.sh", "compare_inputs.py"}
    written = {"backbone.engine", "nformer.engine", "build.log", "golden.npz", "live.npz", *graphs}
    assert written == set(manifest["files"])
    assert manifest["versions"]["tensorrt_rtx"].startswith("1.")
    assert manifest["built_for"]["compute_capabilities"] == ["8.9", "12.0"]
    assert manifest["profiles"]["head"]["features"] == [[150, 32], [200, 32], [500, 32]]
    summary = str(describe_engine(engine))
    assert "head: convolutions and matrix multiplications as built: 8 of 8 in FP16" in summary
    assert "FP16: overflow was not searched; --calib-data DIR" in summary
    assert "info: " in (engine / "build.log").read_text()
    with np.load(engine / "golden.npz") as z:  # 144 rows of the self-test are below the head's profile
        assert set(z.files) == {"images", "features"}


def test_what_leaves_fp16_is_built_in_float32_and_the_summary_says_so(overflowing_bundle, images, tmp_path):
    """TensorRT-RTX's own types of each layer, against what the search over the images found."""
    engine = build_engine(overflowing_bundle, tmp_path / "e", spec("fp16", gallery_size=(20, 100, 200)), images)
    manifest = read_manifest(engine, "engine")
    kept = manifest["fp16"]["kept"]["backbone"]
    assert manifest["fp16"]["searched"]["images"] == 4
    assert kept["/trunk/maxpool/MaxPool"].startswith("numbers up to")
    found = manifest["audit"]["backbone"]["multiplications"]
    assert found["fp32"] == {"asked": 4, "built": 4, "unknown": 0}  # the layer, its two readers and the neck
    assert found["fp16"]["asked"] == found["fp16"]["built"] == 184
    assert manifest["audit"]["backbone"]["other"] == {}
    summary = str(describe_engine(engine))
    assert "FP16: overflow searched on 4 images" in summary
    assert "backbone: /trunk/conv1/conv/Conv stays FP32: " in summary


def test_turing_is_refused_in_the_compilers_words(tiny_bundle, tmp_path):
    with pytest.raises(BackendError, match=r"(?s)for the backbone: got a refusal.*FP32 GEMM is not supported"):
        build(tiny_bundle, tmp_path, spec("fp16", capabilities=("7.5",)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"capabilities": ("8.9", "8.7")}, "capabilities: got 8.7"),
        ({"dla": 0}, "dla with TensorRT-RTX"),
        ({"hardware_compat": "ampere_plus"}, "hardware_compat with TensorRT-RTX"),
        ({"version_compat": True}, "version_compat with TensorRT-RTX"),
    ],
)
def test_what_tensorrt_rtx_does_not_have_is_refused_before_anything_is_built(settings, message, tiny_bundle, tmp_path):
    with pytest.raises(BackendError, match=message):
        build(tiny_bundle, tmp_path, spec("fp16", **settings))
    assert not list(tmp_path.iterdir())
