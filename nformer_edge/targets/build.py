"""An engine for a target: the machine is compared with the recipe first, then the recipe says what is built."""

from __future__ import annotations

import os
from pathlib import Path

from nformer_edge.backends.build import build_engine
from nformer_edge.backends.spec import EngineSpec
from nformer_edge.core.machine import conditions, machine
from nformer_edge.core.spec import PrecisionChoice
from nformer_edge.core.values import from_json
from nformer_edge.exporting.bundle import Bundle, open_bundle
from nformer_edge.quantize.prepare import CalibrationData, Data
from nformer_edge.quantize.spec import BudgetSpec
from nformer_edge.targets.doctor import require_match
from nformer_edge.targets.recipe import read_target


def build(
    bundle: str | os.PathLike[str] | Bundle,
    out: str | os.PathLike[str] | None = None,
    *,
    precision: PrecisionChoice | None = None,
    backend: str | None = None,
    target: str | None = None,
    calib_data: Data | None = None,
    budget: BudgetSpec | None = None,
    budget_data: Data | None = None,
    force_calibration: bool = False,
    force: bool = False,
    **spec: object,
) -> Path:
    """Builds an engine from a bundle; where a target is named, by its recipe, which the other arguments win over.

    Args:
        bundle: folder that `export` wrote.
        out: folder, written whole or not at all; beside the bundle, named after it, if None.
        precision: of the backbone, FP32 by default; ``int8`` needs `calib_data`. ``auto`` takes the fastest within the
            accuracy budget, and needs it too.
        backend: who runs the engine; the best that this machine has by default.
        target: name of a recipe, such as ``jetson-orin-jp62``, or a recipe file.
        calib_data: the dataset that the model was trained on, a folder of images, or a `calibration.json`.
        budget: for INT8, what it may cost in accuracy.
        budget_data: the dataset of whose training people some are held out to measure that; `calib_data` if None.
        force_calibration: accept query or gallery images for calibration.
        force: replace an earlier engine.
        **spec: the other fields of `EngineSpec`, such as ``batch=(1, 8, 32)``.

    Returns:
        The engine's folder.

    Raises:
        UsageError: if there is no such target, or no such field.
        BackendError: if this machine is not the target's, naming everything that does not match; and as `build_engine`.
    """
    asked = from_json(EngineSpec, {"precision": precision, "backend": backend, **spec}, "build")
    data = CalibrationData(calib_data, force_calibration, budget, budget_data)
    return build_for_target(bundle, out, asked, data, target=target, force=force)


def build_for_target(
    bundle: str | os.PathLike[str] | Bundle,
    out: str | os.PathLike[str] | None = None,
    spec: EngineSpec | None = None,
    calib_data: CalibrationData | Data | None = None,
    *,
    target: str | None = None,
    sign: str | os.PathLike[str] | None = None,
    force: bool = False,
) -> Path:
    """`build_engine` by a recipe, where one is named.

    Args:
        bundle: as for `build_engine`.
        out: likewise.
        spec: what is asked for besides; it wins over the recipe.
        calib_data: likewise.
        target: name of a recipe, or a recipe file; None for none.
        sign: as for `build_engine`.
        force: replace an earlier engine.

    Raises:
        UsageError: if there is no such target.
        BackendError: if this machine is not the target's, naming everything that does not match.
    """
    if target is None:
        return build_engine(bundle, out, spec, calib_data, sign=sign, force=force)
    recipe, opened = read_target(target), open_bundle(bundle)
    require_match(recipe, machine(), conditions(), with_head=opened.has_head)
    return build_engine(opened, out, spec, calib_data, recipe=recipe.engine, sign=sign, force=force)
