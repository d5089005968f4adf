"""One self-contained HTML page from results in JSON. It reads and draws; it computes nothing."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nformer_edge.core.artifact import atomic_write
from nformer_edge.core.errors import ArtifactError
from nformer_edge.report.html import sections
from nformer_edge.report.html.budget import budget
from nformer_edge.report.html.cross_model import fleet
from nformer_edge.report.html.gallery import rank_lists
from nformer_edge.report.html.parity import cosines, gates, layers
from nformer_edge.report.html.sections import text
from nformer_edge.report.html.style import CSS

KINDS = ("evaluation", "parity", "benchmark", "comparison", "training", "fleet", "budget")


def read_result(source: dict[str, Any] | str | os.PathLike[str]) -> dict[str, Any]:
    """A result that a measuring command made: itself, or its JSON file.

    Raises:
        ArtifactError: if the file is missing, is not JSON, or holds something else.
    """
    if isinstance(source, dict):
        result, where = source, "result"
    else:
        where = str(source)
        try:
            result = json.loads(Path(source).read_text())
        except FileNotFoundError as e:
            raise ArtifactError(where, "no such file", "a result in JSON", "Check the path.") from e
        except (OSError, ValueError) as e:
            raise ArtifactError(where, f"no readable JSON ({e})", "a result", "Run the command again.") from e
    kind = result.get("kind") if isinstance(result, dict) else type(result).__name__
    if kind not in KINDS:
        raise ArtifactError(
            where,
            f"kind {kind!r}",
            " | ".join(KINDS),
            "Pass what `evaluate`, `parity`, `benchmark`, `fleet`, `train` or `build-engine` wrote as JSON.",
        )
    return result


def write_report(
    results: Sequence[dict[str, Any] | str | os.PathLike[str]],
    out: str | os.PathLike[str],
    title: str = "nformer-edge report",
) -> Path:
    """Writes the page: one file with its styles, charts and thumbnails inside, readable without a network or scripts.

    Args:
        results: dicts or JSON files, in the order in which models shall stand.
        out: the HTML file.
        title: of the page.

    Returns:
        the path written.

    Raises:
        ArtifactError: if a result cannot be read or used, or the page cannot be written.
    """
    out = Path(out)
    page = render([read_result(r) for r in results], title)
    with atomic_write(out) as file:
        file.write(page.encode())
    return out


def render(results: Sequence[dict[str, Any]], title: str) -> str:
    """The page as a string."""
    parts = (
        sections.summary,
        gates,
        cosines,
        layers,
        budget,
        fleet,
        rank_lists,
        sections.cmc,
        sections.latency,
        sections.comparison,
        sections.baselines,
        sections.training,
        sections.machine,
    )
    try:
        body = "\n".join(filter(None, (part(results) for part in parts)))
        top = _header(results, title)
    except (KeyError, TypeError, AttributeError, IndexError) as e:
        raise ArtifactError(
            "results",
            f"a result without what the report draws ({type(e).__name__}: {e})",
            "results of this version",
            "Measure again with this version.",
        ) from e
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{text(title)}</title>\n<style>{CSS}</style>\n</head>\n<body>\n<main>\n"
        f"{top}\n{body}\n<footer>Drawn from JSON by nformer-edge; every figure stands in those files.</footer>\n"
        "</main>\n</body>\n</html>\n"
    )


def _header(results: Sequence[dict[str, Any]], title: str) -> str:
    """Title, data, and a few facts: verdicts and the data's size."""
    data = next((r["data"] for r in results if "data" in r), None)
    facts = []
    for result in results:
        if result["kind"] == "parity":
            facts.append((f"{result['engine']['label']}: parity", sections.pill(result["status"])))
    if data and "query" in data:
        facts = [
            ("data", text(data["name"])),
            ("queries", f"{data['query']:,}"),
            ("gallery", f"{data['gallery']:,}"),
            *facts,
        ]
    cells = "".join(f"<div><dt>{text(name)}</dt><dd>{value}</dd></div>" for name, value in facts)
    machine = next((r["machine"] for r in results if r.get("machine")), None)
    where = f"{machine['cpu']}, {machine['cores']} cores, {machine['system']}" if machine else ""
    told = f'<p class="soft">Measured on {text(where)}</p>' if where else ""
    listed = f'<dl class="facts">{cells}</dl>' if cells else ""
    return f"<header><h1>{text(title)}</h1>{told}{listed}</header>"
