"""A head without a plugin library: TensorRT from 10.9 on puts our kernels into the plan, and the manifest says so."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from helpers import fake_plugin
from helpers.tensorrt_bench import GPU, Bench

from nformer_edge.backends.tensorrt import cuda
from nformer_edge.backends.tensorrt.plugin import ahead as plugin_ahead
from nformer_edge.backends.tensorrt.plugin import kernels
from nformer_edge.backends.tensorrt.plugin import library as plugin_library
from nformer_edge.core.errors import BackendError
from nformer_edge.core.machine import MachineFacts
from nformer_edge.targets import doctor
from nformer_edge.targets.recipe import read_target

PTX = """.version 8.8
.target sm_87
.const .align 4 .u32 nformer_rows_per_block = 64;
.visible .entry nformer_row_top_k(
.param .u64 p, .param .u64 p, .param .u32 p, .param .u32 p, .param .u32 p, .param .u32 p, .param .u32 p, .param .u64 p
)
.maxntid 256, 1, 1
{
}
"""


class Compiler:
    """Keeps what it is asked."""

    version, architectures = (12, 9), (75, 80, 86, 87, 89)

    def __init__(self) -> None:
        self.asked = []

    def __str__(self) -> str:
        return "NVRTC 12.9"

    def ptx(self, source, architecture, options):
        self.asked.append((architecture, [o for o in options if o.startswith("-D")]))
        return PTX


@pytest.fixture
def compiler():
    return Compiler()


@pytest.fixture
def bench(tiny_bundle, tmp_path, monkeypatch, compiler):
    """A TensorRT with Python plugins, a compiler and a driver, but no library."""

    def made(version, driver=(13, 0), compilers=(compiler,)):
        b = Bench(tiny_bundle, tmp_path, monkeypatch, version)
        b.library.unlink()
        monkeypatch.delenv(plugin_library.ENVIRONMENT)
        monkeypatch.setattr(plugin_library, "plugin_places", lambda major=None: iter(()))
        monkeypatch.setattr(plugin_ahead, "find_compilers", lambda: list(compilers))
        monkeypatch.setattr(plugin_ahead, "driver_cuda", lambda: driver)
        monkeypatch.setattr(plugin_ahead, "gpu_facts", lambda ordinal: GPU)
        b.module = fake_plugin.fake_plugin()
        monkeypatch.setitem(sys.modules, "tensorrt.plugin", b.module)
        b.trt.int32, b.trt.float32 = fake_plugin.DataType.INT32, fake_plugin.DataType.FLOAT
        b.machine.creators = {"RowTopK", "ReciprocalNeighborAttention"}  # found by name: they are registered
        build = b.trt.Builder.build_serialized_network

        def build_serialized_network(self, network, config):
            if "nformer::RowTopK" in b.module.registered:  # TensorRT asks for the kernel of a node
                shape = tuple(fake_plugin.ShapeExpr(n, n != 100) for n in (1, 100, 5))
                a = fake_plugin.TensorDesc(shape, fake_plugin.DataType.FLOAT)
                b.module.registered["nformer::RowTopK"]["aot_impl"](a, a, np.array([20], np.int32), (), 0)
            return build(self, network, config)

        monkeypatch.setattr(b.trt.Builder, "build_serialized_network", build_serialized_network)
        return b

    return made


@pytest.mark.parametrize("version", ["10.13", "10.16", "11.4"])
def test_without_a_library_the_plan_carries_the_kernels_and_the_manifest_says_so(bench, compiler, version):
    b = bench(version)
    made = b.build("fp16")
    assert (made.operators, made.plugin_sha256) == ("ahead-of-time", None)
    (kernel,) = made.kernels
    assert (kernel.operator, kernel.cuda, kernel.ptx) == ("RowTopK", "12.9", "sm_87")
    defined = ["-DNFORMER_TYPE=float", "-DNFORMER_ROW_TOP_K", "-DNFORMER_FACTORS=5", "-DNFORMER_COUNT=20"]
    assert compiler.asked == [(87, defined)]  # the GPU's own capability
    flags = b.trt.NetworkDefinitionCreationFlag
    both = 1 << int(flags.STRONGLY_TYPED) | 1 << int(flags.PREFER_AOT_PYTHON_PLUGINS)
    assert [built["network_flags"] for built in b.machine.built] == [1 << int(flags.STRONGLY_TYPED), both]


def test_the_nodes_name_the_namespace_of_the_python_plugins(bench):
    b = bench("10.13")
    b.build("fp16")
    ours = [n for n in b.machine.built[1]["model"].graph.node if n.domain]
    assert {a.s for n in ours for a in n.attribute if a.name == "plugin_namespace"} == {b"nformer"}
    assert all(a.name != "scale" or a.f == a.f for n in ours for a in n.attribute)


def test_a_plan_for_more_gpus_has_kernels_for_the_least_of_them(bench, compiler):
    bench("10.13").build("fp16", hardware_compat="ampere_plus")
    assert [architecture for architecture, _ in compiler.asked] == [80]


def test_a_library_is_taken_where_there_is_one(bench, tmp_path, monkeypatch):
    b = bench("10.13")
    b.library.write_bytes(b"a library")
    monkeypatch.setattr(plugin_library, "plugin_places", lambda major=None: iter((b.library,)))
    b.machine.creators = set()
    made = b.build("fp16")
    assert (made.operators, made.kernels) == ("library", ())


@pytest.mark.parametrize("version", ["8.6", "10.3"])
def test_a_tensorrt_before_10_9_needs_the_library_and_says_what_else_would_do(bench, version):
    with pytest.raises(BackendError, match=r"which cannot put kernels into plans.*build-plugin.*tensorrt>=10\.9"):
        bench(version).build("fp16")


def test_without_a_compiler_the_refusal_names_the_packages(bench):
    with pytest.raises(BackendError, match=r"no CUDA compiler.*build-plugin.*nvidia-cuda-nvrtc-cu12"):
        bench("10.13", compilers=()).build("fp16")


def test_ptx_that_the_driver_cannot_read_is_never_made(bench):
    with pytest.raises(BackendError, match=r"got NVRTC 12\.9, expected NVRTC or nvcc of CUDA 12\.4, the driver's"):
        bench("10.13", driver=(12, 4)).build("fp16")


def test_what_a_callback_refuses_is_told_with_the_build(bench, compiler, monkeypatch):
    b = bench("10.13")
    monkeypatch.setattr(type(compiler), "architectures", (90,))
    with pytest.raises(BackendError, match="expected one up to 87"):
        b.build("fp16")


def test_preflight_and_doctor_ask_for_no_library_where_plans_carry_the_kernels(monkeypatch):
    monkeypatch.setattr(doctor, "find_plugin", lambda major=None: None)
    monkeypatch.setattr(plugin_ahead, "find_compilers", lambda: [Compiler()])

    def told():
        here, target = MachineFacts(versions={"tensorrt": "10.13.3.9"}), read_target("desktop-ada")
        return doctor._plugin_library("10.13.3.9").ok, doctor._plugin(here, target)

    assert told() == (True, [])
    monkeypatch.setattr(plugin_ahead, "find_compilers", list)
    ok, (mismatch,) = told()
    assert not ok
    assert "no CUDA compiler" in mismatch.got
    assert "nvidia-cuda-nvrtc" in mismatch.hint


def test_the_drivers_cuda_is_asked_of_the_driver(monkeypatch):
    class Driver:
        def cuDriverGetVersion(self, number):
            number._obj.value = 12040
            return 0

    monkeypatch.setattr(cuda, "driver_library", Driver)
    assert cuda.driver_cuda() == (12, 4)
    assert kernels.newest_for([Compiler()], cuda.driver_cuda()) is None
