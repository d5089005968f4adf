"""The report's sections on parity: gates, landmark seeds, cosines, and where a graph leaves its band."""

from __future__ import annotations

import math

from nformer_edge.metrics.bootstrap import Interval
from nformer_edge.metrics.gates import GateResult
from nformer_edge.report.diagnosis import Layers
from nformer_edge.report.html.sections import NONE, Results, group, picked, pill, row, section, table, text
from nformer_edge.report.html.svg import Axis, Dot, Line, chart, decades, legend, linear, whole
from nformer_edge.report.parity import Parity
from nformer_edge.report.part import Cosines, RankScore
from nformer_edge.report.table import percent

_SHORT = {
    "tensor": "tensor",
    "cosine_min": "cos min",
    "cosine_mean": "cos mean",
    "first_match": "first",
    "top10_overlap": "top-10",
    "reciprocal_jaccard": "neighbors",
    "mAP_kept": "mAP kept",
    "rank1_kept": "Rank-1 kept",
}


def gates(results: Results) -> str:
    """The verdicts at a glance, then each parity result's gates in full, folded."""
    found = picked(results, Parity)
    cells = []
    for result in found:
        cells.append(group(f"{text(result.title)} {pill(result.status)}", len(_SHORT) + 1))
        for part in result.parts:
            by_name = {g.gate: g for g in part.gates}
            title = text(f"{part.title}, {part.precision.upper()}")
            cells.append(row([title, *(_glance(by_name.get(g)) for g in _SHORT)]))
    body = table(["part", *_SHORT.values()], cells, wide=True)
    body += "".join(map(_blame, found)) + "".join(map(_full_gates, found))
    note = (
        "For each gate the worst run, of landmark seeds and of all or 1 gallery image a person. mAP and Rank-1 kept: "
        "a paired bootstrap over queries, with its 95 % bounds in brackets; the bound that decides gives the margin. "
        "An alarm or a reported number decides nothing."
    )
    return section("Gates", body, note)


def _glance(gate: GateResult | None) -> str:
    """One gate in one colored number."""
    if gate is None:
        return NONE
    shown = "NaN" if math.isnan(gate.measured) else f"{gate.measured:.4g}"
    return f'<span class="glance {text(gate.status)}" title="{text(gate.status)}">{shown}</span>'


def _blame(result: Parity) -> str:
    """Which part a failure comes from, and each failed gate; "" if none failed."""
    if not result.blame:
        return ""
    lines = "".join(f"<li>{text(line)}</li>" for line in (*result.causes, *result.failures))
    return (
        f'<div class="blame"><p>{text(result.engine.label)} failed; to blame: <strong>{text(result.cause)}</strong></p>'
        f"<ul>{lines}</ul></div>"
    )


def _full_gates(result: Parity) -> str:
    cells = []
    for part in result.parts:
        cells.append(group(f"{text(part.title)}, {text(part.precision.upper())} {pill(part.status)}", 7))
        for g in part.gates:
            margin = "" if math.isnan(g.margin) else f"{g.margin:+.2g}"
            seed = NONE if g.landmark_seed is None else str(g.landmark_seed)
            images = "all" if g.images is None else str(g.images)
            shown = (text(g.shown), text(g.shown_bound) or NONE, margin, images, seed, pill(g.status))
            cells.append(row([f'<span title="{text(g.note)}">{text(g.title)}</span>', *shown]))
    full = table(["gate", "measured", "bound", "margin", "images a person", "landmark seed", "status"], cells)
    return f"<details><summary>Every gate: {text(result.title)}</summary>{full}{_runs(result)}</details>"


def _runs(result: Parity) -> str:
    """Every run of every part: scores of both, the paired differences in points, and how many first images differ."""
    cells = []
    for part in result.parts:
        for run in part.runs:
            drawn = [text(f"{part.title}, {run.title}")]
            for figure in ("mAP", "rank1"):
                drawn += [_score(run.reference, figure), _score(run.engine, figure)]
                drawn.append(NONE if run.differences is None else _points(getattr(run.differences, figure)))
            cells.append(row([*drawn, f"{len(run.moved):,}", pill(run.status)]))
    scores = [f"{f}, {who}" for f in ("mAP", "Rank-1") for who in ("reference", "engine", "difference, points")]
    return table(["run", *scores, "other first image", "status"], cells, wide=True)


def _score(score: RankScore | None, figure: str) -> str:
    return NONE if score is None else percent(getattr(score, figure), 2)


def _points(found: Interval) -> str:
    """A difference in percentage points, its 95 % interval small beside it."""
    value, lower, upper = (f"{100 * v:+.2f}" for v in (found.value, found.lower, found.upper))
    return f"{value} <small>{lower} to {upper}</small>"


def cosines(results: Results) -> str:
    """How near each image's feature is to the reference's: one picture a part, a color for each engine."""
    found = picked(results, Parity)
    body = ""
    for name in ("backbone", "head", "end_to_end"):
        lines, lowest = [], 0.9
        for color, result in enumerate(found):
            for part in result.parts:
                if part.part == name and any(part.cosines.counts):
                    lines.append(_histogram(result.engine.label, part.cosines, color))
                    lowest = min(lowest, lines[-1].points[0][0])
        if lines:
            highest = max(share for line in lines for _, share in line.points)
            axes = _cosine_axis(lowest), linear("images, %", [0, highest])
            drawn = chart(f"Cosine to the reference, {name}", *axes, lines)
            body += f"<h3>{text(name.replace('_', ' ').capitalize())}</h3>{drawn}{legend(lines)}"
    note = (
        "Share of images by the cosine between the engine's feature and the reference's, in eight steps to each "
        "further 9; of equal ones the last is seen. The head under all landmark seeds together."
    )
    return section("Cosine to the reference", body, note)


def _histogram(label: str, found: Cosines, color: int) -> Line:
    """Steps from the first to the last bin that holds an image, in percent of all."""
    counts, edges = found.counts, found.edges
    total = sum(counts) + found.not_finite
    held = [i for i, count in enumerate(counts) if count]
    points = [(edges[held[0]], 0.0)]
    for i in range(held[0], held[-1] + 1):
        share = 100 * counts[i] / total
        points += [(edges[i], share), (edges[i + 1], share)]
    return Line(label, [*points, (edges[held[-1] + 1], 0.0)], color)


def _nines(cosine: float) -> float:
    """1 for 0.9, 2 for 0.99 and so on; the last bin, up to a cosine of 1, is as wide as the others."""
    return -math.log10(max(1 - cosine, 10**-8.125))


def _cosine_axis(lowest: float) -> Axis:
    low = max(0, math.floor(_nines(lowest) + 1e-9))
    shown = [(1 - 10.0**-d, f"{1 - 10.0**-d:.{max(d, 1)}f}" if d else "0") for d in range(low, 8)] + [(1.0, "1")]
    return Axis("cosine to the reference", shown[0][0], 1.0, shown, _nines)


def layers(results: Results) -> str:
    """The error of each tensor against its band, in the order of computation, where a part was compared so."""
    body = ""
    for result in picked(results, Parity):
        for found in result.layers:
            if found.nodes:
                body += f"<h3>{text(result.title)}: {text(found.part)}</h3>{_profile(found)}"
    note = (
        "Both graphs in onnxruntime on the same inputs. Error: L2 norm of a tensor's difference over that of the "
        "reference's. Band: what rounding alone may cost there."
    )
    return section("Layer by layer", body, note)


def _profile(found: Layers) -> str:
    nodes = list(enumerate(found.nodes, 1))
    bands = [(i, n.band) for i, n in nodes if math.isfinite(n.band) and n.band]
    errors = [(i, n.error) for i, n in nodes if math.isfinite(n.error)]
    told = f'<p class="note">{text(found.summary)}</p>'
    if not (bands and any(error for _, error in errors)):
        return told
    lines = [Line("error", errors, 0), Line("band", bands, 7, dashed=True)]
    first = found.first
    seen = [(i, n) for i, n in nodes if first and n.tensor == first.tensor and 0 < n.error < math.inf]
    dots = [Dot(i, n.error, 4, n.node) for i, n in seen]
    x = whole("tensor, in the order of computation", 1, len(nodes))
    drawn = chart("Error by tensor", x, decades("relative error", [v for _, v in (*bands, *errors) if v]), lines, dots)
    cells = []
    for _, n in nodes:
        shown = (NONE if value == "-" else value for value in n.shown)
        cells.append(row([text(n.node), text(n.op), *shown, "" if n.inside else pill("failed", "out")], left=2))
    full = table(["node", "operator", "error", "band", "SQNR, dB", "cosine", ""], cells, left=2)
    return f"{told}{drawn}{legend(lines)}<details><summary>Every tensor</summary>{full}</details>"
