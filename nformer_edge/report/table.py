"""Aligned tables of text, and numbers as they stand in them. Nothing is computed here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def percent(fraction: float | None, digits: int = 1) -> str:
    """0.8734 as ``87.3``; empty if there is none."""
    return "" if fraction is None else f"{100 * fraction:.{digits}f}"


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


def format_gates(result: dict[str, Any]) -> str:
    """A parity result's gates as text, stage by stage, with the verdict below."""
    body = []
    for stage in result["stages"]:
        for gate in stage["gates"]:
            shown = (gate["title"], gate_measured(gate), gate_bound(gate), gate["status"])
            body.append([stage["stage"], stage["precision"], *shown])
    blame = f", to blame: {result['blame']}" if result["blame"] else ""
    table = format_table(["stage", "precision", "gate", "measured", "bound", "status"], body, left=3)
    return f"{table}\n{result['engine']['label']} against {result['reference']['label']}: {result['status']}{blame}"


def gate_measured(gate: dict[str, Any]) -> str:
    """A gate's number, with its confidence bounds if it has any."""
    if gate["measured"] is None:
        return "not a number"
    value = f"{gate['measured']:.6g}"
    return value if gate["lower"] is None else f"{value} [{gate['lower']:.4f}, {gate['upper']:.4f}]"


def gate_bound(gate: dict[str, Any]) -> str:
    """A gate's bound with the side that is good."""
    if gate["bound"] is None:
        return ""
    return f"{'<=' if gate['gate'] == 'tensor' else '>='} {gate['bound']:g}"
