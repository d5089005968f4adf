"""Every kernel compiles for every architecture that nvcc has; both TensorRT adapters wherever headers are found."""

from __future__ import annotations

import ctypes
import os
import re
import subprocess
from pathlib import Path

import pytest
from helpers.scripts import PLUGINS, load_script

compile_kernels = load_script("compile_kernels")
NVCC = compile_kernels.find_nvcc()
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="no nvcc: install the CUDA toolkit to compile the kernels")


@pytest.mark.optional
@needs_nvcc
def test_every_kernel_compiles_for_every_architecture_of_this_nvcc(tmp_path: Path) -> None:
    archs = compile_kernels.architectures(NVCC)
    objects, found = compile_kernels.compile_all(NVCC, archs, tmp_path)
    kernels = {r.kernel for r in found}
    assert {(r.kernel, r.arch) for r in found} == {(k, a) for k in kernels for a in archs}
    assert {re.split(r"[, ]", k)[0] for k in kernels} == {"RowTopK", "Attention"}
    # A list driven out of registers shows as hundreds of bytes of stack: that would be many times slower.
    assert [r for r in found if r.stack_bytes > 64] == []
    release = re.search(r"nvcc [\d.]+\d", compile_kernels.report(NVCC, found))
    if release is not None and release[0] in RESOURCES:
        assert_figures_are_as_written(found)
    library = tmp_path / "libnformer_kernels.so"
    compile_kernels.link_shared(NVCC, objects, library)
    assert_refuses_bad_numbers(ctypes.CDLL(str(library)))


def cells(table: str) -> dict[tuple[str, str], str]:
    """By kernel and architecture what stands in a table of figures; shared memory under "shared, KiB"."""
    head, _, *rows = [[c.strip() for c in line.strip("|").split("|")] for line in table.splitlines() if line[:1] == "|"]
    return {(row[0], arch): cell for row in rows for arch, cell in zip(head[1:], row[1:], strict=True)}


RESOURCES = (PLUGINS / "RESOURCES.md").read_text()


def assert_figures_are_as_written(found: list) -> None:
    fresh, written = cells(compile_kernels.table(found)), cells(RESOURCES)
    assert {place: written.get(place) for place in fresh} == fresh, (
        "python plugins/compile_kernels.py --resources plugins/RESOURCES.md"
    )


@pytest.mark.optional
def test_every_kernel_compiles_for_xavier_by_a_compiler_of_cuda_12(tmp_path: Path) -> None:
    cuda12 = compile_kernels.find_cuda12()
    if cuda12 is None:
        packages = "nvidia-cuda-nvrtc-cu12 nvidia-cuda-nvcc-cu12 nvidia-cuda-runtime-cu12"
        pytest.skip(f"no NVRTC and ptxas of CUDA 12, which know sm_72: pip install {packages}")
    found = cuda12.compile(72, tmp_path)
    assert {r.kernel for r in found} == {kernel for kernel, _ in cells(RESOURCES)}
    assert {r.arch for r in found} == {72}
    assert [r for r in found if r.stack_bytes > 128] == []  # 88 in the one kernel that spills; a list takes hundreds
    if str(cuda12) in RESOURCES:
        assert_figures_are_as_written(found)


def assert_refuses_bad_numbers(library: ctypes.CDLL) -> None:
    """Checks that need no GPU: they come before any launch."""
    invalid, success = 1, 0  # cudaErrorInvalidValue, cudaSuccess

    def row_top_k(heads: int, rows: int, columns: int, factors: int, k: int, kind: int = 0) -> int:
        sizes = [ctypes.c_int64(n) for n in (heads, rows, columns, factors, k)]
        return int(library.nformer_row_top_k(None, None, None, *sizes, ctypes.c_int32(kind), None))

    assert row_top_k(1, 0, 5, 5, 20) == success
    assert row_top_k(0, 5, 5, 5, 20) == success
    assert row_top_k(1, 5, 5, 5, 20) == invalid  # null pointers
    bad = [(1, 0, 5, 5, 0), (1, 0, 5, 5, 129), (1, 0, 5, 0, 20), (1, -1, 5, 5, 20), (1, 0, 2**31, 5, 20)]
    assert [row_top_k(*sizes) for sizes in bad] == [invalid] * len(bad)
    assert row_top_k(1, 0, 5, 5, 20, kind=2) == invalid


@pytest.mark.optional
@needs_nvcc
def test_a_compile_error_is_told_in_the_compilers_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "c_api.cu").write_text("#error the words\n")
    monkeypatch.setattr(compile_kernels, "PLUGINS", tmp_path)
    with pytest.raises(RuntimeError, match="the words"):
        compile_kernels.compile_source(NVCC, "c_api.cu", [90], tmp_path / "out.o")


def test_the_figures_are_read_from_what_ptxas_prints() -> None:
    log = """ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_ZN7nformer16row_top_k_kernelILi5ELi4EEEvNS_11RowTopKTaskEl' for 'sm_90'
ptxas info    : Function properties for _ZN7nformer16row_top_k_kernelILi5ELi4EEEvNS_11RowTopKTaskEl
    24 bytes stack frame, 8 bytes spill stores, 4 bytes spill loads
ptxas info    : Used 95 registers, used 1 barriers, 24 bytes cumulative stack size, 10240 bytes smem, 432 bytes cmem[0]
"""
    (figure,) = compile_kernels.parse_resources(log)
    assert figure == compile_kernels.Resources("RowTopK, R <= 5, k <= 128", 90, 95, 10240, 24, 12)
    assert "| RowTopK, R <= 5, k <= 128 | 10 | 95+12 |" in compile_kernels.table([figure])


def tensorrt_headers() -> list[Path]:
    """Include folders: the system's, $TENSORRT_ROOT's, and those of every root in $NFORMER_TENSORRT_ROOTS."""
    roots = [os.environ.get("TENSORRT_ROOT", ""), *os.environ.get("NFORMER_TENSORRT_ROOTS", "").split(os.pathsep)]
    folders = [Path(root) / "include" for root in roots if root]
    folders += [Path("/usr/include"), *Path("/usr/include").glob("*-linux-gnu")]
    return [folder for folder in folders if (folder / "NvInferVersion.h").is_file()]


def cuda_headers() -> Path | None:
    beside = [Path(NVCC).resolve().parents[1] / "include"] if NVCC else []
    home = [Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "include"]
    return next((folder for folder in beside + home if (folder / "cuda_runtime_api.h").is_file()), None)


@pytest.mark.optional
def test_both_adapters_do_what_tensorrt_asks_of_them(compiler: str, tmp_path: Path) -> None:
    found, cuda = tensorrt_headers(), cuda_headers()
    if not found:
        pytest.skip("no TensorRT headers: install libnvinfer-dev or set TENSORRT_ROOT to compile the adapters")
    if cuda is None:
        pytest.skip("no CUDA headers: install the CUDA toolkit or set CUDA_HOME to compile the adapters")
    sources = [PLUGINS / "tests" / "adapter_driver.cpp"]
    sources += [PLUGINS / "tensorrt" / f"{name}.cpp" for name in ("operators", "adapter_v2", "adapter_v3")]
    for headers in found:
        program = tmp_path / "adapter_driver"
        command = [compiler, "-std=c++17", "-Wall", "-Wextra", "-Werror", "-Wno-deprecated-declarations"]
        command += [f"-I{PLUGINS / 'include'}", f"-I{PLUGINS / 'tensorrt'}", "-isystem", str(headers)]
        command += ["-isystem", str(cuda), *map(str, sources), "-o", str(program)]
        built = subprocess.run(command, capture_output=True, text=True, check=False)
        assert built.returncode == 0, f"{headers}\n{built.stderr}"
        ran = subprocess.run([str(program)], capture_output=True, text=True, check=False)
        assert ran.returncode == 0, f"{headers}\n{ran.stdout}{ran.stderr}"
        print(ran.stdout, end="")
