"""Compiles the kernels with nvcc, prints what each takes of a GPU, and can link them into a library for ctypes.

    python plugins/compile_kernels.py                          every architecture that this nvcc has
    python plugins/compile_kernels.py --arch 87 --shared libnformer_kernels.so
    python plugins/compile_kernels.py --resources plugins/RESOURCES.md

Needs nvcc and nothing else: no GPU, no TensorRT, no Python package. nvcc 13 has dropped sm_72 (Xavier). Beside it the
libraries of CUDA 12 do, for the figures (not for --shared), from pip: nvidia-cuda-nvrtc-cu12, nvidia-cuda-nvcc-cu12
(its ptxas) and nvidia-cuda-runtime-cu12 (its headers).
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PLUGINS = Path(__file__).resolve().parent
SOURCES = ("row_top_k.cu", "reciprocal_neighbor_attention.cu", "c_api.cu")
#: No fast-math flag may join these: ties, NaN and the order of sums are part of the contract.
FLAGS = ("-std=c++17", "-O3", "-Xcompiler", "-fPIC,-fvisibility=hidden", "-Xptxas", "-v")
OLDEST = 72  # Xavier


@dataclass(frozen=True)
class Resources:
    """What one kernel takes on one architecture, as ptxas says."""

    kernel: str
    arch: int
    registers: int
    shared_bytes: int
    stack_bytes: int
    spill_bytes: int  # stores plus loads


def find_nvcc() -> str | None:
    """nvcc by $NVCC, $PATH, $CUDA_HOME or /usr/local/cuda, in this order."""
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return os.environ.get("NVCC") or shutil.which("nvcc") or shutil.which("nvcc", path=str(Path(home) / "bin"))


def architectures(nvcc: str) -> list[int]:
    """Compute capabilities, ascending and times ten, that `nvcc` compiles for and the kernels support."""
    listed = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout
    found = {int(m) for m in re.findall(r"^compute_(\d+)$", listed, re.MULTILINE)}
    return sorted(a for a in found if a >= OLDEST)


def target_flags(archs: list[int]) -> list[str]:
    """One PTX for the oldest, machine code for each: the kernels use nothing newer, and PTX is made only once."""
    oldest = min(archs)
    codes = ",".join([*(f"sm_{a}" for a in archs), f"compute_{oldest}"])
    return ["-gencode", f"arch=compute_{oldest},code=[{codes}]"]


def compile_source(nvcc: str, source: str, archs: list[int], out: Path) -> list[Resources]:
    """Compiles one file to the object `out`.

    Raises:
        RuntimeError: with the compiler's words.
    """
    command = [nvcc, *FLAGS, *target_flags(archs), f"-I{PLUGINS / 'include'}", f"-I{PLUGINS / 'src'}"]
    command += ["-c", str(PLUGINS / "src" / source), "-o", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{source}: nvcc failed.\n{' '.join(command)}\n{done.stdout}{done.stderr}")
    return parse_resources(done.stdout + done.stderr)


@dataclass(frozen=True)
class Cuda12:
    """NVRTC and ptxas of CUDA 12, as pip brings them."""

    nvrtc: Any  # nformer_edge.backends.tensorrt.plugin.kernels.Nvrtc
    ptxas: Path

    def __str__(self) -> str:
        return f"NVRTC and ptxas {'.'.join(map(str, self.nvrtc.version))}"

    def compile(self, arch: int, build: Path) -> list[Resources]:
        """Compiles every kernel for one architecture into a cubin in `build`.

        Raises:
            RuntimeError: with ptxas's words. NVRTC's come as its own error.
        """
        options = [f"-I{PLUGINS / 'include'}", f"-I{PLUGINS / 'src'}"]
        text = build / f"every_kernel_{arch}.ptx"
        text.write_text(self.nvrtc.ptx(PLUGINS / "src" / "every_kernel.cu", arch, options))
        command = [str(self.ptxas), "-v", f"-arch=sm_{arch}", str(text), "-o", str(text.with_suffix(".cubin"))]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise RuntimeError(f"{text.name}: ptxas failed.\n{' '.join(command)}\n{done.stdout}{done.stderr}")
        return parse_resources(done.stdout + done.stderr)


def find_cuda12(arch: int = OLDEST) -> Cuda12 | None:
    """Compilers from pip that know `arch`; None if any part is missing."""
    sys.path.append(str(PLUGINS.parent))  # from a checkout; elsewhere the package is installed
    from nformer_edge.backends.tensorrt.plugin.kernels import find_nvrtc

    for nvrtc in find_nvrtc():
        ptxas = nvrtc.library.parents[2] / "cuda_nvcc" / "bin" / "ptxas"
        if arch in nvrtc.architectures and ptxas.is_file():
            return Cuda12(nvrtc, ptxas)
    return None


_ENTRY = re.compile(r"Compiling entry function '(\w+)' for 'sm_(\d+)'")
_STACK = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_USED = re.compile(r"Used (\d+) registers")
_SHARED = re.compile(r"(\d+) bytes smem")


def parse_resources(log: str) -> list[Resources]:
    """Reads ``-Xptxas -v``: for each kernel an entry line, a stack line and a line of registers."""
    found = []
    entry, stack = None, (0, 0)
    for line in log.splitlines():
        if m := _ENTRY.search(line):
            entry = (readable(m[1]), int(m[2]))
        elif m := _STACK.search(line):
            stack = (int(m[1]), int(m[2]) + int(m[3]))
        elif entry is not None and (m := _USED.search(line)):
            shared = _SHARED.search(line)
            found.append(Resources(*entry, int(m[1]), int(shared[1]) if shared else 0, *stack))
            entry, stack = None, (0, 0)
    return found


def readable(mangled: str) -> str:
    """``..16row_top_k_kernelILi5ELi1EEE..`` as ``RowTopK, R <= 5, k <= 32``."""
    if m := re.search(r"row_top_k_kernelILi(\d+)ELi(\d+)EEE", mangled):
        return f"RowTopK, {'R <= ' + m[1] if int(m[1]) else 'any R'}, k <= {32 * int(m[2])}"
    if m := re.search(r"attention_kernelILi(\d+)E(f|6__half)EE", mangled):
        return f"Attention, {'float32' if m[2] == 'f' else 'float16'}, K <= {32 * int(m[1])}"
    return mangled


def table(resources: list[Resources]) -> str:
    """Markdown: a kernel a row, an architecture a column. ``96`` registers, ``128+24`` with 24 bytes spilled."""
    archs = sorted({r.arch for r in resources})
    cells = {(r.kernel, r.arch): r for r in resources}
    lines = ["| kernel | shared, KiB | " + " | ".join(f"sm_{a}" for a in archs) + " |"]
    lines.append("|---|---|" + "---|" * len(archs))
    for kernel in sorted({r.kernel for r in resources}, key=lambda name: [s.zfill(4) for s in name.split()]):
        row = [cells[kernel, a] for a in archs]
        shown = [f"{r.registers}+{r.spill_bytes}" if r.spill_bytes else str(r.registers) for r in row]
        lines.append(f"| {kernel} | {row[0].shared_bytes / 1024:g} | " + " | ".join(shown) + " |")
    return "\n".join(lines)


def report(nvcc: str, resources: list[Resources], cuda12: Cuda12 | None = None) -> str:
    """The text of RESOURCES.md."""
    version = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    release = re.search(r"V([\d.]+)", version)
    compilers = f"nvcc {release[1] if release else '?'}" + (f"; sm_{OLDEST}: {cuda12}" if cuda12 else "")
    return f"""# What the kernels take

Made by `python plugins/compile_kernels.py --resources plugins/RESOURCES.md`; {compilers}.
Registers a thread, and after a plus sign the bytes that a thread spills (stores and loads). Blocks are 256 threads.
These are the compiler's figures. They say what fits on a multiprocessor, not how fast it is.

{table(resources)}
"""


def compile_all(nvcc: str, archs: list[int], build: Path) -> tuple[list[Path], list[Resources]]:
    """Compiles every source into `build`. Returns objects and figures."""
    objects, resources = [], []
    for source in SOURCES:
        objects.append(build / f"{Path(source).stem}.o")
        resources += compile_source(nvcc, source, archs, objects[-1])
    return objects, resources


def link_shared(nvcc: str, objects: list[Path], out: Path) -> None:
    """Links a library with the C functions of ``nformer/kernels.h``; the CUDA runtime is inside."""
    subprocess.run([nvcc, "-shared", "-o", str(out), *map(str, objects)], check=True)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--arch", default="all", help="compute capabilities times ten, such as 87,90 (default: all)")
    parser.add_argument("--shared", type=Path, help="link a library for ctypes here")
    parser.add_argument("--resources", type=Path, help="write the table here")
    args = parser.parse_args(argv)
    nvcc = find_nvcc()
    if nvcc is None:
        print("nvcc: not found. Install the CUDA toolkit, or set NVCC or CUDA_HOME.", file=sys.stderr)
        return 2
    known = architectures(nvcc)
    archs = known if args.arch == "all" else [int(a) for a in args.arch.split(",")]
    if unknown := sorted(set(archs) - set(known)):
        print(f"--arch: got {unknown}, expected some of {known}. sm_72 needs nvcc of CUDA 12.", file=sys.stderr)
        return 2
    cuda12 = find_cuda12() if args.arch == "all" and OLDEST not in known else None
    with tempfile.TemporaryDirectory() as build:
        objects, resources = compile_all(nvcc, archs, Path(build))
        resources += cuda12.compile(OLDEST, Path(build)) if cuda12 else []
        if args.shared:
            link_shared(nvcc, objects, args.shared)
    print(table(resources))
    if args.resources:
        args.resources.write_text(report(nvcc, resources, cuda12))
    return 0


if __name__ == "__main__":
    sys.exit(main())
