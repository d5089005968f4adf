"""TensorRT 8.5 to 11: plans for the GPU of this machine, the head's operators from our plugin library or carried."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

from nformer_edge.backends.engine import Built
from nformer_edge.backends.spec import BuildSpec
from nformer_edge.backends.tensorrt.job import PlanJob, run_job
from nformer_edge.backends.tensorrt.plans import Run, build_plans
from nformer_edge.backends.tensorrt.plugin.ahead import hint_for_operators, missing_ahead_of_time
from nformer_edge.backends.tensorrt.plugin.library import LIBRARY, Operators, find_plugin
from nformer_edge.backends.tensorrt.run import gpu_ordinal, run
from nformer_edge.core.artifact import sha256_file
from nformer_edge.core.errors import BackendError
from nformer_edge.core.machine import nvidia_driver, package_version, version_key
from nformer_edge.core.spec import Precision
from nformer_edge.exporting.bundle import Bundle
from nformer_edge.quantize.values import LowPrecision

__all__ = ["EXTRA", "INT8_HEAD", "NAME", "PRECISIONS", "build", "installed_version", "missing", "missing_to_run", "run"]

NAME = "tensorrt"
EXTRA, USE = NAME, "for a Jetson or a server GPU"
PRECISIONS: tuple[Precision, ...] = ("fp32", "fp16", "int8")
ON_CPU = False
INT8_HEAD = False

#: Versions without DLA, from this one on and below that one: NVIDIA's notes on 10.8 to 11.4.0.
_NO_DLA = ((10, 8), (11, 4, 1))


def missing() -> tuple[str, ...]:
    """See `Backend.missing`."""
    return (() if package_version(NAME) else (f"no package {NAME}",)) + missing_to_run()


def missing_to_run() -> tuple[str, ...]:
    """See `Backend.missing_to_run`."""
    return () if nvidia_driver() else ("no NVIDIA driver",)


def installed_version() -> tuple[int, ...]:
    """Of the package, as far as it tells; the module is asked where the metadata is missing."""
    text = package_version(NAME)
    if not re.match(r"\d+\.", text):
        import tensorrt

        text = str(tensorrt.__version__)
    return version_key(text)


def build(bundle: Bundle, folder: Path, spec: BuildSpec, low: LowPrecision, builder: Run = run_job) -> Built:
    """See `Backend.build`.

    Raises:
        BackendError: for a head whose operators nobody here computes, or a DLA that this build could not use.
        UsageError: for a device that is no GPU.
    """
    here = installed_version()
    if spec.dla is not None:
        refuse_dla(bundle, spec, here)
    job = PlanJob(
        package=NAME,
        workspace=spec.workspace_bytes,
        timing_cache=spec.timing_cache or "",
        hardware_compat=spec.hardware_compat,
        version_compat=spec.version_compat,
        dla=spec.dla,
        device=gpu_ordinal(spec.device),
        verbose=spec.verbose,
    )
    operators: Operators = "library"
    if bundle.has_head:
        operators, job = _with_operators(job, here)
    typed = here >= (10,)
    return build_plans(bundle, folder, spec, low, typed=typed, operators=operators, job=job, builder=builder)


def _with_operators(job: PlanJob, here: tuple[int, ...]) -> tuple[Operators, PlanJob]:
    """What computes the head's operators: the library where there is one, else kernels that the plan carries."""
    library = find_plugin(here[0])
    if library is not None:
        return "library", replace(job, plugin=str(library), plugin_sha256=sha256_file(library))
    lacks = missing_ahead_of_time(here)
    if not lacks:
        return "ahead-of-time", replace(job, ahead_of_time=True)
    got = f"no {LIBRARY} for TensorRT {here[0]}; {lacks}"
    expected = "one of the two: the head's operators are no part of TensorRT"
    raise BackendError("plugin", got, expected, hint_for_operators(here))


def refuse_dla(bundle: Bundle, spec: BuildSpec, here: tuple[int, ...]) -> None:
    """Raises BackendError where a DLA cannot do the work, with the reason."""
    reason = ""
    if bundle.has_head:
        reason = "the head's operators are plugins, and plugins run on the GPU alone: every batch would be copied twice"
    elif spec.precision == "fp32":
        reason = "a DLA computes in FP16 and INT8 alone"
    elif _NO_DLA[0] <= here < _NO_DLA[1]:
        reason = f"TensorRT {'.'.join(map(str, here[:3]))} has no DLA: 10.7 was the last before 11.4.1"
    if reason:
        hint = "Leave --dla out, or export the backbone alone and build it with --fp16 or --int8."
        raise BackendError("dla", f"core {spec.dla}: {reason}", "the GPU", hint)
