"""A bundle becomes an engine: one backend, one precision, and a manifest that says what was really built."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from nformer_edge.backends.base import get, names
from nformer_edge.backends.engine import KIND, BuiltFor, Engine, EngineManifest, PartAudit, open_engine
from nformer_edge.backends.runner import model_name
from nformer_edge.backends.spec import AUTO, EngineSpec, resolve
from nformer_edge.core.artifact import atomic_folder, require_new, write_manifest
from nformer_edge.core.errors import BackendError
from nformer_edge.core.signature import check_private_key, sign_folder
from nformer_edge.core.spec import Precision
from nformer_edge.core.values import Result, to_table
from nformer_edge.exporting.bundle import LIVE, Bundle, ModelManifest, open_bundle
from nformer_edge.quantize.prepare import CalibrationData, Data, prepare
from nformer_edge.quantize.values import BUDGET, BudgetSearch, CalibrationFacts, HalfFacts


def choose_backend(backend: str = AUTO, precision: Precision = "fp32") -> tuple[str, str]:
    """The backend to build for, and why.

    Raises:
        BackendError: if the one asked for cannot build here, or none can build this precision.
    """
    if backend != AUTO:
        missing = get(backend).missing()
        if missing:
            hint = "Use --backend auto; `nformer-edge doctor` names the next steps."
            raise BackendError(backend, ", ".join(missing), "a machine that it can build on", hint)
        return backend, "as asked"
    excluded: list[str] = []
    for name in names():
        found = get(name)
        missing = tuple(dict.fromkeys((*found.missing(), *found.missing_to_run())))
        if not missing and precision in found.PRECISIONS:
            return name, f"the best that this machine has ({'; '.join(excluded)})" if excluded else "the best there is"
        excluded.append(f"{name}: {', '.join(missing) or f'no {precision} on this backend'}")
    hint = "Choose --int8 or no precision flag, or see `nformer-edge doctor`."
    raise BackendError("backend", "; ".join(excluded), f"one that can build {precision} here", hint)


def default_name(bundle: Bundle, backend: str, precision: str) -> str:
    """Such as ``osnet_x0_25_256x128_int8_onnxruntime``."""
    return f"{model_name(bundle.spec)}_{precision}_{backend}"


def build_engine(
    bundle: str | os.PathLike[str] | Bundle,
    out: str | os.PathLike[str] | None = None,
    spec: EngineSpec | None = None,
    calib_data: CalibrationData | Data | None = None,
    *,
    recipe: EngineSpec | None = None,
    sign: str | os.PathLike[str] | None = None,
    force: bool = False,
) -> Path:
    """Builds the engine folder `out` from `bundle`.

    Args:
        bundle: folder that `export_bundle` wrote.
        out: folder, written whole or not at all; beside the bundle under `default_name` if None.
        spec: what is asked for; what it leaves out is the recipe's, then the default: FP32 for the best backend.
        calib_data: for INT8, what to calibrate with, alone or with an accuracy budget: `CalibrationData`. For FP16
            optional: images to search for overflow.
        recipe: a target's.
        sign: PEM file of an Ed25519 private key: the engine carries its signature (`core.signature`).
        force: replace an earlier engine.

    Returns:
        The engine's folder.

    Raises:
        ArtifactError: if there is something at `out`, the bundle does not verify, or too little came out quantized.
        BackendError: if the backend cannot build this here.
        UsageError, DataError, GateError: as `quantize.prepare.prepare`.
    """
    check_private_key(sign)
    chosen = resolve(spec, recipe)
    name, why = choose_backend(chosen.backend, chosen.precision)
    backend, opened = get(name), open_bundle(bundle)
    path = Path(out) if out is not None else opened.folder.parent / default_name(opened, name, chosen.precision)
    half = "fp16" in backend.PRECISIONS
    require_new(path, KIND, force)
    low = prepare(opened, chosen, calib_data, path, half=half)
    model = {field.name: getattr(opened.manifest, field.name) for field in dataclasses.fields(ModelManifest)}
    with atomic_folder(path, KIND) as folder:
        low.save(folder)
        if LIVE in opened.files.files:
            opened.files.copy(LIVE, folder)
        built = backend.build(opened, folder, chosen, low)
        manifest = EngineManifest(
            **{**model, **vars(built)},
            backend=name,
            why=why,
            spec=dataclasses.replace(chosen, exclude_nodes=low.exclude_nodes),
            bundle_sha256=opened.sha256,
            calibration=low.calibration,
            float_nodes=low.exclude_nodes,
        )
        write_manifest(folder, KIND, to_table(manifest))
        sign_folder(folder, KIND, sign)
    return path


@dataclass(frozen=True)
class EngineSummary(Result):
    """What an engine is.

    Args:
        engine: its folder.
        backend: that runs it.
        why: that one.
        precision: of each part, as built.
        size_mb: of each graph or plan.
        audit: of each part, where its precision was looked into.
        calibration: for INT8.
        fp16: for FP16, and for INT8 with FP16 beside it.
        built_for: the machine.
        float_nodes: for INT8, nodes that were left in float on purpose.
        budget: the search, where there was one.
    """

    kind = "engine"
    version = 2

    engine: str
    backend: str
    why: str
    precision: Mapping[str, Precision]
    size_mb: Mapping[str, float]
    audit: Mapping[str, PartAudit]
    calibration: CalibrationFacts | None
    fp16: HalfFacts | None
    built_for: BuiltFor
    float_nodes: tuple[str, ...]
    budget: BudgetSearch | None

    def __str__(self) -> str:
        parts = ", ".join(f"{part} {precision}" for part, precision in self.precision.items())
        size = sum(self.size_mb.values())
        lines = [line for part, audit in self.audit.items() for line in audit.lines(part)]
        lines += self.fp16.lines() if self.fp16 else []
        lines += self.calibration.lines() if self.calibration else []
        if self.budget is not None:
            lines += str(self.budget).splitlines()
        elif self.float_nodes:
            lines.append(f"{len(self.float_nodes)} nodes left in float, as asked")
        lines += [f"built for {self.built_for}"] if str(self.built_for) else []
        first = f"wrote {self.engine}: {parts}, {size:.1f} MB, for {self.backend} ({self.why})"
        return "\n".join([first, *(f"  {line}" for line in lines)])


def describe_engine(path: str | os.PathLike[str] | Engine) -> EngineSummary:
    """What an engine is, verified."""
    engine = open_engine(path)
    found, files = engine.manifest, engine.files.files
    search = BudgetSearch.from_json(json.loads(files[BUDGET]), BUDGET) if BUDGET in files else None
    size_mb = {name: len(data) / 1e6 for name, data in files.items() if name.endswith((".onnx", ".engine"))}
    same = {f.name: getattr(found, f.name) for f in dataclasses.fields(EngineSummary) if hasattr(found, f.name)}
    return EngineSummary(engine=str(engine.folder), size_mb=size_mb, budget=search, **same)
