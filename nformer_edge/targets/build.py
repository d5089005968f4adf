"""An engine for a target: the machine is compared with the recipe first, then the recipe says what is built."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

from nformer_edge.backends.build import build_engine
from nformer_edge.core.machine import conditions, machine
from nformer_edge.core.spec import Backend, Precision, from_dict
from nformer_edge.data.records import Dataset
from nformer_edge.quantize.search import BudgetSpec
from nformer_edge.quantize.spec import EngineSpec, open_bundle
from nformer_edge.targets.preflight import require_match
from nformer_edge.targets.recipe import Target, read_target


def build(
    bundle: str | os.PathLike[str],
    out: str | os.PathLike[str] | None = None,
    *,
    precision: Precision = "fp32",
    backend: Backend = "auto",
    target: str | None = None,
    calib_data: Dataset | str | os.PathLike[str] | None = None,
    budget: BudgetSpec | None = None,
    budget_data: Dataset | str | os.PathLike[str] | None = None,
    force_calibration: bool = False,
    **spec: Any,
) -> Path:
    """Builds an engine from a bundle; where a target is named, by its recipe, which the other arguments win over.

    Args:
        bundle: folder that `export` wrote.
        out: folder, written whole or not at all; beside the bundle, named after it, if None.
        precision: of the backbone; ``int8`` needs `calib_data`.
        backend: who runs the engine; ``auto`` takes the best that this machine has.
        target: name of a recipe, such as ``jetson-orin-jp62``, or a recipe file.
        calib_data: the dataset that the model was trained on, a folder of images, or a `calibration.json`.
        budget: for INT8, what it may cost in accuracy.
        budget_data: the dataset of whose training people some are held out to measure that; `calib_data` if None.
        force_calibration: accept query or gallery images for calibration.
        **spec: the other fields of `EngineSpec`, such as ``batch=(1, 8, 32)``.

    Returns:
        The engine's folder.
    """
    asked = from_dict(EngineSpec, {"precision": precision, "backend": backend, **spec}, "build")
    images = calib_data, force_calibration, budget, budget_data
    if target is not None:
        recipe = read_target(target)
        require_match(recipe, machine(), conditions(), with_head=open_bundle(bundle).has_head)
        asked = with_target(asked, recipe)
    return build_engine(bundle, out, asked, *images)


def build_for_target(
    bundle: str | os.PathLike[str],
    out: str | os.PathLike[str] | None,
    spec: EngineSpec,
    *,
    target: str,
    **settings: Any,
) -> Path:
    """`build_engine` by a recipe.

    Args:
        bundle: as for `build_engine`.
        out: likewise.
        spec: what was asked for besides; a field that is not its default wins over the recipe's.
        target: name of a recipe, or a recipe file.
        **settings: the rest of `build_engine`'s arguments.

    Raises:
        UsageError: if there is no such target.
        BackendError: if this machine is not the target's, naming everything that does not match.
    """
    recipe = read_target(target)
    require_match(recipe, machine(), conditions(), with_head=open_bundle(bundle).has_head)
    return build_engine(bundle, out, with_target(spec, recipe), **settings)


def with_target(spec: EngineSpec, target: Target) -> EngineSpec:
    """`spec` with the recipe's values wherever it still has its default."""
    default = EngineSpec()
    changes: dict[str, Any] = {}
    for field in dataclasses.fields(target.engine):
        value = getattr(target.engine, field.name)
        if value not in ((), None) and getattr(spec, field.name) == getattr(default, field.name):
            changes[field.name] = value
    return dataclasses.replace(spec, **changes)
