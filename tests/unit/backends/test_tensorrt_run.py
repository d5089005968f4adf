"""TensorRT engines on a GPU that the CPU plays: the same answers as the bundle, and each failure by its name."""

from __future__ import annotations

import sys
import threading

import numpy as np
import pytest

from nformer_edge.backends.open import open_model, self_test
from nformer_edge.backends.tensorrt.run import TensorRTRunner
from nformer_edge.core.errors import ArtifactError, BackendError, UsageError


def pictures(count, seed=0):
    return np.random.default_rng(seed).standard_normal((count, 3, 64, 32)).astype(np.float32)


def rows(count, seed=0):
    return np.random.default_rng(seed).standard_normal((count, 32)).astype(np.float32)


# ---- what it does ----


def test_an_engine_answers_as_its_bundle_does(gpu, make_engine, tiny_bundle):
    with open_model(make_engine()) as runner, open_model(tiny_bundle) as bundle:
        assert (runner.backend, runner.has_head, runner.name) == ("tensorrt", True, "osnet_x0_25_64x32")
        np.testing.assert_allclose(runner.embed(pictures(5)), bundle.embed(pictures(5)), atol=1e-5)
        np.testing.assert_allclose(runner.relate(rows(60)), bundle.relate(rows(60)), atol=1e-5)
        assert all(largest <= 1e-5 for largest in self_test(runner).values())


@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 20])
def test_any_number_of_images_goes_through_a_small_profile(gpu, make_engine, tiny_bundle, count):
    with open_model(make_engine(batch=(3, 4, 8))) as runner, open_model(tiny_bundle) as bundle:
        features = runner.embed(pictures(count))
        assert features.shape == (count, 32)
        np.testing.assert_allclose(features, bundle.embed(pictures(count)), atol=1e-5)


def test_tensors_of_float16_are_brought_there_and_back(gpu, make_engine, tiny_bundle):
    engine = make_engine(io="float16", precision={"backbone": "fp16", "head": "fp32"})
    with open_model(engine) as runner, open_model(tiny_bundle) as bundle:
        features = runner.embed(pictures(4))
        assert features.dtype == np.float32
        np.testing.assert_allclose(features, bundle.embed(pictures(4)), atol=0.02)


def test_results_are_the_callers_own(gpu, make_engine):
    with open_model(make_engine()) as runner:
        first = runner.embed(pictures(4))
        kept = first.copy()
        runner.embed(pictures(4, seed=1))
        np.testing.assert_array_equal(first, kept)


def test_a_shape_that_comes_again_is_kept_as_a_graph_with_the_same_answers(gpu, make_engine):
    with open_model(make_engine()) as runner:
        first = [runner.embed(pictures(4, seed)) for seed in range(3)]
        assert gpu.calls.count("execute_async_v3") == 2  # once as it is, once captured
        assert gpu.calls.count("cuGraphLaunch") == 2
        runner.embed(pictures(5))  # another shape: the graph is dropped
        assert len(gpu.graphs) == 0
        for seed, features in enumerate(first):
            np.testing.assert_allclose(runner.embed(pictures(4, seed)), features, atol=1e-5)


@pytest.mark.parametrize(
    "call", ["cuStreamBeginCapture_v2", "cuStreamEndCapture", "cuGraphInstantiateWithFlags", "capturing"]
)
def test_what_cannot_be_captured_is_done_call_by_call_with_the_same_answers(gpu, make_engine, call):
    gpu.failing[call] = 900
    with open_model(make_engine()) as runner:
        first = [runner.embed(pictures(4, seed)) for seed in range(4)]
        assert "cuGraphLaunch" not in gpu.calls
        assert gpu.calls.count(call) == 1  # not tried again
        for seed, features in enumerate(first):
            np.testing.assert_allclose(runner.embed(pictures(4, seed)), features, atol=1e-5)


def test_graphs_can_be_left_out(gpu, make_engine):
    with TensorRTRunner(make_engine(), graphs=False) as runner:
        for seed in range(4):
            runner.embed(pictures(4, seed))
    assert "cuStreamBeginCapture_v2" not in gpu.calls


def test_threads_get_contexts_of_their_own_and_the_right_answers(gpu, make_engine, tiny_bundle):
    with open_model(tiny_bundle) as bundle:
        expected = {seed: bundle.embed(pictures(4, seed)) for seed in range(6)}
    found: dict[int, np.ndarray] = {}
    with TensorRTRunner(make_engine(), contexts=3) as runner:

        def work(seed):
            for _ in range(4):
                found[seed] = runner.embed(pictures(4, seed))

        threads = [threading.Thread(target=work, args=(seed,)) for seed in expected]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert gpu.calls.count("create_execution_context") <= 2 + 2  # three for the backbone at most, one for the head
    for seed, features in expected.items():
        np.testing.assert_allclose(found[seed], features, atol=1e-5)


def test_as_many_threads_compute_at_once_as_open_model_was_asked_for(gpu, make_engine):
    """Each waits inside its context for the two others: with fewer contexts none would come out."""
    gpu.meeting = threading.Barrier(3)
    found = []
    with open_model(make_engine(), contexts=3) as runner:
        threads = [threading.Thread(target=lambda: found.append(runner.embed(pictures(2)))) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(found) == 3
    assert gpu.calls.count("create_execution_context") == 3 + 1  # one for the head
    with pytest.raises(UsageError, match="contexts: got 0, expected at least 1"):
        open_model(make_engine(), contexts=0)


def test_before_tensorrt_10_threads_share_one_context(gpu, make_engine):
    gpu.install("8.6.1")
    with TensorRTRunner(make_engine(versions={"tensorrt": "8.6.1"}), contexts=3) as runner:
        threads = [threading.Thread(target=runner.embed, args=(pictures(4, seed),)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert gpu.calls.count("create_execution_context") == 2


def test_closing_gives_all_memory_back(gpu, make_engine):
    with open_model(make_engine()) as runner:
        for count in (2, 5, 8, 3, 3, 3):
            runner.embed(pictures(count))
        runner.relate(rows(20))
        assert gpu.used > 0
    assert (gpu.used, gpu.graphs) == (0, {})


def test_memory_is_taken_once_for_the_largest_shape(gpu, make_engine):
    with open_model(make_engine()) as runner:
        runner.embed(pictures(8))
        taken = gpu.calls.count("cuMemHostAlloc"), gpu.calls.count("cuMemAlloc")
        for count in (1, 8, 3, 8):
            runner.embed(pictures(count))
        assert (gpu.calls.count("cuMemHostAlloc"), gpu.calls.count("cuMemAlloc")) == taken


def test_a_plan_that_was_closed_says_so(gpu, make_engine):
    from nformer_edge.backends.tensorrt.plan import BACKBONE

    with open_model(make_engine()) as runner:
        plan = runner._plan(BACKBONE)
    with pytest.raises(BackendError, match="backbone: got a closed runner"):
        plan.run({"images": pictures(2)})


def test_copies_are_told_apart_from_computing(gpu, make_engine):
    with open_model(make_engine()) as runner:
        runner.embed(pictures(20))
        assert set(runner.device_ms) == {"copy_in", "compute", "copy_out"}
        assert runner.copy_ms == (runner.device_ms["copy_in"], runner.device_ms["copy_out"])
        assert min(runner.copy_ms) > 0


def test_an_engine_for_rtx_runs_on_tensorrt_rtx(gpu, make_engine):
    gpu.install("1.7.1.116", "tensorrt_rtx")
    engine = make_engine(backend="tensorrt-rtx", versions={"tensorrt_rtx": "1.7.1.116"}, plugin_sha256=None,
                         plans={"nformer.engine": b""}, built_for={"compute_capabilities": ["8.7"]})  # fmt: skip
    gpu.failing["deserialize_cuda_engine"] = "the stop"  # far enough: the right package was asked
    with pytest.raises(ArtifactError, match=r"backbone.engine.*the stop.*expected a plan that tensorrt_rtx 1\.7\.1"):
        open_model(engine).__enter__()


def test_parity_and_benchmark_work_unchanged(gpu, make_engine, tiny_checkpoint, tiny_market):
    from nformer_edge.report.benchmark import benchmark
    from nformer_edge.report.parity import parity

    engine = make_engine()
    compared = parity(tiny_checkpoint, engine, tiny_market, batch=5, draws=100)
    assert compared.status != "failed", str(compared)
    timed = str(benchmark(engine, tiny_market, single_stream=2, gallery=6, batch=4).to_json())
    assert {"copy_in", "copy_out", "backbone", "head"} <= set(timed.replace("'", " ").split())


# ---- what it refuses, by name ----


def refused(engine, kind, message, **settings):
    with pytest.raises(kind, match=message) as caught, open_model(engine, **settings):
        pass
    return str(caught.value)


def test_a_truncated_plan_is_refused_before_tensorrt_sees_it(gpu, make_engine):
    engine = make_engine()
    plan = engine / "backbone.engine"
    plan.write_bytes(plan.read_bytes()[:-1000])
    message = refused(engine, ArtifactError, r"backbone.engine: got \d+ bytes, expected \d+ bytes")
    assert f"nformer-edge build-engine BUNDLE --backend tensorrt --fp16 -o {engine}" in message
    assert "deserialize_cuda_engine" not in gpu.calls


def test_a_changed_plan_is_refused_before_tensorrt_sees_it(gpu, make_engine):
    engine = make_engine()
    runner = open_model(engine)
    data = bytearray((engine / "nformer.engine").read_bytes())
    data[-5] ^= 1
    (engine / "nformer.engine").write_bytes(data)
    refused(engine, ArtifactError, "nformer.engine: got sha256.*nformer-edge build-engine BUNDLE")
    assert "deserialize_cuda_engine" not in gpu.calls
    with runner:  # changed between the check and the opening: the checked bytes are what TensorRT gets
        assert runner.relate(rows(20)).shape == (20, 32)


def test_a_plan_that_was_truncated_when_written_is_refused_in_tensorrts_words(gpu, make_engine):
    engine = make_engine()
    plan = (engine / "backbone.engine").read_bytes()[:-1000]
    message = refused(make_engine(plans={"backbone.engine": plan}), ArtifactError, "backbone.engine: deserializing it")
    assert "Serialization assertion" in message
    assert "nformer-edge build-engine BUNDLE --backend tensorrt --fp16" in message


@pytest.mark.parametrize("text", ["", "[]", '{"spec": 3}', '{"kind": "engine", "backend": "tensorrt"}'])
def test_a_manifest_that_cannot_be_read_is_refused(gpu, make_engine, text):
    engine = make_engine()
    (engine / "manifest.json").write_text(text)
    with pytest.raises(ArtifactError, match="no readable manifest"):
        TensorRTRunner(engine)


@pytest.mark.parametrize(
    ("built", "here"), [("10.3.0", "10.13.3.9"), ("8.5.2.2", "10.3.0"), ("10.3.0", "11.4.0.106"), (None, "10.3.0")]
)
def test_another_tensorrt_is_refused_with_the_command_that_rebuilds(gpu, make_engine, built, here):
    gpu.install(here)
    engine = make_engine(versions={"tensorrt": built} if built else {})
    message = refused(engine, BackendError, "tensorrt: got an engine built with")
    assert here in message
    assert f"nformer-edge build-engine BUNDLE --backend tensorrt --fp16 -o {engine}" in message
    assert "cuInit" not in gpu.calls


def test_a_version_compatible_plan_runs_on_later_versions_of_the_same_major_one(gpu, make_engine):
    spec = {"precision": "fp16", "version_compat": True}
    gpu.install("10.16.1.11")
    with open_model(make_engine(spec=spec)) as runner:
        assert runner.embed(pictures(1)).shape == (1, 32)
        assert runner._runtime.engine_host_code_allowed
    for here in ("10.2.0", "11.0.0.114"):
        gpu.install(here)
        refused(make_engine(spec=spec), BackendError, "tensorrt: got an engine built with 10.3.0")


def test_the_command_that_rebuilds_repeats_what_was_asked(gpu, make_engine):
    gpu.install("11.4.0.106")
    asked = {"precision": "int8", "batch": [1, 4, 16], "gallery_size": [20, 100, 900], "hardware_compat": "ampere_plus",
             "version_compat": True, "workspace": 2.0, "dla": None, "calib_num": 256}  # fmt: skip
    message = refused(make_engine(spec=asked), BackendError, "tensorrt: got an engine built with")
    assert (
        "build-engine BUNDLE --backend tensorrt --int8 --batch 1:4:16 --gallery-size 20:100:900 --workspace 2.0 "
        "--hardware-compat ampere_plus --version-compat --calib-data DIR -o " in message
    )


@pytest.mark.parametrize(("built", "here"), [("10.3.0", "10.3.0.26"), ("10.16.1.11", "10.16.1.11")])
def test_versions_that_agree_as_far_as_they_are_told_are_taken(gpu, make_engine, built, here):
    gpu.install(here)
    with open_model(make_engine(versions={"tensorrt": built})) as runner:
        assert runner.embed(pictures(1)).shape == (1, 32)


@pytest.mark.parametrize(
    ("built_for", "word"),
    [
        ({"gpu": "NVIDIA RTX 4090", "compute_capability": "8.9", "multiprocessors": 128}, r"8\.9 \(here 8\.7\)"),
        ({"gpu": "Fake Orin", "compute_capability": "8.7", "multiprocessors": 8}, r"multiprocessors 8 \(here 16\)"),
        ({"gpu": "Other Orin", "compute_capability": "8.7"}, r"GPU Other Orin \(here Fake Orin\)"),
        ({}, "a GPU that its manifest does not name"),
        ({"compute_capabilities": ["8.6", "8.9"]}, r"compute capability 8\.6, 8\.9"),
        ({"compute_capability": "8.9", "hardware_compat": "same_compute_capability"}, r"8\.9 \(here 8\.7\)"),
    ],
)
def test_another_gpu_is_refused_with_the_command_that_rebuilds(gpu, make_engine, built_for, word):
    message = refused(make_engine(built_for=built_for), BackendError, f"GPU: got an engine for .*{word}")
    assert "nformer-edge build-engine BUNDLE" in message
    assert "deserialize_cuda_engine" not in gpu.calls


@pytest.mark.parametrize(
    "built_for",
    [
        {"gpu": "Other Orin", "compute_capability": "8.7", "hardware_compat": "same_compute_capability"},
        {"gpu": "NVIDIA A100", "compute_capability": "8.0", "hardware_compat": "ampere_plus"},
        {"compute_capabilities": ["8.6", "8.7"]},
    ],
)
def test_a_plan_built_to_be_compatible_runs_on_another_gpu(gpu, make_engine, built_for):
    with open_model(make_engine(built_for=built_for)) as runner:
        assert runner.embed(pictures(1)).shape == (1, 32)


def test_ampere_plus_does_not_reach_back_before_ampere(gpu, make_engine):
    gpu.capability = (7, 2)
    engine = make_engine(built_for={"compute_capability": "8.0", "hardware_compat": "ampere_plus"})
    refused(engine, BackendError, "GPU: got an engine for")


def test_a_missing_plugin_is_refused_by_name(gpu, make_engine, monkeypatch):
    engine = make_engine()
    monkeypatch.delenv("NFORMER_EDGE_PLUGINS")
    monkeypatch.setenv("XDG_DATA_HOME", str(engine))
    message = refused(engine, BackendError, "plugin: got no libnformer_plugins.so")
    assert "build-plugin" in message
    assert "deserialize_cuda_engine" not in gpu.calls


def test_another_plugin_library_is_refused_by_its_hash(gpu, make_engine, plugin_library):
    engine = make_engine()
    plugin_library.write_bytes(b"another library")
    refused(engine, BackendError, "plugin: got another library.*expected the library that the engine was built with")
    assert "load_library" not in gpu.calls


def test_a_plugin_library_beside_the_plan_is_found(gpu, make_engine, plugin_library, monkeypatch):
    engine = make_engine(plans={"libnformer_plugins.so": plugin_library.read_bytes()})
    monkeypatch.delenv("NFORMER_EDGE_PLUGINS")
    with open_model(engine) as runner:
        assert runner.relate(rows(20)).shape == (20, 32)


def test_a_library_that_tensorrt_does_not_take_is_refused(gpu, make_engine):
    gpu.failing["load_library"] = True
    message = refused(make_engine(), BackendError, "expected a plugin library that TensorRT 10.3.0 takes")
    assert "nformer-edge build-plugin" in message


def test_a_head_without_its_plugin_is_refused_in_tensorrts_words(gpu, make_engine):
    message = refused(make_engine(plugin_sha256=None), ArtifactError, "nformer.engine: deserializing it")
    assert "could not find plugin RowTopK" in message


def test_a_second_engine_of_a_process_uses_the_library_that_is_loaded(gpu, make_engine):
    engine = make_engine()
    with open_model(engine), open_model(engine) as second:
        assert second.relate(rows(20)).shape == (20, 32)
    assert gpu.calls.count("load_library") == 1


def test_two_plugin_libraries_in_one_process_are_refused(gpu, make_engine, plugin_library):
    with open_model(make_engine()):
        pass
    plugin_library.write_bytes(b"another library")
    refused(make_engine(), BackendError, "that this process loaded before.*Start a new process")


@pytest.mark.parametrize("count", [1, 201])
def test_images_beyond_the_heads_profile_are_refused_with_the_profile(gpu, make_engine, count):
    with open_model(make_engine()) as runner, pytest.raises(UsageError, match=r"features: got shape") as caught:
        runner.relate(rows(count), np.zeros((2, 3), np.int32))
    assert "[2..200, 32], the profile that the head was built for" in str(caught.value)
    assert "--gallery-size" in str(caught.value)


def test_a_batch_beyond_the_profile_is_refused_with_the_profile(gpu, make_engine):
    from nformer_edge.backends.tensorrt.plan import BACKBONE

    with open_model(make_engine()) as runner, pytest.raises(UsageError, match=r"images: got shape \[9, 3, 64, 32\]"):
        runner._plan(BACKBONE).run({"images": pictures(9)})


def test_other_landmarks_than_the_plan_has_are_refused(gpu, make_engine):
    with open_model(make_engine()) as runner, pytest.raises(UsageError, match=r"landmarks: got shape \[2, 4\]"):
        runner.relate(rows(9), np.zeros((2, 4), np.int32))


def test_memory_that_runs_out_on_the_gpu_is_named_with_what_is_free(gpu, make_engine):
    with open_model(make_engine()) as runner:
        before = runner.embed(pictures(2))
        gpu.total = gpu.used + 1000
        with pytest.raises(BackendError, match=r"got out of GPU memory: 0 MiB free of \d+ MiB"):
            runner.embed(pictures(8))
        gpu.total = 1 << 28
        np.testing.assert_allclose(runner.embed(pictures(2)), before, atol=1e-6)  # and it goes on afterwards
    assert gpu.used == 0


@pytest.mark.parametrize("call", ["cuMemHostAlloc", "cuMemAlloc"])
def test_memory_that_runs_out_on_either_side_is_named(gpu, make_engine, call):
    with open_model(make_engine()) as runner:
        gpu.failing[call] = "memory"
        with pytest.raises(BackendError, match="got out of GPU memory"):
            runner.embed(pictures(8))


@pytest.mark.parametrize("call", ["create_execution_context", "deserialize_cuda_engine"])
def test_memory_that_runs_out_inside_tensorrt_is_named(gpu, make_engine, call):
    gpu.failing[call] = "[resources.cpp::OutOfMemory] Error Code 2: OutOfMemory (Requested size was 3221225472 bytes.)"
    refused(make_engine(), BackendError, r"backbone.engine: .*got out of GPU memory: \d+ MiB free")
    assert gpu.used == 0


def test_memory_that_runs_out_while_running_is_named(gpu, make_engine):
    with open_model(make_engine()) as runner:
        gpu.failing["execute_async_v3"] = "enqueueV3: cuda error: out of memory"
        with pytest.raises(BackendError, match="running the backbone: got out of GPU memory"):
            runner.embed(pictures(2))


def test_no_driver_is_refused_by_name(gpu, make_engine, monkeypatch):
    broken = type(sys)("pycuda")
    broken.__path__ = []
    monkeypatch.setitem(sys.modules, "pycuda", broken)
    monkeypatch.delitem(sys.modules, "pycuda.driver")

    class Finder:
        @staticmethod
        def find_spec(name, path=None, target=None):
            if name == "pycuda.driver":
                raise ImportError("libcuda.so.1: cannot open shared object file: No such file or directory")
            return None

    monkeypatch.setattr(sys, "meta_path", [Finder, *sys.meta_path])
    refused(make_engine(), BackendError, r"NVIDIA driver: got libcuda.so.1: cannot open.*expected a GPU and its driver")


def test_a_driver_without_a_gpu_is_refused_by_name(gpu, make_engine):
    gpu.count = 0
    refused(make_engine(), BackendError, "NVIDIA driver: got zero GPUs")
    gpu.failing["cuInit"] = "no CUDA-capable device is detected"
    refused(make_engine(), BackendError, "NVIDIA driver: got cuInit failed: no CUDA-capable device")


def test_a_gpu_that_is_not_there_is_refused(gpu, make_engine):
    refused(make_engine(), BackendError, r"device: got cuda:3, expected one of the 1 GPUs", device="cuda:3")
    refused(make_engine(), UsageError, "device: got tpu", device="tpu")
    refused(make_engine(), UsageError, "device: got cpu, expected a GPU", device="cpu")
    refused(make_engine(), UsageError, r"intra_op_threads: got 4, .*Set contexts", intra_op_threads=4)


@pytest.mark.parametrize(
    ("module", "step"), [("pycuda", "pip install pycuda; it is compiled"), ("tensorrt", "nformer-edge[tensorrt]")]
)
def test_a_missing_package_is_named_with_the_next_step(gpu, make_engine, monkeypatch, module, step):
    for name in [n for n in sys.modules if n == module or n.startswith(f"{module}.")]:
        monkeypatch.setitem(sys.modules, name, None)
    assert step in refused(make_engine(), BackendError, f"{module}: got not installed")


@pytest.mark.parametrize("call", ["set_input_shape", "set_tensor_address", "execute_async_v3"])
def test_every_no_of_tensorrt_is_an_error(gpu, make_engine, call):
    with open_model(make_engine()) as runner:
        gpu.failing[call] = "the reason"
        with pytest.raises(BackendError, match=f"running the backbone: got {call}.* returned False"):
            runner.embed(pictures(2))
        del gpu.failing[call]
        assert runner.embed(pictures(2)).shape == (2, 32)


@pytest.mark.parametrize("call", ["cuMemcpyHtoDAsync", "cuMemcpyDtoHAsync", "cuStreamSynchronize", "cuCtxPushCurrent"])
def test_every_error_of_the_driver_is_named(gpu, make_engine, call):
    with open_model(make_engine()) as runner:
        gpu.failing[call] = "an illegal memory access was encountered"
        with pytest.raises(BackendError, match=f"{call} failed: an illegal memory access"):
            runner.embed(pictures(2))
        gpu.failing.clear()


def test_a_plan_of_another_network_is_refused(gpu, make_engine):
    engine = make_engine()
    head = (engine / "nformer.engine").read_bytes()
    message = refused(make_engine(plans={"backbone.engine": head}), ArtifactError, "backbone.engine: got tensors")
    assert "expected images -> features" in message


def test_a_head_without_its_file_is_refused(gpu, make_engine):
    engine = make_engine()
    refused(
        make_engine(model={**_model(engine), "head": None}),
        ArtifactError,
        "the plans backbone.engine, nformer.engine, expected backbone.engine, by its spec",
    )


def _model(engine):
    import json

    return json.loads((engine / "manifest.json").read_text())["model"]
