"""Recipes: what is done to a model, in which order, as TOML."""

from __future__ import annotations

import importlib
import os
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import get_args

from nformer_edge.compress.step import Step
from nformer_edge.core.artifact import read_text
from nformer_edge.core.errors import ArtifactError, UsageError
from nformer_edge.core.spec import BackboneSpec, check_at_least, check_choice, from_dict, to_dict
from nformer_edge.core.values import Table
from nformer_edge.data.loaders import AugmentSpec
from nformer_edge.training.config import Precision

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

#: Steps: a module of `nformer_edge.compress`, and the class in it. A new one is one file and one line here.
STEPS = {"distil": "distil:Distil", "prune": "prune:Prune", "sparsify": "sparsify:Sparsify", "qat": "qat:Qat"}


@dataclass(frozen=True)
class Recipe:
    """A whole compression.

    Args:
        steps: in their order; in the file an array of tables, each with its ``kind``.
        student: the backbone that the first step gets, untrained; the model's own, trained, if None.
        views: of each training image that the teacher sees, the plain one among them; a store has its own number.
        augment: how the views are drawn.
        holdout: share of the training identities that every step is judged by.
        seed: everything random follows from it.
        precision: of training.
        cache_mib: training images stay decoded in memory up to this size.
        save_minutes: an interrupted step loses at most so much, and the batch at hand.
    """

    steps: tuple[Step, ...] = ()
    student: BackboneSpec | None = None
    views: int = 4
    augment: AugmentSpec = field(default_factory=AugmentSpec)
    holdout: float = 0.1
    seed: int = 0
    precision: Precision = "fp32"
    cache_mib: int = 2048
    save_minutes: float = 2.0

    def __post_init__(self) -> None:
        check_at_least("views", self.views, 1)
        for name in ("seed", "cache_mib", "save_minutes"):
            check_at_least(name, getattr(self, name), 0)
        check_choice("precision", self.precision, get_args(Precision))
        if not 0 <= self.holdout < 1:
            raise UsageError("holdout", self.holdout, "0 <= holdout < 1", "Hold out fewer people.")

    @property
    def identity(self) -> Table:
        """What decides the numbers."""
        plain = {k: v for k, v in to_dict(self).items() if k not in ("cache_mib", "save_minutes")}
        return {**plain, "steps": [{"kind": kind_of(step), **to_dict(step)} for step in self.steps]}


def kind_of(step: Step) -> str:
    """The name of a step in recipes."""
    return next(kind for kind, where in STEPS.items() if where.endswith(f":{type(step).__name__}"))


def read_recipe(path: str | os.PathLike[str]) -> Recipe:
    """A recipe from TOML; absent keys take their defaults.

    Raises:
        UsageError: if the file is missing or not TOML, has no step or an unknown one, or holds an unknown key or a
            value of the wrong type.
    """
    name = Path(path).name
    try:
        data = tomllib.loads(read_text(path, "a TOML file"))
    except (ValueError, RecursionError, ArtifactError) as e:
        raise UsageError(str(path), str(e), "a TOML file", "Check the file.") from e
    tables = data.pop("steps", [])
    if not isinstance(tables, list) or not tables or not all(isinstance(table, dict) for table in tables):
        raise UsageError(f"{name}.steps", "none", "at least one table [[steps]]", "Add one, with its kind.")
    steps = tuple(_step(table, f"{name}.steps[{i}]") for i, table in enumerate(tables))
    return replace(from_dict(Recipe, data, name), steps=steps)


def _step(table: Table, where: str) -> Step:
    table = dict(table)
    kind = table.pop("kind", None)
    check_choice(f"{where}.kind", kind, tuple(STEPS))
    module, _, name = STEPS[str(kind)].partition(":")
    step: Step = from_dict(getattr(importlib.import_module(f"nformer_edge.compress.{module}"), name), table, where)
    return step
