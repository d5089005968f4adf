"""One self-contained HTML page from results. It reads and draws; it computes nothing."""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import TypeAlias

from nformer_edge.core.artifact import atomic_write, read_json
from nformer_edge.core.errors import ArtifactError
from nformer_edge.core.values import Result
from nformer_edge.quantize.values import BudgetSearch
from nformer_edge.report.accuracy import Evaluation
from nformer_edge.report.benchmark import Benchmark, Comparison
from nformer_edge.report.cross_model import CrossModel
from nformer_edge.report.frontier import Frontier
from nformer_edge.report.html import sections
from nformer_edge.report.html.budget import budget
from nformer_edge.report.html.frontier import frontier
from nformer_edge.report.html.parity import cosines, gates, layers
from nformer_edge.report.html.sections import Results, text
from nformer_edge.report.parity import Parity
from nformer_edge.training.history import History

#: What the page draws, by kind.
KINDS: dict[str, type[Result]] = {
    cls.kind: cls for cls in (Evaluation, Parity, Benchmark, Comparison, CrossModel, BudgetSearch, Frontier, History)
}

Readable: TypeAlias = "Result | str | os.PathLike[str]"


def read_result(source: Readable) -> Result:
    """A result: itself, or from its JSON file.

    Raises:
        ArtifactError: if the file is missing, is not JSON, or holds something else.
    """
    if not isinstance(source, (str, os.PathLike)):
        return source
    where = os.fspath(source)
    data = read_json(source, "a result in JSON", "Pass a file that a command wrote with -o.")
    kind = data.get("kind") if isinstance(data, dict) else type(data).__name__
    if not isinstance(kind, str) or kind not in KINDS:
        hint = "Pass a JSON file that a command wrote with -o, such as `evaluate` or `benchmark`."
        raise ArtifactError(where, f"kind {kind!r}", " | ".join(KINDS), hint)
    return KINDS[kind].from_json(data, where)


def write_report(results: Sequence[Readable], out: str | os.PathLike[str], title: str = "nformer-edge report") -> Path:
    """Writes the page: one file with its styles, charts and thumbnails inside, readable without a network or scripts.

    Args:
        results: values or JSON files, in the order in which the page shows them.
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


def render(results: Results, title: str) -> str:
    """The page as a string."""
    judged = sections.summary, sections.composition, gates, cosines, layers, budget, frontier, sections.cross_model
    ranked = sections.rank_lists, sections.cmc
    timed = sections.latency, sections.comparison, sections.baselines
    parts = *judged, *ranked, *timed, sections.training, sections.machine
    body = "\n".join(filter(None, (part(results) for part in parts)))
    css = (files(__package__) / "style.css").read_text()
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{text(title)}</title>\n<style>{css}</style>\n</head>\n<body>\n<main>\n"
        f"{_header(results, title)}\n{body}\n"
        "<footer>Every figure on this page is in the JSON files that it was made from.</footer>\n"
        "</main>\n</body>\n</html>\n"
    )


def _header(results: Results, title: str) -> str:
    """Title, data, and a few facts: verdicts and the data's size."""
    facts = [(f"{r.engine.label}: parity", sections.pill(r.status)) for r in results if isinstance(r, Parity)]
    data = next((r.data for r in results if hasattr(r, "data")), None)
    if data:
        counts = [("queries", f"{data.query:,}"), ("gallery", f"{data.gallery:,}")]
        facts = [("data", text(data.name)), *counts, *facts]
    cells = "".join(f"<div><dt>{text(name)}</dt><dd>{value}</dd></div>" for name, value in facts)
    machine = next((r.machine for r in results if hasattr(r, "machine")), None)
    where = f"Measured on {machine.cpu}, {machine.cores} cores, {machine.system}" if machine else ""
    told = f'<p class="soft">{text(where)}</p>' if where else ""
    listed = f'<dl class="facts">{cells}</dl>' if cells else ""
    return f"<header><h1>{text(title)}</h1>{told}{listed}</header>"
