"""A bundle becomes an engine: one backend, one precision, and a manifest that says what was really built."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from nformer_edge.backends.choice import CHOICE, Choice, build_fastest, choose_backends
from nformer_edge.backends.engine import KIND, BuiltFor, Engine, PartAudit, open_engine
from nformer_edge.backends.runner import model_name
from nformer_edge.backends.spec import AUTO, EngineSpec, resolve
from nformer_edge.core.artifact import atomic_folder, require_new, write_manifest
from nformer_edge.core.signature import check_private_key, sign_folder
from nformer_edge.core.spec import Precision
from nformer_edge.core.values import Result, to_table
from nformer_edge.exporting.bundle import LIVE, Bundle, open_bundle
from nformer_edge.quantize.prepare import CalibrationData, Data
from nformer_edge.quantize.values import BUDGET, BudgetSearch, CalibrationFacts, HalfFacts


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
    chosen, opened = resolve(spec, recipe), open_bundle(bundle)
    data = calib_data if isinstance(calib_data, CalibrationData) else CalibrationData(calib_data)
    names, _ = choose_backends(chosen.backend, chosen.precision, int8_head=chosen.head_precision == "int8")
    name = names[0] if len(names) == 1 else AUTO
    path = Path(out) if out is not None else opened.folder.parent / default_name(opened, name, chosen.precision)
    require_new(path, KIND, force)
    with atomic_folder(path, KIND) as folder:
        work = folder / "tried"
        work.mkdir()
        engine, why, choice = build_fastest(opened, work, chosen, data, path)
        for file in engine.folder.iterdir():
            file.rename(folder / file.name)
        shutil.rmtree(work)
        if LIVE in opened.files.files:
            opened.files.copy(LIVE, folder)
        if choice is not None:
            choice.save(folder / CHOICE)
        write_manifest(folder, KIND, to_table(engine.manifest(opened, why)))
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
        choice: what it was timed against, where it was.
    """

    kind = "engine"
    version = 3

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
    choice: Choice | None

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
        lines += str(self.choice).splitlines() if self.choice is not None else []
        lines += [f"built for {self.built_for}"] if str(self.built_for) else []
        first = f"wrote {self.engine}: {parts}, {size:.1f} MB, for {self.backend} ({self.why})"
        return "\n".join([first, *(f"  {line}" for line in lines)])


def describe_engine(path: str | os.PathLike[str] | Engine) -> EngineSummary:
    """What an engine is, verified."""
    engine = open_engine(path)
    found, files = engine.manifest, engine.files.files
    search = BudgetSearch.from_json(json.loads(files[BUDGET]), BUDGET) if BUDGET in files else None
    choice = Choice.from_json(json.loads(files[CHOICE]), CHOICE) if CHOICE in files else None
    size_mb = {name: len(data) / 1e6 for name, data in files.items() if name.endswith((".onnx", ".engine"))}
    same = {f.name: getattr(found, f.name) for f in dataclasses.fields(EngineSummary) if hasattr(found, f.name)}
    return EngineSummary(engine=str(engine.folder), size_mb=size_mb, budget=search, choice=choice, **same)
