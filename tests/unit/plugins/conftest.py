"""The kernels and their row logic on the CPU: compiled by g++ once a session and called through ctypes."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[3]
PLUGINS = ROOT / "plugins"
WARNINGS = ("-Wall", "-Wextra", "-Werror", "-Wconversion", "-Wno-sign-conversion")


def _pointer(x: np.ndarray | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if x is None else x.ctypes.data)


class RowLogic:
    """The CPU build of ``plugins/include/nformer/row_logic.cuh``; arrays in, arrays out."""

    def __init__(self, library: Path) -> None:
        self.lib = ctypes.CDLL(str(library))

    def row_top_k(
        self,
        a: np.ndarray,  # [H, N, R]
        b: np.ndarray,  # [H, M, R]
        k: int,
    ) -> np.ndarray:  # int32 [H, N, k]
        (heads, rows, factors), columns = a.shape, b.shape[1]
        a, b = np.ascontiguousarray(a), np.ascontiguousarray(b)
        out = np.full((heads, rows, k), -7, np.int32)  # -7: a place left unwritten shows
        sizes = [ctypes.c_int64(n) for n in (heads, rows, columns, factors, k)]
        self.lib.host_row_top_k(_pointer(a), _pointer(b), _pointer(out), *sizes, int(a.dtype == np.float16))
        return out

    def attention(
        self,
        a: np.ndarray,  # [H, N, R]
        b: np.ndarray,  # [H, N, R]
        v: np.ndarray,  # [H, N, D]
        neighbors: np.ndarray,  # int32 [H or 1, N, K]
        scale: float,
        wide: bool = False,
        t: np.ndarray | None = None,  # float32 [H or 1, N]
        cameras: np.ndarray | None = None,  # int32 [N]
        camera_factor: float = 1.0,
    ) -> np.ndarray:  # [H, N, D]
        (heads, rows, factors), size = a.shape, v.shape[2]
        a, b, v, neighbors = (np.ascontiguousarray(x) for x in (a, b, v, neighbors))
        out = np.full(v.shape, 7, v.dtype)
        sizes = [ctypes.c_int64(n) for n in (heads, rows, factors, size, neighbors.shape[0], neighbors.shape[2])]
        self.lib.host_reciprocal_neighbor_attention(
            *(_pointer(x) for x in (a, b, v, neighbors, out)), *sizes, ctypes.c_float(scale), _pointer(t),
            ctypes.c_int64(1 if t is None else len(t)), _pointer(cameras), ctypes.c_float(camera_factor),
            int(a.dtype == np.float16), int(wide),
        )  # fmt: skip
        return out


@pytest.fixture(scope="session")
def compiler() -> str:
    found = shutil.which("g++") or shutil.which("c++")
    if found is None:
        pytest.skip("no C++ compiler: install g++ to test the kernels' row logic")
    return found


@pytest.fixture(scope="session")
def row_logic(compiler: str, tmp_path_factory: pytest.TempPathFactory) -> RowLogic:
    out = tmp_path_factory.mktemp("row_logic") / "librow_logic.so"
    source = PLUGINS / "tests" / "host_driver.cpp"
    command = [compiler, "-std=c++17", "-O2", "-ffp-contract=off", *WARNINGS, "-shared", "-fPIC"]
    command += [f"-I{PLUGINS / 'include'}", f"-I{PLUGINS / 'tests'}", str(source), "-o", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return RowLogic(out)


@pytest.fixture(scope="session")
def emulated_library(compiler: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The .cu files themselves, launches and all, built against a GPU that the CPU plays thread by thread."""
    out = tmp_path_factory.mktemp("emulated") / "libnformer_kernels.so"
    command = [
        compiler,
        "-std=c++17",
        "-O2",
        "-fno-strict-aliasing",
        "-ffp-contract=off",
        "-Wall",
        "-Wextra",
        "-Werror",
    ]
    command += [f"-I{PLUGINS / folder}" for folder in ("tests/emulated_cuda", "tests", "include", "src")]
    names = ("row_top_k", "reciprocal_neighbor_attention", "c_api")
    command += ["-shared", "-fPIC", "-x", "c++", *(str(PLUGINS / "src" / f"{name}.cu") for name in names)]
    done = subprocess.run([*command, "-o", str(out)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return out
