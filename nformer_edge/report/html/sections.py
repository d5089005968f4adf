"""The report's sections: values in, HTML out. Nothing is computed; every text is escaped.

Each function takes all results, picks its kind and returns "" where there is none.
"""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Iterable, Sequence
from functools import lru_cache
from html import escape
from typing import TypeVar

from nformer_edge.core.errors import DataError
from nformer_edge.core.machine import MachineFacts
from nformer_edge.core.preprocess import load_image
from nformer_edge.core.values import Result
from nformer_edge.report.accuracy import (
    BACKBONE,
    COMPOSITION_HEADERS,
    NFORMER,
    Evaluation,
    Ranking,
    RankList,
    composition_cells,
)
from nformer_edge.report.benchmark import PERCENTILES, Benchmark, Comparison
from nformer_edge.report.cross_model import HEADERS, CrossModel
from nformer_edge.report.html.svg import Bar, Line, line_chart, stacked_bars
from nformer_edge.report.pipeline import STEPS
from nformer_edge.report.summary import Row, summary_rows
from nformer_edge.report.table import number, percent
from nformer_edge.training.history import History

T = TypeVar("T")

Results = Sequence[Result]

#: In place of a figure that was not measured.
NONE = "\N{EN DASH}"


def text(value: object) -> str:
    """Anything as escaped text; "" for None."""
    return "" if value is None else escape(str(value), quote=True)


def section(title: str, body: str, note: str = "") -> str:
    """A titled card; "" without a body."""
    told = f'<p class="note">{text(note)}</p>' if note else ""
    return f"<section><h2>{text(title)}</h2>{told}{body}</section>" if body else ""


def pill(status: str, words: str = "") -> str:
    """A colored word: passed, failed, undecided, alarm, quiet, reported or short."""
    return f'<span class="pill {text(status)}">{text(words or status)}</span>'


def table(headers: Sequence[str], rows: Sequence[str], left: int = 1, wide: bool = False) -> str:
    """A table that scrolls sideways by itself; `rows` are finished ``<tr>``, closer together if `wide`."""
    if not rows:
        return ""
    head = "".join(f'<th scope="col"{_left(i, left)}>{text(h)}</th>' for i, h in enumerate(headers))
    tight = ' class="tight"' if wide else ""
    return (
        f'<div class="scroll" tabindex="0"><table{tight}><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody>'
        "</table></div>"
    )


def row(cells: Sequence[str], left: int = 1) -> str:
    """A line of finished cells; the first is its header."""
    others = "".join(f"<td{_left(i, left)}>{cell}</td>" for i, cell in enumerate(cells[1:], 1))
    return f'<tr><th scope="row" class="l">{cells[0]}</th>{others}</tr>'


def group(title: str, width: int) -> str:
    """A line that heads the lines below it; `title` is finished HTML."""
    return f'<tr class="group"><th scope="rowgroup" class="l" colspan="{width}">{title}</th></tr>'


def _left(i: int, left: int) -> str:
    return ' class="l"' if i < left else ""


def picked(results: Iterable[object], cls: type[T]) -> list[T]:
    """The results of one class."""
    return [r for r in results if isinstance(r, cls)]


def _latency(r: Row) -> str:
    return NONE if r.latency_ms is None else f"{number(r.latency_ms)} <small>{text(r.latency_kind)}</small>"


def _scores(r: Ranking) -> list[str]:
    """mAP and Rank-1 in percent, their 95 % intervals small beside them."""
    scores = ((r.mAP, *r.mAP_interval), (r.cmc[0], *r.rank1_interval))
    shown = (map(percent, score) for score in scores)
    return [f"{value} <small>{lower}{NONE}{upper}</small>" for value, lower, upper in shown]


def summary(results: Results) -> str:
    """Backbone and +NFormer of each model: accuracy, latency, size."""
    cells = []
    for r in summary_rows(results):
        named = [text(r.model.label), text(r.ranking.name), text(r.precision.upper())]
        figures = [percent(r.ranking.mINP), _latency(r), number(r.size_mb) or NONE]
        cells.append(row([*named, *_scores(r.ranking), *figures], left=3))
    note = (
        "mAP, Rank-1 and mINP in percent, with 95 % intervals by the bootstrap over queries. ms per image: from image "
        "file to ranked gallery, one query at a time; p90 with 99 % confidence, or the median if the run is short."
    )
    headers = ["model", "part", "precision", "mAP", "Rank-1", "mINP", "ms per image", "MB"]
    return section("Summary", table(headers, cells, left=3), note)


def baselines(results: Results) -> str:
    """Other ways to re-rank the same features, where an evaluation has them."""
    cells = []
    for result in picked(results, Evaluation):
        if len(result.rankings) > 2 or result.model is None:
            cells.append(group(text(result.label), 6))
            for r in result.rankings:
                figures = [percent(r.cmc[4]), percent(r.mINP), number(r.seconds, 2)]
                cells.append(row([text(r.title), *_scores(r), *figures]))
    note = "All rankings use the same features. Seconds are for all queries, on the machine below."
    headers = ["ranking", "mAP", "Rank-1", "Rank-5", "mINP", "seconds"]
    return section("Re-ranking", table(headers, cells), note)


def composition(results: Results) -> str:
    """Backbone and head of each model by the number of gallery images a person."""
    cells = []
    for result in picked(results, Evaluation):
        if result.composition is not None and any(r.head for r in result.composition.rows):
            cells.append(group(text(result.label), len(COMPOSITION_HEADERS)))
            cells += [row([text(c) for c in line], left=2) for line in composition_cells(result.composition)]
    note = (
        "In percent, one query a person, the gallery thinned to so many images a person; distractors stay. The head "
        "sees all queries and the thinned gallery in one set (joint), or each query alone with it (per query), as a "
        "search does; told: it knows how many images a person has. 95 % intervals by the bootstrap over people; gain: "
        "head less backbone, in points."
    )
    return section("Images a person", table(COMPOSITION_HEADERS, cells, left=2), note)


def latency(results: Results) -> str:
    """Percentiles of every run, and the mean of each step as bars."""
    cells, bars = [], []
    for result in picked(results, Benchmark):
        cells.append(group(text(result.model.label), 9))
        for run in result.runs:
            figures = [number(v) or NONE for v in (run.early_stopping_ms, *run.percentiles.values())]
            named = [f"{text(run.pipeline)}, {text(run.name)}", number(run.count, 0)]
            cells.append(row([*named, *figures, number(run.images_per_second)]))
            if run.scenario == "SingleStream":
                means = [(s, run.steps[s].mean_ms) for s in STEPS if s in run.steps]
                bars.append(Bar(f"{result.model.label}, {run.pipeline}", means, f"{number(run.latency.mean_ms)} ms"))
    headers = ["scenario", "count", "early stop", *PERCENTILES, "images/s"]
    chart = stacked_bars(bars, "Mean latency by step", STEPS, "ms")
    body = table(headers, cells) + (f"<h3>Mean latency of each step, SingleStream</h3>{chart}" if chart else "")
    note = (
        "Milliseconds from issue to reply, without warm-up. Early stop: an upper bound of the scenario's percentile "
        "(p90 of SingleStream, p99 of MultiStream) with 99 % confidence. A dash: too few samples for that figure."
    )
    return section("Latency", body, note)


def comparison(results: Results) -> str:
    """Ratios pair by pair of models timed in turn."""
    cells = []
    for result in picked(results, Comparison):
        for run in result.runs[1:]:
            figures = [number(v, 3) for v in (run.ratio, run.ratio_p5, run.ratio_p95)]
            label = f"{text(run.label)} / {text(result.runs[0].label)}"
            cells.append(row([label, *figures, number(run.latency.count, 0)]))
    note = "Models timed in turn: latency over the baseline's for the same query. A ratio below 1 is faster."
    return section("Latency ratios", table(["ratio", "median", "p5", "p95", "pairs"], cells), note)


def cross_model(results: Results) -> str:
    """Accuracy and threshold of each pairing of models."""
    parts = []
    for result in picked(results, CrossModel):
        rows = [row([text(cell) for cell in pairing.cells()], left=2) for pairing in result.pairings]
        parts.append(section("Cross-model evaluation", table(HEADERS, rows, left=2), result.note))
    return "\n".join(parts)


#: Twice the size that the page shows them at, for dense screens.
_WIDTH, _HEIGHT = 116, 232


@lru_cache(maxsize=1024)
def thumbnail(path: str) -> str | None:
    """The image as a JPEG data URI of at most 116 x 232 pixels, or None where it cannot be read here."""
    try:
        image = load_image(path)
    except DataError:
        return None
    image.thumbnail((_WIDTH, _HEIGHT))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=82)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _figure(path: str, words: str, caption: str, kind: str = "") -> str:
    uri = thumbnail(path)
    picture = f'<div class="missing" role="img" aria-label="{text(words)}">image not available</div>'
    if uri:
        picture = f'<img src="{uri}" alt="{text(words)}" width="58" height="116">'
    name = text(os.path.basename(path))
    return f'<figure class="{kind}" title="{name}">{picture}<figcaption>{caption}</figcaption></figure>'


def _strip(ranked: RankList) -> str:
    figures = []
    for place, found in enumerate(ranked.gallery, 1):
        kind, sign = ("right", "✓") if found.correct else ("wrong", "✗")
        figures.append(_figure(found.path, f"rank {place}, {kind}", f"{sign} {place}", kind))
    who = f'<div class="who">{text(ranked.ranking)}</div>'
    query = _figure(ranked.query, "query", "query")
    return f'<div class="list" style="--n:{len(figures) + 1}">{who}{query}{"".join(figures)}</div>'


def rank_lists(results: Results, most: int = 6) -> str:
    """For each query of the first evaluation that recorded any, one strip a ranking, best match first."""
    result = next((r for r in picked(results, Evaluation) if r.rank_lists), None)
    if result is None:
        return ""
    by_query: dict[str, list[RankList]] = {}
    for ranked in result.rank_lists:
        by_query.setdefault(ranked.query, []).append(ranked)
    strips = "".join(
        f'<div class="lists" tabindex="0">{"".join(map(_strip, lists))}</div>'
        for lists in list(by_query.values())[:most]
    )
    note = f"{result.label}: each query and its best gallery images. ✓ in green: the same person. ✗ in red: another."
    return section("Rank lists", f'<div class="queries">{strips}</div>', note)


def cmc(results: Results) -> str:
    """Cumulative match curves, first 20 ranks: a color for each model, dashes for its backbone alone."""
    lines = []
    for color, result in enumerate(picked(results, Evaluation)):
        for r in result.rankings:
            if r.name in (BACKBONE, NFORMER):
                points = [(rank, 100 * share) for rank, share in enumerate(r.cmc[:20], 1)]
                lines.append(Line(f"{result.label}, {r.name}", points, color, dashed=r.name == BACKBONE))
    chart = line_chart(lines, "Cumulative match curves", "rank", "queries with a match, %", y_max=100)
    note = "Share of queries with a correct match at or before each rank. Of equal curves the last one is visible."
    return section("CMC", chart, note)


def training(results: Results) -> str:
    """Each stage of each training as a line, and its learning curves: loss and held-out mAP by epoch."""
    histories = picked(results, History)
    found = [(h, stage, record) for h in histories for stage, record in h.stages.items()]
    several = len(histories) > 1
    cells = []
    lines: dict[str, list[Line]] = {"loss": [], "held_out_map": []}
    for color, (history, stage, record) in enumerate(found):
        label = f"{stage}, {history.checkpoint.rpartition('/')[2]}" if several else stage
        losses = [(e.epoch, e.loss) for e in record.epochs if e.loss is not None]
        held_out = [(e.epoch, 100 * e.held_out_map) for e in record.epochs if e.held_out_map is not None]
        for key, points in (("loss", losses), ("held_out_map", held_out)):
            if points:  # an epoch without a figure is not drawn
                lines[key].append(Line(label, points, color))
        if record.epochs:
            last, best = record.epochs[-1], record.best
            reached = [percent(best.held_out_map), number(best.epoch, 0)] if best else [NONE, NONE]
            figures = [number(last.epoch, 0), number(last.loss, 3), *reached, number(record.seconds, 0)]
            cells.append(row([text(label), *(figure or NONE for figure in figures)]))
    body = table(["stage", "epochs", "last loss", "best held-out mAP", "after epoch", "seconds"], cells)
    for key, title in (("loss", "Loss"), ("held_out_map", "Held-out mAP, %")):
        chart = line_chart(lines[key], f"{title} by epoch", "epoch", title.lower())
        body += f"<h3>{text(title)}</h3>{chart}" if chart else ""
    note = "Held-out mAP: on training identities that were held out of training, ranked in the plain view."
    return section("Training", body, note if lines["held_out_map"] else "")


def machine(results: Results) -> str:
    """Where it was measured, and with which versions."""
    parts: list[str] = []
    machines: list[MachineFacts] = []
    for m in (r.machine for r in results if hasattr(r, "machine")):
        if m in machines:
            continue
        machines.append(m)
        facts = {
            "Processor": f"{m.cpu}, {m.cores} cores, {m.architecture}",
            "Instruction sets": ", ".join(m.instruction_sets),
            "Memory": m.memory_mib and f"{m.memory_mib / 1024:.0f} GiB",
            "Board": m.board,
            "GPU": m.gpu,
            "System": m.system,
            "Versions": ", ".join(f"{k} {v}" for k, v in m.versions.items()),
        }
        parts.append(_facts(facts))
    for result in picked(results, Benchmark)[:1]:
        now = result.conditions[1]
        facts = {
            "Clock": now.cpu_mhz and f"{now.cpu_mhz:.0f} MHz",
            "Governor": now.governor,
            "Power mode": now.power_mode,
            "Temperature": now.temperature_c and f"{now.temperature_c:.0f} °C",
            "Load": now.load_average and f"{now.load_average:.2f}",
            "Threads": result.intra_op_threads,
        }
        parts.append(_facts(facts))
    return section("Machine", "".join(parts))


def _facts(facts: dict[str, object]) -> str:
    items = "".join(f"<dt>{text(k)}</dt><dd>{text(v)}</dd>" for k, v in facts.items() if v)
    return f'<dl class="details">{items}</dl>' if items else ""
