"""Both stages of a bundle as TensorRT plans: what `backends.tensorrt.build` and `backends.tensorrt_rtx.build` share."""

from __future__ import annotations

import io
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from nformer_edge.backends.tensorrt.audit import audit_plan
from nformer_edge.backends.tensorrt.comparison import write_comparison
from nformer_edge.backends.tensorrt.job import BuiltPlan, PlanJob, run_job
from nformer_edge.backends.tensorrt.plugin.library import Operators
from nformer_edge.core.artifact import read_verified
from nformer_edge.core.errors import BackendError
from nformer_edge.core.terminal import PROGRESS
from nformer_edge.exporting.bundle import GOLDEN
from nformer_edge.quantize.calibrate import Calibration
from nformer_edge.quantize.overflow_search import OverflowSearch, fp16_fields, search_overflow, write_log
from nformer_edge.quantize.plain import plain_features
from nformer_edge.quantize.spec import EngineSpec, OpenBundle

if TYPE_CHECKING:
    from nformer_edge.backends.tensorrt.graphs import PreparedGraph
    from nformer_edge.quantize.ranges import Ranges

PLANS = {"backbone": "backbone.engine", "head": "nformer.engine"}
LOG = "build.log"

Run = Callable[[PlanJob], BuiltPlan]


def build_plans(
    bundle: OpenBundle,
    folder: Path,
    spec: EngineSpec,
    calibration: Calibration | None,
    *,
    typed: bool,
    operators: Operators,
    job: Mapping[str, Any],
    run: Run = run_job,
) -> dict[str, Any]:
    """Prepares, builds and audits each stage into `folder`.

    Args:
        bundle: verified.
        folder: the engine's.
        spec: what to build.
        calibration: for INT8, its ranges; for FP16 too, images to search for numbers beyond FP16.
        typed: whether the TensorRT takes precision from the graph's types.
        operators: who computes our two operators.
        job: fields of `PlanJob` that both stages share.
        run: what builds a plan.

    Returns:
        Fields of the manifest: ``versions``, ``built_for``, ``precision``, ``audit``, ``profiles``, ``calibration``,
        ``fp16``.

    Raises:
        BackendError: if a stage cannot be built, or is not what was asked for.
    """
    ranges, facts, search = None, None, None
    if calibration is not None and spec.precision == "int8":
        ranges, facts = calibration.ranges(bundle, folder)
    if calibration is not None and calibration.images and spec.precision != "fp32":
        search = search_overflow(bundle, calibration.images)
    fields: dict[str, Any] = {"precision": {}, "audit": {}, "profiles": {}}
    graphs: dict[str, PreparedGraph] = {}
    (folder / LOG).touch()
    shapes = profiles(bundle, spec)
    with tempfile.TemporaryDirectory() as temporary:
        work = folder if spec.keep_graphs else Path(temporary)
        for stage, profile in tqdm(shapes.items(), desc="building plans", unit="plan", **PROGRESS):
            graph = prepare_stage(stage, bundle, work, spec, ranges, search, typed=typed, operators=operators)
            graphs[stage] = graph
            if spec.precision != "fp32":
                write_log(folder / LOG, stage, search, graph.beyond)
            own: dict[str, Any] = {
                "stage": stage,
                "graph": str(graph.path),
                "plan": str(folder / PLANS[stage]),
                "log": str(folder / LOG),
                "profile": profile,
                "flags": graph.flags,
                "float32": graph.float32,
            }
            if stage == "backbone":
                own |= {"plugin": "", "plugin_sha256": "", "ahead_of_time": False}
            built = run(PlanJob(**{**job, **own}))
            audit = audit_plan(stage, built.layers, graph.asked, strict=typed)
            fields["audit"][stage], fields["profiles"][stage] = audit, profile
            fields["precision"][stage] = _as_built(audit)
            fields |= {"versions": {str(job["package"]): built.version}, "built_for": built.built_for}
            if built.kernels:
                fields["kernels"] = built.kernels
            if stage == "backbone":
                _copy_golden(bundle, folder, shapes, graph.path if ranges is not None else None)
        if spec.keep_graphs:
            write_comparison(work, bundle, graphs, shapes, package=str(job["package"]), typed=typed)
    if spec.precision != "fp32":
        fields["fp16"] = fp16_fields(search, {stage: graph.beyond for stage, graph in graphs.items()})
    return fields | ({"calibration": facts} if facts is not None else {})


def prepare_stage(
    stage: str,
    bundle: OpenBundle,
    work: Path,
    spec: EngineSpec,
    ranges: Ranges | None,
    search: OverflowSearch | None,
    *,
    typed: bool,
    operators: Operators,
) -> PreparedGraph:
    """Writes one stage's graph into `work`, as a TensorRT takes it: see `backends.tensorrt.graphs`.

    Raises:
        BackendError: without the packages that prepare graphs.
    """
    try:
        from nformer_edge.backends.tensorrt.graphs import prepare_backbone, prepare_head
    except ImportError as e:
        raise BackendError(
            "build-engine",
            f"no package {e.name}",
            "onnx, onnxruntime and onnx-graphsurgeon, which prepare the graphs",
            "pip install 'nformer-edge[quant]'",
        ) from e
    unfit = search.unfit(stage) if search is not None else None
    if stage == "backbone":
        return prepare_backbone(
            bundle, work, spec.precision, ranges, typed=typed, unfit=unfit, exclude=spec.exclude_nodes
        )
    return prepare_head(bundle, work, spec.precision, typed=typed, operators=operators, unfit=unfit)


def _as_built(audit: Mapping[str, Any]) -> str:
    """A stage's precision: the narrowest type that any of its products was built in.

    TensorRT 8 can fuse a whole stage into one layer that tells nothing; then it is what the stage was asked to be, and
    the audit's ``untold`` says that nobody has seen it.
    """
    for told in ("built", "asked"):
        for kind, counts in audit["products"].items():
            if counts[told]:
                return str(kind)
    raise AssertionError("a stage without products")


def profiles(bundle: OpenBundle, spec: EngineSpec) -> dict[str, dict[str, list[list[int]]]]:
    """Least, best and largest shape of each stage's inputs."""
    image = [3, bundle.spec.preprocess.height, bundle.spec.preprocess.width]
    found = {"backbone": {"images": [[size, *image] for size in spec.batch]}}
    head = bundle.spec.head
    if head is not None:
        landmarks = [head.layers, head.landmarks]
        rows = [[size, head.features] for size in spec.gallery_size]
        found["head"] = {"features": rows, "landmarks": [landmarks] * 3}
    return found


def _copy_golden(bundle: OpenBundle, folder: Path, built: Mapping[str, Any], quantized: Path | None) -> None:
    """The self-test's vectors, without those that the head's profile does not admit.

    An INT8 backbone is compared with what its own graph gives, computed plainly, and not with FP32.
    """
    data = read_verified(bundle.folder, bundle.manifest, GOLDEN)
    with np.load(io.BytesIO(data), allow_pickle=False) as z:
        arrays = {name: z[name] for name in z.files}
    if "head" in built:
        least, _, most = (shape[0] for shape in built["head"]["features"])
        if not least <= len(arrays["head_input"]) <= most:
            arrays = {name: arrays[name] for name in ("images", "features")}
    if quantized is not None:
        arrays["features"] = plain_features(quantized, arrays["images"])
    np.savez(folder / GOLDEN, **arrays)  # type: ignore[arg-type]
