"""Bundles become engines, and their manifests say what was really built."""

from __future__ import annotations

import json
import shutil

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from nformer_edge.backends.build import EngineSummary, build_engine, describe_engine
from nformer_edge.backends.choice import choose_backends
from nformer_edge.backends.engine import Counts, how_to_rebuild, open_engine
from nformer_edge.backends.onnxruntime import build as onnxruntime
from nformer_edge.backends.open import open_model, self_test
from nformer_edge.backends.spec import EngineSpec, parse_sizes
from nformer_edge.backends.tensorrt import build as tensorrt
from nformer_edge.core import machine as cpu
from nformer_edge.core.artifact import read_manifest
from nformer_edge.core.errors import ArtifactError, BackendError, DataError, UsageError
from nformer_edge.core.spec import BackboneSpec, HeadSpec, ModelSpec, PreprocessSpec
from nformer_edge.core.values import digest_of
from nformer_edge.exporting.export import export_bundle
from nformer_edge.metrics.agreement import cosines
from nformer_edge.model.backbone import Backbone
from nformer_edge.model.checkpoint import save_checkpoint
from nformer_edge.model.gated import make_head
from nformer_edge.quantize.fp16 import multiplication_types
from nformer_edge.quantize.placement_cpu import channel_gates


def spec(precision, **settings):
    return EngineSpec(backend="onnxruntime", precision=precision, **settings)


@pytest.fixture(scope="module")
def int8_engine(tiny_bundle, tiny_market, tmp_path_factory):
    out = tmp_path_factory.mktemp("int8") / "engine"
    return build_engine(tiny_bundle, out, spec("int8", calib_num=10, calib_method="minmax"), calib_data=tiny_market)


def test_an_fp32_engine_is_the_bundle_in_plain_files(tiny_bundle, tmp_path):
    engine = build_engine(tiny_bundle, tmp_path / "e", spec("fp32"))
    manifest, bundle = read_manifest(engine, "engine"), read_manifest(tiny_bundle, "bundle")
    assert manifest["files"] == bundle["files"]
    assert manifest["precision"] == {"backbone": "fp32", "head": "fp32"}
    assert (manifest["backend"], manifest["landmark_seed"]) == ("onnxruntime", 7)
    with open_model(engine) as runner:
        assert set(self_test(runner)) == {"backbone", "head"}


def test_the_paper_s_head_in_int8_needs_no_calibration_and_says_what_it_is(tiny_bundle, tmp_path):
    engine = build_engine(tiny_bundle, tmp_path / "e", EngineSpec(precision="fp32", head_precision="int8"))
    manifest = open_engine(engine).manifest
    assert (manifest.backend, manifest.precision) == ("onnxruntime", {"backbone": "fp32", "head": "int8"})
    assert manifest.audit["head"].multiplications["int8"].built > 4
    assert "--head-precision int8" in how_to_rebuild("e", manifest)
    rows = np.random.default_rng(0).standard_normal((40, 32)).astype(np.float32)
    with open_model(engine) as int8, open_model(tiny_bundle) as reference:
        self_test(int8)
        found = cosines(int8.relate(rows), reference.relate(rows))
    assert found.min() > 0.97
    assert found.max() < 1


def test_seven_bits_make_a_coarser_head(tiny_bundle, tmp_path):
    rows = np.random.default_rng(0).standard_normal((40, 32)).astype(np.float32)
    asked = EngineSpec(precision="fp32", head_precision="int8", reduce_range=True)
    with open_model(build_engine(tiny_bundle, tmp_path / "e", asked)) as int8, open_model(tiny_bundle) as reference:
        assert cosines(int8.relate(rows), reference.relate(rows)).min() > 0.95
    weights = onnx.load(tmp_path / "e" / "nformer.onnx").graph.initializer
    kept = [numpy_helper.to_array(w) for w in weights if w.data_type == onnx.TensorProto.INT8 and len(w.dims) == 2]
    assert kept
    assert max(np.abs(w).max() for w in kept) == 63


def test_another_backend_or_another_head_is_not_built_in_int8(tiny_bundle, tmp_path):
    pytest.importorskip("openvino")
    with pytest.raises(BackendError, match="head_precision: got int8 for openvino, expected onnxruntime, or fp32"):
        build_engine(tiny_bundle, tmp_path / "e", EngineSpec(backend="openvino", head_precision="int8"))
    gated = ModelSpec(BackboneSpec("osnet_x0_25", 32, "fc"), HeadSpec.gated(32), PreprocessSpec(64, 32))
    save_checkpoint(tmp_path / "m.safetensors", gated, Backbone(gated.backbone), make_head(gated.head))
    bundle = export_bundle(tmp_path / "m.safetensors", tmp_path / "b")
    with pytest.raises(UsageError, match="got int8 for a gated head, expected the paper's head"):
        build_engine(bundle, tmp_path / "e", EngineSpec(precision="fp32", head_precision="int8"))


def test_an_int8_engine_is_audited_and_agrees_with_fp32(int8_engine, tiny_bundle):
    manifest = read_manifest(int8_engine, "engine")
    assert manifest["precision"] == {"backbone": "int8", "head": "fp32"}
    assert open_engine(int8_engine).manifest.audit["backbone"].multiplications == {
        "int8": Counts(139, 139),
        "fp32": Counts(49, 49),
    }
    assert manifest["calibration"]["num"] == 10
    assert len(manifest["calibration"]["sha256"]) == 64
    images = np.random.default_rng(0).uniform(-1, 1, (4, 3, 64, 32)).astype(np.float32)
    with open_model(int8_engine) as engine, open_model(tiny_bundle) as reference:
        self_test(engine)
        found, expected = engine.embed(images), reference.embed(images)
        assert cosines(found, expected).min() >= 0.9
        assert not np.array_equal(found, expected)


def test_an_int8_backbone_has_signed_weights_a_scale_for_each_channel_and_unsigned_activations(int8_engine):
    model = onnx.load(int8_engine / "backbone.onnx")
    constants = {t.name: t for t in model.graph.initializer}
    makers = {name: n for n in model.graph.node for name in n.output}
    conv = next(n for n in model.graph.node if n.op_type == "Conv")
    weights, activations = makers[conv.input[1]], makers[conv.input[0]]
    channels = constants[weights.input[0]].dims[0]
    assert constants[weights.input[0]].data_type == onnx.TensorProto.INT8
    assert list(constants[weights.input[1]].dims) == [channels]
    assert constants[activations.input[2]].data_type == onnx.TensorProto.UINT8


def test_channel_gates_stay_in_float_and_nothing_else_does(int8_engine, tiny_bundle):
    kept = channel_gates(onnx.load(tiny_bundle / "backbone.onnx"))
    model = onnx.load(int8_engine / "backbone.onnx")
    makers = {name: n.op_type for n in model.graph.node for name in n.output}
    floats = [n.name for n in model.graph.node if n.op_type == "Conv" and makers.get(n.input[1]) != "DequantizeLinear"]
    assert len(floats) == 48  # two in each of 24 gates
    assert set(floats) <= set(kept)
    assert all("/gate" in name for name in kept)


def test_a_description_has_a_summary_to_print(int8_engine):
    found = describe_engine(int8_engine)
    assert "backbone int8, head fp32" in str(found)
    assert "139 of 139 in INT8, 49 of 49 in FP32" in str(found)
    assert EngineSummary.from_json(json.loads(json.dumps(found.to_json()))) == found


def test_calibration_images_and_int8_are_only_taken_together(tiny_bundle, tiny_market, tmp_path):
    with pytest.raises(UsageError, match=r"calib_data: got images for fp32.*--int8"):
        build_engine(tiny_bundle, tmp_path / "e", spec("fp32"), calib_data=tiny_market)
    with pytest.raises(UsageError, match="calib_data: got none"):
        build_engine(tiny_bundle, tmp_path / "e", spec("int8"))


def test_calibration_on_query_images_is_refused(tiny_bundle, tiny_market, tmp_path):
    with pytest.raises(DataError, match="a query image, expected training images alone"):
        build_engine(tiny_bundle, tmp_path / "e", spec("int8"), calib_data=tiny_market / "query")
    assert not (tmp_path / "e").exists()


def test_a_damaged_bundle_is_refused_before_anything_is_built(tiny_bundle, tmp_path):
    copy = tmp_path / "bundle"
    shutil.copytree(tiny_bundle, copy)
    data = bytearray((copy / "nformer.onnx").read_bytes())
    data[len(data) // 2] ^= 1
    (copy / "nformer.onnx").write_bytes(data)
    with pytest.raises(ArtifactError, match=r"nformer.onnx: got sha256"):
        build_engine(copy, tmp_path / "e", spec("fp32"))


def test_fp16_on_a_cpu_is_refused_by_name(tiny_bundle, tmp_path):
    with pytest.raises(BackendError, match=r"fp16 for onnxruntime, expected fp32 \| int8"):
        build_engine(tiny_bundle, tmp_path / "e", spec("fp16"))
    with pytest.raises(BackendError, match=r"precision: got fp16|no fp16 on this backend"):
        build_engine(tiny_bundle, tmp_path / "e", EngineSpec(precision="fp16"))


def test_auto_takes_what_is_there_and_says_why():
    names, why = choose_backends("auto", "int8")
    assert "onnxruntime" in names
    assert "tensorrt: " in why


def test_auto_prefers_a_backend_that_lacks_nothing(monkeypatch):
    monkeypatch.setattr(tensorrt, "missing", lambda: ())
    monkeypatch.setattr(tensorrt, "missing_to_run", lambda: ())
    assert choose_backends("auto", "fp16") == (("tensorrt",), "the best there is")


@pytest.mark.parametrize("name", ["tensorrt", "tensorrt-rtx"])
def test_a_backend_that_cannot_build_here_says_what_is_missing(name, tiny_bundle, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(BackendError, match=f"{name}: got no package tensorrt"):
        build_engine(tiny_bundle, tmp_path / "e", EngineSpec(backend=name))


def test_onnxruntime_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    assert onnxruntime.missing() == ("no package onnxruntime",)


def test_an_engine_without_a_name_stands_beside_its_bundle(tiny_bundle, tmp_path):
    copy = tmp_path / "bundle"
    shutil.copytree(tiny_bundle, copy)
    assert build_engine(copy, None, spec("fp32")) == tmp_path / "osnet_x0_25_64x32_fp32_onnxruntime"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"backend": "onnxruntim"}, "Did you mean 'onnxruntime'"),
        ({"precision": "int4"}, "precision: got 'int4'"),
        ({"calib_method": "max"}, "calib_method: got 'max'"),
        ({"calib_num": 0}, "calib_num: got 0"),
        ({"batch": (0, 1, 2)}, "batch: got 0:1:2"),
        ({"gallery_size": (20, 10, 30)}, "gallery_size: got 20:10:30"),
        ({"hardware_compat": "ampere"}, "Did you mean 'ampere_plus'"),
        ({"dla": -1}, "dla: got -1"),
    ],
)
def test_a_spec_refuses_what_cannot_be(settings, message):
    with pytest.raises(UsageError, match=message):
        EngineSpec(**settings)


def test_the_audit_counts_only_products_that_take_int8_from_both_sides():
    def product(data, weights):
        return helper.make_node("Conv", [data, weights], [f"y_{data}_{weights}"], name=f"{data} {weights}")

    nodes = [
        helper.make_node("DequantizeLinear", ["q", "s"], ["data"]),
        helper.make_node("DequantizeLinear", ["w", "s"], ["weights"]),
        product("data", "weights"),
        product("x", "weights"),
        product("data", "float_weights"),
        helper.make_node("MatMul", ["x", "float_weights"], ["z"], name="z"),
    ]
    model = helper.make_model(helper.make_graph(nodes, "g", [], []))
    assert list(multiplication_types(model).values()) == ["int8", "fp32", "fp32", "fp32"]


@pytest.mark.parametrize(
    ("flags", "saturates"),
    [
        (("avx2",), True),
        (("avx2", "avx512_vnni"), False),
        (("avx2", "avx_vnni"), False),
        (("sse4_2",), True),
        (("asimddp",), False),
        ((), False),
    ],
)
def test_weights_lose_a_bit_only_where_products_would_saturate(flags, saturates, monkeypatch):
    monkeypatch.setattr(cpu, "instruction_sets", lambda: flags)
    assert cpu.saturates_int8() is saturates


def test_a_table_of_ranges_serves_a_second_build_without_images(int8_engine, tiny_bundle, tmp_path):
    table = int8_engine / "calibration.json"
    second = build_engine(tiny_bundle, tmp_path / "e", spec("int8"), calib_data=table)
    first, again = read_manifest(int8_engine, "engine"), read_manifest(second, "engine")
    assert again["calibration"] == first["calibration"]
    constants = [
        {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(e / "backbone.onnx").graph.initializer}
        for e in (int8_engine, second)
    ]
    assert all(np.array_equal(constants[0][name], constants[1][name]) for name in constants[0])


def test_a_table_of_another_backbone_is_refused(int8_engine, tiny_bundle, tmp_path):
    table = json.loads((int8_engine / "calibration.json").read_text())
    other = table | {"backbone_sha256": "0" * 64}
    (tmp_path / "other.json").write_text(json.dumps(other))
    with pytest.raises(ArtifactError, match="contents that do not match their sha256"):
        build_engine(tiny_bundle, tmp_path / "e", spec("int8"), calib_data=tmp_path / "other.json")
    (tmp_path / "other.json").write_text(json.dumps(other | {"sha256": digest_of(other)}))
    with pytest.raises(ArtifactError, match="got ranges of another backbone"):
        build_engine(tiny_bundle, tmp_path / "e", spec("int8"), calib_data=tmp_path / "other.json")
    (tmp_path / "broken.json").write_text('{"kind": "calibration", "ranges": {"x": [1]}}')
    with pytest.raises(ArtifactError, match="expected calibration, version 3"):
        build_engine(tiny_bundle, tmp_path / "e", spec("int8"), calib_data=tmp_path / "broken.json")


@pytest.mark.parametrize(("text", "sizes"), [("1:8:32", (1, 8, 32)), ("16", (1, 16, 16))])
def test_sizes_are_read_as_min_opt_and_max(text, sizes):
    assert parse_sizes(text) == sizes


@pytest.mark.parametrize("text", ["", "8:1:2", "0:1:2", "1:2", "a:b:c", "1:2:3:4"])
def test_other_sizes_are_refused(text):
    with pytest.raises(UsageError, match="min:opt:max"):
        parse_sizes(text)
