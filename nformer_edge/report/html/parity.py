"""The report's sections on parity: gates, landmark seeds, cosines, and where a graph leaves its band."""

from __future__ import annotations

import math
from typing import Any

from nformer_edge.report.html import sections
from nformer_edge.report.html.sections import NONE, Results, group, pill, row, section, table, text
from nformer_edge.report.html.svg import Axis, Dot, Line, chart, decades, legend, linear, whole
from nformer_edge.report.table import gate_bound, gate_measured, number, percent
from nformer_edge.report.verdict import CAUSES, describe_causes, describe_failures, describe_layers

_SHORT = {
    "tensor": "tensor",
    "cosine_min": "cos min",
    "cosine_mean": "cos mean",
    "rank1_agreement": "rank-1",
    "top10_overlap": "top-10",
    "reciprocal_jaccard": "neighbors",
    "mAP_kept": "mAP kept",
    "rank1_kept": "Rank-1 kept",
}


def gates(results: Results) -> str:
    """The verdicts at a glance, then each parity result's gates in full, folded."""
    found = sections.of_kind(results, "parity")
    cells = []
    for result in found:
        cells.append(group(f"{_title(result)} {pill(result['status'])}", len(_SHORT) + 1))
        for stage in result["stages"]:
            by_name = {g["gate"]: g for g in stage["gates"]}
            name = f"{stage['stage'].replace('_', ' ')}, {stage['precision'].upper()}"
            cells.append(row([text(name), *(_glance(by_name.get(g)) for g in _SHORT)]))
    body = table(["stage", *_SHORT.values()], cells, wide=True)
    body += "".join(map(_blame, found)) + "".join(map(_full_gates, found))
    note = (
        "Of each gate the worst landmark seed. mAP and Rank-1 kept: a paired bootstrap over queries, with its 95 % "
        "bounds in brackets; the bound that decides gives the margin. An alarm or a reported number decides nothing."
    )
    return section("Gates", body, note)


def _glance(gate: dict[str, Any] | None) -> str:
    """One gate in one colored number."""
    if gate is None:
        return NONE
    shown = "NaN" if gate["measured"] is None else f"{gate['measured']:.4g}"
    return f'<span class="glance {text(gate["status"])}" title="{text(gate["status"])}">{shown}</span>'


def _blame(result: dict[str, Any]) -> str:
    """Which stage a failure comes from, and each failed gate; "" if none failed."""
    if not result["blame"]:
        return ""
    lines = "".join(f"<li>{text(line)}</li>" for line in (*describe_causes(result), *describe_failures(result)))
    cause = CAUSES.get(result["blame"], result["blame"])
    return (
        f'<div class="blame"><p>{text(result["engine"]["label"])} failed; to blame: <strong>{text(cause)}</strong></p>'
        f"<ul>{lines}</ul></div>"
    )


def _full_gates(result: dict[str, Any]) -> str:
    title = _title(result)
    cells = []
    for stage in result["stages"]:
        name = text(stage["stage"].replace("_", " "))
        cells.append(group(f"{name}, {text(stage['precision'].upper())} {pill(stage['status'])}", 6))
        cells += [
            row(
                [
                    text(g["title"]),
                    text(gate_measured(g)),
                    text(gate_bound(g)) or NONE,
                    "" if g["margin"] is None else f"{g['margin']:+.2g}",
                    NONE if g["landmark_seed"] is None else str(g["landmark_seed"]),
                    pill(g["status"]),
                ]
            )
            for g in stage["gates"]
        ]
    full = table(["gate", "measured", "bound", "margin", "landmark seed", "status"], cells)
    return f"<details><summary>Every gate: {title}</summary>{full}{_runs(result)}</details>"


def _runs(result: dict[str, Any]) -> str:
    """Every run of every stage: scores of both, and the paired differences in points."""
    cells = []
    for stage in result["stages"]:
        for run in stage["runs"]:
            seed = "" if run["landmark_seed"] is None else f", landmark seed {run['landmark_seed']}"
            scored = run["scores"]["engine"] or {}
            cells.append(
                row(
                    [
                        text(stage["stage"].replace("_", " ") + seed),
                        percent(run["scores"]["reference"]["mAP"], 2),
                        percent(scored.get("mAP"), 2) or NONE,
                        _points(run["differences"], "mAP"),
                        percent(run["scores"]["reference"]["rank1"], 2),
                        percent(scored.get("rank1"), 2) or NONE,
                        _points(run["differences"], "rank1"),
                        pill(run["status"]),
                    ]
                )
            )
    headers = [
        "run",
        "mAP, reference",
        "mAP, engine",
        "difference, points",
        "Rank-1, reference",
        "Rank-1, engine",
        "difference, points",
        "status",
    ]
    return table(headers, cells, wide=True)


def _points(differences: dict[str, Any] | None, figure: str) -> str:
    """A difference in percentage points, its 95 % interval small beside it."""
    if differences is None:
        return NONE
    value, lower, upper = (f"{100 * differences[figure][n]:+.2f}" for n in ("value", "lower", "upper"))
    return f"{value} <small>{lower} to {upper}</small>"


def _title(result: dict[str, Any]) -> str:
    return f"{text(result['engine']['label'])} against {text(result['reference']['label'])}"


def cosines(results: Results) -> str:
    """How near each image's feature is to the reference's: one picture a stage, a color for each engine."""
    found = sections.of_kind(results, "parity")
    body = ""
    for stage in ("backbone", "head", "end_to_end"):
        lines, lowest = [], 0.9
        for color, result in enumerate(found):
            for judged in result["stages"]:
                counts = judged["cosines"]["counts"]
                if judged["stage"] == stage and any(counts):
                    lines.append(_histogram(result["engine"]["label"], judged["cosines"], color))
                    lowest = min(lowest, lines[-1].points[0][0])
        if lines:
            highest = max(share for line in lines for _, share in line.points)
            drawn = chart(
                f"Cosine to the reference, {stage}", _cosine_axis(lowest), linear("images, %", [0, highest]), lines
            )
            keys = legend([(line.label, line.color, False) for line in lines])
            body += f"<h3>{text(stage.replace('_', ' ').capitalize())}</h3>{drawn}{keys}"
    note = (
        "Share of images by the cosine between the engine's feature and the reference's, in eight steps to each "
        "further 9; of equal ones the last is seen. The head under all landmark seeds together."
    )
    return section("Cosine to the reference", body, note)


def _histogram(label: str, found: dict[str, Any], color: int) -> Line:
    """Steps from the first to the last bin that holds an image, in percent of all."""
    counts, edges = found["counts"], found["edges"]
    total = sum(counts) + found["not_finite"]
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
    """The error of each tensor against its band, in the order of computation, where a stage was compared so."""
    body = ""
    for result in sections.of_kind(results, "parity"):
        for found in result["layers"]:
            if found["nodes"]:
                body += f"<h3>{_title(result)}: {text(found['stage'])}</h3>{_profile(found)}"
    note = (
        "Both graphs in onnxruntime on the same inputs. Error: L2 norm of a tensor's difference over that of the "
        "reference's. Band: what rounding alone may cost there."
    )
    return section("Layer by layer", body, note)


def _profile(found: dict[str, Any]) -> str:
    nodes = list(enumerate(found["nodes"], 1))
    bands = [(i, n["band"]) for i, n in nodes if n["band"]]
    errors = [(i, n["error"]) for i, n in nodes if n["error"] is not None]
    told = f'<p class="note">{text(describe_layers(found))}</p>'
    if not (bands and any(error for _, error in errors)):
        return told
    lines = [Line("error", errors, 0), Line("band", bands, 7, dashed=True)]
    first = found["first"]
    dots = []
    if first is not None and first["error"]:
        place = next(i for i, n in nodes if n["tensor"] == first["tensor"])
        dots = [Dot(place, first["error"], 4, first["node"])]
    x = whole("tensor, in the order of computation", 1, len(nodes))
    drawn = chart("Error by tensor", x, decades("relative error", [v for _, v in (*bands, *errors) if v]), lines, dots)
    keys = legend([(line.label, line.color, line.dashed) for line in lines])
    cells = [
        row(
            [
                text(n["node"]),
                text(n["op"]),
                *(NONE if n[k] is None else f"{n[k]:.2e}" for k in ("error", "band")),
                number(n["sqnr_db"]) or NONE,
                NONE if n["cosine"] is None else f"{n['cosine']:.6f}",
                "" if n["inside"] else pill("failed", "out"),
            ],
            left=2,
        )
        for _, n in nodes
    ]
    full = table(["node", "operator", "error", "band", "SQNR, dB", "cosine", ""], cells, left=2)
    return f"{told}{drawn}{keys}<details><summary>Every tensor</summary>{full}</details>"
