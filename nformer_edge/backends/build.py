"""A bundle becomes an engine: one backend, one precision, and a manifest that says what was really built."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, cast

from nformer_edge.backends.engine import BuiltFor, PartAudit
from nformer_edge.backends.onnxruntime import build as onnxruntime
from nformer_edge.backends.tensorrt import build as tensorrt
from nformer_edge.backends.tensorrt_rtx import build as tensorrt_rtx
from nformer_edge.core.artifact import atomic_folder, atomic_write_json, read_manifest, read_verified, write_manifest
from nformer_edge.core.errors import BackendError, UsageError
from nformer_edge.core.spec import Backend, Precision, to_dict
from nformer_edge.core.values import from_json, to_table
from nformer_edge.data.records import Dataset
from nformer_edge.quantize.calibrate import choose_calibration
from nformer_edge.quantize.decide import BUDGET, decide
from nformer_edge.quantize.overflow_search import fp16_lines
from nformer_edge.quantize.search import BudgetSpec
from nformer_edge.quantize.search_table import format_budget
from nformer_edge.quantize.spec import EngineSpec, OpenBundle, open_bundle

__all__ = ["BACKENDS", "BudgetSpec", "EngineSpec", "build_engine", "choose_backend", "default_name", "describe_engine"]

KIND = "engine"

#: Best first: the order in which ``auto`` tries them.
BACKENDS: dict[str, Any] = {module.NAME: cast(Any, module) for module in (tensorrt, tensorrt_rtx, onnxruntime)}

#: What a bundle's manifest says of the model, and an engine's repeats.
_INHERITED = ("model", "preprocess", "normalization", "landmark_rule", "landmark_seed", "opset", "checkpoint_sha256")


def choose_backend(backend: Backend = "auto", precision: Precision = "fp32") -> tuple[str, str]:
    """The backend to build for, and why.

    Raises:
        BackendError: if the one asked for cannot build here, or none can build this precision.
    """
    if backend != "auto":
        missing = BACKENDS[backend].missing()
        if missing:
            raise BackendError(
                backend,
                ", ".join(missing),
                "a machine that it can build on",
                "Use --backend auto; `nformer-edge doctor` names the next steps.",
            )
        return backend, "as asked"
    passed_over: list[str] = []
    for name, module in BACKENDS.items():
        missing = (*module.missing(), *(m for m in module.missing_to_run() if m not in module.missing()))
        if not missing and precision in module.PRECISIONS:
            why = f"the best that this machine has ({'; '.join(passed_over)})" if passed_over else "the best there is"
            return name, why
        passed_over.append(f"{name}: {', '.join(missing) or f'no {precision} on this backend'}")
    raise BackendError(
        "backend",
        "; ".join(passed_over),
        f"one that can build {precision} here",
        "Choose --int8 or no precision flag, or see `nformer-edge doctor`.",
    )


def default_name(bundle: OpenBundle, backend: str, precision: str) -> str:
    """Such as ``osnet_x0_25_256x128_int8_onnxruntime``."""
    size = bundle.spec.preprocess
    return f"{bundle.spec.backbone.arch}_{size.height}x{size.width}_{precision}_{backend}"


def build_engine(
    bundle: str | os.PathLike[str],
    out: str | os.PathLike[str] | None = None,
    spec: EngineSpec | None = None,
    calib_data: Dataset | str | os.PathLike[str] | None = None,
    force_calibration: bool = False,
    budget: BudgetSpec | None = None,
    budget_data: Dataset | str | os.PathLike[str] | None = None,
) -> Path:
    """Builds the engine folder `out` from `bundle`.

    Args:
        bundle: folder that `export_bundle` wrote.
        out: folder, written whole or not at all; beside the bundle under `default_name` if None.
        spec: what to build; FP32 for the best backend if None.
        calib_data: for INT8, the dataset that the model was trained on (its training images are used), a folder of
            images, or the `calibration.json` of an earlier engine. For FP16 optional: images to search for overflow.
        force_calibration: accept query or gallery images for calibration.
        budget: for INT8, what it may cost in accuracy: the nodes that cost most stay in float (`quantize.search`).
        budget_data: the dataset of whose training people some are held out to measure that; `calib_data` if None.

    Returns:
        The engine's folder.

    Raises:
        ArtifactError: if the bundle does not verify, or too little came out quantized.
        BackendError: if the backend cannot build this here.
        UsageError: for INT8 without `calib_data`, or a budget without INT8.
        GateError: if no choice of nodes keeps within the budget.
        DataError: for calibration images that cannot be used, query and gallery images among them.
    """
    spec = spec or EngineSpec()
    name, why = choose_backend(spec.backend, spec.precision)
    opened = open_bundle(bundle)
    _require_room_for(spec.precision, opened)
    path = Path(out) if out is not None else opened.folder.parent / default_name(opened, name, spec.precision)
    calibration, searched = None, None
    if spec.precision == "int8":
        decided = decide(
            opened, path, spec, calib_data, budget=budget, budget_data=budget_data, force=force_calibration
        )
        spec, calibration, searched = decided.spec, decided.calibration, decided.budget
    elif budget is not None:
        raise UsageError("max_map_drop", f"a budget for {spec.precision}", "int8", "Add --int8.")
    elif spec.precision == "fp16" and calib_data is not None:
        calibration = choose_calibration(calib_data, spec, force=force_calibration)
    with atomic_folder(path, KIND) as folder:
        built = BACKENDS[name].build(opened, folder, spec, calibration)
        if searched is not None:
            atomic_write_json(folder / BUDGET, searched)
        known = built if isinstance(built, dict) else {k: v for k, v in to_table(built).items() if v is not None}
        if calibration is not None and spec.precision == "int8":
            known["calibration"] = calibration.measure(opened)[1]
        write_manifest(folder, KIND, _fields(opened, spec, name, why) | known)
    return path


def _require_room_for(precision: Precision, bundle: OpenBundle) -> None:
    if precision == "int8" and bundle.backbone_precision != "fp32":
        raise UsageError(
            "precision",
            f"int8 for a backbone that is in {bundle.backbone_precision} already",
            "one in FP32",
            "Leave --int8 out: the graph is built as it stands. --fp16 halves the head.",
        )


def _fields(bundle: OpenBundle, spec: EngineSpec, backend: str, why: str) -> dict[str, Any]:
    inherited = {key: bundle.manifest[key] for key in _INHERITED if key in bundle.manifest}
    if spec.precision == "int8":
        inherited["float_nodes"] = list(spec.exclude_nodes)
    return {"backend": backend, "why": why, "spec": to_dict(spec), "bundle_sha256": bundle.sha256, **inherited}


def describe_engine(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What an engine's manifest says, verified, as JSON of kind ``engine``, with a ``summary`` to print."""
    manifest = read_manifest(path, KIND)
    graphs = (".onnx", ".engine")
    megabytes = {name: entry["bytes"] / 1e6 for name, entry in manifest["files"].items() if name.endswith(graphs)}
    stages = ", ".join(f"{stage} {precision}" for stage, precision in manifest["precision"].items())
    lines = [f"wrote {path}: {stages}, {sum(megabytes.values()):.1f} MB, for {manifest['backend']} ({manifest['why']})"]
    lines += [f"  {line}" for line in _audit_lines(manifest.get("audit") or {})]
    if "fp16" in manifest:
        lines += [f"  {line}" for line in fp16_lines(manifest["fp16"])]
    if "calibration" in manifest:
        used = manifest["calibration"]
        lines.append(f"  calibrated with {used['num']} images, {used['method']}, sha256 {used['sha256'][:12]}")
        lines += [f"  {line}" for line in _method_lines(used.get("auto"))]
    searched = json.loads(read_verified(path, manifest, BUDGET)) if BUDGET in manifest["files"] else None
    if searched is not None:
        lines += [f"  {line}" for line in format_budget(searched)]
    elif manifest.get("float_nodes"):
        lines.append(f"  {len(manifest['float_nodes'])} nodes left in float, as asked")
    if "built_for" in manifest:
        lines.append(f"  built for {from_json(BuiltFor, manifest['built_for'])}")
    return {
        "kind": "engine",
        "engine": str(path),
        "backend": manifest["backend"],
        "why": manifest["why"],
        "precision": manifest["precision"],
        "size_mb": megabytes,
        "audit": manifest.get("audit"),
        "calibration": manifest.get("calibration"),
        "fp16": manifest.get("fp16"),
        "built_for": manifest.get("built_for"),
        "float_nodes": manifest.get("float_nodes"),
        "budget": searched,
        "summary": "\n".join(lines),
    }


def _method_lines(chosen: dict[str, Any] | None) -> list[str]:
    """What ``auto`` chose the calibration method by."""
    if chosen is None:
        return []
    scores = {method: found[chosen["stage"]] for method, found in chosen["scores"].items()}
    told = [f"{m} {100 * s['mAP']:.2f} ({s['overlap_at_10']:.3f})" for m, s in scores.items()]
    people = chosen["held_out"]["identities"]
    return [f"chosen by mAP (neighbors kept) of {people} people held out: {', '.join(told)}"]


def _audit_lines(audit: dict[str, Any]) -> list[str]:
    """onnxruntime's audit counts the products of a graph, TensorRT's those of a plan."""
    lines = []
    for name, found in audit.items():
        if "multiplications" in found:
            lines += from_json(PartAudit, found).lines(name)
        else:
            lines.append(f"{name}: {found['int8']} of {found['total']} in INT8")
    return lines
