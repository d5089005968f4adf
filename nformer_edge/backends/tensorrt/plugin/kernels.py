"""The kernels of our two operators as PTX that TensorRT launches itself: compiled for a node, read for its launch.

TensorRT hands an ahead-of-time kernel the inputs' pointers, then 32-bit integers, then the outputs' pointers, and runs
no code of ours on the host. `plugins/src/ahead_of_time.cu` has the kernels in this form; the arithmetic in them is that
of the plugin library.
"""

from __future__ import annotations

import functools
import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nformer_edge.backends.tensorrt.plugin.build import sources_folder
from nformer_edge.backends.tensorrt.plugin.ptx import PtxCompiler
from nformer_edge.core.errors import BackendError
from nformer_edge.ops.contract import RECIPROCAL_NEIGHBOR_ATTENTION, ROW_TOP_K

#: The longest neighbor list and factor vector that the kernels take: `kMaxNeighbors`, `kMostFactors` in C++.
MAX_NEIGHBORS = 128
MAX_FACTORS = 1 << 20

_TYPES = {"fp32": "float", "fp16": "__half"}
_ENTRY = re.compile(r"\.entry (\w+)\((.*?)\)\s*(.*?)\{", re.DOTALL)


@dataclass(frozen=True)
class Kernel:
    """One kernel, ready to be put into a plan.

    Args:
        operator: `ROW_TOP_K` or `RECIPROCAL_NEIGHBOR_ATTENTION`.
        entry: its name in the PTX.
        ptx: the text.
        parameters: bits of each parameter: 64 is a pointer, 32 an integer.
        target: such as ``sm_89``: the smallest GPU that runs it.
        threads: of a block.
        rows_per_block: of one head; a launch has heads * ceil(rows / rows_per_block) blocks.
    """

    operator: str
    entry: str
    ptx: str
    parameters: tuple[int, ...]
    target: str
    threads: int
    rows_per_block: int

    @property
    def sha256(self) -> str:
        """Of the PTX."""
        return hashlib.sha256(self.ptx.encode()).hexdigest()


def compile_row_top_k(compiler: PtxCompiler, architecture: int, kind: str, factors: int, k: int) -> Kernel:
    """RowTopK's kernel.

    Args:
        compiler: see `backends.tensorrt.plugin.ptx`.
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


def compile_attention(compiler: PtxCompiler, architecture: int, kind: str, count: int) -> Kernel:
    """ReciprocalNeighborAttention's kernel; `count` is K, the rest as for `compile_row_top_k`."""
    _check("K", count, MAX_NEIGHBORS)
    options = ("-DNFORMER_ATTENTION", f"-DNFORMER_COUNT={count}")
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
    """What a launch has to know, from the PTX itself.

    Raises:
        BackendError: if it is not in there.
    """
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
