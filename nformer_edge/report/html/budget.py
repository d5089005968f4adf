"""The report's section on accuracy budgets: what INT8 costs node by node, and accuracy against latency and size."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from nformer_edge.quantize.values import BudgetSearch, Point, Score
from nformer_edge.report.html.sections import Results, picked, row, section, table, text
from nformer_edge.report.html.svg import Bar, Dot, Line, chart, legend, linear, stacked_bars
from nformer_edge.report.table import number, percent

#: Nodes whose bars are drawn, the worst first.
SHOWN = 15


def budget(results: Results) -> str:
    """Each search: accuracy against latency and size, its points as a table, and the nodes that cost most."""
    return "\n".join(map(_search, picked(results, BudgetSearch)))


def _search(search: BudgetSearch) -> str:
    held = search.held_out
    note = (
        f"{search.model}: {search.budget}; measured on {held.images:,} images of {held.whom} held out "
        "of training. The number next to a dot is how many nodes are in float; the others are in INT8. The budget must "
        "hold with 95 % confidence."
    )
    body = ""
    for bound in _bounds(search):
        for label, value in _COSTS.items():
            title = f"{bound.label} against {label.partition(',')[0]}"
            body += f"<h3>{text(title)}</h3>{_frontier(search, bound, label, value)}"
    return section("Accuracy budget", body + _points(search) + _nodes(search), note)


#: The cost axes of the charts.
_COSTS: dict[str, Callable[[Point], float]] = {
    "latency, ms an image": lambda point: point.latency_ms,
    "size, MB": lambda point: point.size_mb,
}


@dataclass(frozen=True)
class _Bound:
    """What a search was asked to hold: a score, and the lowest value that was asked for, both in percent."""

    label: str
    value: Callable[[Score], float]
    lowest: float | None


def _bounds(search: BudgetSearch) -> list[_Bound]:
    drop, overlap, mAP = search.budget.max_map_drop, search.budget.min_overlap, 100 * search.score(search.fp32).mAP
    found = [_Bound("mAP", lambda score: 100 * score.mAP, None if drop is None else mAP - drop)] if mAP >= 0 else []
    if overlap:  # 0 asks for none
        found.append(_Bound("overlap@10", lambda score: 100 * score.overlap_at_10, 100 * overlap))
    return found


def _frontier(search: BudgetSearch, bound: _Bound, cost: str, of: Callable[[Point], float]) -> str:
    def dot(point: Point, color: int, label: str, hollow: bool = False) -> Dot:
        return Dot(of(point), bound.value(search.score(point)), color, label, hollow)

    dots = []
    for i, point in enumerate(search.frontier):
        chosen = i == search.chosen
        dots.append(dot(point, int(chosen), f"{len(point.float_nodes)}{' chosen' * chosen}"))
    dots.sort(key=lambda d: -d.color)  # the chosen one's word comes first
    dots.insert(0, dot(search.fp32, 7, "FP32", hollow=True))
    xs, ys = [d.x for d in dots], [d.y for d in dots]
    lines: list[Line] = []
    if bound.lowest is not None:
        ys.append(bound.lowest)
        ends = [(min(xs), bound.lowest), (max(xs), bound.lowest)]
        lines.append(Line(f"budget: {bound.lowest:.1f} % {bound.label}", ends, 4, dashed=True))
    x, y = linear(cost, xs, wanted=7), linear(f"{bound.label}, %", ys)
    return chart(f"{bound.label} against {cost}", x, y, lines, dots) + legend(lines)


def _points(search: BudgetSearch) -> str:
    def line(name: str, point: Point) -> str:
        score = search.score(point)
        shares = (score.mAP, score.map_drop, score.map_drop_upper, score.rank1)
        scores = [*(percent(share, 2) for share in shares), percent(score.overlap_at_10)]
        return row([name, *scores, number(point.latency_ms, 2), number(point.size_mb, 2)])

    cells = [line("FP32", search.fp32)]
    for i, point in enumerate(search.frontier):
        name = f"INT8, {len(point.float_nodes)} in float"
        cells.append(line(f"<strong>{name} (chosen)</strong>" if i == search.chosen else name, point))
    return table(["", "mAP", "points lost", "at most (95 %)", "Rank-1", "overlap@10", "ms an image", "MB"], cells)


def _nodes(search: BudgetSearch) -> str:
    """The worst nodes as bars; all of them as a table."""
    bars, cells = [], []
    whole = search.score(search.frontier[0]).mAP  # the first has no node in float
    for cost in search.nodes:
        lost, name = 100 * (1 - cost.alone.overlap_at_10), f"{cost.node} ({cost.op})"
        bars.append(Bar(name, [("overlap@10 lost", lost)], f"{lost:.2f} %"))
        gained = percent(cost.left_out.mAP - whole, 2)
        cells.append(row([text(name), f"{lost:.2f}", percent(cost.alone.map_drop, 2), gained]))
    title = "Overlap@10 lost when this node alone is INT8"
    drawn = stacked_bars(bars[:SHOWN], title, ("overlap@10 lost",), "%")
    headers = ["node", "overlap@10 lost, %", "mAP lost, points", "mAP gained in float, points"]
    full = f"<details><summary>Every node</summary>{table(headers, cells)}</details>"
    return (f"<h3>{title}</h3>{drawn}" if drawn else "") + full
