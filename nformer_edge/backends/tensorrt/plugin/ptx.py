"""CUDA C++ compiled to PTX on this machine, without a GPU: by NVRTC, which pip and every toolkit bring, or by nvcc."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import re
import subprocess
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from nformer_edge.backends.tensorrt.plugin.build import find_nvcc
from nformer_edge.core.errors import BackendError

#: No fast-math flag may join this: ties, NaN and the order of sums are part of the operators' contract.
_FLAGS = ("-std=c++17",)

#: Where NVIDIA's packages for CUDA 12 and for CUDA 13 put the library and, beside it, the headers of the runtime.
_IN_PACKAGES = (("cuda_nvrtc/lib", "cuda_runtime/include"), ("cu13/lib", "cu13/include"))

#: Earlier ones refuse ``__builtin_bit_cast``, by which the kernels have infinity where there are no headers.
OLDEST_NVRTC = (12, 3)


@dataclass(frozen=True)
class Nvrtc:
    """NVIDIA's compiler as a library: ``libnvrtc.so`` and a folder that has ``cuda_fp16.h``.

    Args:
        library: the file.
        headers: the folder.
        version: of CUDA: the PTX needs a driver for it or for a later one.
        architectures: compute capabilities times ten, ascending.
    """

    library: Path
    headers: Path
    version: tuple[int, int]
    architectures: tuple[int, ...]

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
            version = _nvrtc_version(nvrtc)
            if version >= OLDEST_NVRTC:
                yield Nvrtc(library, headers, version, _nvrtc_architectures(nvrtc))


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

    def says(word: str) -> str:
        return subprocess.run([str(program), word], capture_output=True, text=True, check=True).stdout

    release = re.search(r"release (\d+)\.(\d+)", says("--version"))
    assert release is not None, "nvcc tells its release"
    listed = re.findall(r"^compute_(\d+)$", says("--list-gpu-arch"), re.MULTILINE)
    return Nvcc(program, (int(release[1]), int(release[2])), tuple(sorted(int(a) for a in listed)))


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


def _nvrtc_version(nvrtc: Any) -> tuple[int, int]:
    major, minor = ctypes.c_int(), ctypes.c_int()
    _call(nvrtc, "nvrtcVersion", ctypes.byref(major), ctypes.byref(minor))
    return major.value, minor.value


def _nvrtc_architectures(nvrtc: Any) -> tuple[int, ...]:
    count = ctypes.c_int()
    _call(nvrtc, "nvrtcGetNumSupportedArchs", ctypes.byref(count))
    found = (ctypes.c_int * count.value)()
    _call(nvrtc, "nvrtcGetSupportedArchs", found)
    return tuple(sorted(found))


def _refused(source: Path, compiler: str, said: str) -> BackendError:
    hint = "Report this with the words above, or use another version of the compiler."
    return BackendError(source.name, f"a refusal of {compiler}: {said.strip()[-2000:]}", "PTX", hint)
