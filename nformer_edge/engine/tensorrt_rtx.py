"""TensorRT-RTX: what it needs here, and an honest refusal. Its engines are not built by this version."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nformer_edge.engine.backend import EngineSpec, OpenBundle
from nformer_edge.engine.tensorrt import NOT_YET, nvidia_driver, package_version, refuse

NAME = "tensorrt-rtx"
PRECISIONS = ("fp32", "fp16", "int8")


def tensorrt_rtx_package() -> str:
    """The version of the package tensorrt_rtx, or "" where it is not installed."""
    return package_version("tensorrt_rtx")


def lacking() -> tuple[str, ...]:
    """See `BackendModule.lacking`."""
    missing = [] if tensorrt_rtx_package() else ["no package tensorrt_rtx"]
    missing += [] if nvidia_driver() else ["no NVIDIA driver"]
    return (*missing, NOT_YET)


def build(bundle: OpenBundle, folder: Path, spec: EngineSpec, images: Sequence[str] | None) -> dict[str, Any]:
    """See `BackendModule.build`. Always refuses, and says what is lacking."""
    refuse(NAME, lacking(), "package tensorrt_rtx (nformer-edge[tensorrt-rtx]), a GeForce RTX GPU and its driver")
