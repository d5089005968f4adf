"""TensorRT 8.5 to 11: plans for the GPU of this machine, the head's operators from our plugin library or carried."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from nformer_edge.backends.tensorrt.job import run_job
from nformer_edge.backends.tensorrt.plans import Run, build_plans
from nformer_edge.backends.tensorrt.plugin.ahead import hint_ahead_of_time, lacking_ahead_of_time
from nformer_edge.backends.tensorrt.plugin.library import LIBRARY, Operators, find_plugin
from nformer_edge.core.artifact import sha256_file
from nformer_edge.core.errors import BackendError, UsageError
from nformer_edge.core.machine import nvidia_driver, package_version
from nformer_edge.quantize.calibrate import Calibration
from nformer_edge.quantize.spec import EngineSpec, OpenBundle

NAME = "tensorrt"
PRECISIONS = ("fp32", "fp16", "int8")

#: Versions without DLA, from this one on and below that one: NVIDIA's notes on 10.8 to 11.4.0.
_NO_DLA = ((10, 8), (11, 4, 1))


def tensorrt_package() -> str:
    """The version of the package tensorrt, or "" where it is not installed."""
    return package_version("tensorrt")


def lacking() -> tuple[str, ...]:
    """See `BackendModule.lacking`."""
    missing = [] if tensorrt_package() else ["no package tensorrt"]
    return (*missing, *lacking_to_run())


def lacking_to_run() -> tuple[str, ...]:
    """See `BackendModule.lacking_to_run`."""
    return () if nvidia_driver() else ("no NVIDIA driver",)


def installed_version() -> tuple[int, ...]:
    """Of the package, as far as it tells; the module is asked where the metadata is missing."""
    text = tensorrt_package()
    if not re.match(r"\d+\.", text):
        import tensorrt

        text = str(tensorrt.__version__)
    return tuple(int(n) for n in re.findall(r"\d+", text.partition(".post")[0]))


def build(
    bundle: OpenBundle, folder: Path, spec: EngineSpec, calibration: Calibration | None, run: Run = run_job
) -> dict[str, Any]:
    """See `BackendModule.build`.

    Raises:
        BackendError: for a head whose operators nobody here computes, or a DLA that this build could not use.
        UsageError: for a device that is no GPU.
    """
    here = installed_version()
    if spec.dla is not None:
        refuse_dla(bundle, spec, here)
    operators, plugin = _operators(here) if bundle.has_head else (None, {})
    job = {
        "package": "tensorrt",
        "workspace": spec.workspace_bytes,
        "timing_cache": spec.timing_cache,
        "hardware_compat": spec.hardware_compat,
        "version_compat": spec.version_compat,
        "dla": spec.dla,
        "device": gpu_ordinal(spec.device),
        "verbose": spec.verbose,
        **plugin,
    }
    fields = build_plans(
        bundle, folder, spec, calibration, typed=here >= (10,), operators=operators or "library", job=job, run=run
    )
    return fields | {"operators": operators, "plugin_sha256": plugin.get("plugin_sha256")}


def _operators(here: tuple[int, ...]) -> tuple[Operators, dict[str, Any]]:
    """Who computes the head's operators: the library where there is one, else kernels that the plan carries.

    Returns:
        What to call it, and the fields of `PlanJob` that say so.
    """
    library = find_plugin(here[0])
    if library is not None:
        return "library", {"plugin": str(library), "plugin_sha256": sha256_file(library)}
    lacking = lacking_ahead_of_time(here)
    if not lacking:
        return "ahead-of-time", {"ahead_of_time": True}
    raise BackendError(
        "plugin",
        f"no {LIBRARY} for TensorRT {here[0]}; {lacking}",
        "one of the two: the head's operators are no part of TensorRT",
        f"nformer-edge build-plugin; without TensorRT's headers: {hint_ahead_of_time(here)}",
    )


def refuse_dla(bundle: OpenBundle, spec: EngineSpec, here: tuple[int, ...]) -> None:
    """Raises BackendError where a DLA cannot do the work, with the reason."""
    reason = ""
    if bundle.has_head:
        reason = (
            "the head's operators are a plugin and plugins run on the GPU alone, so every batch would wait for the GPU "
            "and for a copy between the two"
        )
    elif spec.precision == "fp32":
        reason = "a DLA computes in FP16 and INT8 alone"
    elif _NO_DLA[0] <= here < _NO_DLA[1]:
        reason = f"TensorRT {'.'.join(map(str, here[:3]))} has no DLA: 10.7 was the last before 11.4.1"
    if reason:
        raise BackendError(
            "dla",
            f"core {spec.dla}: {reason}",
            "the GPU",
            "Leave --dla out, or export the backbone alone and build it with --fp16 or --int8.",
        )


def gpu_ordinal(device: str) -> int:
    """0 for ``cuda`` and for ``cpu``, what a command says unless told otherwise.

    Raises:
        UsageError: for a device that is no GPU.
    """
    name, _, number = device.partition(":")
    if name not in ("cpu", "cuda") or not (number.isdecimal() or not number):
        raise UsageError("device", device, "a GPU, such as cuda:0", "Choose one, or leave it out.")
    return int(number or 0)
