"""Two charts as inline SVG, coloured by the page's CSS: lines, and stacked bars."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 720, 320
_LEFT, _RIGHT, _TOP, _BOTTOM = 48, 16, 12, 40

#: Colours that the style sheet has, light and dark.
COLORS = 8


@dataclass(frozen=True)
class Line:
    """One curve. `color` is an index into the style sheet's colours."""

    label: str
    points: Sequence[tuple[float, float]]
    color: int
    dashed: bool = False


def ticks(low: float, high: float, wanted: int = 5) -> list[float]:
    """Round numbers that cover low..high, about `wanted` steps of 1, 2 or 5 times a power of ten."""
    raw = max(high - low, 1e-12) / wanted
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, last + 1)]


def _number(value: float) -> str:
    return f"{value:,.6g}"


def legend(entries: Sequence[tuple[str, int, bool]]) -> str:
    """Labels with their colour's mark: (label, colour, dashed)."""
    items = "".join(
        f'<li><span class="key c{color % COLORS}{" dashed" if dashed else ""}"></span>{escape(label)}</li>'
        for label, color, dashed in entries
    )
    return f'<ul class="legend">{items}</ul>'


def line_chart(lines: Sequence[Line], title: str, x_label: str, y_label: str, y_max: float | None = None) -> str:
    """Curves over common axes, with a legend below. Empty if there is no point."""
    points = [p for line in lines for p in line.points if all(map(math.isfinite, p))]
    if not points:
        return ""
    xs, ys = [p[0] for p in points], [p[1] for p in points]
    x_low, x_high = min(xs), max(max(xs), min(xs) + 1)
    y_ticks = [t for t in ticks(min(ys), max(ys)) if y_max is None or t <= y_max + 1e-9]
    y_low, y_high = y_ticks[0], max(y_ticks[-1], max(ys), y_ticks[0] + 1e-9)

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - x_low) / (x_high - x_low) * (WIDTH - _LEFT - _RIGHT)
        up = (y - y_low) / (y_high - y_low) * (HEIGHT - _TOP - _BOTTOM)
        return _LEFT + across, HEIGHT - _BOTTOM - up

    parts = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title, quote=True)}">'
        f"<title>{escape(title)}</title>"
    ]
    for tick in y_ticks:
        _, y = place(x_low, tick)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick" x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{_number(tick)}</text>')
    for tick in (t for t in _x_ticks(x_low, x_high) if x_low <= t <= x_high):
        x, _ = place(tick, y_low)
        parts.append(
            f'<text class="tick" x="{x:.1f}" y="{HEIGHT - _BOTTOM + 18}" text-anchor="middle">{_number(tick)}</text>'
        )
    parts.append(
        f'<text class="axis" x="{(WIDTH + _LEFT) / 2}" y="{HEIGHT - 4}" text-anchor="middle">{escape(x_label)}</text>'
        f'<text class="axis" transform="translate(11 {HEIGHT / 2 - 14}) rotate(-90)" text-anchor="middle">'
        f"{escape(y_label)}</text>"
    )
    for line in lines:
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*p) for p in line.points if all(map(math.isfinite, p))))
        dashed = " dashed" if line.dashed else ""
        parts.append(f'<polyline class="curve c{line.color % COLORS}{dashed}" points="{path}"/>')
    parts.append("</svg>")
    return "".join(parts) + legend([(line.label, line.color, line.dashed) for line in lines])


def _x_ticks(low: float, high: float) -> list[float]:
    """Whole numbers, the first always among them: ranks and epochs begin at 1."""
    step = max(1, math.ceil(ticks(low, high, 8)[1] - ticks(low, high, 8)[0]))
    return [low, *(t for t in range(step * (int(low) // step + 1), int(high) + 1, step))]


@dataclass(frozen=True)
class Bar:
    """One bar of segments (name, value), in the order that they are stacked."""

    label: str
    segments: Sequence[tuple[str, float]]
    total: str


def stacked_bars(bars: Sequence[Bar], title: str, names: Sequence[str]) -> str:
    """Horizontal bars on one scale; a segment's colour is its name's place in `names`. HTML, so that text can wrap."""
    longest = max((sum(v for _, v in bar.segments) for bar in bars), default=0)
    if not longest > 0:
        return ""
    rows = []
    for bar in bars:
        segments, x = [], 0.0
        for name, value in bar.segments:
            width = 100 * value / longest
            segments.append(
                f'<rect class="c{names.index(name) % COLORS}" x="{x:.3f}" y="0" width="{width:.3f}" height="10">'
                f"<title>{escape(name)}: {value:.2f} ms</title></rect>"
            )
            x += width
        rows.append(
            f'<div class="bar"><span class="bar-label">{escape(bar.label)}</span>'
            f'<svg viewBox="0 0 100 10" preserveAspectRatio="none" role="img" '
            f'aria-label="{escape(bar.label, quote=True)}">{"".join(segments)}</svg>'
            f'<span class="bar-total">{escape(bar.total)}</span></div>'
        )
    used = [n for n in names if any(n == s for bar in bars for s, _ in bar.segments)]
    keys = legend([(n, names.index(n), False) for n in used])
    return f'<div class="bars" role="group" aria-label="{escape(title, quote=True)}">{"".join(rows)}</div>{keys}'
