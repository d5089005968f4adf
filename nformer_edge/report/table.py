"""Aligned tables of text, and numbers as they stand in them. Nothing is computed here."""

from __future__ import annotations

import math
from collections.abc import Sequence


def percent(fraction: float | None, digits: int = 1) -> str:
    """0.8734 as ``87.3``; empty if there is none, or it is NaN."""
    return "" if fraction is None or math.isnan(fraction) else f"{100 * fraction:.{digits}f}"


def number(value: float | None, digits: int = 1) -> str:
    """A number with thousands apart; empty if there is none."""
    return "" if value is None else f"{value:,.{digits}f}"


def format_table(headers: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Aligned text: the first `left` columns to the left, the others to the right."""
    widths = [max(len(str(r[i])) for r in (headers, *rows)) for i in range(len(headers))]

    def line(cells: Sequence[str]) -> str:
        aligned = (c.ljust(w) if i < left else c.rjust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=True)))
        return "  ".join(aligned).rstrip()

    return "\n".join([line(headers), "  ".join("-" * w for w in widths), *(line(r) for r in rows)])
