"""The real pycuda, on a driver that the CPU plays: what we take from it is there and means what we think."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent

PROGRAM = """
import ctypes, threading
import numpy as np
from nformer_edge.core.errors import BackendError
from nformer_edge.backends.tensorrt.cuda import Device, Graph, driver_library

device = Device(0)
assert (device.name, device.compute_capability, device.multiprocessors) == ("Emulated GPU", "8.7", 16)
library = driver_library()
library.emulated_used.restype = ctypes.c_size_t
source = np.arange(1000, dtype=np.float32)

with device.current():
    stream, marks = device.stream(), [device.event() for _ in range(2)]
    host, back = device.pinned((1000,), np.dtype(np.float32)), device.pinned((1000,), np.dtype(np.float32))
    memory = device.allocate(host.nbytes)
    assert library.emulated_used() == host.nbytes

def work():
    with device.current():
        host[...] = source
        marks[0].record(stream)
        device.copy_in(memory, host, stream)
        device.copy_out(back, memory, stream)
        marks[1].record(stream)
        stream.synchronize()
        assert marks[1].time_since(marks[0]) == 0.5
        assert np.array_equal(back, source)
        done.append(1)

done = []
work()
thread = threading.Thread(target=work)
thread.start(); thread.join()
assert len(done) == 2, "another thread works on the same stream and memory"

with device.current():
    graph = Graph(library, stream, lambda: None)
    graph.launch(stream); graph.launch(stream)
    graph.close(); graph.close()
    assert library.emulated_launches() == 2
    try:
        device.allocate(1 << 30)
        raise AssertionError("64 MiB were enough")
    except BackendError as e:
        assert "got out of GPU memory: 63 MiB free of 64 MiB" in str(e), e

def release():
    global stream, host, back
    with device.current():
        memory.free()
        marks.clear()
        stream = host = back = None

thread = threading.Thread(target=release)
thread.start(); thread.join()
assert library.emulated_used() == 0, "another thread gives it back"
print("done")
"""


@pytest.fixture(scope="module")
def driver(tmp_path_factory) -> Path:
    """The folder of the emulated libcuda.so.1: our functions, and a refusal under every other name that pycuda has."""
    if importlib.util.find_spec("pycuda") is None:
        pytest.skip("no pycuda: pip install pycuda (builds with nvcc) to try what we take from it")
    compiler, nm = shutil.which("gcc"), shutil.which("nm")
    if compiler is None or nm is None:
        pytest.skip("no gcc or nm: install gcc and binutils to build the emulated driver")
    extension = next(Path(importlib.util.find_spec("pycuda").submodule_search_locations[0]).glob("_driver*.so"))
    listed = subprocess.run(
        [nm, "-D", "--undefined-only", extension], capture_output=True, text=True, check=True
    ).stdout
    ours = (HERE.parents[1] / "helpers" / "emulated_driver.c").read_text()
    names = {line.split()[-1].partition("@")[0] for line in listed.splitlines()}
    others = sorted(n for n in names if n.startswith("cu") and f" {n}(" not in ours)
    folder = tmp_path_factory.mktemp("driver")
    (folder / "all.c").write_text(ours + "".join(f"int {name}(void) {{ return 801; }}\n" for name in others))
    command = [compiler, "-shared", "-fPIC", "-w", "-Wl,-soname,libcuda.so.1", "-o", folder / "libcuda.so.1"]
    subprocess.run([*command, folder / "all.c"], check=True)
    return folder


def run(folder: Path | None, program: str = PROGRAM, machine: str = "64") -> subprocess.CompletedProcess[str]:
    paths = {"LD_LIBRARY_PATH": str(folder)} if folder else {}
    environment = {**os.environ, **paths, "EMULATED_CUDA": machine, "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=False)


def test_what_a_runner_takes_from_pycuda_does_what_it_should(driver: Path) -> None:
    done = run(driver)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "done\n"
    assert done.stderr == ""


def test_pycuda_without_a_gpu_is_a_named_refusal(driver: Path) -> None:
    done = run(driver, "from nformer_edge.backends.tensorrt.cuda import Device; Device(0)", machine="no-device")
    assert "BackendError: NVIDIA driver: got cuInit failed: no CUDA-capable device is detected" in done.stderr


def test_pycuda_without_a_driver_is_a_named_refusal(driver: Path) -> None:
    if (
        subprocess.run(
            [sys.executable, "-c", "import ctypes; ctypes.CDLL('libcuda.so.1')"], capture_output=True
        ).returncode
        == 0
    ):
        pytest.skip("a driver: this refusal needs a machine without one")
    done = run(None, "from nformer_edge.backends.tensorrt.cuda import Device; Device(0)")
    assert "BackendError: NVIDIA driver: got libcuda.so.1: cannot open shared object file" in done.stderr
