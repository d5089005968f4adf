"""Engines for onnxruntime on the CPU: plain ONNX files, so that any onnxruntime opens them, here or elsewhere.

FP32 is the bundle's graphs as they are: what onnxruntime's optimizer makes of them when it loads them depends on the
CPU, and saving that would tie the file to it. INT8 is the backbone with Q/DQ nodes beside the FP32 head.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any, Final

import numpy as np

from nformer_edge.core.errors import BackendError
from nformer_edge.core.machine import instruction_sets, versions
from nformer_edge.exporting.bundle import BACKBONE, GOLDEN, HEAD
from nformer_edge.exporting.session import open_session
from nformer_edge.quantize.calibrate import Calibration
from nformer_edge.quantize.decide import weights_have_7_bits
from nformer_edge.quantize.spec import EngineSpec, OpenBundle

NAME: Final = "onnxruntime"
EXTRA, USE = "cpu", "to run bundles and engines on a CPU"
PRECISIONS = ("fp32", "int8")


def missing() -> tuple[str, ...]:
    """See `Backend.missing`."""
    return () if importlib.util.find_spec("onnxruntime") else ("no package onnxruntime",)


def missing_to_run() -> tuple[str, ...]:
    """See `Backend.missing_to_run`."""
    return ()


def build(bundle: OpenBundle, folder: Path, spec: EngineSpec, calibration: Calibration | None) -> dict[str, Any]:
    """See `BackendModule.build`.

    Raises:
        BackendError: for FP16, a device that is not the CPU, or INT8 without the package onnx.
    """
    if spec.precision == "fp16":
        raise BackendError(
            "precision",
            "fp16 for onnxruntime on a CPU",
            "fp32 or int8",
            "Its CPU kernels would compute in float32 behind casts, and slower: use --int8, or a GPU backend.",
        )
    if spec.device not in (None, "cpu"):
        raise BackendError("device", spec.device, "cpu for onnxruntime", "Leave --device out, or use TensorRT.")
    if bundle.has_head:
        bundle.copy(HEAD, folder)
    bundle.copy(GOLDEN, folder)
    fields: dict[str, Any] = {"versions": versions("onnxruntime", "onnx", "numpy")}
    precision = {"backbone": bundle.backbone_precision} | ({"head": "fp32"} if bundle.has_head else {})
    if spec.precision == "fp32":
        bundle.copy(BACKBONE, folder)
        return fields | {"precision": precision}
    assert calibration is not None, "build_engine chose it"
    fields |= _build_int8(bundle, folder, spec, calibration)
    return fields | {"precision": precision | {"backbone": "int8"}}


def _build_int8(bundle: OpenBundle, folder: Path, spec: EngineSpec, calibration: Calibration) -> dict[str, Any]:
    ranges, facts = calibration.ranges(bundle, folder)
    from nformer_edge.quantize.place_cpu import quantize_backbone

    reduce_range = weights_have_7_bits(spec)
    bundle.copy(BACKBONE, folder)  # the verified bytes; replaced by the quantized file below
    counts = quantize_backbone(
        folder / BACKBONE, folder / BACKBONE, ranges, reduce_range=reduce_range, exclude=spec.exclude_nodes
    )
    _record_features(folder)
    return {
        "calibration": facts,
        "audit": counts,
        "built_on": {"instruction_sets": list(instruction_sets()), "reduce_range": reduce_range},
    }


def _record_features(folder: Path) -> None:
    """The self-test of an INT8 engine compares with what it gave when it was built, not with FP32."""
    with np.load(folder / GOLDEN, allow_pickle=False) as z:
        arrays = {name: z[name] for name in z.files}
    session = open_session((folder / BACKBONE).read_bytes(), BACKBONE)
    (arrays["features"],) = session.run(["features"], {"images": arrays["images"]})
    np.savez(folder / GOLDEN, **arrays)  # type: ignore[arg-type]
