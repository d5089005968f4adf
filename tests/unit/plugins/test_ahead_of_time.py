"""The operators as TensorRT's ahead-of-time Python plugins: their PTX, what a plan is told of a launch, and the launch.

No GPU: a launch is worked out by our functions for given sizes, by NVIDIA's own `tensorrt.plugin` where its wheels are,
and then made on the GPU that the CPU plays.
"""

from __future__ import annotations

import ctypes
import json
import math
import os
import re
import subprocess
import sys
import types
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import fake_plugin
from helpers import row_logic as logic
from helpers.gated import FACTOR, gated_case, gated_formula
from helpers.tensorrt_names import collect

from nformer_edge.backends.engine import KernelInPlan
from nformer_edge.backends.tensorrt.plugin import ahead as plugin_ahead
from nformer_edge.backends.tensorrt.plugin import kernels as plugin_kernels
from nformer_edge.backends.tensorrt.plugin.ahead import AheadOfTime
from nformer_edge.backends.tensorrt.plugin.library import ATTENTIONS
from nformer_edge.core.errors import BackendError

HERE = Path(__file__).parent
PLUGINS = HERE.parents[2] / "plugins"
WHEELS = "NFORMER_EDGE_TENSORRT_WHEELS"


COMPILERS = plugin_kernels.find_compilers()
needs_compiler = pytest.mark.skipif(
    not COMPILERS, reason="no NVRTC and no nvcc: pip install nvidia-cuda-nvrtc-cu12 nvidia-cuda-runtime-cu12"
)

POINTER, INTEGER = 64, 32
ROW_TOP_K = (POINTER,) * 2 + (INTEGER,) * 5 + (POINTER,)
#: By the number of inputs: with t there is the number of its heads as well, with cameras a float's two halves.
ATTENTION = {n: (POINTER,) * n + (INTEGER,) * (8, 9, 11)[n - 4] + (POINTER,) for n in (4, 5, 6)}


# ---- what a compiler makes of them ----


@needs_compiler
@pytest.mark.parametrize("compiler", COMPILERS, ids=lambda c: type(c).__name__)
@pytest.mark.parametrize(
    ("kind", "factors", "k", "rows"), [("fp32", 5, 20, 64), ("fp16", 16, 100, 16), ("fp32", 0, 20, 64)]
)
def test_row_top_k_becomes_ptx_that_takes_inputs_integers_output(compiler, kind, factors, k, rows):
    kernel = plugin_kernels.compile_row_top_k(compiler, 89, kind, factors, k)
    assert (kernel.entry, kernel.parameters) == ("nformer_row_top_k", ROW_TOP_K)
    assert (kernel.threads, kernel.rows_per_block) == (256, rows)
    assert re.search(r"^\.target sm_89$", kernel.ptx, re.MULTILINE)
    assert f".version {compiler.version[0] - 4 if compiler.version[0] > 12 else 8}." in kernel.ptx


@needs_compiler
@pytest.mark.parametrize("compiler", COMPILERS, ids=lambda c: type(c).__name__)
@pytest.mark.parametrize("inputs", [4, 5, 6])
def test_attention_becomes_ptx_that_takes_inputs_integers_output(compiler, inputs):
    kernel = plugin_kernels.compile_attention(compiler, 75, "fp16", 20, inputs)
    assert (kernel.entry, kernel.parameters) == ("nformer_reciprocal_neighbor_attention", ATTENTION[inputs])
    assert (kernel.threads, kernel.rows_per_block) == (256, 8)


@needs_compiler
def test_an_architecture_that_the_compiler_does_not_know_gets_the_next_older_ones_ptx():
    compiler = COMPILERS[0]
    kernel = plugin_kernels.compile_attention(compiler, 999, "fp32", 20)
    assert f".target sm_{max(compiler.architectures)}" in kernel.ptx
    with pytest.raises(BackendError, match="expected one up to 10"):
        plugin_kernels.compile_attention(compiler, 10, "fp32", 20)


@needs_compiler
@pytest.mark.parametrize("compiler", COMPILERS, ids=lambda c: type(c).__name__)
def test_a_refusal_of_the_compiler_is_told_in_its_words(compiler, tmp_path):
    source = tmp_path / "wrong.cu"
    source.write_text("#error the words\n")
    with pytest.raises(BackendError, match=r"wrong\.cu: got a refusal of .*the words"):
        compiler.ptx(source, 89, [])


def test_a_compiler_is_taken_that_the_driver_can_follow():
    old, new = (plugin_kernels.Nvcc(Path("nvcc"), version, (89,)) for version in ((12, 4), (13, 0)))
    assert plugin_kernels.newest_for([old, new], (13, 1)) is new
    assert plugin_kernels.newest_for([old, new], (12, 8)) is old
    assert plugin_kernels.newest_for([old, new], (12, 2)) is None


@pytest.mark.parametrize(("name", "numbers"), [("k", (5, 129)), ("k", (5, 0)), ("R", (1 << 21, 20))])
def test_numbers_beyond_the_kernels_are_refused(name, numbers):
    with pytest.raises(BackendError, match=f"got {name} = .*, expected 1.."):
        plugin_kernels.compile_row_top_k(plugin_kernels.Nvcc(Path("nvcc"), (13, 0), (89,)), 89, "fp32", *numbers)


@pytest.mark.parametrize("bounds", ["256, 1, 1", "256"])
def test_both_ways_of_writing_the_threads_of_a_block_are_read(bounds):
    ptx = (
        ".target sm_121\n.const .align 4 .u32 nformer_rows_per_block = 8;\n.visible .entry kernel(\n"
        f"\t.param .u64 .ptr .align 1 a,\n\t.param .u32 b\n)\n.maxntid {bounds}\n{{\n\tret;\n}}\n"
    )
    kernel = plugin_kernels.read_kernel("RowTopK", ptx, Path("x.cu"))
    assert (kernel.threads, kernel.parameters) == (256, (POINTER, INTEGER))


@pytest.mark.parametrize("bounds", ["16, 16, 1", "16, 16"])
def test_a_block_of_two_dimensions_is_refused(bounds):
    ptx = f".target sm_89\nnformer_rows_per_block = 8;\n.visible .entry kernel(\n)\n.maxntid {bounds}\n{{\n}}\n"
    with pytest.raises(BackendError, match="PTX without a kernel, its target, threads"):
        plugin_kernels.read_kernel("RowTopK", ptx, Path("x.cu"))


def test_ptx_without_a_kernel_is_refused():
    with pytest.raises(BackendError, match="PTX without a kernel"):
        plugin_kernels.read_kernel("RowTopK", ".version 8.0\n", Path("x.cu"))


@pytest.mark.parametrize("scale", [0.25, -0.25, 1e-30, -3.4e38, 0.0])
def test_a_float_travels_as_two_small_integers(scale):
    high, low = plugin_kernels.float_halves(scale)
    assert 0 <= high < 1 << 16
    assert 0 <= low < 1 << 16
    assert np.array([high << 16 | low], np.uint32).view(np.float32)[0] == np.float32(scale)


# ---- what a plan is told, and the launch that follows ----


def node(operator: str, inputs: list, sizes: dict, **attributes) -> dict:
    kinds = {"k": ("int32", "INT32"), "scale": ("float32", "FLOAT32"), "camera_factor": ("float32", "FLOAT32")}
    listed = [[name, value, *kinds[name]] for name, value in attributes.items()]
    return {"operator": operator, "inputs": inputs, "attributes": listed, "sizes": sizes}


def row_top_k(kind: str, heads: int, factors: int, k: int, rows: int, columns: int | None = None) -> dict:
    sizes = {"N": rows} if columns is None else {"N": rows, "M": columns}
    right = "N" if columns is None else "M"
    return node("RowTopK", [[[heads, "N", factors], kind], [[heads, right, factors], kind]], sizes, k=k)


def attention(kind: str, heads: int, factors: int, size: int, lists: int, k: int, rows: int, scale: float) -> dict:
    inputs = [[[heads, "N", factors], kind], [[heads, "N", factors], kind], [[heads, "N", size], kind]]
    return node("ReciprocalNeighborAttention", [*inputs, [[lists, "N", k], "INT32"]], {"N": rows}, scale=scale)


def gated(kind: str, heads: int, size: int, lists: int, thresholds: int, k: int, rows: int, *, cameras: bool) -> dict:
    plain = attention(kind, heads, 5, size, lists, k, rows, 1.3)
    inputs = [*plain["inputs"], [[thresholds, "N"], "FLOAT"], *[[["N"], "INT32"]] * cameras]
    more = {"camera_factor": FACTOR} if cameras else {}
    return node(ATTENTIONS[len(inputs)], inputs, {"N": rows}, scale=1.3, **more)


NODES = {
    "affinity": row_top_k("FLOAT", 2, 5, 20, 100),
    "features": row_top_k("HALF", 1, 40, 33, 70, 130),
    "no rows": row_top_k("FLOAT", 2, 5, 20, 0),
    "shared lists": attention("FLOAT", 2, 5, 16, 1, 20, 60, -0.25),
    "own lists": attention("HALF", 2, 5, 6, 2, 33, 37, math.nan),
    "gated": gated("FLOAT", 2, 16, 1, 2, 20, 60, cameras=False),
    "gated by camera": gated("HALF", 2, 7, 2, 1, 33, 37, cameras=True),
}


class EmulatedCompiler:
    """A compiler for the GPU that the CPU plays. What it gives has the form of PTX, and the library's path in it."""

    version, architectures = (13, 0), (89,)

    def __init__(self, compiler: str, folder: Path) -> None:
        self.compiler, self.folder, self.built = compiler, folder, {}

    def ptx(self, source: Path, architecture: int, options: Sequence[str]) -> str:
        assert source.name == "ahead_of_time.cu"
        defined = tuple(option for option in options if option.startswith("-D"))
        library = self.built.setdefault(defined, self.folder / f"ahead{len(self.built)}.so")
        if not library.is_file():
            command = [
                self.compiler,
                "-std=c++17",
                "-O1",
                "-fno-strict-aliasing",
                "-ffp-contract=off",
                "-Wall",
                "-Werror",
            ]
            command += [f"-I{PLUGINS / folder}" for folder in ("tests/emulated_cuda", "tests", "include", "src")]
            command += ["-shared", "-fPIC", str(PLUGINS / "tests" / "ahead_driver.cpp"), "-o", str(library), *defined]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr
        rows = ctypes.c_int32.in_dll(ctypes.CDLL(str(library)), "nformer_rows_per_block").value
        top_k = "-DNFORMER_ROW_TOP_K" in defined
        entry = "nformer_row_top_k" if top_k else "nformer_reciprocal_neighbor_attention"
        inputs = next((int(option[-1]) for option in defined if option.startswith("-DNFORMER_INPUTS")), 2)
        parameters = ", ".join(f".param .u{bits} p" for bits in (ROW_TOP_K if top_k else ATTENTION[inputs]))
        return (
            f"// {library}\n.target sm_{architecture}\n.const .align 4 .u32 nformer_rows_per_block = {rows};\n"
            f".visible .entry {entry}(\n{parameters}\n)\n.maxntid 256, 1, 1\n{{\n}}"
        )


@pytest.fixture
def plugin_module(monkeypatch):
    module = fake_plugin.fake_plugin()
    monkeypatch.setitem(sys.modules, "tensorrt.plugin", module)
    return module


def fake_trt() -> types.SimpleNamespace:
    kinds = fake_plugin.DataType
    return types.SimpleNamespace(__name__="tensorrt", __version__="10.13.3", int32=kinds.INT32, float32=kinds.FLOAT)


def planned(module: types.ModuleType, node: dict) -> dict:
    """The launch at the node's sizes, as a plan would be told it."""
    functions = module.registered[f"nformer::{node['operator']}"]
    tensors = [
        fake_plugin.TensorDesc(
            tuple(fake_plugin.ShapeExpr(node["sizes"].get(s, s), not isinstance(s, str)) for s in shape),
            fake_plugin.DataType[kind],
        )
        for shape, kind in node["inputs"]
    ]
    given = [np.array([value], kind) for _, value, kind, _ in node["attributes"]]
    out = functions["register"](*tensors, *given)
    combinations = functions["autotune"](*tensors, *given, (out,))
    assert [t.dtype.value for t in (*tensors, out)] in combinations
    entry, text, launch, numbers = functions["aot_impl"](*tensors, *given, (out,), 0)
    fields = ("grid_x", "grid_y", "grid_z", "block_x", "block_y", "block_z", "shared_mem")
    plain = {name: getattr(value := getattr(launch, name), "value", value) for name in fields}
    return {"output": [s.value for s in out.shape_expr], "type": out.dtype.name, "entry": entry, "ptx": text,
            "launch": plain, "numbers": [n.value for n in numbers]}  # fmt: skip


def launched(plan: dict, inputs: list[np.ndarray], kind: type) -> np.ndarray:
    """Runs the kernel: addresses of the inputs' pointers, of the numbers, of the output's pointer."""
    library = ctypes.CDLL(re.search(r"^// (.+)$", plan["ptx"], re.MULTILINE)[1])
    out = np.full(plan["output"], 7, kind)
    pointers = [ctypes.c_void_p(x.ctypes.data) for x in (*inputs, out)]
    values = [*pointers[:-1], *(ctypes.c_int32(n) for n in plan["numbers"]), pointers[-1]]
    arguments = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
    library.launch_kernel(plan["launch"]["grid_x"], plan["launch"]["block_x"], arguments)
    return out


@pytest.fixture
def plan(plugin_module, compiler, tmp_path):
    ahead = AheadOfTime(fake_trt(), EmulatedCompiler(compiler, tmp_path), 89, [])
    return lambda name: (planned(plugin_module, NODES[name]), ahead)


@pytest.mark.parametrize("name", ["affinity", "features", "no rows"])
def test_row_top_k_launched_as_the_plan_says_finds_the_best_columns(plan, name):
    told, _ = plan(name)
    given = NODES[name]
    kind = np.float32 if given["inputs"][0][1] == "FLOAT" else np.float16
    heads, rows, k = told["output"]
    shapes = [[given["sizes"].get(s, s) for s in shape] for shape, _ in given["inputs"]]
    rng = np.random.default_rng(7)
    a, b = (rng.integers(-3, 4, shape).astype(kind) for shape in shapes)
    found = launched(told, [a, b], np.int32)
    assert told["launch"]["grid_x"] == max(1, heads * -(-rows // 64))
    assert np.array_equal(found, logic.reference_top_k(logic.exact_scores(a, b), k))


@pytest.mark.parametrize("name", ["shared lists", "own lists"])
def test_attention_launched_as_the_plan_says_is_the_softmax_over_reciprocal_neighbors(plan, name):
    told, _ = plan(name)
    (value,) = (value for _, value, _, _ in NODES[name]["attributes"])
    kind = np.float32 if told["type"] == "FLOAT" else np.float16
    (heads, rows, factors), size = [*NODES[name]["inputs"][0][0]], told["output"][2]
    rows, (lists, _, k) = told["output"][1], NODES[name]["inputs"][3][0]
    a, b, v, neighbors = logic.attention_case(11, heads, rows, factors, size, k, kind)
    neighbors = np.ascontiguousarray(neighbors[:lists])
    found = launched(told, [a, b, v, neighbors], kind)
    scale = 1 / math.sqrt(size) if math.isnan(value) else value
    expected = logic.reference_attention(a, b, v, neighbors, scale)
    assert np.abs(found - expected).max() <= (1e-5 if kind is np.float32 else 4e-3)


@pytest.mark.parametrize("name", ["gated", "gated by camera"])
def test_the_gated_attention_launched_as_the_plan_says_is_the_dense_formula(plan, name):
    told, _ = plan(name)
    kind = np.float32 if told["type"] == "FLOAT" else np.float16
    heads, rows, size = told["output"]
    (lists, _, k), (thresholds, _) = (shape for shape, _ in NODES[name]["inputs"][3:5])
    case = gated_case(heads, rows, 5, size, k, lists=lists, thresholds=thresholds, cameras="camera" in name)
    a, b, v, neighbors, scale, t, cameras = case
    inputs = [
        *(x.numpy().astype(kind) for x in (a, b, v)),
        *(x.numpy() for x in (neighbors, t, cameras) if x is not None),
    ]
    wide = [torch.from_numpy(x).double() for x in inputs[:3]]
    expected = gated_formula(*wide, neighbors, scale, t.double(), cameras).numpy()
    error = np.abs(launched(told, inputs, kind) - expected)
    assert (error <= (1e-5 if kind is np.float32 else 2e-3) * (1 + np.abs(expected))).all()


def test_what_was_compiled_is_kept_by_its_hash(plan):
    told, ahead = plan("affinity")
    (sha256,) = ahead.kernels
    assert ahead.kernels[sha256].ptx == told["ptx"]
    assert ahead.kernels[sha256].sha256 == sha256
    assert ahead.facts() == (KernelInPlan("RowTopK", "nformer_row_top_k", sha256, "13.0", "sm_89"),)


def test_an_error_in_a_callback_is_kept_for_whoever_asks(plugin_module, compiler, tmp_path):
    errors = []
    AheadOfTime(fake_trt(), EmulatedCompiler(compiler, tmp_path), 89, errors)
    with pytest.raises(BackendError):
        planned(plugin_module, row_top_k("FLOAT", 2, 5, 129, 100))
    assert "got k = 129, expected 1..128" in errors[0]


def test_a_second_registration_in_one_process_is_refused(plugin_module):
    AheadOfTime(fake_trt(), None, 89, [])
    with pytest.raises(BackendError, match="already has a defintion"):
        AheadOfTime(fake_trt(), None, 89, [])


def test_a_tensorrt_without_python_plugins_is_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorrt.plugin", None)
    with pytest.raises(BackendError, match=r"tensorrt\.plugin: got none .* build-plugin"):
        AheadOfTime(fake_trt(), None, 89, [])


# ---- NVIDIA's own package ----


def wheels() -> list[Path]:
    """Of the bindings that put kernels into plans."""
    found = Path(os.environ.get(WHEELS) or HERE / "none").glob("tensorrt_cu*bindings-*.whl")
    version = lambda wheel: tuple(int(n) for n in re.search(r"-(\d+)\.(\d+)", wheel.name).groups())  # noqa: E731
    return sorted(wheel for wheel in found if version(wheel) >= plugin_ahead.SINCE)


@needs_compiler
@pytest.mark.skipif(not wheels(), reason=f"no wheels of the bindings of 10.9 or later: name their folder in {WHEELS}")
def test_tensorrts_own_package_tells_a_plan_the_same(plan, tmp_path):
    nodes, answers = tmp_path / "nodes.json", tmp_path / "answers.json"
    nodes.write_text(json.dumps(list(NODES.values())))
    expected = [plan(name)[0] for name in NODES]
    for wheel in wheels():
        folder = tmp_path / wheel.stem
        folder.mkdir()
        environment = {**os.environ, **collect.make_importable(wheel, folder)}
        command = [sys.executable, HERE.parents[1] / "helpers" / "play_tensorrt.py", nodes, answers]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{wheel.name}\n{done.stdout}{done.stderr}"
        told = json.loads(answers.read_text())
        assert told["errors"] == []
        for mine, theirs in zip(expected, told["answers"], strict=True):
            assert {**theirs, "ptx": ""} == {**mine, "ptx": ""}, wheel.name
            kernel = plugin_kernels.read_kernel(mine["entry"], theirs["ptx"], Path("ptx"))
            assert kernel.parameters in (ROW_TOP_K, *ATTENTION.values())
