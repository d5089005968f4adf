"""Engines for OpenVINO: the same ONNX files, compiled when they are opened, for batches of two fixed sizes.

INT8 is the backbone with the Q/DQ nodes of onnxruntime's engines; what is float beside them is BF16 where the CPU has
it. FP32 is asked for by name: of itself OpenVINO takes BF16 there too.
"""

from __future__ import annotations

import importlib.util
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import numpy as np

from nformer_edge.backends.engine import Built, BuiltFor, Counts, PartAudit
from nformer_edge.backends.onnxruntime import build as onnxruntime
from nformer_edge.backends.runner import Runner
from nformer_edge.backends.spec import BuildSpec
from nformer_edge.core.errors import ArtifactError, BackendError, UsageError
from nformer_edge.core.machine import instruction_sets, versions
from nformer_edge.core.spec import Precision
from nformer_edge.exporting.bundle import BACKBONE, GOLDEN, HEAD, Bundle, ModelFiles
from nformer_edge.exporting.session import ONNXRUNTIME
from nformer_edge.ops import onnx_ops
from nformer_edge.quantize.values import HalfFacts, LowPrecision

NAME: Final = "openvino"
EXTRA, USE = NAME, "for Intel CPUs, GPUs and NPUs, and often the fastest on any x86 CPU"
PRECISIONS: tuple[Precision, ...] = ("fp32", "fp16", "bf16", "int8")
ON_CPU = True
INT8_HEAD = False

#: What runs the head: onnxruntime with the native kernels, up to 4 times as fast on 20 images; or OpenVINO, by the
#: bodies of the file, with the two operators inlined.
NATIVE, INLINED = "native", "inlined"


def missing() -> tuple[str, ...]:
    """See `Backend.missing`."""
    return () if importlib.util.find_spec(NAME) else (f"no package {NAME}",)


def missing_to_run() -> tuple[str, ...]:
    """See `Backend.missing_to_run`."""
    return missing()


def build(bundle: Bundle, folder: Path, spec: BuildSpec, low: LowPrecision) -> Built:
    """See `Backend.build`.

    Raises:
        BackendError: for a device that is not there or does not compute in this precision, numbers that FP16 would not
            hold, 8-bit weights on a CPU whose sums of them saturate, or a head that nothing here can run.
    """
    from nformer_edge.backends.openvino.run import compile_graph, on_device

    kind = spec.built_precision
    onnxruntime.refuse_reduced_range(spec)
    device = on_device(spec.device, kind)
    if low.overflow is not None and (unfit := low.overflow.unfit("backbone")):
        name, why = next(iter(unfit.items()))
        hint = "Use --precision fp32, or TensorRT, which leaves single nodes in FP32."
        raise BackendError("precision", f"{name} with {why}", "numbers that FP16 holds, in every node", hint)
    bundle.files.copy(GOLDEN, folder)
    if low.ranges is None:
        bundle.files.copy(BACKBONE, folder)
    else:
        onnxruntime.write_quantized(bundle, folder, low)
    graph = (folder / BACKBONE).read_bytes()
    compiled = compile_graph(graph, BACKBONE, device, kind)
    precision: dict[str, Precision] = dict(bundle.precision)
    if kind != "fp32":
        precision["backbone"] = kind
        images = bundle.golden["images"]
        features = np.array(compiled.create_infer_request().infer({"images": images})["features"])
        np.savez(folder / GOLDEN, **{**bundle.golden, "features": features})  # type: ignore[arg-type]
    return Built(
        versions=versions(NAME, ONNXRUNTIME, "onnx", "numpy"),
        precision=precision,
        audit={"backbone": _audit(graph, compiled, kind)} if kind != "fp32" else {},
        built_for=_built_for(device, low),
        operators=_write_head(bundle, folder) if bundle.has_head else None,
        fp16=HalfFacts(low.searched, {}) if kind == "fp16" else None,
    )


def run(
    model: ModelFiles,
    *,
    device: str | None = None,
    intra_op_threads: int | None = None,
    contexts: int | None = None,
    native: bool = True,
) -> Runner:
    """See `Backend.run`."""
    from nformer_edge.backends.openvino.run import OpenVinoRunner

    if contexts is not None:
        hint = "Set intra_op_threads: CPU threads of one forward pass."
        raise UsageError("contexts", contexts, f"nothing for {NAME}", hint)
    return OpenVinoRunner(model, device=device, intra_op_threads=intra_op_threads, native=native)


def node_ms(graph: bytes, precision: Precision, images: np.ndarray) -> Mapping[str, float]:
    """See `Backend.node_ms`."""
    from nformer_edge.backends.openvino.run import layer_ms

    return onnxruntime.by_node(graph, layer_ms(graph, precision, images, onnxruntime.PROFILED))


def _built_for(device: str, low: LowPrecision) -> BuiltFor:
    if device != "CPU":
        return BuiltFor(device=device)
    if low.ranges is None:
        return BuiltFor()
    return BuiltFor(instruction_sets=instruction_sets(), reduce_range=low.reduce_range)


def _write_head(bundle: Bundle, folder: Path) -> str:
    """Writes the head's file, and tells what will run it."""
    from nformer_edge.backends.openvino.run import compile_graph

    if importlib.util.find_spec(ONNXRUNTIME) and onnx_ops.available():
        bundle.files.copy(HEAD, folder)
        return NATIVE
    try:
        import onnx
        from onnx import inliner

        inlined = inliner.inline_local_functions(onnx.load_from_string(bundle.head)).SerializeToString()
        compile_graph(inlined, HEAD, "CPU", "fp32")
    except (ImportError, ArtifactError) as e:
        got = e.got if isinstance(e, ArtifactError) else f"no package {e.name}"
        hint = f"pip install 'nformer-edge[{onnxruntime.EXTRA}]', whose kernels run every head."
        raise BackendError(f"{NAME}: the head", got, "a head that it takes", hint) from e
    (folder / HEAD).write_bytes(inlined)
    return INLINED


def _audit(graph: bytes, compiled: object, precision: Precision) -> PartAudit:
    """Convolutions and matrix multiplications by the type that was asked for, and how many are in it as compiled."""
    import onnx

    from nformer_edge.backends.openvino.run import multiplications
    from nformer_edge.quantize.fp16 import multiplication_types

    asked = Counter(multiplication_types(onnx.load_from_string(graph)).values())
    built = multiplications(compiled)
    if precision != "int8":
        total = sum(asked.values())
        return PartAudit({precision: Counts(total, min(built[precision], total))})
    rest: Precision = "bf16" if built["bf16"] else "fp32"
    kinds: dict[str, Precision] = {"int8": "int8", "fp32": rest}  # what is float beside INT8 is BF16 where it can be
    return PartAudit({kinds[kind]: Counts(asked[kind], min(built[kinds[kind]], asked[kind])) for kind in asked})
