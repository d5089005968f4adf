"""One GPU: through pycuda what a runner needs, and of the driver's own library the rest.

Nothing of CUDA is imported before a `Device` is opened. A builder has TensorRT, but need not have pycuda.
"""

from __future__ import annotations

import atexit
import ctypes
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from nformer_edge.core.errors import BackendError, Error

_MIB = 1 << 20

# The primary context of each GPU, kept for the life of the process, as the CUDA runtime inside TensorRT keeps it.
_contexts: dict[int, Any] = {}
_lock = threading.Lock()


@dataclass(frozen=True)
class Gpu:
    """Name, compute capability such as ``8.7``, and number of multiprocessors of a GPU."""

    name: str
    compute_capability: str
    multiprocessors: int


class Device:
    """A GPU, opened.

    Args:
        ordinal: as CUDA counts.

    Raises:
        BackendError: if pycuda, the driver or the GPU is not there.
    """

    def __init__(self, ordinal: int = 0) -> None:
        self._driver = _import_driver()
        try:
            self._driver.init()
            count = self._driver.Device.count()
        except self._driver.Error as e:
            raise _no_gpu(str(e)) from e
        if not count:
            raise _no_gpu("zero GPUs")
        if not 0 <= ordinal < count:
            here = f"one of the {count} GPUs here: cuda:0 to cuda:{count - 1}"
            raise BackendError("device", f"cuda:{ordinal}", here, "Choose one of these.")
        device = self._driver.Device(ordinal)
        major, minor = device.compute_capability()
        processors = int(device.get_attribute(self._driver.device_attribute.MULTIPROCESSOR_COUNT))
        self.gpu = Gpu(str(device.name()), f"{major}.{minor}", processors)
        with self.named("opening the GPU"), _lock:
            if ordinal not in _contexts:
                _contexts[ordinal] = context = device.retain_primary_context()
                atexit.register(context.detach)  # pycuda's destructor detaches in the wrong way and complains
        self._context = _contexts[ordinal]

    @contextmanager
    def current(self) -> Iterator[None]:
        """This GPU is the calling thread's. Everything below, and every release of it, happens inside."""
        with self.named("choosing the GPU"):
            self._context.push()
        try:
            yield
        finally:
            self._driver.Context.pop()

    @contextmanager
    def named(self, doing: str) -> Iterator[None]:
        """Turns what the driver raises into BackendError, memory that ran out apart from the rest."""
        try:
            yield
        except self._driver.MemoryError as e:
            raise self.out_of_memory(doing) from e
        except self._driver.Error as e:
            hint = "Run again; if it stays, reboot, and see `nformer-edge doctor`."
            raise BackendError(doing, str(e), "success from the CUDA driver", hint) from e

    def out_of_memory(self, doing: str) -> BackendError:
        """The refusal, with what is free of how much."""
        try:
            free, total = self._driver.mem_get_info()
            got = f"out of GPU memory: {free // _MIB} MiB free of {total // _MIB} MiB"
        except self._driver.Error:
            got = "out of GPU memory"
        hint = "Close other programs on the GPU, send fewer images at once, or build with a smaller profile."
        return BackendError(doing, got, "memory for the engine and its tensors", hint)

    def stream(self) -> Any:
        """A stream of its own: ``handle`` for TensorRT, ``synchronize()``."""
        with self.named("making a stream"):
            return self._driver.Stream()

    def event(self) -> Any:
        """A point in a stream: ``record(stream)``, ``time_since(other)`` in ms."""
        return self._driver.Event()

    def pinned(self, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        """An array in page-locked memory, which the GPU copies from and to while the CPU goes on."""
        with self.named(f"page-locking {int(np.prod(shape)) * dtype.itemsize // _MIB} MiB"):
            return self._driver.pagelocked_empty(shape, dtype)

    def allocate(self, size: int) -> Any:
        """`size` bytes on the GPU; ``int()`` of it is the address, ``free()`` gives it back."""
        with self.named(f"allocating {size // _MIB} MiB on the GPU"):
            return self._driver.mem_alloc(max(size, 1))

    def copy_in(self, target: Any, source: np.ndarray, stream: Any) -> None:
        """Pinned memory to the GPU, in the stream's order."""
        self._driver.memcpy_htod_async(target, source, stream)

    def copy_out(self, target: np.ndarray, source: Any, stream: Any) -> None:
        """The GPU to pinned memory, in the stream's order."""
        self._driver.memcpy_dtoh_async(target, source, stream)


def _import_driver() -> Any:
    try:
        import pycuda.driver
    except ImportError as e:
        if (e.name or "").startswith("pycuda") or "libcuda" not in str(e):
            hint = "pip install pycuda; it is compiled then, and needs nvcc on the PATH."
            raise BackendError("pycuda", "not installed", "pycuda 2024.1 or newer, to run engines", hint) from e
        raise _no_gpu(str(e)) from e
    return pycuda.driver


def _no_gpu(why: str) -> BackendError:
    hint = "Install the driver, or run the bundle or an engine for the CPU."
    return BackendError("NVIDIA driver", why, "a GPU and its driver", hint)


# ---- CUDA graphs ----

_THREAD_LOCAL = 1  # CU_STREAM_CAPTURE_MODE_THREAD_LOCAL: what other threads do meanwhile is no concern of this capture


class CaptureError(Error):
    """Work that CUDA cannot keep as a graph; it can still be done call by call."""


class Graph:
    """What a stream was given, kept by the GPU's driver to be given again in one call.

    Args:
        library: the driver's library, as `driver_library` opens it.
        stream: a stream of `Device`.
        work: queues the work on that stream; must not wait for it.

    Raises:
        CaptureError: if a call refuses, with its name and CUDA's.
    """

    def __init__(self, library: Any, stream: Any, work: Callable[[], None]) -> None:
        self._library = library
        self._exec = ctypes.c_void_p()
        graph = ctypes.c_void_p()
        handle = ctypes.c_void_p(stream.handle)
        self._call("cuStreamBeginCapture_v2", handle, ctypes.c_int(_THREAD_LOCAL))
        try:
            work()
        except BaseException:
            library.cuStreamEndCapture(handle, ctypes.byref(graph))  # a stream left capturing is of no use to anybody
            raise
        self._call("cuStreamEndCapture", handle, ctypes.byref(graph))
        try:
            self._call("cuGraphInstantiateWithFlags", ctypes.byref(self._exec), graph, ctypes.c_ulonglong(0))
        finally:
            library.cuGraphDestroy(graph)

    def launch(self, stream: Any) -> None:
        """Queues all of it once more."""
        self._call("cuGraphLaunch", self._exec, ctypes.c_void_p(stream.handle))

    def close(self) -> None:
        """Gives it back to the driver."""
        if self._exec:
            self._library.cuGraphExecDestroy(self._exec)
            self._exec = ctypes.c_void_p()

    def _call(self, name: str, *arguments: Any) -> None:
        function = getattr(self._library, name, None)
        if function is None:
            raise CaptureError(name, "a driver without it", "CUDA 11.4 or newer")
        code = function(*arguments)
        if code != 0:
            word = ctypes.c_char_p()
            self._library.cuGetErrorName(ctypes.c_int(code), ctypes.byref(word))
            raise CaptureError(name, (word.value or str(code).encode()).decode(), "CUDA_SUCCESS")


# ---- the driver's own library ----

#: CUdevice_attribute.
_MAJOR, _MINOR, _MULTIPROCESSORS = 75, 76, 16


def driver_library() -> Any:
    """libcuda, opened. Raises BackendError if there is none."""
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError as e:
        hint = "Install the driver, or build where one is: TensorRT times its kernels on the GPU."
        raise BackendError("NVIDIA driver", f"none ({e})", "libcuda.so.1", hint) from e


def driver_cuda() -> tuple[int, int]:
    """The newest CUDA that the driver knows, such as (12, 8): PTX of a later one is refused.

    Raises:
        BackendError: if there is no driver.
    """
    number = ctypes.c_int()
    _ask_driver("cuDriverGetVersion", ctypes.byref(number))
    return number.value // 1000, number.value % 1000 // 10


def gpu_facts(ordinal: int = 0) -> Gpu:
    """One GPU, asked of the driver. Raises BackendError if the driver has no such GPU."""
    device, name, number = ctypes.c_int(), ctypes.create_string_buffer(256), ctypes.c_int()
    _ask_driver("cuInit", 0)
    _ask_driver("cuDeviceGet", ctypes.byref(device), ordinal)
    _ask_driver("cuDeviceGetName", name, len(name), device)
    found = []
    for attribute in (_MAJOR, _MINOR, _MULTIPROCESSORS):
        _ask_driver("cuDeviceGetAttribute", ctypes.byref(number), attribute, device)
        found.append(number.value)
    return Gpu(name.value.decode(errors="replace"), f"{found[0]}.{found[1]}", found[2])


def _ask_driver(function: str, *arguments: Any) -> None:
    code = getattr(driver_library(), function)(*arguments)
    if code != 0:
        got = f"CUDA error {code} from {function}"
        raise BackendError("NVIDIA driver", got, "success", "`nvidia-smi` must show a GPU.")
