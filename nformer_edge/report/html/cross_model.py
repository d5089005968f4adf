"""The report's section on mixed fleets: who embeds the queries, who the gallery, and what that costs."""

from __future__ import annotations

from nformer_edge.report.cross_model_table import HEADERS, cells, note
from nformer_edge.report.html import sections
from nformer_edge.report.html.sections import Results, row, section, table, text


def fleet(results: Results) -> str:
    """Each fleet's pairings: accuracy and threshold."""
    parts = []
    for result in sections.of_kind(results, "fleet"):
        rows = [row([text(cell) for cell in cells(pairing)], left=2) for pairing in result["pairings"]]
        parts.append(section("Mixed fleet", table(HEADERS, rows, left=2), note(result)))
    return "\n".join(parts)
