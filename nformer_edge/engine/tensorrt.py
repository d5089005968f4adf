"""TensorRT: what it needs here, and an honest refusal. Plans are not built by this version."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NoReturn

from nformer_edge.core.errors import BackendError
from nformer_edge.engine.backend import EngineSpec, OpenBundle

NAME = "tensorrt"
PRECISIONS = ("fp32", "fp16", "int8")

NOT_YET = "a version of nformer-edge that does not build its engines yet"


def tensorrt_package() -> str:
    """The version of the package tensorrt, or "" where it is not installed."""
    return package_version("tensorrt")


def package_version(name: str) -> str:
    """The version of an importable package; "" where there is none."""
    if importlib.util.find_spec(name) is None:
        return ""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "version unknown"  # JetPack's own copy has no metadata


def nvidia_driver() -> str:
    """The NVIDIA driver's own line about itself, on a PC, a server or a Jetson; "" where there is none."""
    for place in ("/proc/driver/nvidia/version", "/sys/module/nvidia/version", "/sys/module/nvgpu/version"):
        try:
            return Path(place).read_text().splitlines()[0].strip()
        except (OSError, IndexError):
            continue
    return "nvgpu" if Path("/dev/nvhost-gpu").exists() else ""


def lacking() -> tuple[str, ...]:
    """See `BackendModule.lacking`."""
    missing = [] if tensorrt_package() else ["no package tensorrt"]
    missing += [] if nvidia_driver() else ["no NVIDIA driver"]
    return (*missing, NOT_YET)


def build(bundle: OpenBundle, folder: Path, spec: EngineSpec, images: Sequence[str] | None) -> dict[str, Any]:
    """See `BackendModule.build`. Always refuses, and says what is lacking."""
    refuse(NAME, lacking(), "package tensorrt (nformer-edge[tensorrt]), an NVIDIA GPU and its driver")


def refuse(name: str, missing: tuple[str, ...], expected: str) -> NoReturn:
    """Raises BackendError with all that is missing."""
    raise BackendError(
        name, got=", ".join(missing), expected=expected,
        mend="Use --backend onnxruntime here; the bundle's ONNX files also open in trtexec.",
    )  # fmt: skip
