"""Wheels of both machines, as `make wheels` makes them: their names, what is in them, and that they install and run."""

from __future__ import annotations

import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
QEMU = shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static")

#: e_machine of an ELF file.
MACHINES = {"x86_64": 62, "aarch64": 183}

USE = """
import numpy as np
from nformer_edge.ops import native
from nformer_edge.targets.recipe import target_names
assert "rk3588" in target_names()
x = np.random.default_rng(0).normal(size=(1, 50, 8)).astype(np.float32)
expected = np.argsort(-(x[0] @ x[0].T), axis=1, kind="stable")[:, :5]
assert (native.row_top_k(x, x, 5)[0] == expected).mean() > 0.95
print("used", ",".join(native.instruction_sets()))
"""

#: A program that opens a library, as the machine of the library.
OPENS = """
#include <dlfcn.h>
#include <stdio.h>
int main(int argc, char** argv) {
  void* library = dlopen(argv[1], RTLD_NOW);
  if (!library) return puts(dlerror()), 1;
  const char* names[8];
  int count = ((int (*)(const char**, int))dlsym(library, "nformer_instruction_sets"))(names, 8);
  for (int i = 0; i < count; ++i) puts(names[i]);
  return count < 1;
}
"""


@pytest.fixture(scope="module")
def wheels(tmp_path_factory):
    lacking = [c for c in ("x86_64-linux-gnu-g++", "aarch64-linux-gnu-g++") if shutil.which(c) is None]
    if lacking:
        pytest.skip(f"lacks {' and '.join(lacking)}")
    out = tmp_path_factory.mktemp("dist")
    subprocess.run([ROOT / "export" / "wheels.sh", out], check=True, capture_output=True, text=True)
    return {m: next(out.glob(f"*_{m}.whl")) for m in MACHINES} | {"sdist": next(out.glob("*.tar.gz"))}


def installed(folder: Path, wheel: Path) -> Path:
    """The Python of a new environment with this package alone, and no compiler within reach."""
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    install = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", wheel]
    subprocess.run(install, check=True, env={"PATH": str(folder / "bin"), "CXX": "none", "CC": "none"})
    return python


@pytest.mark.optional
def test_a_wheel_serves_every_python_and_every_linux_of_its_time(wheels):
    for machine in MACHINES:
        python, abi, platform = wheels[machine].stem.split("-")[-3:]
        assert (python, abi) == ("py3", "none")
        assert platform.startswith("manylinux_2_")
        assert int(platform.split("_")[2]) <= 35  # JetPack 6 has glibc 2.35


@pytest.mark.optional
def test_a_wheel_holds_the_kernels_of_its_machine_the_recipes_and_the_plugins_source(wheels):
    for machine, number in MACHINES.items():
        with zipfile.ZipFile(wheels[machine]) as wheel:
            names = set(wheel.namelist())
            for library in ("_kernels.so", "libnformer_onnxruntime.so"):
                assert int.from_bytes(wheel.read(f"nformer_edge/ops/{library}")[18:20], "little") == number
        assert {"nformer_edge/export/recipes/rk3588.toml", "nformer_edge/plugins/CMakeLists.txt"} <= names
        assert not [name for name in names if name.startswith("tests/")]


@pytest.mark.optional
def test_the_wheel_installs_without_a_compiler_and_runs(wheels, tmp_path):
    python = installed(tmp_path / "env", wheels["x86_64"])
    said = subprocess.run([python, "-c", USE], check=True, capture_output=True, text=True, cwd=tmp_path).stdout
    assert said.startswith("used ")
    subprocess.run([python, "-m", "nformer_edge.cli", "doctor"], check=True, capture_output=True, cwd=tmp_path)


@pytest.mark.optional
def test_the_source_distribution_compiles_and_runs(wheels, tmp_path):
    venv.create(tmp_path / "env", with_pip=True)
    python = tmp_path / "env" / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "--quiet", wheels["sdist"]], check=True)
    subprocess.run([python, "-c", USE], check=True, cwd=tmp_path)


@pytest.mark.optional
def test_the_kernels_for_arm_open_and_run_under_qemu(wheels, tmp_path):
    if QEMU is None:
        pytest.skip("lacks qemu-aarch64")
    with zipfile.ZipFile(wheels["aarch64"]) as wheel:
        library = wheel.extract("nformer_edge/ops/_kernels.so", tmp_path)
    source = tmp_path / "opens.c"
    source.write_text(OPENS)
    compile_it = ["aarch64-linux-gnu-g++", "-x", "c++", "-fpermissive", "-w", source, "-o", tmp_path / "opens", "-ldl"]
    subprocess.run(compile_it, check=True)
    run = [QEMU, "-L", "/usr/aarch64-linux-gnu", tmp_path / "opens", library]
    said = subprocess.run(run, check=True, capture_output=True, text=True).stdout
    assert "neon" in said.split()


@pytest.mark.optional
def test_pip_takes_the_wheel_for_the_python_of_each_jetpack(wheels, tmp_path):
    for version, glibc in (("3.10", 35), ("3.11", 36), ("3.12", 39)):
        platforms = [f"--platform=manylinux_2_{n}_aarch64" for n in range(17, glibc + 1)]
        asked = [*platforms, "--python-version", version, "--only-binary=:all:", "--no-deps", "--no-index"]
        where = ["--target", tmp_path / version, wheels["aarch64"]]
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *asked, *where]
        subprocess.run(command, check=True)
        assert (tmp_path / version / "nformer_edge" / "ops" / "_kernels.so").is_file()
