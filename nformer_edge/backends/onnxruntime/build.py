"""Engines for onnxruntime on the CPU: plain ONNX files, so that any onnxruntime opens them, here or elsewhere.

FP32 is the bundle's graphs as they are: what onnxruntime's optimizer makes of them when it loads them depends on the
CPU, and saving that would tie the file to it. INT8 is the backbone with Q/DQ nodes beside the FP32 head.
"""

from __future__ import annotations

import importlib.util
import json
import tempfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np

from nformer_edge.backends.engine import Built, BuiltFor, Counts, PartAudit
from nformer_edge.backends.runner import Runner
from nformer_edge.backends.spec import BuildSpec
from nformer_edge.core.errors import BackendError, UsageError
from nformer_edge.core.machine import VNNI, instruction_sets, saturates_int8, versions
from nformer_edge.core.spec import Precision
from nformer_edge.exporting.bundle import BACKBONE, GOLDEN, HEAD, Bundle, ModelFiles
from nformer_edge.exporting.session import ONNXRUNTIME, open_session
from nformer_edge.quantize.values import LowPrecision

if TYPE_CHECKING:
    from onnx import ModelProto

NAME: Final = ONNXRUNTIME
EXTRA, USE = "cpu", "to run bundles and engines on a CPU"
PRECISIONS: tuple[Precision, ...] = ("fp32", "int8")  # FP16 would compute in FP32 behind casts: 0.69 x
ON_CPU = True

#: Runs of which the shortest time of each node counts.
PROFILED = 15


def missing() -> tuple[str, ...]:
    """See `Backend.missing`."""
    return () if importlib.util.find_spec(NAME) else (f"no package {NAME}",)


def missing_to_run() -> tuple[str, ...]:
    """See `Backend.missing_to_run`."""
    return missing()


def build(bundle: Bundle, folder: Path, spec: BuildSpec, low: LowPrecision) -> Built:
    """See `Backend.build`.

    Raises:
        BackendError: for a device that is not the CPU, or 8-bit weights on a CPU whose sums of them saturate.
    """
    if spec.device not in (None, "cpu"):
        raise BackendError("device", spec.device, f"cpu for {NAME}", "Leave --device out, or use another backend.")
    refuse_reduced_range(spec)
    for name in (BACKBONE, GOLDEN, *([HEAD] if bundle.has_head else [])):
        bundle.files.copy(name, folder)
    used = versions(NAME, "onnx", "numpy")
    if low.ranges is None:
        return Built(versions=used, precision=bundle.precision)
    audit = _quantize(bundle, folder, low)
    made_on = BuiltFor(instruction_sets=instruction_sets(), reduce_range=low.reduce_range)
    precision: dict[str, Precision] = {**bundle.precision, "backbone": "int8"}
    return Built(versions=used, precision=precision, audit={"backbone": audit}, built_for=made_on)


def run(
    model: ModelFiles,
    *,
    device: str | None = None,
    intra_op_threads: int | None = None,
    contexts: int | None = None,
    native: bool = True,
) -> Runner:
    """See `Backend.run`. Runs a bundle as it runs an engine."""
    from nformer_edge.backends.onnxruntime.run import OnnxRuntimeRunner

    if device not in (None, "cpu"):
        raise UsageError("device", device, f"nothing for {NAME}", "Leave it out: it runs on the CPU.")
    if contexts is not None:
        hint = "Set intra_op_threads: CPU threads of one forward pass."
        raise UsageError("contexts", contexts, f"nothing for {NAME}", hint)
    return OnnxRuntimeRunner(model, intra_op_threads=intra_op_threads, native=native)


def node_ms(graph: bytes, precision: Precision, images: np.ndarray) -> Mapping[str, float]:
    """See `Backend.node_ms`."""
    with tempfile.TemporaryDirectory() as folder:
        session = open_session(graph, BACKBONE, profile=str(Path(folder) / "profile"))
        for _ in range(PROFILED):
            session.run(["features"], {"images": images})
        events = json.loads(Path(session.end_profiling()).read_text())
    kernels: dict[str, float] = {}
    for event in events:
        name, ms = event["name"], event["dur"] / 1000
        if name.endswith("_kernel_time"):
            kernels[name] = min(ms, kernels.get(name, ms))
    return by_node(graph, kernels)


def by_node(graph: bytes, kernels: Mapping[str, float]) -> Mapping[str, float]:
    """Times of kernels, added up by the node of the graph whose name each kernel's name begins with, if any."""
    import onnx

    names = sorted((node.name for node in onnx.load_from_string(graph).graph.node), key=len, reverse=True)
    found: dict[str, float] = {}
    for kernel, ms in kernels.items():
        node = next((name for name in names if kernel.startswith(name)), None)
        if node is not None:
            found[node] = found.get(node, 0.0) + ms
    return found


def refuse_reduced_range(spec: BuildSpec) -> None:
    """Raises BackendError for 8-bit weights on a CPU whose sums of them saturate."""
    if spec.reduce_range is False and spec.precision == "int8" and saturates_int8():
        hint = "Leave reduce_range out: 7 bits are chosen here."
        raise BackendError("reduce_range", False, f"a CPU with one of {', '.join(VNNI)}", hint)


def write_quantized(bundle: Bundle, folder: Path, low: LowPrecision) -> ModelProto:
    """Writes the backbone with Q/DQ nodes into `folder`."""
    import onnx

    from nformer_edge.quantize.placement_cpu import quantize_backbone

    assert low.ranges is not None, "asked for"
    model = quantize_backbone(bundle.backbone, low.ranges, reduce_range=low.reduce_range, exclude=low.exclude_nodes)
    onnx.save(model, folder / BACKBONE)
    return model


def _quantize(bundle: Bundle, folder: Path, low: LowPrecision) -> PartAudit:
    """Replaces the backbone in `folder`, and in the self-test its features: INT8 is not compared with FP32."""
    from nformer_edge.quantize.fp16 import multiplication_types

    model = write_quantized(bundle, folder, low)
    session = open_session((folder / BACKBONE).read_bytes(), BACKBONE)
    (features,) = session.run(["features"], {"images": bundle.golden["images"]})
    np.savez(folder / GOLDEN, **{**bundle.golden, "features": features})  # type: ignore[arg-type]
    counts = Counter(multiplication_types(model).values())
    return PartAudit({kind: Counts(counts[kind], counts[kind]) for kind in ("int8", "fp32") if counts[kind]})
