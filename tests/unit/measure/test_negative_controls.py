"""Engines that are broken on purpose, each in one way that has happened: a gate must fail and blame the right stage."""

from __future__ import annotations

import json
import shutil

import onnx
import pytest
from onnx import TensorProto, helper

from nformer_edge.core.artifact import read_manifest, write_manifest
from nformer_edge.core.errors import ArtifactError, GateError
from nformer_edge.core.spec import PreprocessSpec, from_dict
from nformer_edge.engine.build import EngineSpec, build_engine
from nformer_edge.measure.parity import parity, require_passed
from nformer_edge.onnx.calibration import calibration_images
from nformer_edge.onnx.quantize import measure_ranges

torch = pytest.importorskip("torch")


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def changed(checkpoint, out, change):
    """A copy of a checkpoint after `change(backbone, head)`."""
    from nformer_edge.model.checkpoint import load_checkpoint, save_checkpoint

    model = load_checkpoint(checkpoint)
    with torch.no_grad():
        change(model.backbone, model.head)
    save_checkpoint(out, model.spec, model.backbone, model.head)
    return out


def norms(module):
    return [m for m in module.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)]


def swap(one, other):
    """Gives each of two BatchNorms what the other has."""
    ours = {name: tensor.clone() for name, tensor in one.state_dict().items()}
    one.load_state_dict(other.state_dict())
    other.load_state_dict(ours)


@pytest.fixture(scope="module")
def checkpoint(tiny_checkpoint, tmp_path_factory):
    """The tiny model with BatchNorms as training leaves them: no two alike, or a swap would change nothing."""

    def trained(backbone, head):
        generator = torch.Generator().manual_seed(3)
        for norm in norms(backbone) + norms(head):
            size = norm.num_features
            norm.weight.copy_(0.7 + 0.6 * torch.rand(size, generator=generator))
            norm.running_mean.copy_(0.2 * torch.randn(size, generator=generator))
            norm.running_var.copy_(0.5 + torch.rand(size, generator=generator))
            if norm.bias is not None and norm.bias.requires_grad:
                norm.bias.copy_(0.2 * torch.randn(size, generator=generator))

    return changed(tiny_checkpoint, tmp_path_factory.mktemp("trained") / "model.safetensors", trained)


@pytest.fixture(scope="module")
def bundle(checkpoint):
    from nformer_edge.onnx.export import export_bundle

    return export_bundle(checkpoint, checkpoint.parent / "bundle", landmark_seed=7)


@pytest.fixture
def broken_bundle(bundle, tmp_path):
    """A copy of the bundle with other preprocessing or another head; its manifest is in order again."""

    def make(head=None, **preprocess):
        copy = tmp_path / "broken"
        shutil.copytree(bundle, copy)
        manifest = read_manifest(copy, "bundle")
        if head is not None:
            onnx.save(head, copy / "nformer.onnx")
        for spec in (manifest["preprocess"], manifest["model"]["preprocess"]):
            spec.update(preprocess)
        write_manifest(
            copy, "bundle", {k: v for k, v in manifest.items() if k not in ("kind", "format_version", "files")}
        )
        return copy

    return make


@pytest.fixture(scope="module")
def judge(checkpoint, tiny_market):
    def go(engine):
        return parity(checkpoint, engine, tiny_market, draws=200, threads=1)

    return go


def failed(result, blamed):
    """Asserts that a gate failed and `blamed` is named, in the JSON and in the error. Returns who failed."""
    assert result["status"] == "failed"
    assert result["blame"] == blamed
    with pytest.raises(GateError, match=f"to blame: {blamed}"):
        require_passed(result)
    return {s["stage"] for s in result["stages"] if s["status"] == "failed"}


def test_the_sound_bundle_passes(judge, bundle):
    result = judge(bundle)
    assert {s["stage"]: s["status"] for s in result["stages"]} == dict.fromkeys(
        ("backbone", "head", "end_to_end"), "passed"
    )


def test_a_wrong_channel_order_is_blamed_on_the_backbone(judge, broken_bundle):
    assert failed(judge(broken_bundle(channels="BGR")), "backbone") == {"backbone", "end_to_end"}


@pytest.mark.parametrize("left_out", [{"mean": [0.0, 0.0, 0.0]}, {"std": [1.0, 1.0, 1.0]}], ids=["mean", "std"])
def test_a_missing_normalisation_is_blamed_on_the_backbone(judge, broken_bundle, left_out):
    assert failed(judge(broken_bundle(**left_out)), "backbone") == {"backbone", "end_to_end"}


def test_two_swapped_batch_norms_are_blamed_on_the_backbone(judge, checkpoint, tmp_path):
    def change(backbone, _):
        first = norms(backbone)[1]
        swap(first, next(n for n in norms(backbone)[2:] if n.num_features == first.num_features))

    broken = changed(checkpoint, tmp_path / "swapped.safetensors", change)
    assert failed(judge(broken), "backbone") == {"backbone", "end_to_end"}


def test_a_head_with_the_backbones_batch_norm_is_blamed_on_the_head(judge, checkpoint, tmp_path):
    def change(backbone, head):
        neck = [n for n in norms(backbone) if n.num_features == head.bottleneck.num_features][-1]
        head.bottleneck.load_state_dict(neck.state_dict())

    broken = changed(checkpoint, tmp_path / "neck.safetensors", change)
    assert failed(judge(broken), "head") == {"head", "end_to_end"}


def test_a_head_that_is_silently_skipped_is_blamed_on_the_head(judge, broken_bundle):
    def value(name, kind, shape):
        return helper.make_tensor_value_info(name, kind, shape)

    skipped = helper.make_model(
        helper.make_graph(
            [helper.make_node("Identity", ["features"], ["embeddings"])], "nformer",
            [value("features", TensorProto.FLOAT, ["N", 32]), value("landmarks", TensorProto.INT32, [2, "l"])],
            [value("embeddings", TensorProto.FLOAT, ["N", 32])],
        ),
        opset_imports=[helper.make_opsetid("", 18)], ir_version=9,
    )  # fmt: skip
    assert failed(judge(broken_bundle(head=skipped)), "head") == {"head", "end_to_end"}


INT8 = EngineSpec(backend="onnxruntime", precision="int8", calib_num=4, calib_method="minmax")


def gate(result, name):
    return next(g for g in result["stages"][0]["gates"] if g["gate"] == name)


def test_int8_ranges_of_another_model_are_refused_and_where_forged_blamed_on_the_backbone(
    judge, bundle, tiny_bundle, tiny_market, tmp_path
):
    sound = build_engine(bundle, tmp_path / "sound", INT8, calib_data=tiny_market)
    images = calibration_images(tiny_market, INT8.calib_num, INT8.seed)
    preprocess = from_dict(PreprocessSpec, read_manifest(tiny_bundle, "bundle")["preprocess"])
    ranges = measure_ranges(tiny_bundle / "backbone.onnx", images, preprocess, INT8.calib_method).to_json()
    table = json.loads((sound / "calibration.json").read_text())
    other = tmp_path / "other.json"
    other.write_text(json.dumps(ranges | {"backbone_sha256": "0" * 64, "calibration": table["calibration"]}))
    with pytest.raises(ArtifactError, match="ranges of another backbone"):
        build_engine(bundle, tmp_path / "refused", INT8, calib_data=other)
    table |= ranges
    forged = tmp_path / "calibration.json"
    forged.write_text(json.dumps(table))

    result = judge(build_engine(bundle, tmp_path / "forged", INT8, calib_data=forged))
    assert failed(result, "backbone") == {"backbone", "end_to_end"}
    assert gate(result, "cosine_min")["status"] == "alarm"
    ours = judge(sound)
    for name in ("cosine_min", "rank1_agreement", "top10_overlap"):
        assert gate(ours, name)["measured"] > gate(result, name)["measured"], name
