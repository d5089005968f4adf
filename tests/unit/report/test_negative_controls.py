"""Engines that are broken on purpose, each in one way that has happened: a gate must fail and blame the right stage."""

from __future__ import annotations

import re
import shutil
from dataclasses import replace

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from nformer_edge.backends.build import build_engine
from nformer_edge.backends.spec import EngineSpec
from nformer_edge.core.artifact import OWN_FIELDS, read_manifest, write_manifest
from nformer_edge.core.errors import ArtifactError, GateError
from nformer_edge.core.machine import saturates_int8
from nformer_edge.data.calibration import calibration_images
from nformer_edge.exporting.bundle import GOLDEN, open_bundle
from nformer_edge.quantize.calibrate import measure_ranges
from nformer_edge.quantize.values import read_ranges
from nformer_edge.report.parity import parity
from nformer_edge.report.table import format_table

torch = pytest.importorskip("torch")


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
            golden = open_bundle(bundle).golden  # with the head's vectors, opening would refuse it before parity
            np.savez(copy / GOLDEN, images=golden["images"], features=golden["features"])
        for spec in (manifest["preprocess"], manifest["model"]["preprocess"]):
            spec.update(preprocess)
        write_manifest(copy, "bundle", {k: v for k, v in manifest.items() if k not in OWN_FIELDS})
        return copy

    return make


@pytest.fixture(scope="module")
def caught():
    """Prints the table of the controls, what caught each and what was blamed: ``pytest -s`` shows it."""
    rows = []
    yield rows
    print("\n" + format_table(["control", "to blame", "caught by, in that part", "at fault"], rows, left=4))


@pytest.fixture
def judge(checkpoint, tiny_market, caught, request):
    def go(engine):
        result = parity(checkpoint, engine, tiny_market, draws=200, intra_op_threads=1)
        if result.blame in ("backbone", "head"):
            blamed = next(p for p in result.parts if p.part == result.blame)
            gates = [g.gate for g in blamed.gates if g.status == "failed"]
            fault = (
                "preprocessing"
                if result.input.error
                else ", ".join(r.first.node if r.first else "graph" for r in result.layers)
            )
            name = re.split("_(is|are)_(blamed|refused)", request.node.name.removeprefix("test_"))[0].replace("_", " ")
            caught.append([name, result.blame, ", ".join(gates), fault])
        return result

    return go


def failed(result, blamed):
    """Asserts that a gate failed and `blamed` is named, in the JSON and in the error. Returns who failed."""
    assert result.status == "failed"
    assert result.blame == blamed
    with pytest.raises(GateError, match=f"to blame: {blamed}") as caught:
        result.require_passed()
    for line in result.causes:
        assert line in str(caught.value)
    return {s.part for s in result.parts if s.status == "failed"}


def first(result, stage):
    """The first node out of its band, which the error must name."""
    (found,) = [r.first for r in result.layers if r.part == stage]
    assert found.inputs_inside
    with pytest.raises(GateError, match=re.escape(f"{stage}: first node out of its band: {found.node} (")):
        result.require_passed()
    return found.node


def test_the_sound_bundle_passes(judge, bundle):
    result = judge(bundle)
    assert {s.part: s.status for s in result.parts} == dict.fromkeys(("backbone", "head", "end_to_end"), "passed")
    assert (result.input.error, result.layers) == (0, ())


def test_a_wrong_channel_order_is_blamed_on_the_preprocessing(judge, broken_bundle):
    result = judge(broken_bundle(channels="BGR"))
    assert failed(result, "backbone") == {"backbone", "end_to_end"}
    assert result.causes == ["the input itself differs, so it is the preprocessing: channels: BGR, the reference RGB"]


@pytest.mark.parametrize(("field", "left_out"), [("mean", [0.0, 0.0, 0.0]), ("std", [1.0, 1.0, 1.0])])
def test_a_missing_normalization_is_blamed_on_the_preprocessing(judge, broken_bundle, field, left_out):
    result = judge(broken_bundle(**{field: left_out}))
    assert failed(result, "backbone") == {"backbone", "end_to_end"}
    (line,) = result.causes
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
    tensors = result.layers[0].tensors
    assert f"head: the engine's graph has 1 of the reference's {tensors} tensors" in result.causes


#: All of the training images: tensors that no image of the calibration reached would be at fault too.
INT8 = EngineSpec(backend="onnxruntime", precision="int8", calib_num=36, calib_method="minmax")


@pytest.fixture(params=[False, True], ids=["8 bits", "7 bits"])
def int8(request):
    """An INT8 build as a CPU with VNNI makes it, and as one without."""
    if saturates_int8() and not request.param:
        pytest.skip("8-bit weights saturate on this CPU, which has no VNNI")
    return replace(INT8, reduce_range=request.param)


def gate(result, name):
    return next(g for g in result.parts[0].gates if g.gate == name)


def test_int8_ranges_of_another_model_are_refused_and_where_forged_blamed_on_the_backbone(
    judge, int8, bundle, tiny_bundle, tiny_market, tmp_path
):
    sound = build_engine(bundle, tmp_path / "sound", int8, calib_data=tiny_market)
    images, source = calibration_images(tiny_market, int8.calib_num, 0), open_bundle(tiny_bundle)
    ranges = measure_ranges(source.backbone, images, source.spec.preprocess, ["minmax"])["minmax"]
    right = read_ranges(sound / "calibration.json")
    other = tmp_path / "other.json"
    replace(right, table=ranges.table, backbone_sha256="0" * 64).save(other)
    with pytest.raises(ArtifactError, match="ranges of another backbone"):
        build_engine(bundle, tmp_path / "refused", int8, calib_data=other)
    forged = tmp_path / "calibration.json"
    replace(right, table=ranges.table).save(forged)

    engine = build_engine(bundle, tmp_path / "forged", int8, calib_data=forged)
    result = judge(engine)
    assert failed(result, "backbone") == {"backbone", "end_to_end"}
    assert gate(result, "cosine_min").status == "alarm"
    ours = judge(sound)
    for name in ("cosine_min", "cosine_mean"):  # ranks of a dozen images agree or not by a hair, on one CPU or another
        assert 1 - gate(result, name).measured > 3 * (1 - gate(ours, name).measured), name

    # Named is the first node in the graph, whose range is too narrow by a quarter and more: it cuts.
    assert first(result, "backbone") == "/trunk/conv1/conv/Conv"
    tensor = result.layers[0].first.tensor
    assert ranges.table[tensor][1] < 0.75 * right.table[tensor][1]
