"""What low precision is asked for: precision and calibration, an accuracy budget, nodes to leave in float."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal

from nformer_edge.core.artifact import read_text
from nformer_edge.core.errors import ArtifactError, UsageError
from nformer_edge.core.spec import CalibrationChoice, Precision, PrecisionChoice, check_at_least, check_choice

if TYPE_CHECKING:
    from nformer_edge.quantize.values import Score

#: What `--calib-method` calls the choice by held-out people.
AUTO: Final = "auto"

#: Whose features are scored: the backbone's, and, where there is a head, what it makes of them.
SCOPES = ("backbone", "end_to_end")


@dataclass(frozen=True)
class QuantizeSpec:
    """How a backbone is brought to low precision. Fields as in `backends.spec.EngineSpec`."""

    precision: PrecisionChoice = "fp32"
    calib_method: CalibrationChoice = "percentile"
    calib_num: int = 256
    seed: int = 0
    reduce_range: bool | None = None
    exclude_nodes: tuple[str, ...] = ()

    @property
    def built_precision(self) -> Precision:
        """`precision`, once one has been chosen."""
        assert self.precision != AUTO, "a build is of one precision"
        return self.precision


@dataclass(frozen=True)
class BudgetSpec:
    """How much accuracy INT8 may cost.

    Args:
        max_map_drop: percentage points of mAP, against FP32 on held-out training identities; None does not ask.
        min_overlap: share of each image's ten nearest that must stay: tells where mAP is saturated and does not.
        images: held-out images at most.
        scope: whose mAP counts: the ``backbone``'s, or ``end_to_end`` with the head; ``auto`` is the latter where there
            is a head.
    """

    max_map_drop: float | None = None
    min_overlap: float = 0.0
    images: int = 600
    scope: Literal["auto", "backbone", "end_to_end"] = "auto"

    def __post_init__(self) -> None:
        if self.max_map_drop is not None:
            check_at_least("max_map_drop", self.max_map_drop, 0.0)
        if not 0 <= self.min_overlap <= 1 or (self.max_map_drop is None and not self.min_overlap):
            hint = "Such as --max-map-drop 0.5, or --min-overlap 0.95."
            raise UsageError("min_overlap", self.min_overlap, "a share, or max_map_drop", hint)
        check_at_least("budget_images", self.images, 8)
        check_choice("budget_scope", self.scope, (AUTO, *SCOPES))

    def counts(self, scopes: tuple[str, ...]) -> str:
        """Which of the model's scopes counts.

        Raises:
            UsageError: for one that the model does not have.
        """
        if self.scope == AUTO:
            return scopes[-1]
        check_choice("budget_scope", self.scope, scopes)
        return self.scope

    def holds(self, score: Score) -> bool:
        """Whether a score keeps within it; a drop counts by its 95 % bound."""
        enough = score.overlap_at_10 >= self.min_overlap
        return enough and (self.max_map_drop is None or 100 * score.map_drop_upper <= self.max_map_drop)

    def __str__(self) -> str:
        drop = [] if self.max_map_drop is None else [f"at most {self.max_map_drop:g} points of mAP lost"]
        return " and ".join(drop + ([f"overlap@10 at least {self.min_overlap:g}"] if self.min_overlap else []))


def read_exclude(sources: Iterable[str]) -> tuple[str, ...]:
    """Names of ONNX nodes to leave in float, each once, in order.

    Args:
        sources: names; or files: an engine's `budget.json` (what it chose), a JSON list, or text with a name a line and
            comments after ``#``.

    Raises:
        UsageError: for JSON that is neither, or a search that chose nothing.
        ArtifactError: for a file that cannot be read.
    """
    names: list[str] = []
    for source in sources:
        names += _from_file(Path(source)) if os.path.exists(source) else [source]
    return tuple(dict.fromkeys(names))


def _from_file(path: Path) -> list[str]:
    from nformer_edge.quantize.values import BudgetSearch

    text = read_text(path, "names of nodes")
    if path.suffix != ".json":
        lines = (line.partition("#")[0].strip() for line in text.splitlines())
        return [line for line in lines if line]
    try:
        found = json.loads(text)
        if isinstance(found, dict):
            search = BudgetSearch.from_json(found, str(path))
            found = None if search.chosen is None else list(search.float_nodes)
        if not (isinstance(found, list) and all(isinstance(name, str) for name in found)):
            raise ValueError("something else")
    except (ValueError, RecursionError, ArtifactError) as e:
        expected = "a list of node names, or an engine's budget.json that chose a set"
        raise UsageError("exclude_nodes", f"{path}: {e}", expected, "Write the names into a file, one a line.") from e
    return found
