"""Builds the plugin library on this machine: says what is missing, then drives the CMake project in `plugins/`."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from nformer_edge.backends.tensorrt.plugin.library import ENVIRONMENT, KIND, LIBRARY, PluginManifest, default_folder
from nformer_edge.core.artifact import atomic_folder, sha256_file, write_manifest
from nformer_edge.core.errors import BackendError, UsageError
from nformer_edge.core.machine import machine, nvcc_version, shipped, usable_cores, version_key
from nformer_edge.core.terminal import PROGRESS
from nformer_edge.core.values import Result, to_table

_OLDEST_CMAKE = "3.20"

Named = str | os.PathLike[str] | None


@dataclass(frozen=True)
class Tools:
    """What a build needs, as found."""

    cmake: Path
    nvcc: Path
    headers: Path  # the folder of NvInferVersion.h
    tensorrt: str  # the headers' version


@dataclass(frozen=True)
class Plugin(Result):
    """A plugin library that was built.

    Args:
        library: the file.
        sha256: of it.
        facts: what its manifest says.
        log: of the build.
        found: whether it lies where engines look for it; else an environment variable has to name it.
    """

    kind = "plugin"
    version = 2

    library: Path
    sha256: str
    facts: PluginManifest
    log: Path
    found: bool = True

    def __str__(self) -> str:
        built = self.facts
        codes = ", ".join(f"sm_{a}" for a in built.architectures)
        lines = [
            f"wrote {self.library}",
            f"  sha256 {self.sha256}",
            f"  for TensorRT {built.tensorrt.partition('.')[0]} (headers {built.tensorrt}), CUDA {built.cuda}",
            f"  machine code for {codes}; PTX of compute_{built.ptx} for later ones",
        ]
        lines += [] if self.found else [f"  engines find it once {ENVIRONMENT}={self.library} is set"]
        return "\n".join(lines)


def build_plugin(
    out: Named = None, *, tensorrt_root: Named = None, nvcc: Named = None, architectures: str = "auto"
) -> Plugin:
    """Builds `libnformer_plugins.so` into a folder with its manifest and the build's log.

    Args:
        out: the folder; where engines look for it if None.
        tensorrt_root: an unpacked TensorRT tarball; JetPack's or apt's headers if None.
        nvcc: the CUDA compiler; $CUDACXX, $PATH, $CUDA_HOME or /usr/local/cuda if None.
        architectures: ``auto`` is this machine's GPU, or all that nvcc has where there is none; ``all``; or compute
            capabilities times ten, such as ``87,89``.

    Raises:
        BackendError: for what is missing, all of it at once; or with the compiler's last words.
        UsageError: for architectures that are none.
    """
    tools = find_tools(tensorrt_root, nvcc)
    wanted = _architectures(architectures)
    folder = Path(out) if out is not None else default_folder(version_key(tools.tensorrt)[0])
    with tempfile.TemporaryDirectory(prefix="nformer-plugins-") as scratch, atomic_folder(folder, KIND) as new:
        log = Path(scratch) / "build.log"
        architectures_built, ptx = _cmake(tools, Path(scratch) / "build", log, wanted, tensorrt_root)
        shutil.copyfile(Path(scratch) / "build" / LIBRARY, new / LIBRARY)
        shutil.copyfile(log, new / log.name)
        _opens(new / LIBRARY)
        facts = PluginManifest(tools.tensorrt, nvcc_version(tools.nvcc), architectures_built, ptx)
        write_manifest(new, KIND, to_table(facts))
    found = out is None
    return Plugin(folder / LIBRARY, sha256_file(folder / LIBRARY), facts, folder / "build.log", found)


def find_tools(tensorrt_root: Named = None, nvcc: Named = None) -> Tools:
    """CMake, compilers and headers. Raises BackendError, naming everything that is missing and where it comes from."""
    compiler, cmake, headers = find_nvcc(nvcc), _find_cmake(), find_headers(tensorrt_root)
    cxx = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    where = f" under {tensorrt_root}" if tensorrt_root else ""
    needed = {
        f"CMake {_OLDEST_CMAKE} or newer (pip install cmake)": cmake,
        "C++17 compiler (apt install g++)": cxx,
        "nvcc (JetPack: apt install nvidia-jetpack; a PC: the CUDA toolkit; or --nvcc PATH)": compiler,
        f"TensorRT's headers{where}, NvInferVersion.h (JetPack: apt install nvidia-jetpack; a PC: apt install "
        "libnvinfer-dev, or unpack the tarball and give --tensorrt-root DIR; without: nformer-edge doctor)": headers,
    }
    missing = [name for name, found in needed.items() if not found]
    if cmake is None or compiler is None or headers is None or missing:
        hint = "Install what is missing and run it again."
        raise BackendError("build-plugin", "no " + "; no ".join(missing), "all of it on this machine", hint)
    return Tools(cmake, compiler, headers, headers_version(headers))


def find_nvcc(named: Named = None) -> Path | None:
    """nvcc as named, or by $CUDACXX, $PATH, $CUDA_HOME, /usr/local/cuda, in this order."""
    asked = named or os.environ.get("CUDACXX")
    home = Path(os.environ.get("CUDA_HOME") or "/usr/local/cuda") / "bin"
    found = shutil.which(str(asked)) if asked else shutil.which("nvcc") or shutil.which("nvcc", path=str(home))
    return Path(found) if found else None


def find_headers(root: Named = None) -> Path | None:
    """The folder of TensorRT's headers: below `root` or $TENSORRT_ROOT if one is given, else the system's."""
    named = root or os.environ.get("TENSORRT_ROOT")
    if named:
        places = [Path(named) / "include", Path(named)]
    else:
        system = Path("/usr/include")
        places = [system, system / f"{platform.machine()}-linux-gnu", *sorted(system.glob("*-linux-gnu"))]
    return next((place for place in places if (place / "NvInferVersion.h").is_file()), None)


def headers_version(folder: Path) -> str:
    """Such as ``10.13.3.9``. Since 10.13 the numbers stand behind a second name."""
    header = folder / "NvInferVersion.h"
    defined = dict(re.findall(r"#define\s+(\w+)\s+(\w+)", header.read_text(errors="replace")))
    values = [defined.get(f"NV_TENSORRT_{part}", "") for part in ("MAJOR", "MINOR", "PATCH", "BUILD")]
    numbers = [defined.get(value, value) for value in values]
    if not all(n.isdecimal() for n in numbers):
        raise BackendError(str(header), "no version in it", "TensorRT's own", "Name another folder in --tensorrt-root.")
    return ".".join(numbers)


def sources_folder() -> Path:
    """The CMake project of the kernels and adapters."""
    return shipped("plugins")


def _architectures(said: str) -> list[str]:
    if said == "auto":
        return [c.replace(".", "") for c in (machine().compute_capability,) if c]
    if said == "all":
        return []
    wanted = [a.strip() for a in said.split(",")]
    if not all(re.fullmatch(r"\d{2,3}", a) for a in wanted):
        raise UsageError("arch", repr(said), "auto, all, or such as 87,89", "Correct --arch.")
    return wanted


def _find_cmake() -> Path | None:
    """CMake beside this Python (a wheel brings one) or on $PATH, if it is new enough."""
    for found in (shutil.which("cmake", path=str(Path(sys.executable).parent)), shutil.which("cmake")):
        said = subprocess.run([found, "--version"], capture_output=True, text=True, check=False).stdout if found else ""
        version = re.search(r"cmake version ([\d.]+)", said)
        if found and version and version_key(version[1]) >= version_key(_OLDEST_CMAKE):
            return Path(found)
    return None


def _cmake(tools: Tools, build: Path, log: Path, wanted: list[str], root: Named) -> tuple[tuple[str, ...], str]:
    """Configures and builds. Returns the architectures and that of the PTX, as CMake settled them."""
    command = [str(tools.cmake), "-S", str(sources_folder()), "-B", str(build)]
    command += [f"-DTENSORRT_INCLUDE={tools.headers}", f"-DCMAKE_CUDA_COMPILER={tools.nvcc}"]
    command += [f"-DTENSORRT_ROOT={Path(root).resolve()}"] if root else []
    command += [f"-DCMAKE_CUDA_ARCHITECTURES={';'.join(wanted)}"] if wanted else []
    _run(command, log, "configuring")
    _run([str(tools.cmake), "--build", str(build), "--parallel", str(usable_cores())], log, "compiling")
    settled = re.search(r"Architectures: ([\w,]+), PTX compute_(\d+)", log.read_text(errors="replace"))
    assert settled is not None, "plugins/CMakeLists.txt prints it"
    return tuple(a.removeprefix("sm_") for a in settled[1].split(",")), settled[2]


def _run(command: list[str], log: Path, doing: str) -> None:
    """Runs a step, its words into `log`; the bar follows the per cent that make prints."""
    with (
        open(log, "a", encoding="utf-8") as file,
        tqdm(total=100, desc=doing, unit="%", **PROGRESS) as bar,
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
        ) as work,
    ):
        assert work.stdout is not None, "asked for above"
        for line in work.stdout:
            file.write(line)
            if percent := re.match(r"\[\s*(\d+)%\]", line):
                bar.update(int(percent[1]) - bar.n)
    if work.returncode != 0:
        words = [line for line in log.read_text(errors="replace").splitlines() if "rror" in line] or ["no word of why"]
        got, kept = " ".join(words[0].split()), shutil.copy(log, tempfile.mkdtemp(prefix="nformer-plugins-"))
        raise BackendError(f"build-plugin: {doing}", got, "success", f"The whole log: {kept}")


def _opens(library: Path) -> None:
    """Opens it in a process of its own: whatever is missing shows now and not on the first engine."""
    program = f"import ctypes, os; ctypes.CDLL({str(library)!r}, mode=os.RTLD_NOW).nformer_register_plugins"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        hint = "Use the compiler and the TensorRT of this machine."
        raise BackendError("build-plugin", done.stderr.strip().splitlines()[-1], "a library that opens", hint)
