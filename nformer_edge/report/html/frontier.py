"""The frontier of students and precisions: picture and table."""

from __future__ import annotations

from nformer_edge.report.frontier import Frontier
from nformer_edge.report.html.sections import Results, picked, row, section, table, text
from nformer_edge.report.html.svg import Dot, Line, chart, legend, linear


def frontier(results: Results) -> str:
    """Of every such result, mAP against time with the largest batch, and all figures."""
    return "\n".join(_drawn(found) for found in picked(results, Frontier))


def _drawn(found: Frontier) -> str:
    batch = max(found.rounds)
    dots = [
        Dot(p.ms[batch], 100 * p.mAP, 1 if p.dominated_by is None else 0, p.model.label, hollow=i == 0)
        for i, p in enumerate(found.points)
    ]
    best = sorted((dot for dot in dots if dot.color), key=lambda dot: dot.x)
    lines = [Line("not dominated", [(dot.x, dot.y) for dot in best], 1)]
    x, y = linear(f"ms, batch {batch}", [dot.x for dot in dots]), linear("mAP, %", [dot.y for dot in dots])
    picture = chart(f"mAP against ms, batch {batch}", x, y, lines, dots) + legend(lines)
    rows = [row([text(cell) for cell in point.cells()]) for point in found.points]
    return section("Students, prunings and precisions", picture + table(found.headers, rows, wide=True), found.note)
