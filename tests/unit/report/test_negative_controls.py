"""Engines that are broken on purpose, each in one way that has happened: a gate must fail and blame the right stage."""

from __future__ import annotations

import json
import re
import shutil

import onnx
import pytest
from onnx import TensorProto, helper

from nformer_edge.backends.build import EngineSpec, build_engine
from nformer_edge.core.artifact import OWN_FIELDS, read_manifest, write_manifest
from nformer_edge.core.errors import ArtifactError, GateError
from nformer_edge.core.spec import PreprocessSpec, from_dict
from nformer_edge.data.calibration import calibration_images
from nformer_edge.quantize.place_cpu import measure_ranges
from nformer_edge.report.parity import parity
from nformer_edge.report.verdict import describe_causes, require_passed

torch = pytest.importorskip("torch")


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def swap(one, other):
    """Gives each of two BatchNorms what the other has."""
    ours = {name: tensor.clone() for name, tensor in one.state_dict().items()}
    one.load_state_dict(other.state_dict())
    other.load_state_dict(ours)


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
        write_manifest(copy, "bundle", {k: v for k, v in manifest.items() if k not in OWN_FIELDS})
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
    with pytest.raises(GateError, match=f"to blame: {blamed}") as caught:
        require_passed(result)
    for line in describe_causes(result):
        assert line in str(caught.value)
    return {s["stage"] for s in result["stages"] if s["status"] == "failed"}


def first(result, stage):
    """The first node out of its band, which the error must name."""
    (found,) = [r["first"] for r in result["layers"] if r["stage"] == stage]
    assert found["inputs_inside"]
    with pytest.raises(GateError, match=re.escape(f"{stage}: first node out of its band: {found['node']} (")):
        require_passed(result)
    return found["node"]


def test_the_sound_bundle_passes(judge, bundle):
    result = judge(bundle)
    assert {s["stage"]: s["status"] for s in result["stages"]} == dict.fromkeys(
        ("backbone", "head", "end_to_end"), "passed"
    )
    assert (result["input"]["error"], result["layers"]) == (0, [])


def test_a_wrong_channel_order_is_blamed_on_the_preprocessing(judge, broken_bundle):
    result = judge(broken_bundle(channels="BGR"))
    assert failed(result, "backbone") == {"backbone", "end_to_end"}
    assert describe_causes(result) == [
        "the input itself differs, so it is the preprocessing: channels: BGR, the reference RGB"
    ]


@pytest.mark.parametrize(("field", "left_out"), [("mean", [0.0, 0.0, 0.0]), ("std", [1.0, 1.0, 1.0])])
def test_a_missing_normalization_is_blamed_on_the_preprocessing(judge, broken_bundle, field, left_out):
    result = judge(broken_bundle(**{field: left_out}))
    assert failed(result, "backbone") == {"backbone", "end_to_end"}
    (line,) = describe_causes(result)
    assert line.startswith(f"the input itself differs, so it is the preprocessing: {field}: {tuple(left_out)}")


def test_two_swapped_batch_norms_are_blamed_on_the_backbone_and_the_first_is_named(
    judge, checkpoint, changed, norms, tmp_path
):
    named = []

    def change(backbone, _):
        first = norms(backbone)[1]
        named.extend(name for name, module in backbone.named_modules() if module is first)
        swap(first, next(n for n in norms(backbone)[2:] if n.num_features == first.num_features))

    broken = changed(checkpoint, tmp_path / "swapped.safetensors", change)
    result = judge(broken)
    assert failed(result, "backbone") == {"backbone", "end_to_end"}
    assert named == ["trunk.conv2.0.conv1.bn"]  # in the graph it is folded into the convolution before it
    assert first(result, "backbone") == "/trunk/conv2/conv2.0/conv1/conv/Conv"


def test_a_head_with_the_backbones_batch_norm_is_blamed_on_the_head_and_the_norm_is_named(
    judge, checkpoint, changed, norms, tmp_path
):
    def change(backbone, head):
        neck = [n for n in norms(backbone) if n.num_features == head.bottleneck.num_features][-1]
        head.bottleneck.load_state_dict(neck.state_dict())

    result = judge(changed(checkpoint, tmp_path / "neck.safetensors", change))
    assert failed(result, "head") == {"head", "end_to_end"}
    assert first(result, "head") == "/head/bottleneck/BatchNormalization"


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
    result = judge(broken_bundle(head=skipped))
    assert failed(result, "head") == {"head", "end_to_end"}
    tensors = result["layers"][0]["tensors"]
    assert f"head: the engine's graph has 1 of the reference's {tensors} tensors" in describe_causes(result)


#: All of the training images: tensors that no image of the calibration reached would be at fault too.
INT8 = EngineSpec(backend="onnxruntime", precision="int8", calib_num=36, calib_method="minmax")


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

    engine = build_engine(bundle, tmp_path / "forged", INT8, calib_data=forged)
    result = judge(engine)
    assert failed(result, "backbone") == {"backbone", "end_to_end"}
    assert gate(result, "cosine_min")["status"] == "alarm"
    ours = judge(sound)
    for name in ("cosine_min", "rank1_agreement", "top10_overlap"):
        assert gate(ours, name)["measured"] > gate(result, name)["measured"], name

    # Named is the first node in the graph, whose range is too narrow by a quarter and more: it cuts.
    assert first(result, "backbone") == "/trunk/conv1/conv/Conv"
    tensor = result["layers"][0]["first"]["tensor"]
    right, wrong = (t["ranges"][tensor][1] for t in (json.loads((sound / "calibration.json").read_text()), table))
    assert wrong < 0.75 * right
