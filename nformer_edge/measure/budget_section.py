"""The report's section on accuracy budgets: what INT8 costs node by node, and what can be had for what."""

from __future__ import annotations

from typing import Any

from nformer_edge.measure import sections
from nformer_edge.measure.sections import Results, row, section, table, text
from nformer_edge.measure.svg import Bar, Dot, Line, chart, legend, linear, stacked_bars
from nformer_edge.measure.table import number, percent

#: Nodes whose bars are drawn, the worst first.
SHOWN = 15


def budget(results: Results) -> str:
    """Each search: accuracy against latency and size, its points as a table, and the nodes that cost most."""
    return "\n".join(map(_search, sections.of_kind(results, "budget")))


def _search(result: dict[str, Any]) -> str:
    held, drop = result["held_out"], result["max_map_drop"]
    allowed = "" if drop is None else f"at most {drop:g} points of mAP lost; "
    note = (
        f"{result['model']}, {result['backend']}: {allowed}measured on {held['images']:,} images of "
        f"{held['identities']:,} people held out of training. A point has so many nodes in float, the others in INT8."
    )
    body = ""
    for key, label in (("latency_ms", "latency, ms an image"), ("size_mb", "size, MB")):
        body += f"<h3>Accuracy against {text(label.partition(',')[0])}</h3>{_frontier(result, key, label)}"
    return section("Accuracy budget", body + _points(result) + _nodes(result), note)


def _frontier(result: dict[str, Any], key: str, label: str) -> str:
    plain, points = result["float"], result["frontier"]
    places = [(p[key], 100 * p["mAP"]) for p in points]
    dots = [Dot(plain[key], 100 * plain["mAP"], 7, "FP32", hollow=True)]
    for i, (p, place) in enumerate(zip(points, places, strict=True)):
        chosen = i == result["chosen"]
        words = f"chosen: {len(p['float_nodes'])} in float" if chosen else ""
        dots.append(Dot(*place, 1 if chosen else 0, words, below=True))
    xs, ys = [d.x for d in dots], [d.y for d in dots]
    lines = [Line("INT8, ever more nodes in float", places, 0)]
    if result["max_map_drop"] is not None:
        least = 100 * plain["mAP"] - result["max_map_drop"]
        ys.append(least)
        lines.append(Line(f"budget: {least:.1f} mAP", [(min(xs), least), (max(xs), least)], 4, dashed=True))
    title = f"mAP against {label}"
    drawn = chart(title, linear(label, xs, wanted=7), linear("mAP, %", ys), lines, dots)
    return drawn + legend([(line.label, line.color, line.dashed) for line in lines])


def _points(result: dict[str, Any]) -> str:
    def line(name: str, p: dict[str, Any], drop: str) -> str:
        figures = [percent(p["mAP"], 2), drop, percent(p["rank1"], 2), number(p["latency_ms"], 2)]
        return row([name, *figures, number(p["size_mb"], 2)])

    cells = [line("FP32", result["float"], "")]
    for i, p in enumerate(result["frontier"]):
        name = f"INT8, {len(p['float_nodes'])} in float"
        if i == result["chosen"]:
            name = f"<strong>{name} (chosen)</strong>"
        cells.append(line(name, p, percent(p["map_drop"], 2)))
    return table(["", "mAP", "points lost", "Rank-1", "ms an image", "MB"], cells)


def _nodes(result: dict[str, Any]) -> str:
    """The worst nodes as the search put them in order: in INT8 alone, and left out alone."""
    nodes = result["nodes"][:SHOWN]
    body = ""
    for title, name, side, figure in (
        ("mAP lost when this node alone is INT8", "lost, alone in INT8", "alone", "map_drop"),
        ("mAP gained when this node alone is left in float", "gained, left in float", "left_out", "map_gain"),
    ):
        bars = [
            Bar(f"{n['node']} ({n['op']})", [(name, 100 * n[side][figure])], f"{100 * n[side][figure]:.2f} points")
            for n in nodes
        ]
        drawn = stacked_bars(bars, title, ("lost, alone in INT8", "gained, left in float"), "points")
        body += f"<h3>{text(title)}</h3>{drawn}" if drawn else ""
    return body
