"""A mixed fleet's pairings as text. Nothing is computed here."""

from __future__ import annotations

from typing import Any

from nformer_edge.report.table import format_table, number, percent

HEADERS = (
    "query",
    "gallery",
    "mAP",
    "Rank-1",
    "mAP kept",
    "Rank-1 kept",
    "threshold",
    "true match",
    "false match, old",
)


def cells(pairing: dict[str, Any]) -> list[str]:
    """One pairing, under `HEADERS`."""
    return [
        pairing["query"],
        pairing["gallery"],
        percent(pairing["mAP"], 2),
        percent(pairing["rank1"], 2),
        _kept(pairing["mAP_kept"]),
        _kept(pairing["rank1_kept"]),
        f"{pairing['threshold']:.4f}",
        percent(pairing["true_match_rate"], 2),
        f"{pairing['at_reference_threshold']['false_match_rate']:.3g}",
    ]


def _kept(ratio: dict[str, float | None]) -> str:
    value, lower, upper = (ratio[name] for name in ("value", "lower", "upper"))
    if value is None:
        return "undecided"
    bounds = "undecided" if lower is None else f"{percent(lower, 2)}, {percent(upper, 2)}"
    return f"{percent(value, 2)} [{bounds}]"


def note(result: dict[str, Any]) -> str:
    """How to read the pairings."""
    return (
        f"Threshold: the cosine distance at which {result['wanted_false_match_rate']:g} of "
        f"{number(result['pairs']['impostor'], 0)} pairs of different people across cameras are accepted; true match: "
        f"what it accepts of {number(result['pairs']['genuine'], 0)} pairs of the same person. "
        f"False match, old: the share at the threshold of {result['models'][0]['label']} alone. "
        "Percent; kept: of that model alone, with 95 % intervals (paired bootstrap over queries)."
    )


def format_fleet(result: dict[str, Any]) -> str:
    """A fleet's result as text: one line a pairing, and how to read it."""
    return f"{format_table(HEADERS, [cells(p) for p in result['pairings']], left=2)}\n{note(result)}"
