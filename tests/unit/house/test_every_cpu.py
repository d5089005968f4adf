"""What could depend on the instruction set or on the number of threads: under each level of this machine, and under an
emulated one."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from nformer_edge.ops import native

ROOT = Path(__file__).parents[3]
#: Ours beside PyTorch's name for the same level; every other level gets the other number of threads. Those with integer
#: dot products differ from these in RowTopK's first filter alone, and its tests run on all.
LEVELS = {"baseline": "default", "neon": "default", "avx2": "avx2", "avx512": "avx512"}
SENSITIVE = ("ops/test_onnx_ops.py", "model/test_nformer.py", "model/test_start.py", "training/test_head.py")


@pytest.mark.parametrize("level", [s for s in LEVELS if native.available() and s in native.instruction_sets()])
def test_the_sensitive_tests_pass_at_each_level(level: str) -> None:
    threads = str(1 + list(LEVELS).index(level) % 2)
    env = os.environ | {native.ISA_VARIABLE: level, "ATEN_CPU_CAPABILITY": LEVELS[level], "OMP_NUM_THREADS": threads}
    files = [str(ROOT / "tests" / "unit" / name) for name in SENSITIVE]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *files]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{level}, {threads} threads\n{done.stdout[-4000:]}"


#: Debian's static package has the second name.
QEMU = shutil.which("qemu-x86_64") or shutil.which("qemu-x86_64-static")
INT8 = (
    "backends/test_build.py::test_an_int8_engine_is_audited_and_agrees_with_fp32",
    "quantize/test_placement.py::test_with_every_node_quantized_it_is_what_onnxruntime_placed",
    "quantize/test_placement.py::test_without_some_nodes_it_computes_what_onnxruntimes_quantizer_makes",
)


@pytest.mark.optional
@pytest.mark.skipif(QEMU is None, reason="no qemu-x86_64: install qemu-user-static to run INT8 on another CPU")
def test_int8_passes_on_a_cpu_without_vnni() -> None:
    """Haswell: AVX2 and nothing newer, where onnxruntime's 8-bit kernels saturate. Emulated: some minutes."""
    command = [QEMU, "-cpu", "Haswell", sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
    files = [str(ROOT / "tests" / "unit" / name) for name in INT8]
    done = subprocess.run([*command, *files], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:]
