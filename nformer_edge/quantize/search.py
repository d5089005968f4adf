"""INT8 to an accuracy budget: which nodes stay in float so that held-out people are still found.

Each node, or nodes in a row (`quantize.placement.node_groups`), is measured twice: alone in INT8, all else in float;
and left out, all else in INT8. The nodes are then put in order by the overlap@10 that they cost, and left in float from
the worst on, in growing sets that are each measured whole, until the budget holds; between the last set that failed and
the first that held, halving finds the smallest. mAP says whether the budget holds; neighbors say whose fault it is,
because one node moves mAP by less than some hundreds of queries can tell.

The order is by what a node costs alone and by what leaving it out gains. On a CPU an activation with a bad range is
felt by the node that makes it and by those that read it, and stays INT8 until all of them are in float: leaving out one
of them gains nothing, and each costs dear alone.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from tqdm import tqdm

from nformer_edge.core.journal import Journal
from nformer_edge.core.terminal import PROGRESS
from nformer_edge.core.values import JSON, Table, from_json, to_table
from nformer_edge.quantize.evaluator import Evaluator
from nformer_edge.quantize.placement import Placement
from nformer_edge.quantize.placement_cpu import excluded_multiplications
from nformer_edge.quantize.spec import BudgetSpec
from nformer_edge.quantize.values import BudgetSearch, NodeCost, Point, Score

Scores = Mapping[str, Score]


@dataclass(frozen=True)
class Search:
    """One search: a placement, who scores it, and what is known already.

    Args:
        placement: Q/DQ in every node.
        groups: nodes to measure together, by the first one's name.
        evaluator: scores a backbone.
        journal: keeps what was measured.
        facts: what the scores depend on besides the nodes in float.
        excluded: nodes that are in float whatever is found.
    """

    placement: Placement
    groups: Mapping[str, tuple[str, ...]]
    evaluator: Evaluator
    journal: Journal
    facts: Table
    excluded: tuple[str, ...] = ()

    def score(self, in_float: Iterable[str]) -> Scores:
        """Of the backbone with these groups in float, by scope."""
        names = self.members(in_float)
        facts: Table = {**self.facts, "score": _sorted(names)}
        return recall_scores(self.journal, facts, lambda: self.evaluator.score(self.placement.without(names)))

    def point(self, in_float: Sequence[str]) -> Point:
        """The same as a point of the frontier, with latency and size."""
        names, scores = self.members(in_float), self.score(in_float)

        def costs() -> list[float]:
            model = self.placement.without(names)
            return [*self.evaluator.latency(model), self.evaluator.size_mb(model)]

        float_ms, ratio, size = self.journal.recall({**self.facts, "costs": _sorted(names)}, costs)
        return Point(tuple(names), scores, float_ms, ratio, ratio * float_ms, size)

    def members(self, groups: Iterable[str]) -> list[str]:
        """The nodes of these groups, after those that are in float anyway."""
        return [*self.excluded, *(name for group in groups for name in self.groups[group])]


def recall_scores(journal: Journal, facts: Table, score: Callable[[], Scores]) -> Scores:
    """Scores by scope, remembered or measured now."""
    found = journal.recall(facts, lambda: to_table(score()))
    return {scope: from_json(Score, one) for scope, one in found.items()}


def run_search(search: Search, budget: BudgetSpec, limit: int, *, model: str, calibration: str) -> BudgetSearch:
    """Measures every node, puts them in order, and finds the fewest in float that keep within the budget.

    Args:
        search: what to measure with.
        budget: what must hold.
        limit: multiplications that may stay in float at most: beyond them it is no INT8 engine any more.
        model: the bundle's name.
        calibration: the ranges' method.

    Returns:
        A search of which `chosen` is None where no set within `limit` holds.
    """
    evaluator, journal, names = search.evaluator, search.journal, list(search.groups)
    scope = budget.counts(evaluator.scopes)
    whole = search.score(())[scope]
    rows = []
    for name in tqdm(names, desc="measuring nodes", unit="node", **PROGRESS):
        alone = search.score([other for other in names if other != name])[scope]
        rows.append(_cost(search, name, alone, search.score([name])[scope], whole))
    rows.sort(key=lambda row: -row.harm)
    order = [row.node for row in rows]
    points = _frontier(search, order[: _within(search, order, limit)], budget, scope)
    float_ms = statistics.median(point.float_ms for point in points)
    # Each was timed in turn with FP32; on one scale they can be compared.
    points = [replace(point, latency_ms=point.latency_ratio * float_ms) for point in points]
    reference = recall_scores(journal, {**search.facts, "float": True}, evaluator.score)
    return BudgetSearch(
        model=model,
        calibration=calibration,
        scope=scope,
        budget=budget,
        held_out=evaluator.held_out.facts,
        fp32=Point((), reference, float_ms, 1.0, float_ms, evaluator.size_mb()),
        nodes=tuple(rows),
        frontier=tuple(points),
        chosen=next((i for i, point in enumerate(points) if budget.holds(point.scores[scope])), None),
        measured=journal.measured,
        reused=journal.reused,
        seconds=journal.seconds,
    )


def _sorted(names: Iterable[str]) -> list[JSON]:
    return list(sorted(names))


def _cost(search: Search, name: str, alone: Score, left_out: Score, whole: Score) -> NodeCost:
    harm = 1.0 - alone.overlap_at_10 + left_out.overlap_at_10 - whole.overlap_at_10
    kind = next(n.op_type for n in search.placement.plain.graph.node if n.name == name)
    return NodeCost(name, kind, search.groups[name], harm, alone, left_out)


def _within(search: Search, order: Sequence[str], limit: int) -> int:
    """How many groups, the worst first, can be in float without more than `limit` multiplications among them."""
    count = 0
    while (
        count < len(order)
        and excluded_multiplications(search.placement.plain, search.members(order[: count + 1])) <= limit
    ):
        count += 1
    return count


def _frontier(search: Search, order: Sequence[str], budget: BudgetSpec, scope: str) -> list[Point]:
    """Points by how many groups are in float: 0, 1, 2, 4 ... all of `order`, and those that halving has looked at."""
    sizes = sorted({0, len(order), *(1 << i for i in range(len(order).bit_length()) if 1 << i < len(order))})
    points = {size: search.point(order[:size]) for size in tqdm(sizes, desc="frontier", **PROGRESS)}
    holding = [size for size in sizes if budget.holds(points[size].scores[scope])]
    if holding:
        high = holding[0]
        low = max((size for size in sizes if size < high), default=high)
        while high - low > 1:
            middle = (low + high) // 2
            points[middle] = search.point(order[:middle])
            low, high = (low, middle) if budget.holds(points[middle].scores[scope]) else (middle, high)
    return [points[size] for size in sorted(points)]
