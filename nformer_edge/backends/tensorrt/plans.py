"""Both parts of a bundle as TensorRT plans: what `backends.tensorrt.build` and `backends.tensorrt_rtx.build` share."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np
from tqdm import tqdm

from nformer_edge.backends.engine import Built, PartAudit, Profile
from nformer_edge.backends.spec import BuildSpec
from nformer_edge.backends.tensorrt.audit import audit_plan
from nformer_edge.backends.tensorrt.comparison import write_comparison
from nformer_edge.backends.tensorrt.job import BuiltPlan, PlanJob
from nformer_edge.backends.tensorrt.plan import BACKBONE, HEAD
from nformer_edge.backends.tensorrt.plugin.library import Operators
from nformer_edge.core.errors import BackendError
from nformer_edge.core.spec import Precision
from nformer_edge.core.terminal import PROGRESS
from nformer_edge.exporting.bundle import GOLDEN, Bundle
from nformer_edge.quantize.values import HalfFacts, LowPrecision, half_log

if TYPE_CHECKING:
    from nformer_edge.backends.tensorrt.graphs import PreparedGraph

PLANS = {spec.part: spec.file for spec in (BACKBONE, HEAD)}
LOG = "build.log"

Run = Callable[[PlanJob], BuiltPlan]


def build_plans(
    bundle: Bundle,
    folder: Path,  # the engine's
    spec: BuildSpec,
    low: LowPrecision,  # for INT8, its ranges; for FP16 too, numbers beyond FP16 that were found
    *,
    typed: bool,  # whether the TensorRT takes precision from the graph's types
    operators: Operators,
    job: PlanJob,  # what both parts share
    builder: Run,  # builds one plan
) -> Built:
    """Prepares, builds and audits each part into `folder`.

    Raises:
        BackendError: if a part cannot be built, or is not what was asked for.
    """
    graphs: dict[str, PreparedGraph] = {}
    built: dict[str, BuiltPlan] = {}
    audit: dict[str, PartAudit] = {}
    (folder / LOG).touch()
    shapes = profiles(bundle, spec)
    with tempfile.TemporaryDirectory() as temporary:
        work = folder if spec.keep_graphs else Path(temporary)
        for part, profile in tqdm(shapes.items(), desc="building plans", unit="plan", **PROGRESS):
            graphs[part] = graph = prepare_part(part, bundle, work, spec, low, typed=typed, operators=operators)
            if spec.precision != "fp32":
                with open(folder / LOG, "a") as log:
                    log.write(half_log(part, low.overflow, graph.beyond))
            own = replace(job, part=part, graph=str(graph.path), plan=str(folder / PLANS[part]))
            own = replace(own, log=str(folder / LOG), profile=profile, flags=graph.flags, float32=graph.float32)
            if part == BACKBONE.part:
                own = replace(own, plugin="", plugin_sha256="", ahead_of_time=False)
            built[part] = builder(own)
            audit[part] = audit_plan(part, built[part].layers, graph.asked, strict=typed)
            if part == BACKBONE.part:
                _copy_golden(bundle, folder, shapes, graph.path if low.ranges is not None else None)
        if spec.keep_graphs:
            write_comparison(work, bundle, graphs, shapes, rtx=operators == "inlined", typed=typed)
    last = list(built.values())[-1]
    half = HalfFacts(low.searched, {part: graph.beyond for part, graph in graphs.items()})
    return Built(
        versions={job.package: last.version},
        precision={part: _as_built(found) for part, found in audit.items()},
        audit=audit,
        built_for=last.built_for,
        profiles=shapes,
        operators=operators if bundle.has_head and operators != "inlined" else None,
        plugin_sha256=job.plugin_sha256 or None,
        kernels=last.kernels,
        fp16=None if spec.precision == "fp32" else half,
    )


def prepare_part(
    part: str, bundle: Bundle, work: Path, spec: BuildSpec, low: LowPrecision, *, typed: bool, operators: Operators
) -> PreparedGraph:
    """Writes one part's graph into `work`, as a TensorRT takes it: see `backends.tensorrt.graphs`.

    Raises:
        BackendError: without the packages that prepare graphs.
    """
    try:
        from nformer_edge.backends.tensorrt.graphs import prepare_backbone, prepare_head
    except ImportError as e:
        expected = "onnx, onnxruntime and onnx-graphsurgeon, to prepare graphs"
        hint = "pip install 'nformer-edge[quant]'"
        raise BackendError("build-engine", f"no package {e.name}", expected, hint) from e
    unfit = low.overflow.unfit(part) if low.overflow is not None else None
    if part == HEAD.part:
        return prepare_head(bundle, work, spec.built_precision, typed=typed, operators=operators, unfit=unfit)
    exclude = low.exclude_nodes
    return prepare_backbone(bundle, work, spec.built_precision, low.ranges, typed=typed, unfit=unfit, exclude=exclude)


def _as_built(audit: PartAudit) -> Precision:
    """A part's precision: the narrowest type that any of its multiplications was built in.

    TensorRT 8 can fuse a whole part into one layer that tells nothing; then it is what the part was asked to be, and
    the audit's `unknown` says that nobody has seen it.
    """
    counts = audit.multiplications
    found = [kind for kind, c in counts.items() if c.built] or [kind for kind, c in counts.items() if c.asked]
    return cast(Precision, found[0])


def profiles(bundle: Bundle, spec: BuildSpec) -> dict[str, Profile]:
    """Min, opt and max shape of each part's inputs."""
    image = bundle.spec.preprocess.shape
    found: dict[str, Profile] = {"backbone": {"images": tuple((size, *image) for size in spec.batch)}}
    head = bundle.spec.head
    if head is not None:
        # TensorRT-RTX cannot compile the standard-operator body of RowTopK for sets smaller than a list
        rows = tuple((max(size, head.listed), head.features) for size in spec.gallery_size)
        found["head"] = {"features": rows, "landmarks": ((head.layers, head.landmarks),) * 3}
    return found


def _copy_golden(bundle: Bundle, folder: Path, built: Mapping[str, Profile], quantized: Path | None) -> None:
    """The self-test's vectors, without those that the head's profile does not admit.

    An INT8 backbone is compared with what its own graph gives, computed plainly, and not with FP32.
    """
    arrays = dict(bundle.golden)
    if "head" in built:
        smallest, _, largest = (shape[0] for shape in built["head"]["features"])
        if not smallest <= len(arrays["head_input"]) <= largest:
            arrays = {name: arrays[name] for name in ("images", "features")}
    if quantized is not None:
        from nformer_edge.quantize.fp16 import plain_features

        arrays["features"] = plain_features(quantized.read_bytes(), arrays["images"])
    np.savez(folder / GOLDEN, **arrays)  # type: ignore[arg-type]
