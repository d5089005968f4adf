"""TensorRT-RTX: compiles ahead of time for the GeForce GPUs that are asked for, with no GPU and no driver.

It takes no plugins, so the head's operators are the standard-operator bodies of the same file, which its parser
inlines. Where there is no GPU, a finished plan cannot be opened either; the audit reads the list of layers that the
builder prints, with the same names and types as the inspector's.
"""

from __future__ import annotations

from pathlib import Path

from nformer_edge.backends.engine import Built
from nformer_edge.backends.spec import BuildSpec
from nformer_edge.backends.tensorrt.build import missing_to_run
from nformer_edge.backends.tensorrt.job import PlanJob, run_job
from nformer_edge.backends.tensorrt.plans import Run, build_plans
from nformer_edge.backends.tensorrt.run import run
from nformer_edge.core.errors import BackendError
from nformer_edge.core.machine import package_version
from nformer_edge.core.spec import Precision
from nformer_edge.exporting.bundle import Bundle
from nformer_edge.quantize.values import LowPrecision

__all__ = ["EXTRA", "INT8_HEAD", "NAME", "ON_CPU", "PRECISIONS", "build", "missing", "missing_to_run", "run"]

NAME = "tensorrt-rtx"
EXTRA, USE = NAME, "for a GeForce RTX"
PRECISIONS: tuple[Precision, ...] = ("fp32", "fp16", "int8")
ON_CPU = False
INT8_HEAD = False

#: What `ComputeCapability` of 1.7 names, without the alias for the GPU that is there.
CAPABILITIES = ("7.5", "8.0", "8.6", "8.9", "12.0", "12.1")

#: What is built for by default. Not Turing (7.5): for it the compiler of 1.7 refuses an FP32 GEMM, and the
#: neck and the head's affinities are FP32 by policy.
USUAL = ("8.0", "8.6", "8.9", "12.0", "12.1")


def missing() -> tuple[str, ...]:
    """See `Backend.missing`."""
    return () if package_version(NAME) else (f"no package {NAME}",)


def build(bundle: Bundle, folder: Path, spec: BuildSpec, low: LowPrecision, builder: Run = run_job) -> Built:
    """See `Backend.build`. Raises BackendError for an option that TensorRT-RTX does not have."""
    unknown = [c for c in spec.capabilities if c not in CAPABILITIES]
    if unknown:
        hint = "Use TensorRT for other GPUs: --backend tensorrt on the machine itself."
        raise BackendError("capabilities", ", ".join(unknown), f"among {', '.join(CAPABILITIES)}", hint)
    refused = {
        "dla": spec.dla is not None,
        "hardware_compat": spec.hardware_compat != "none",
        "version_compat": spec.version_compat,  # 1.7 looks for a lean runtime that its package does not have
    }
    for name, is_asked in refused.items():
        if is_asked:
            hint = "Leave it out; --capabilities names the GPUs."
            raise BackendError(name, f"{name} with TensorRT-RTX", "compute capabilities, and this version of it", hint)
    job = PlanJob(
        package=NAME.replace("-", "_"),
        workspace=spec.workspace_bytes,
        timing_cache=spec.timing_cache or "",
        capabilities=spec.capabilities or USUAL,
        verbose=spec.verbose,
    )
    return build_plans(bundle, folder, spec, low, typed=True, operators="inlined", job=job, builder=builder)
