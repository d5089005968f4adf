"""Engines for onnxruntime on the CPU: plain ONNX files, so that any onnxruntime opens them, here or elsewhere.

FP32 is the bundle's graphs as they are: what onnxruntime's optimizer makes of them when it loads them depends on the
CPU, and saving that would tie the file to it. INT8 is the backbone with Q/DQ nodes, beside the head in FP32 or with
its linear layers in dynamic INT8.
"""

from __future__ import annotations

import importlib.util
import json
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
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
INT8_HEAD = True

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
    made = Built(versions=versions(NAME, "onnx", "numpy"), precision=bundle.precision)
    reduce_range = saturates_int8() if spec.reduce_range is None else spec.reduce_range
    audit: dict[str, PartAudit] = {}
    if low.ranges is not None:
        reduce_range = low.reduce_range
        audit["backbone"] = _quantize(bundle, folder, low)
    if spec.head_precision == "int8":
        audit["head"] = _quantize_head(bundle, folder, reduce_range=reduce_range)
    if not audit:
        return made
    int8: dict[str, Precision] = dict.fromkeys(audit, "int8")
    made_on = BuiltFor(instruction_sets=instruction_sets(), reduce_range=reduce_range)
    return replace(made, precision={**made.precision, **int8}, audit=audit, built_for=made_on)


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
    if spec.reduce_range is False and "int8" in (spec.precision, spec.head_precision) and saturates_int8():
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
    _replace_golden(folder, features=features)
    counts = Counter(multiplication_types(model).values())
    return PartAudit({kind: Counts(counts[kind], counts[kind]) for kind in ("int8", "fp32") if counts[kind]})


def _quantize_head(bundle: Bundle, folder: Path, *, reduce_range: bool) -> PartAudit:
    """The same for the head's linear layers.

    Raises:
        UsageError: for a bundle without a head, or with one that has little of them.
    """
    import onnx

    from nformer_edge.quantize.dynamic import quantize_linear_layers

    if bundle.spec.head is None or bundle.spec.head.rule == "gated":
        got = "int8 for a gated head" if bundle.has_head else "int8 and no head"
        hint = "Leave --head-precision out: the gated head's time is in its lists, which are integers as it is."
        raise UsageError("head_precision", got, "the paper's head", hint if bundle.has_head else "Leave it out.")
    model = quantize_linear_layers(onnx.load_from_string(bundle.head), reduce_range=reduce_range)
    onnx.save(model, folder / HEAD)
    golden = bundle.golden
    feed = {"features": golden["head_input"], "landmarks": golden["landmarks"]}
    (embeddings,) = open_session((folder / HEAD).read_bytes(), HEAD).run(["embeddings"], feed)
    _replace_golden(folder, embeddings=embeddings)
    counts = Counter(node.op_type for node in model.graph.node)
    found = {"int8": counts["MatMulInteger"], "fp32": counts["MatMul"] + counts["Gemm"]}
    return PartAudit({kind: Counts(count, count) for kind, count in found.items() if count})


def _replace_golden(folder: Path, **arrays: np.ndarray) -> None:
    """The self-test is against what the engine gives: INT8 is not compared with FP32."""
    with np.load(folder / GOLDEN) as found:
        golden = dict(found)
    np.savez(folder / GOLDEN, **{**golden, **arrays})  # type: ignore[arg-type]
