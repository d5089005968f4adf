"""The kernels of our two operators as PTX that TensorRT launches itself: compiled for one node, read for its launch.

TensorRT hands an ahead-of-time kernel the inputs' pointers, then 32-bit integers, then the outputs' pointers, and runs
no code of ours on the host. `plugins/src/ahead_of_time.cu` has the kernels in this form; the arithmetic in them is that
of the plugin library. The compiler is NVRTC, which pip and every toolkit bring, or nvcc; neither needs a GPU.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib.util
import os
import re
import subprocess
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from nformer_edge.backends.tensorrt.plugin.build import find_nvcc, sources_folder
from nformer_edge.core.errors import BackendError
from nformer_edge.core.machine import nvcc_version, version_key
from nformer_edge.ops.contract import RECIPROCAL_NEIGHBOR_ATTENTION, ROW_TOP_K

#: The longest neighbor list and factor vector that the kernels take: `kMaxNeighbors`, `kMostFactors` in C++.
MAX_NEIGHBORS = 128
MAX_FACTORS = 1 << 20

_TYPES = {"fp32": "float", "fp16": "__half"}
_ENTRY = re.compile(r"\.entry (\w+)\((.*?)\)\s*(.*?)\{", re.DOTALL)


@dataclass(frozen=True)
class Kernel:
    """One kernel, ready to be put into a plan."""

    operator: str
    entry: str  # its name in the PTX
    ptx: str
    parameters: tuple[int, ...]  # bits of each: 64 is a pointer, 32 an integer
    target: str  # such as sm_89: the smallest GPU that runs it
    threads: int  # of a block
    rows_per_block: int  # of one head; a launch has heads * ceil(rows / rows_per_block) blocks

    @property
    def sha256(self) -> str:
        """Of the PTX."""
        return hashlib.sha256(self.ptx.encode()).hexdigest()


def compile_row_top_k(compiler: PtxCompiler, architecture: int, kind: str, factors: int, k: int) -> Kernel:
    """RowTopK's kernel.

    Args:
        compiler: of CUDA.
        architecture: the lowest compute capability that it must run on, times ten.
        kind: of a and b, ``fp32`` or ``fp16``.
        factors: R; 0 where the graph does not know it.
        k: neighbors.

    Raises:
        BackendError: for numbers that the kernels do not take, or with the compiler's words.
    """
    _check("k", k, MAX_NEIGHBORS)
    _check("R", max(factors, 1), MAX_FACTORS)
    options = ("-DNFORMER_ROW_TOP_K", f"-DNFORMER_FACTORS={factors}", f"-DNFORMER_COUNT={k}")
    return _compiled(ROW_TOP_K, compiler, architecture, kind, options)


def compile_attention(compiler: PtxCompiler, architecture: int, kind: str, count: int, inputs: int = 4) -> Kernel:
    """ReciprocalNeighborAttention's kernel for so many inputs; `count` is K, the rest as for `compile_row_top_k`."""
    _check("K", count, MAX_NEIGHBORS)
    options = ("-DNFORMER_ATTENTION", f"-DNFORMER_COUNT={count}", f"-DNFORMER_INPUTS={inputs}")
    return _compiled(RECIPROCAL_NEIGHBOR_ATTENTION, compiler, architecture, kind, options)


def float_halves(value: float) -> tuple[int, int]:
    """The upper and the lower 16 bits of a float32: numbers that a launch of integers can carry, whatever the sign."""
    bits = int(np.float32(value).view(np.uint32))
    return bits >> 16, bits & 0xFFFF


def _check(name: str, value: int, largest: int) -> None:
    if not 1 <= value <= largest:
        hint = "The CUDA kernels take no more: train with fewer neighbors or landmarks."
        operators = f"{ROW_TOP_K}, {RECIPROCAL_NEIGHBOR_ATTENTION}"
        raise BackendError(operators, f"{name} = {value}", f"1..{largest}", hint)


@functools.cache  # a head has one node of each operator a layer, and most are alike
def _compiled(operator: str, compiler: PtxCompiler, architecture: int, kind: str, options: tuple[str, ...]) -> Kernel:
    known = [a for a in compiler.architectures if a <= architecture]
    if not known:
        got = f"compute capabilities {', '.join(map(str, compiler.architectures))}"
        raise BackendError(str(compiler), got, f"one up to {architecture}", "Install an older version of it.")
    folder = sources_folder()
    paths = [f"-I{folder / 'include'}", f"-I{folder / 'src'}", f"-DNFORMER_TYPE={_TYPES[kind]}"]
    ptx = compiler.ptx(folder / "src" / "ahead_of_time.cu", max(known), [*paths, *options])
    return read_kernel(operator, ptx, folder / "src" / "ahead_of_time.cu")


def read_kernel(operator: str, ptx: str, source: Path) -> Kernel:
    """What a launch has to know, from the PTX itself. Raises BackendError if it is not in there."""
    entry = _ENTRY.search(ptx)
    rows = re.search(r"nformer_rows_per_block = (\d+);", ptx)
    # "256, 1, 1"; from sm_100 on nvcc 13 writes "256" alone
    threads = re.search(r"\.maxntid (\d+)(?:, 1)*\s*$", entry[3], re.MULTILINE) if entry else None
    target = re.search(r"^\.target (\w+)", ptx, re.MULTILINE)
    if entry is None or rows is None or threads is None or target is None:
        got = "PTX without a kernel, its target, threads or rows"
        raise BackendError(str(source), got, "all four", "Report this with the compiler's version.")
    bits = tuple(int(b) for b in re.findall(r"\.param \.u(32|64)", entry[2]))
    return Kernel(operator, entry[1], ptx, bits, target[1], int(threads[1]), int(rows[1]))


# ---- compilers ----

#: No fast-math flag may join this: ties, NaN and the order of sums are part of the operators' contract.
_FLAGS = ("-std=c++17",)

#: Where NVIDIA's packages for CUDA 12 and for CUDA 13 put the library and, beside it, the headers of the runtime.
_IN_PACKAGES = (("cuda_nvrtc/lib", "cuda_runtime/include"), ("cu13/lib", "cu13/include"))

#: Earlier ones refuse ``__builtin_bit_cast``, by which the kernels have infinity where there are no headers.
OLDEST_NVRTC = (12, 3)


@dataclass(frozen=True)
class Nvrtc:
    """NVIDIA's compiler as a library: ``libnvrtc.so`` and a folder that has ``cuda_fp16.h``."""

    library: Path
    headers: Path
    version: tuple[int, int]  # of CUDA: the PTX needs a driver for it or for a later one
    architectures: tuple[int, ...]  # compute capabilities times ten, ascending

    def __str__(self) -> str:
        return f"NVRTC {'.'.join(map(str, self.version))} ({self.library})"

    def ptx(self, source: Path, architecture: int, options: Sequence[str]) -> str:
        """PTX of `source` for one architecture, with such `options` as ``-DNAME=1`` and ``-Ifolder``.

        Raises:
            BackendError: with the compiler's words.
        """
        nvrtc = _opened(self.library)
        words = [f"--gpu-architecture=compute_{architecture}", *_FLAGS, f"-I{self.headers}", *options]
        given = (ctypes.c_char_p * len(words))(*(word.encode() for word in words))
        program = ctypes.c_void_p()
        _call(nvrtc, "nvrtcCreateProgram", ctypes.byref(program), source.read_bytes(), str(source).encode(), 0, 0, 0)
        try:
            if nvrtc.nvrtcCompileProgram(program, len(words), given) != 0:
                raise _refused(source, str(self), _text(nvrtc, "nvrtcGetProgramLog", program))
            return _text(nvrtc, "nvrtcGetPTX", program)
        finally:
            nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


@dataclass(frozen=True)
class Nvcc:
    """The toolkit's compiler driver, which has its headers itself; see `Nvrtc`."""

    program: Path
    version: tuple[int, int]
    architectures: tuple[int, ...]

    def __str__(self) -> str:
        return f"nvcc {'.'.join(map(str, self.version))} ({self.program})"

    def ptx(self, source: Path, architecture: int, options: Sequence[str]) -> str:
        """See `Nvrtc.ptx`."""
        command = [str(self.program), "-ptx", f"-arch=compute_{architecture}", *_FLAGS, *options, str(source)]
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "kernel.ptx"
            done = subprocess.run([*command, "-o", str(out)], capture_output=True, text=True, check=False)
            if done.returncode != 0:
                raise _refused(source, str(self), done.stderr)
            return out.read_text()


PtxCompiler: TypeAlias = Nvrtc | Nvcc


def find_nvrtc() -> Iterator[Nvrtc]:
    """Every NVRTC from `OLDEST_NVRTC` on with headers: of pip's packages, of $CUDA_HOME, of /usr/local/cuda."""
    for library, headers in _nvrtc_places():
        if (headers / "cuda_fp16.h").is_file():
            try:
                nvrtc = _opened(library)
            except OSError:
                continue  # of another machine's architecture, say
            version, architectures = _nvrtc_facts(nvrtc)
            if version >= OLDEST_NVRTC:
                yield Nvrtc(library, headers, version, architectures)


def _nvrtc_places() -> Iterator[tuple[Path, Path]]:
    spec = importlib.util.find_spec("nvidia")
    for root in (spec.submodule_search_locations or ()) if spec is not None else ():
        for libraries, headers in _IN_PACKAGES:
            for library in sorted(Path(root, libraries).glob("libnvrtc.so*")):
                yield library, Path(root, headers)
    home = Path(os.environ.get("CUDA_HOME") or "/usr/local/cuda")
    for library in sorted(home.glob("lib64/libnvrtc.so")):
        yield library, home / "include"


def as_nvcc(program: Path) -> Nvcc:
    """The nvcc at `program`, asked for its version and architectures."""

    said = subprocess.run([str(program), "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout
    major, minor, *_ = version_key(nvcc_version(program))
    return Nvcc(program, (major, minor), tuple(sorted(map(int, re.findall(r"^compute_(\d+)$", said, re.MULTILINE)))))


def find_compilers() -> list[PtxCompiler]:
    """All that is here: every NVRTC, and nvcc."""
    nvcc = find_nvcc()
    return [*find_nvrtc(), *([as_nvcc(nvcc)] if nvcc is not None else [])]


def newest_for(compilers: Iterable[PtxCompiler], driver: tuple[int, int]) -> PtxCompiler | None:
    """The newest compiler whose PTX a driver for CUDA `driver` reads; None if there is none."""
    readable = [compiler for compiler in compilers if compiler.version <= driver]
    return max(readable, key=lambda compiler: compiler.version, default=None)


def _opened(library: Path) -> Any:
    # It opens a second library by name, which pip's packages for CUDA 13 put on no path: opened first, it is found.
    for builtins in library.parent.glob("libnvrtc-builtins.so*"):
        ctypes.CDLL(str(builtins))
    return ctypes.CDLL(str(library))


def _call(nvrtc: Any, function: str, *arguments: Any) -> None:
    code = getattr(nvrtc, function)(*arguments)
    if code != 0:
        raise BackendError("NVRTC", f"error {code} from {function}", "success", "Install it again.")


def _text(nvrtc: Any, what: str, program: ctypes.c_void_p) -> str:
    size = ctypes.c_size_t()
    _call(nvrtc, f"{what}Size", program, ctypes.byref(size))
    text = ctypes.create_string_buffer(size.value)
    _call(nvrtc, what, program, text)
    return text.value.decode(errors="replace")


def _nvrtc_facts(nvrtc: Any) -> tuple[tuple[int, int], tuple[int, ...]]:
    """Version and architectures."""
    major, minor, count = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    _call(nvrtc, "nvrtcVersion", ctypes.byref(major), ctypes.byref(minor))
    _call(nvrtc, "nvrtcGetNumSupportedArchs", ctypes.byref(count))
    found = (ctypes.c_int * count.value)()
    _call(nvrtc, "nvrtcGetSupportedArchs", found)
    return (major.value, minor.value), tuple(sorted(found))


def _refused(source: Path, compiler: str, said: str) -> BackendError:
    hint = "Report this with the words above, or use another version of the compiler."
    return BackendError(source.name, f"a refusal of {compiler}: {said.strip()[-2000:]}", "PTX", hint)
