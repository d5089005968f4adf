"""The report's section on accuracy budgets: what INT8 costs node by node, and what can be had for what."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from nformer_edge.report.html import sections
from nformer_edge.report.html.sections import Results, row, section, table, text
from nformer_edge.report.html.svg import Bar, Dot, Line, chart, legend, linear, stacked_bars
from nformer_edge.report.table import number, percent

#: Nodes whose bars are drawn, the worst first.
SHOWN = 15


def budget(results: Results) -> str:
    """Each search: accuracy against latency and size, its points as a table, and the nodes that cost most."""
    return "\n".join(map(_search, sections.of_kind(results, "budget")))


def _search(result: dict[str, Any]) -> str:
    held = result["held_out"]
    note = (
        f"{result['model']}, {result['backend']}: {result['budget']}; measured on {held['images']:,} images of "
        f"{held['identities']:,} people held out of training. A number is how many nodes are in float, the others in "
        "INT8; the budget must hold with 95 % confidence."
    )
    body = ""
    for bound in _bounds(result):
        for key, label in (("latency_ms", "latency, ms an image"), ("size_mb", "size, MB")):
            title = f"{bound.title} against {label.partition(',')[0]}"
            body += f"<h3>{text(title)}</h3>{_frontier(result, bound, key, label)}"
    return section("Accuracy budget", body + _points(result) + _nodes(result), note)


@dataclass(frozen=True)
class _Bound:
    """What a search was asked to hold: a field of its points in percent, FP32 has, the least that was asked."""

    title: str
    label: str
    key: str
    fp32: float
    least: float | None


def _bounds(result: dict[str, Any]) -> list[_Bound]:
    plain, drop, neighbors = 100 * result["float"]["mAP"], result["max_map_drop"], result["min_overlap"]
    found = [_Bound("Accuracy", "mAP", "mAP", plain, None if drop is None else plain - drop)]
    if neighbors:  # 0 asks for none
        found.append(_Bound("Neighbors kept", "neighbors kept", "overlap_at_10", 100.0, 100 * neighbors))
    return found


def _frontier(result: dict[str, Any], bound: _Bound, key: str, label: str) -> str:
    chosen = result["chosen"]
    dots = [
        Dot(p[key], 100 * p[bound.key], 1 if i == chosen else 0, f"{len(p['float_nodes'])}{' chosen' * (i == chosen)}")
        for i, p in enumerate(result["frontier"])
    ]
    dots.sort(key=lambda d: -d.color)  # the chosen one's word comes first
    dots.insert(0, Dot(result["float"][key], bound.fp32, 7, "FP32", hollow=True))
    xs, ys = [d.x for d in dots], [d.y for d in dots]
    lines: list[Line] = []
    if bound.least is not None:
        ys.append(bound.least)
        ends = [(min(xs), bound.least), (max(xs), bound.least)]
        lines.append(Line(f"budget: {bound.least:.1f} {bound.label}", ends, 4, dashed=True))
    title = f"{bound.label} against {label}"
    drawn = chart(title, linear(label, xs, wanted=7), linear(f"{bound.label}, %", ys), lines, dots)
    return drawn + legend([(line.label, line.color, line.dashed) for line in lines])


def _points(result: dict[str, Any]) -> str:
    def line(name: str, p: dict[str, Any]) -> str:
        drop = [percent(p.get(key), 2) for key in ("map_drop", "map_drop_upper")]  # FP32 has none
        scores = [percent(p["mAP"], 2), *drop, percent(p["rank1"], 2), percent(p.get("overlap_at_10"), 1)]
        return row([name, *scores, number(p["latency_ms"], 2), number(p["size_mb"], 2)])

    cells = [line("FP32", result["float"])]
    for i, p in enumerate(result["frontier"]):
        name = f"INT8, {len(p['float_nodes'])} in float"
        if i == result["chosen"]:
            name = f"<strong>{name} (chosen)</strong>"
        cells.append(line(name, p))
    return table(["", "mAP", "points lost", "at most (95 %)", "Rank-1", "neighbors kept", "ms an image", "MB"], cells)


def _nodes(result: dict[str, Any]) -> str:
    """The worst nodes, as the search put them in order, as bars; all of them as a table."""
    bars, cells = [], []
    for n in result["nodes"]:
        lost, name = 100 * (1 - n["alone"]["overlap_at_10"]), f"{n['node']} ({n['op']})"
        bars.append(Bar(name, [("neighbors lost", lost)], f"{lost:.2f} %"))
        drop, gain = percent(n["alone"]["map_drop"], 2), percent(n["left_out"]["map_gain"], 2)
        cells.append(row([text(name), f"{lost:.2f}", drop, gain]))
    title = "Neighbors lost when this node alone is INT8"
    drawn = stacked_bars(bars[:SHOWN], title, ("neighbors lost",), "%")
    headers = ["node", "neighbors lost, %", "mAP lost, points", "mAP gained in float, points"]
    full = f"<details><summary>Every node</summary>{table(headers, cells)}</details>"
    return (f"<h3>{title}</h3>{drawn}" if drawn else "") + full
