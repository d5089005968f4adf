"""Both stages of a bundle as TensorRT plans: what `engine.tensorrt` and `engine.tensorrt_rtx` share."""

from __future__ import annotations

import io
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from nformer_edge.core.artifact import read_verified
from nformer_edge.core.errors import BackendError
from nformer_edge.core.terminal import PROGRESS
from nformer_edge.engine.audit import audit_plan
from nformer_edge.engine.backend import EngineSpec, OpenBundle
from nformer_edge.engine.calibrate import Calibration
from nformer_edge.engine.job import BuiltPlan, PlanJob, run_job
from nformer_edge.onnx.bundle import GOLDEN

BACKBONE_PLAN = "backbone.engine"
HEAD_PLAN = "nformer.engine"
LOG = "build.log"

Run = Callable[[PlanJob], BuiltPlan]


def build_plans(
    bundle: OpenBundle, folder: Path, spec: EngineSpec, calibration: Calibration | None, *,
    typed: bool, plugin: bool, job: Mapping[str, Any], run: Run = run_job,
) -> dict[str, Any]:  # fmt: skip
    """Prepares, builds and audits each stage into `folder`.

    Args:
        bundle: verified.
        folder: the engine's.
        spec: what to build.
        calibration: for INT8.
        typed: whether the TensorRT takes precision from the graph's types.
        plugin: whether our two operators are nodes for a plugin, or inlined.
        job: fields of `PlanJob` that both stages share.
        run: what builds a plan.

    Returns:
        Fields of the manifest: ``versions``, ``built_for``, ``precision``, ``audit``, ``profiles``, ``calibration``.

    Raises:
        BackendError: if a stage cannot be built, or is not what was asked for.
    """
    try:
        from nformer_edge.engine.graphs import prepare_backbone, prepare_head
    except ImportError as e:
        raise BackendError(
            str(job["package"]), got=f"no package {e.name}", expected="onnx and onnxruntime, which prepare the graphs",
            mend="pip install 'nformer-edge[quant]'",
        ) from e  # fmt: skip
    ranges, facts = calibration.ranges(bundle, folder) if calibration is not None else (None, None)
    fields: dict[str, Any] = {"precision": {}, "audit": {}, "profiles": {}}
    (folder / LOG).touch()
    stages = ["backbone", *(["head"] if bundle.has_head else [])]
    with tempfile.TemporaryDirectory() as work:
        for stage in tqdm(stages, desc="building plans", unit="plan", **PROGRESS):
            if stage == "backbone":
                graph = prepare_backbone(bundle, Path(work), spec.precision, ranges, typed=typed)
            else:
                graph = prepare_head(bundle, Path(work), spec.precision, typed=typed, plugin=plugin)
            profile = profiles(bundle, spec)[stage]
            with_plugin = stage == "head" and plugin
            own = {} if with_plugin else {"plugin": "", "plugin_sha256": ""}
            built = run(
                PlanJob(
                    **{
                        **job, **own, "stage": stage, "graph": str(graph.path), "profile": profile,
                        "plan": str(folder / (BACKBONE_PLAN if stage == "backbone" else HEAD_PLAN)),
                        "log": str(folder / LOG), "flags": graph.flags, "float32": graph.float32,
                    }
                )
            )  # fmt: skip
            fields["audit"][stage] = audit_plan(stage, built.layers, graph.asked, strict=typed)
            fields["precision"][stage] = _as_built(fields["audit"][stage])
            fields["profiles"][stage] = profile
            fields |= {"versions": {str(job["package"]): built.version}, "built_for": built.built_for}
    _copy_golden(bundle, folder, fields["profiles"])
    return fields | ({"calibration": facts} if facts is not None else {})


def _as_built(audit: Mapping[str, Any]) -> str:
    """A stage's precision is the narrowest type that any of its products was built in."""
    return next(kind for kind in ("int8", "fp16", "fp32") if audit["products"].get(kind, {}).get("built"))


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


def _copy_golden(bundle: OpenBundle, folder: Path, built: Mapping[str, Any]) -> None:
    """The self-test's vectors, without those that the head's profile does not admit."""
    data = read_verified(bundle.folder, bundle.manifest, GOLDEN)
    with np.load(io.BytesIO(data), allow_pickle=False) as z:
        arrays = {name: z[name] for name in z.files}
    if "head" in built:
        least, _, most = (shape[0] for shape in built["head"]["features"])
        if not least <= len(arrays["head_input"]) <= most:
            arrays = {name: arrays[name] for name in ("images", "features")}
    np.savez(folder / GOLDEN, **arrays)  # type: ignore[arg-type]
