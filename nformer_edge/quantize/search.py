"""INT8 to an accuracy budget: which nodes stay in float so that held-out people are still found.

Each node, or nodes in a row (`quantize.placement.node_groups`), is measured twice: alone in INT8, all else in float;
and left out, all else in INT8. The nodes are then put in order by the neighbors that they cost, and left in float from
the worst on, in growing sets that are each measured whole, until the budget holds; between the last set that failed and
the first that held, halving finds the smallest. mAP says whether the budget holds; neighbors say whose fault it is,
because one node moves mAP by less than some hundreds of queries can tell.

The order is by what a node costs alone and by what leaving it out gains. On a CPU an activation with a bad range is
felt by the node that makes it and by those that read it, and stays INT8 until all of them are in float: leaving out one
of them gains nothing, and each costs dear alone.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from tqdm import tqdm

from nformer_edge.core.errors import UsageError
from nformer_edge.core.journal import Journal
from nformer_edge.core.spec import check_at_least, check_choice
from nformer_edge.core.terminal import PROGRESS
from nformer_edge.quantize.score import STAGES, Judge

if TYPE_CHECKING:
    from onnx import ModelProto

    from nformer_edge.quantize.placement import Placement

VERSION = 1

Stage = Literal["auto", "backbone", "end_to_end"]

Nodes = Sequence[str]


@dataclass(frozen=True)
class BudgetSpec:
    """How much accuracy INT8 may cost.

    Args:
        max_map_drop: percentage points of mAP, against FP32 on held-out training identities; None does not ask.
        min_overlap: share of each image's ten nearest that must stay: tells where mAP is saturated and does not.
        images: held-out images at most.
        stage: whose mAP counts: the ``backbone``'s, or ``end_to_end`` with the head; ``auto`` is the latter where there
            is a head.
    """

    max_map_drop: float | None = None
    min_overlap: float = 0.0
    images: int = 600
    stage: Stage = "auto"

    def __post_init__(self) -> None:
        if self.max_map_drop is not None:
            check_at_least("max_map_drop", self.max_map_drop, 0.0)
        if not 0 <= self.min_overlap <= 1 or (self.max_map_drop is None and not self.min_overlap):
            raise UsageError(
                "min_overlap",
                self.min_overlap,
                "a share, or max_map_drop",
                "Such as --max-map-drop 0.5, or --min-overlap 0.95.",
            )
        check_at_least("budget_images", self.images, 8)
        check_choice("budget_stage", self.stage, ("auto", *STAGES))

    def judged_stage(self, stages: tuple[str, ...]) -> str:
        """Which of the model's stages counts.

        Raises:
            UsageError: for a stage that the model does not have.
        """
        if self.stage != "auto":
            check_choice("budget_stage", self.stage, stages)
        return stages[-1] if self.stage == "auto" else self.stage

    def holds(self, score: dict[str, float]) -> bool:
        """Whether a score is within the budget, by its one-sided 95 % bound."""
        enough = score["overlap_at_10"] >= self.min_overlap
        return enough and (self.max_map_drop is None or 100 * score["map_drop_upper"] <= self.max_map_drop)

    def __str__(self) -> str:
        drop = [] if self.max_map_drop is None else [f"at most {self.max_map_drop:g} points of mAP lost"]
        return " and ".join(drop + ([f"{self.min_overlap:g} of the neighbors kept"] if self.min_overlap else []))


@dataclass(frozen=True)
class Search:
    """One search: a placement, who judges it, and what is known already.

    Args:
        placement: Q/DQ in every node.
        groups: nodes to judge together, by the first one's name.
        facts: what the scores depend on besides the nodes in float, as plain data.
        excluded: nodes that are in float whatever is found.
    """

    placement: Placement
    groups: dict[str, tuple[str, ...]]
    judge: Judge
    journal: Journal
    facts: dict[str, Any]
    excluded: tuple[str, ...] = ()

    def score(self, in_float: Iterable[str]) -> dict[str, dict[str, float]]:
        """Of the backbone with these groups in float, by stage."""
        names = self.members(in_float)
        facts = {**self.facts, "score": sorted(names)}
        found: dict[str, dict[str, float]] = self.journal.recall(facts, lambda: self.judge.score(self._model(names)))
        return found

    def point(self, in_float: Sequence[str], stage: str) -> dict[str, Any]:
        """The same as a point of the frontier, with latency and size."""
        names = self.members(in_float)
        scores = self.score(in_float)
        costs = self.journal.recall({**self.facts, "costs": sorted(names)}, lambda: self._costs(self._model(names)))
        return {"float_nodes": list(names), **scores[stage], **costs, "stages": scores}

    def members(self, groups: Iterable[str]) -> Nodes:
        """The nodes of these groups, after those that are in float anyway."""
        return [*self.excluded, *(name for group in groups for name in self.groups[group])]

    def reference(self) -> dict[str, dict[str, float]]:
        """FP32's scores by stage."""
        found: dict[str, dict[str, float]] = self.journal.recall({**self.facts, "float": True}, self.judge.reference)
        return found

    def _model(self, names: Nodes) -> ModelProto:
        return self.placement.without(names)

    def _costs(self, model: ModelProto) -> dict[str, float]:
        return {**self.judge.latency(model), "size_mb": self.judge.size_mb(model)}


def run_search(search: Search, budget: BudgetSpec, limit: int) -> dict[str, Any]:
    """Measures every node, puts them in order, and finds the fewest in float that keep within the budget.

    Args:
        search: what to measure with.
        budget: what must hold.
        limit: products that may stay in float at most: beyond them it is no INT8 engine any more.

    Returns:
        JSON of kind ``budget``; ``chosen`` is null where no set within `limit` holds.
    """
    stage = budget.judged_stage(search.judge.stages)
    names = list(search.groups)
    whole = search.score(())
    rows = []
    for name in tqdm(names, desc="measuring nodes", unit="node", **PROGRESS):
        alone, left_out = search.score([other for other in names if other != name]), search.score([name])
        rows.append(_sensitivity(search, name, alone, left_out, whole, stage))
    rows.sort(key=lambda r: -r["harm"])
    order = [row["node"] for row in rows]
    points = _frontier(search, order[: _within(search, order, limit)], budget, stage)
    plain_ms = statistics.median(point["float_ms"] for point in points)
    for point in points:  # each was timed in turn with FP32; on one scale, so that they can be compared
        point["latency_ms"] = point["latency_ratio"] * plain_ms
    holding = [i for i, point in enumerate(points) if budget.holds(point)]
    return {
        **_describe(search, budget, stage, plain_ms),
        "nodes": rows,
        "frontier": points,
        "chosen": holding[0] if holding else None,
        "measured": search.journal.measured,
        "reused": search.journal.reused,
        "seconds": search.journal.seconds,
    }


def _sensitivity(
    search: Search, name: str, alone: dict[str, Any], left_out: dict[str, Any], whole: dict[str, Any], stage: str
) -> dict[str, Any]:
    lost = 1.0 - alone[stage]["overlap_at_10"]
    gained = left_out[stage]["overlap_at_10"] - whole[stage]["overlap_at_10"]
    kinds = {n.name: n.op_type for n in search.placement.plain.graph.node}
    return {
        "node": name,
        "op": kinds[name],
        "members": list(search.groups[name]),
        "harm": lost + gained,
        "alone": {k: alone[stage][k] for k in ("map_drop", "map_drop_upper", "overlap_at_10")},
        "left_out": {
            "map_gain": left_out[stage]["mAP"] - whole[stage]["mAP"],
            "overlap_at_10": left_out[stage]["overlap_at_10"],
        },
    }


def _within(search: Search, order: Nodes, limit: int) -> int:
    """How many groups, the worst first, can be in float without more than `limit` products among them."""
    from nformer_edge.quantize.place_cpu import excluded_products

    count = 0
    while count < len(order) and excluded_products(search.placement.plain, search.members(order[: count + 1])) <= limit:
        count += 1
    return count


def _frontier(search: Search, order: Nodes, budget: BudgetSpec, stage: str) -> list[dict[str, Any]]:
    """Points by how many groups are in float: 0, 1, 2, 4 ... all of `order`, and those that halving has looked at."""
    sizes = sorted({0, len(order), *(1 << i for i in range(len(order).bit_length()) if 1 << i < len(order))})
    points = {size: search.point(order[:size], stage) for size in tqdm(sizes, desc="frontier", **PROGRESS)}
    holding = [size for size in sizes if budget.holds(points[size])]
    if holding:
        high = holding[0]
        low = max((size for size in sizes if size < high), default=high)
        while high - low > 1:
            middle = (low + high) // 2
            points[middle] = search.point(order[:middle], stage)
            low, high = (low, middle) if budget.holds(points[middle]) else (middle, high)
    return [points[size] for size in sorted(points)]


def _describe(search: Search, budget: BudgetSpec, stage: str, plain_ms: float) -> dict[str, Any]:
    reference = search.reference()
    held_out = search.judge.held_out.describe()
    return {
        "kind": "budget",
        "version": VERSION,
        "backend": "onnxruntime",
        "stage": stage,
        "budget": str(budget),
        "max_map_drop": budget.max_map_drop,
        "min_overlap": budget.min_overlap,
        "held_out": held_out,
        "float": {**reference[stage], "latency_ms": plain_ms, "size_mb": search.judge.size_mb(), "stages": reference},
    }
