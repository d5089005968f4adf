"""Engines for OpenVINO: the same files and numbers as onnxruntime's, compiled by another runtime."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import numpy as np
import pytest

from nformer_edge.backends.build import build_engine, describe_engine
from nformer_edge.backends.choice import choose_backends
from nformer_edge.backends.engine import open_engine
from nformer_edge.backends.open import open_model, self_test
from nformer_edge.backends.openvino import run as openvino_runner
from nformer_edge.backends.spec import EngineSpec
from nformer_edge.core import machine as cpu
from nformer_edge.core.errors import ArtifactError, BackendError, UsageError
from nformer_edge.core.spec import BackboneSpec, HeadSpec, ModelSpec, PreprocessSpec
from nformer_edge.metrics.agreement import ROUNDING, cosines, row_errors
from nformer_edge.ops import onnx_ops


@pytest.fixture(scope="module")
def installed():
    pytest.importorskip("openvino", reason="no openvino")


@pytest.fixture(scope="module")
def engine(installed, tiny_bundle, tmp_path_factory):
    return build_engine(tiny_bundle, tmp_path_factory.mktemp("ov") / "fp32", EngineSpec("openvino", batch=(1, 4, 8)))


@pytest.fixture(scope="module")
def int8_engine(installed, tiny_bundle, tiny_market, tmp_path_factory):
    spec = EngineSpec("openvino", "int8", calib_num=10, calib_method="minmax", reduce_range=True)
    return build_engine(tiny_bundle, tmp_path_factory.mktemp("ov") / "int8", spec, tiny_market)


def pictures(count):
    return np.random.default_rng(0).standard_normal((count, 3, 64, 32)).astype(np.float32)


def test_an_fp32_engine_gives_the_features_of_onnxruntime(engine, tiny_bundle):
    with open_model(engine) as found, open_model(tiny_bundle) as reference:
        assert set(self_test(found)) == {"backbone", "head"}
        assert row_errors(found.embed(pictures(3)), reference.embed(pictures(3))).max() <= ROUNDING
        features = np.random.default_rng(1).standard_normal((40, 32)).astype(np.float32)
        assert row_errors(found.relate(features), reference.relate(features)).max() <= ROUNDING


def test_any_number_of_images_is_cut_into_one_and_the_usual_batch(engine):
    with open_model(engine, intra_op_threads=1) as runner:
        images = pictures(7)
        features = runner.embed(images)
        assert set(runner._sessions) == {"backbone.onnx 1", "backbone.onnx 4", "nformer.onnx"}
        for count in (0, 1, 2, 5, 7):
            found = runner.embed(images[:count])
            assert (found.dtype, found.shape) == (np.float32, (count, 32))
            np.testing.assert_allclose(found, features[:count], rtol=1e-4, atol=1e-5)


def test_a_manifest_tells_runtime_version_and_what_runs_the_head(engine):
    found = open_engine(engine).manifest
    assert found.backend == "openvino"
    assert found.versions["openvino"] == cpu.package_version("openvino")
    assert found.operators == ("native" if onnx_ops.available() else "inlined")


def test_int8_is_the_same_graph_as_onnxruntimes_and_is_audited(int8_engine, tiny_bundle, tmp_path):
    spec = EngineSpec("onnxruntime", "int8", reduce_range=True)
    theirs = build_engine(tiny_bundle, tmp_path / "e", spec, int8_engine / "calibration.json")
    assert (theirs / "backbone.onnx").read_bytes() == (int8_engine / "backbone.onnx").read_bytes()
    found = open_engine(int8_engine).manifest
    assert found.audit["backbone"].multiplications["int8"].asked == 139
    assert found.built_for.reduce_range is True
    assert [row.name for row in describe_engine(int8_engine).choice.tried] == ["openvino fp32", "openvino int8"]
    with open_model(int8_engine) as runner, open_model(tiny_bundle) as reference:
        self_test(runner)
        assert cosines(runner.embed(pictures(4)), reference.embed(pictures(4))).min() >= 0.9


def test_int8_is_refused_on_a_cpu_where_its_sums_would_saturate(
    installed, tiny_bundle, int8_engine, tmp_path, monkeypatch
):
    monkeypatch.setattr(cpu, "instruction_sets", lambda: ("avx2", "avx512_vnni"))
    spec = EngineSpec("openvino", "int8", reduce_range=False)
    moved = build_engine(tiny_bundle, tmp_path / "e", spec, int8_engine / "calibration.json")
    monkeypatch.setattr(cpu, "instruction_sets", lambda: ("avx2",))
    with pytest.raises(BackendError, match=r"8-bit weights.*build-engine BUNDLE --backend openvino --int8"):
        open_model(moved)
    with pytest.raises(BackendError, match="reduce_range"):
        build_engine(tiny_bundle, tmp_path / "f", spec, int8_engine / "calibration.json")
    with open_model(int8_engine) as runner:  # 7 bits run anywhere
        runner.embed(pictures(1))


@pytest.fixture(scope="module")
def gated_bundle(tmp_path_factory):
    from nformer_edge.exporting.export import export_bundle
    from nformer_edge.model.backbone import Backbone
    from nformer_edge.model.checkpoint import save_checkpoint
    from nformer_edge.model.gated import make_head

    folder = tmp_path_factory.mktemp("gated")
    spec = ModelSpec(BackboneSpec("resnet18", 32), HeadSpec.gated(32), PreprocessSpec(64, 32))
    save_checkpoint(folder / "m.safetensors", spec, Backbone(spec.backbone), make_head(spec.head))
    return export_bundle(folder / "m.safetensors", folder / "bundle")


def test_without_our_kernels_openvino_runs_the_gated_head_itself(installed, gated_bundle, tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_ops, "available", lambda: False)
    found = build_engine(gated_bundle, tmp_path / "e", EngineSpec("openvino"))
    assert open_engine(found).manifest.operators == "inlined"
    features = np.random.default_rng(1).standard_normal((150, 32)).astype(np.float32)
    with open_model(found) as runner, open_model(gated_bundle) as reference:
        assert not runner.native
        assert row_errors(runner.relate(features), reference.relate(features)).max() <= ROUNDING


def test_a_head_that_openvino_refuses_needs_onnxruntime(installed, tiny_bundle, tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_ops, "available", lambda: False)
    monkeypatch.setattr(openvino_runner, "compile_graph", _refusing_heads(openvino_runner.compile_graph))
    with pytest.raises(BackendError, match=r"openvino: the head: got .*nformer-edge\[cpu\]"):
        build_engine(tiny_bundle, tmp_path / "e", EngineSpec("openvino"))


def _refusing_heads(compile_graph):
    def refusing(graph, name, *args):
        if name == "nformer.onnx":
            raise ArtifactError(name, "a graph that is refused", "one it compiles", "None.")
        return compile_graph(graph, name, *args)

    return refusing


def test_a_device_that_is_not_there_is_refused_with_those_that_are(installed, tiny_bundle, engine, tmp_path):
    with pytest.raises(BackendError, match=r"device: got npu9, expected one that openvino finds here: .*cpu"):
        build_engine(tiny_bundle, tmp_path / "e", EngineSpec("openvino", device="npu9"))
    with pytest.raises(BackendError, match="device: got cuda:0"):
        open_model(engine, device="cuda:0")
    with pytest.raises(UsageError, match="contexts: got 2"):
        open_model(engine, contexts=2)


def test_a_precision_that_a_device_does_not_compute_in_is_refused(monkeypatch):
    able = {"CPU": ["FP32", "INT8"], "NPU": ["FP16", "INT8"]}
    core = SimpleNamespace(available_devices=list(able), get_property=lambda device, _: able[device])
    monkeypatch.setattr(openvino_runner, "_openvino", lambda: SimpleNamespace(Core=lambda: core))
    assert openvino_runner.on_device("npu", "fp16") == "NPU"
    assert openvino_runner.on_device(None, "int8") == "CPU"
    with pytest.raises(BackendError, match=r"bf16 on this CPU, expected fp32 \| int8"):
        openvino_runner.on_device("cpu", "bf16")
    with pytest.raises(BackendError, match=r"fp32 on this NPU, expected fp16 \| int8"):
        openvino_runner.on_device("npu", "fp32")


def test_openvino_that_is_not_installed_is_named_with_the_next_step(monkeypatch):
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(BackendError, match=r"openvino: got no package openvino.*nformer-edge\[openvino\]"):
        openvino_runner.on_device("cpu", "fp32")
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(BackendError, match=r"openvino: got no package openvino.*nformer-edge\[openvino\]"):
        choose_backends("openvino")


def test_a_graph_that_openvino_refuses_is_one_line(installed):
    with pytest.raises(ArtifactError, match=r"backbone.onnx: got a graph that openvino \S+ refuses \([^\n]+\)"):
        openvino_runner.compile_graph(b"\x08\x09", "backbone.onnx", "CPU", "fp32")
