"""TensorRT's build on a module made of each version's own names: what is asked of it, and each refusal by its name.

No GPU has run this path. What the module plays beyond its names is NVIDIA's documentation; real plans are built in
`test_tensorrt_rtx`, which takes the same road from `network.build_plan` on.
"""

from __future__ import annotations

import itertools

import pytest
from helpers import fake_tensorrt
from helpers.tensorrt_bench import GPU, Bench

from nformer_edge.backends.engine import BuiltFor, Counts
from nformer_edge.backends.spec import BuildSpec
from nformer_edge.backends.tensorrt import build as tensorrt
from nformer_edge.backends.tensorrt import cuda
from nformer_edge.backends.tensorrt.cuda import Gpu, gpu_facts
from nformer_edge.backends.tensorrt.plugin import library as plugin_library
from nformer_edge.core.artifact import sha256_file
from nformer_edge.core.errors import BackendError, UsageError
from nformer_edge.exporting.bundle import open_bundle
from nformer_edge.quantize.fp16 import multiplication_types
from nformer_edge.quantize.prepare import prepare
from nformer_edge.quantize.spec import QuantizeSpec
from nformer_edge.quantize.values import HalfFacts

VERSIONS = ("8.6", "10.3", "10.13", "10.16", "11.4")


@pytest.fixture
def bench(tiny_bundle, tmp_path, monkeypatch):
    return lambda version="10.3": Bench(tiny_bundle, tmp_path, monkeypatch, version)


@pytest.fixture(scope="module")
def calibration(tiny_bundle, tiny_market, tmp_path_factory):
    """A table of ranges, measured once."""
    spec, folder = QuantizeSpec("int8", "minmax", calib_num=4), tmp_path_factory.mktemp("ranges")
    prepare(open_bundle(tiny_bundle), spec, tiny_market, folder, half=False).save(folder)
    return folder / "calibration.json"


@pytest.mark.parametrize(
    ("version", "precision"), [("8.6", "fp32"), ("11.4", "fp32"), *itertools.product(VERSIONS, ("fp16", "int8"))]
)
def test_every_version_builds_every_precision_by_names_that_it_has(bench, calibration, version, precision):
    b = bench(version)
    built = b.build(precision, calibration if precision == "int8" else None)
    assert built.precision == {"backbone": precision, "head": "fp16" if precision == "int8" else precision}
    assert built.versions == {"tensorrt": b.trt.__version__}
    assert built.built_for == BuiltFor(GPU.name, GPU.compute_capability, GPU.multiprocessors)
    assert built.plugin_sha256 == sha256_file(b.library)
    convolutions = built.audit["backbone"].multiplications[precision]
    assert convolutions.asked == convolutions.built
    assert (b.out / "backbone.engine").is_file()
    assert (b.out / "nformer.engine").is_file()
    assert "info: Engine generation completed" in (b.out / "build.log").read_text()


@pytest.mark.parametrize("version", ["10.3", "10.13", "10.16", "11.4"])
def test_from_tensorrt_10_on_types_stand_in_the_graph_and_no_flag_is_set(bench, version):
    b = bench(version)
    b.build("fp16")
    strongly = 1 << int(b.trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    assert [(asked["network_flags"], asked["flags"]) for asked in b.machine.built] == [(strongly, [])] * 2


def test_tensorrt_8_gets_a_float32_graph_flags_and_layers_that_keep_float32(bench, calibration):
    b = bench("8.6")
    b.build("int8", calibration)
    backbone, head = b.machine.built
    assert backbone["flags"] == ["FP16", "INT8", "OBEY_PRECISION_CONSTRAINTS"]
    assert head["flags"] == ["FP16", "OBEY_PRECISION_CONSTRAINTS"]
    assert backbone["network_flags"] == 1 << int(b.trt.NetworkDefinitionCreationFlag.EXPLICIT_BATCH)
    assert next(o.version for o in head["model"].opset_import if not o.domain) == 17
    assert any(name.endswith("/Gemm") for name in backbone["held"])  # the neck
    assert not any(name.endswith("/Gemm") for name in head["held"])
    assert any("LayerNorm" in name for name in head["held"])


def test_tensorrt_8_holds_every_layer_of_the_head_that_is_no_projection(bench):
    """A node that its parser splits into layers of other names could not be held: there must be none."""
    b = bench("8.6")
    b.build("fp16")
    head = b.machine.built[1]
    floats = {n.name for n in head["model"].graph.node if n.op_type not in ("Shape", "Cast")}
    projections = {n.name for n in head["model"].graph.node if n.op_type == "Gemm"}
    kinds = {n.name: n.op_type for n in head["model"].graph.node}
    assert {"RowTopK", "ReciprocalNeighborAttention", "ReduceMean", "Sqrt"} <= {kinds[n] for n in head["held"]}
    integers = {"Gather", "Unsqueeze", "Concat", "Div", "Mul", "Add"}  # sizes, and indices of landmarks
    assert {kinds[n] for n in floats - head["held"] - projections} <= integers


@pytest.mark.parametrize("version", VERSIONS)
def test_float32_is_float32_and_not_tf32(bench, version):
    b = bench(version)
    b.build("fp32")
    assert [asked["cleared"] for asked in b.machine.built] == [["TF32"]] * 2


def test_the_operators_bodies_are_taken_out_where_a_plugin_takes_their_place(bench):
    b = bench()
    b.build("fp16")
    head = b.machine.built[1]["model"]
    assert not head.functions
    ours = [n for n in head.graph.node if n.domain]
    named = [{a.name: a.s for a in n.attribute if a.name.startswith("plugin")} for n in ours]
    assert named == [{"plugin_version": b"1", "plugin_namespace": b""}] * len(ours)


def test_profiles_and_workspace_are_as_asked(bench):
    b = bench()
    built = b.build("fp16", batch=(1, 4, 8), gallery_size=(20, 100, 300), workspace=1.5)
    backbone, head = b.machine.built
    assert backbone["profile"] == {"images": ((1, 3, 64, 32), (4, 3, 64, 32), (8, 3, 64, 32))}
    assert head["profile"]["features"] == ((20, 32), (100, 32), (300, 32))
    assert built.profiles["head"]["landmarks"] == ((2, 3),) * 3
    assert backbone["workspace"] == head["workspace"] == 3 << 29


def test_a_timing_cache_is_read_and_written(bench, tmp_path):
    b, file = bench(), tmp_path / "timing.cache"
    b.build("fp16", timing_cache=str(file))
    assert file.read_bytes() == b"timed;timed;"  # one plan after the other


def test_compatibility_is_asked_for_and_told(bench):
    b = bench("10.13")
    built = b.build("fp16", hardware_compat="same_compute_capability", version_compat=True)
    assert built.built_for.hardware_compat == "same_compute_capability"
    assert [x["compat"].name for x in b.machine.built] == ["SAME_COMPUTE_CAPABILITY"] * 2
    assert b.machine.built[0]["flags"] == ["VERSION_COMPATIBLE"]
    with pytest.raises(UsageError, match=r"same_compute_capability with TensorRT 10\.3"):
        bench_again = Bench.__new__(Bench)
        bench_again.__dict__ |= b.__dict__ | {"trt": fake_tensorrt.fake_tensorrt("10.3", b.machine)}
        bench_again.build("fp16", hardware_compat="same_compute_capability")


@pytest.mark.parametrize("option", [{"hardware_compat": "ampere_plus"}, {"version_compat": True}])
def test_what_tensorrt_8_5_does_not_have_is_refused_by_name(bench, option):
    b = bench("8.6")
    del b.trt.HardwareCompatibilityLevel  # it came with 8.6
    with pytest.raises(UsageError, match=f"{next(iter(option))}: got TensorRT 8.*expected 8.6 or later"):
        b.build("fp16", **option)


@pytest.mark.parametrize(
    ("call", "returned", "doing"),
    [
        ("create_network", None, "making a network"),
        ("create_builder_config", None, "making a configuration"),
        ("create_optimization_profile", None, "making a profile"),
        ("parse", False, "parsing the ONNX graph"),
        ("add_optimization_profile", -1, "adding the profile"),
        ("create_timing_cache", None, "reading the timing cache"),
        ("set_timing_cache", False, "taking the timing cache"),
        ("build_serialized_network", None, "building"),
        ("deserialize_cuda_engine", None, "reading the plan back"),
        ("create_execution_context", None, "making a context to inspect by"),
        ("set_input_shape", False, "inspecting at images"),
    ],
)
def test_whatever_tensorrt_refuses_is_an_error_with_its_own_words(bench, tmp_path, call, returned, doing):
    b = bench()
    b.machine.failing[call] = returned
    b.machine.lines[call] = "because of the weather"
    with pytest.raises(BackendError, match=f"{doing}.*for the backbone: got a refusal") as caught:
        b.build("fp16", timing_cache=str(tmp_path / "cache"))
    if call not in ("create_network", "create_builder_config", "create_optimization_profile"):
        assert "because of the weather" in str(caught.value)
        assert "error: because of the weather" in (b.out / "build.log").read_text()


def test_an_int8_build_that_came_out_fp32_is_an_error(bench, calibration):
    b = bench()
    import onnx

    model = onnx.load(b.bundle / "backbone.onnx")
    b.machine.wrong_type = {n.name: "fp32" for n in model.graph.node if n.op_type == "Conv"}
    with pytest.raises(
        BackendError, match=r"backbone: precision: got 139 of 139 multiplications not in int8 \(.* in fp32"
    ):
        b.build("int8", calibration)


def test_one_fp16_product_in_fp32_is_an_error_in_a_strongly_typed_network(bench):
    b = bench()
    b.machine.wrong_type = {"/trunk/conv1/conv/Conv": "fp32"}
    with pytest.raises(BackendError, match="got 1 of 187 multiplications not in fp16"):
        b.build("fp16")


def test_a_head_without_its_plugin_library_is_refused(bench, monkeypatch, tmp_path):
    b = bench()
    b.library.unlink()
    monkeypatch.setattr(plugin_library, "plugin_places", lambda major=None: iter(()))
    with pytest.raises(BackendError, match=r"no libnformer_plugins.so for TensorRT 10.*build-plugin"):
        b.build("fp16")


@pytest.mark.parametrize(
    ("version", "head", "precision", "reason"),
    [
        ("10.3", True, "fp16", "plugins run on the GPU alone"),
        ("10.3", False, "fp32", "computes in FP16 and INT8 alone"),
        ("10.13", False, "fp16", "10.7 was the last before 11.4.1"),
    ],
)
def test_a_dla_that_could_not_do_the_work_is_refused_with_the_reason(bench, version, head, precision, reason):
    from types import SimpleNamespace

    b = bench(version)
    with pytest.raises(BackendError, match=reason):
        tensorrt.refuse_dla(
            SimpleNamespace(has_head=head), BuildSpec(precision=precision, dla=0), tensorrt.installed_version()
        )
    assert b.machine.built == []


def test_a_dla_that_can_is_asked_for_with_the_gpu_behind_it(tmp_path, monkeypatch, tiny_checkpoint):
    from nformer_edge.core.spec import ModelSpec
    from nformer_edge.exporting.export import export_bundle
    from nformer_edge.model.checkpoint import load_checkpoint, save_checkpoint

    whole = load_checkpoint(tiny_checkpoint)
    alone = ModelSpec(whole.spec.backbone, None, whole.spec.preprocess)
    save_checkpoint(tmp_path / "alone.safetensors", alone, whole.backbone)
    b = Bench(export_bundle(tmp_path / "alone.safetensors", tmp_path / "alone"), tmp_path, monkeypatch, "10.3")
    built = b.build("fp16", dla=1)
    assert (b.machine.built[0]["dla"], b.machine.built[0]["flags"]) == (1, ["GPU_FALLBACK"])
    assert (built.precision, built.plugin_sha256) == ({"backbone": "fp16"}, None)


@pytest.mark.parametrize(("device", "ordinal"), [(None, 0), ("cuda", 0), ("cuda:2", 2)])
def test_a_device_is_a_gpu(device, ordinal):
    assert tensorrt.gpu_ordinal(device) == ordinal


@pytest.mark.parametrize("device", ["tpu", "cpu", "cuda:", "cuda:x"])
def test_another_device_is_refused(device):
    with pytest.raises(UsageError, match=f"device: got {device}"):
        tensorrt.gpu_ordinal(device)


def test_a_gpu_is_asked_of_the_driver(monkeypatch):
    class Driver:
        code = 0

        def cuInit(self, flags):
            return self.code

        def cuDeviceGet(self, device, ordinal):
            device._obj.value = ordinal
            return 0

        def cuDeviceGetName(self, name, length, device):
            name.value = b"NVIDIA Thor"
            return 0

        def cuDeviceGetAttribute(self, number, which, device):
            number._obj.value = {75: 11, 76: 0, 16: 20}[which]
            return 0

    monkeypatch.setattr(cuda, "driver_library", Driver)
    assert gpu_facts() == Gpu("NVIDIA Thor", "11.0", 20)
    Driver.code = 100
    with pytest.raises(BackendError, match="CUDA error 100 from cuInit"):
        gpu_facts()


def test_without_images_the_policy_stands_alone_and_the_build_says_so(bench):
    b = bench()
    built = b.build("fp16")
    assert built.fp16 == HalfFacts(None, {"backbone": {}, "head": {}})
    assert "overflow was not searched" in " ".join(built.fp16.lines())
    assert "fp16: head: overflow was not searched" in (b.out / "build.log").read_text()


def test_a_float32_build_says_nothing_of_fp16(bench):
    assert bench().build("fp32").fp16 is None


def test_with_images_overflow_is_searched_and_nothing_is_found_where_fp16_holds(bench, tiny_market):
    b = bench()
    built = b.build("fp16", tiny_market, calib_num=6)
    assert built.fp16.searched.images == 6
    assert len(built.fp16.searched.sha256) == 64
    assert built.fp16.kept == {"backbone": {}, "head": {}}
    assert built.fp16.lines() == ["FP16: overflow searched on 6 images"]


@pytest.mark.parametrize("version", ["8.6", "10.3", "11.4"])
def test_what_leaves_fp16_stays_in_float32_and_manifest_and_log_say_which_and_why(
    overflowing_bundle, tmp_path, monkeypatch, tiny_market, version
):
    b = Bench(overflowing_bundle, tmp_path, monkeypatch, version)
    built = b.build("fp16", tiny_market, calib_num=6)
    kept = built.fp16.kept["backbone"]
    assert 3 <= len(kept) < 10
    assert kept["/trunk/maxpool/MaxPool"].startswith("numbers up to ")
    assert kept["/trunk/conv1/conv/Conv"]
    assert built.audit["backbone"].multiplications["fp32"].asked > 1
    assert built.audit["backbone"].other == {}
    log = (b.out / "build.log").read_text()
    assert "fp16: backbone: /trunk/maxpool/MaxPool stays FP32: numbers up to" in log
    assert any("/trunk/maxpool/MaxPool stays FP32" in line for line in built.fp16.lines())
    if version == "8.6":
        assert kept.keys() <= b.machine.built[0]["held"]
    else:
        types = multiplication_types(b.machine.built[0]["model"])
        assert {types[name] for name in kept if name in types} == {"fp32"}


def test_an_int8_build_keeps_them_too_and_their_multiplications_stay_int8(
    overflowing_bundle, tmp_path, monkeypatch, tiny_market
):
    b = Bench(overflowing_bundle, tmp_path, monkeypatch, "10.13")
    built = b.build("int8", tiny_market, calib_num=4, calib_method="minmax")
    assert built.audit["backbone"].multiplications["int8"] == Counts(139, 139)
    model = b.machine.built[0]["model"]
    first = next(n for n in model.graph.node if n.name == "/trunk/conv1/conv/Conv")
    made_by = {name: n for n in model.graph.node for name in n.output}
    assert first.name in built.fp16.kept["backbone"]
    assert [made_by[name].op_type for name in first.input[:2]] == ["DequantizeLinear"] * 2  # and no cast between
