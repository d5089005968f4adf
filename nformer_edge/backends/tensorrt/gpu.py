"""Which GPU a plan was built on, asked of the driver itself: a builder has TensorRT, but need not have pycuda."""

from __future__ import annotations

import ctypes
from typing import Any

from nformer_edge.core.errors import BackendError

#: CUdevice_attribute.
_MAJOR, _MINOR, _MULTIPROCESSORS = 75, 76, 16


def driver_library() -> Any:
    """libcuda, opened.

    Raises:
        BackendError: if there is none.
    """
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError as e:
        raise BackendError(
            "NVIDIA driver",
            f"none ({e})",
            "libcuda.so.1",
            "Install the driver, or build where one is: TensorRT times its kernels on the GPU.",
        ) from e


def driver_cuda() -> tuple[int, int]:
    """The newest CUDA that the driver knows, such as (12, 8): PTX of a later one is refused.

    Raises:
        BackendError: if there is no driver.
    """
    cuda, number = driver_library(), ctypes.c_int()
    if cuda.cuDriverGetVersion(ctypes.byref(number)) != 0:
        raise BackendError("NVIDIA driver", "no answer to cuDriverGetVersion", "its version", "`nvidia-smi` must work.")
    return number.value // 1000, number.value % 1000 // 10


def gpu_facts(ordinal: int = 0) -> dict[str, Any]:
    """``gpu``, ``compute_capability`` and ``multiprocessors`` of one GPU, as a manifest's ``built_for`` has them.

    Raises:
        BackendError: if the driver has no such GPU.
    """
    cuda = driver_library()
    device, name, number = ctypes.c_int(), ctypes.create_string_buffer(256), ctypes.c_int()

    def call(function: str, *arguments: Any) -> None:
        code = getattr(cuda, function)(*arguments)
        if code != 0:
            raise BackendError(
                f"GPU {ordinal}", f"CUDA error {code} from {function}", "a GPU", "`nvidia-smi` must show it."
            )

    def attribute(which: int) -> int:
        call("cuDeviceGetAttribute", ctypes.byref(number), which, device)
        return number.value

    call("cuInit", 0)
    call("cuDeviceGet", ctypes.byref(device), ordinal)
    call("cuDeviceGetName", name, len(name), device)
    return {
        "gpu": name.value.decode(errors="replace"),
        "compute_capability": f"{attribute(_MAJOR)}.{attribute(_MINOR)}",
        "multiprocessors": attribute(_MULTIPROCESSORS),
    }
