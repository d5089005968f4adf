"""The kernels outside Python: under sanitizers, and, where the tools are there, on an emulated Arm processor."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

SOURCES = Path(__file__).parents[3] / "nformer_edge" / "ops" / "src"
#: Of every result of the driver, on every machine. It changes only where the driver's cases or the arithmetic do.
CHECKSUM = "checksum cd102f919f276874"

#: Debian's static package has the second name.
QEMU = shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static")

pytestmark = [
    pytest.mark.optional,
    pytest.mark.skipif(
        shutil.which("cmake") is None or shutil.which("g++") is None, reason="lacks cmake or g++ to build the driver"
    ),
]


def build_and_run(folder: Path, *options: str, before: tuple[str, ...] = ()) -> str:
    """Builds kernels_driver in `folder` and runs it. Returns what it printed."""
    defaults = ("-DNFORMER_PYTHON=OFF", "-DNFORMER_DRIVER=ON")
    subprocess.run(
        ["cmake", "-S", SOURCES.parents[2], "-B", folder, *defaults, *options], check=True, capture_output=True
    )
    subprocess.run(
        ["cmake", "--build", folder, "--target", "kernels_driver", "--parallel", "2"], check=True, capture_output=True
    )
    driver = folder / "nformer_edge" / "ops" / "src" / "kernels_driver"
    run = subprocess.run([*before, driver], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout


def test_kernels_are_clean_under_address_and_undefined_behavior_sanitizers(tmp_path: Path) -> None:
    assert CHECKSUM in build_and_run(tmp_path, "-DNFORMER_SANITIZE=address,undefined")


@pytest.mark.skipif(
    shutil.which("aarch64-linux-gnu-g++") is None or QEMU is None, reason="lacks aarch64-linux-gnu-g++ and qemu-aarch64"
)
def test_neon_gives_the_same_bits_as_this_machine(tmp_path: Path) -> None:
    cross = ("-DCMAKE_SYSTEM_NAME=Linux", "-DCMAKE_SYSTEM_PROCESSOR=aarch64", "-DCMAKE_EXE_LINKER_FLAGS=-static")
    compiler = "-DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++"
    printed = build_and_run(tmp_path, *cross, compiler, before=(QEMU,))
    assert "neon" in printed.split()  # and neondot, where the emulator has it
    assert CHECKSUM in printed
