"""An engine for a target: the machine is compared with the recipe first, then the recipe says what is built."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

from nformer_edge.backends.build import build_engine
from nformer_edge.core.machine import conditions, machine
from nformer_edge.quantize.spec import EngineSpec, open_bundle
from nformer_edge.targets.preflight import require_match
from nformer_edge.targets.recipe import Target, read_target


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
