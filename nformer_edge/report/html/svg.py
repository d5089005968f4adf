"""Charts as inline SVG, colored by the page's CSS: marks over two axes, and bars."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from html import escape

WIDTH, HEIGHT = 720, 320
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 16, 12, 42

#: Colors that the style sheet has, light and dark.
COLORS = 8


@dataclass(frozen=True)
class Line:
    """One curve. `color` is an index into the style sheet's colors."""

    label: str
    points: Sequence[tuple[float, float]]
    color: int
    dashed: bool = False


@dataclass(frozen=True)
class Dot:
    """One point with a word beside it, where there is room; `hollow` for what it is compared with."""

    x: float
    y: float
    color: int
    label: str = ""
    hollow: bool = False


@dataclass(frozen=True)
class Axis:
    """One axis: its ends and its ticks (value, what stands there). Equal distances are equal numbers."""

    label: str
    low: float
    high: float
    ticks: Sequence[tuple[float, str]]
    scale: Callable[[float], float] = field(default=float)

    def place(self, value: float) -> float:
        """Where `value` stands, 0 at the low end and 1 at the high one."""
        low, high = self.scale(self.low), self.scale(self.high)
        return (self.scale(min(max(value, self.low), self.high)) - low) / (high - low)


def ticks(low: float, high: float, wanted: int = 5) -> list[float]:
    """Round numbers that cover low..high, about `wanted` steps of 1, 2 or 5 times a power of ten."""
    raw = max(high - low, 1e-12) / wanted
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, last + 1)]


def _number(value: float) -> str:
    return f"{value:,.6g}"


def linear(label: str, values: Sequence[float], *, highest: float | None = None, wanted: int = 5) -> Axis:
    """An axis with round ends that cover `values`, a little room beyond a single one; no tick above `highest`."""
    low, high = min(values), max(values)
    if high - low < 1e-9 * max(1.0, abs(high)):
        low, high = low - 0.05 * max(abs(low), 1e-6), high + 0.05 * max(abs(high), 1e-6)
    shown = [t for t in ticks(low, high, wanted) if highest is None or t <= highest + 1e-9]
    return Axis(label, shown[0], max(shown[-1], high), [(t, _number(t)) for t in shown])


def decades(label: str, values: Sequence[float], most: int = 6) -> Axis:
    """A logarithmic axis from one power of ten to another, a little beyond the positive `values` on either side."""
    low, high = math.floor(math.log10(min(values)) - 0.1), math.ceil(math.log10(max(values)) + 0.1)
    high = max(high, low + 1)
    step = math.ceil((high - low) / most)
    shown = [(10.0**p, f"{10.0**p:g}") for p in range(low, high + 1, step)]
    return Axis(label, 10.0**low, 10.0**high, shown, math.log10)


def whole(label: str, low: float, high: float) -> Axis:
    """Whole numbers, the first always among the ticks: ranks and epochs begin at 1."""
    high = max(high, low + 1)
    step = max(1, math.ceil(ticks(low, high, 8)[1] - ticks(low, high, 8)[0]))
    shown = [low, *(t for t in range(step * (int(low) // step + 1), int(high) + 1, step) if t <= high)]
    return Axis(label, low, high, [(t, _number(t)) for t in shown])


def legend(lines: Sequence[Line]) -> str:
    """Labels with their color's mark."""
    items = "".join(
        f'<li><span class="key c{line.color % COLORS}{" dashed" * line.dashed}"></span>{escape(line.label)}</li>'
        for line in lines
    )
    return f'<ul class="legend">{items}</ul>'


def chart(title: str, x: Axis, y: Axis, lines: Sequence[Line] = (), dots: Sequence[Dot] = ()) -> str:
    """Lines and dots over two axes. What lies beyond an axis is drawn at its end. No legend.

    Of words that would lie over each other the first dot's is written.
    """

    def place(px: float, py: float) -> tuple[float, float]:
        across, up = x.place(px) * (WIDTH - _LEFT - _RIGHT), y.place(py) * (HEIGHT - _TOP - _BOTTOM)
        return _LEFT + across, HEIGHT - _BOTTOM - up

    parts = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title, quote=True)}">'
        f"<title>{escape(title)}</title>"
    ]
    for value, words in y.ticks:
        _, at = place(x.low, value)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(f'<text class="tick" x="{_LEFT - 8}" y="{at + 4:.1f}" text-anchor="end">{escape(words)}</text>')
    for value, words in x.ticks:
        at, _ = place(value, y.low)
        parts.append(
            f'<text class="tick" x="{at:.1f}" y="{HEIGHT - _BOTTOM + 18}" text-anchor="middle">{escape(words)}</text>'
        )
    parts.append(
        f'<text class="axis" x="{(WIDTH + _LEFT) / 2}" y="{HEIGHT - 4}" text-anchor="middle">{escape(x.label)}</text>'
        f'<text class="axis" transform="translate(11 {HEIGHT / 2 - 14}) rotate(-90)" text-anchor="middle">'
        f"{escape(y.label)}</text>"
    )
    for line in lines:
        path = " ".join(f"{a:.1f},{b:.1f}" for a, b in (place(*p) for p in line.points if all(map(math.isfinite, p))))
        parts.append(f'<polyline class="curve c{line.color % COLORS}{" dashed" * line.dashed}" points="{path}"/>')
    return "".join([*parts, *_drawn([(dot, *place(dot.x, dot.y)) for dot in dots]), "</svg>"])


def _drawn(dots: Sequence[tuple[Dot, float, float]]) -> list[str]:
    """Circles, then words: each in the first of four places beside its dot that no dot and no earlier word takes."""
    # boxes: left, top, right, bottom
    taken = [(x - 6, y - 6, x + 6, y + 6) for _, x, y in dots]
    circles, words = [], []
    for dot, x, y in dots:
        kind = f"dot c{dot.color % COLORS}{' hollow' * dot.hollow}"
        circles.append(f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="5"/>')
        width = 7.5 * len(dot.label)
        for left, up in ((False, -8.0), (False, 18.0), (True, -8.0), (True, 18.0)) if dot.label else ():
            at = x - 9 - width if left else x + 9
            box = (at, y + up - 11, at + width, y + up + 3)
            outside = box[0] < _LEFT or box[2] > WIDTH or box[1] < 2 or box[3] > HEIGHT - _BOTTOM
            if outside or any(box[0] < t[2] and t[0] < box[2] and box[1] < t[3] and t[1] < box[3] for t in taken):
                continue
            taken.append(box)
            side = f'x="{x - 9:.1f}" y="{y + up:.1f}" text-anchor="end"' if left else f'x="{at:.1f}" y="{y + up:.1f}"'
            words.append(f'<text class="mark" {side}>{escape(dot.label)}</text>')
            break
    return circles + words


def line_chart(lines: Sequence[Line], title: str, x_label: str, y_label: str, y_max: float | None = None) -> str:
    """Curves over whole numbers, with a legend below. Empty if there is no point."""
    points = [p for line in lines for p in line.points if all(map(math.isfinite, p))]
    if not points:
        return ""
    xs, ys = [p[0] for p in points], [p[1] for p in points]
    drawn = chart(title, whole(x_label, min(xs), max(xs)), linear(y_label, ys, highest=y_max), lines)
    return drawn + legend(lines)


@dataclass(frozen=True)
class Bar:
    """One bar of segments (name, value), in the order that they are stacked."""

    label: str
    segments: Sequence[tuple[str, float]]
    total: str


def stacked_bars(bars: Sequence[Bar], title: str, names: Sequence[str], unit: str) -> str:
    """Horizontal bars on one scale; a segment's color is its name's place in `names`. HTML, so that text can wrap.

    A segment below 0 is not drawn: the number beside its bar tells it.
    """
    longest = max((sum(max(v, 0.0) for _, v in bar.segments) for bar in bars), default=0)
    if not longest > 0:
        return ""
    rows = []
    for bar in bars:
        segments, x = [], 0.0
        for name, value in bar.segments:
            width = 100 * max(value, 0.0) / longest
            segments.append(
                f'<rect class="c{names.index(name) % COLORS}" x="{x:.3f}" y="0" width="{width:.3f}" height="10">'
                f"<title>{escape(name)}: {value:.2f} {escape(unit)}</title></rect>"
            )
            x += width
        rows.append(
            f'<div class="bar"><span class="bar-label">{escape(bar.label)}</span>'
            f'<svg viewBox="0 0 100 10" preserveAspectRatio="none" role="img" '
            f'aria-label="{escape(bar.label, quote=True)}">{"".join(segments)}</svg>'
            f'<span class="bar-total">{escape(bar.total)}</span></div>'
        )
    used = {name for bar in bars for name, _ in bar.segments}
    keys = legend([Line(name, (), color) for color, name in enumerate(names) if name in used])
    return f'<div class="bars" role="group" aria-label="{escape(title, quote=True)}">{"".join(rows)}</div>{keys}'
