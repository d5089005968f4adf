"""The summary table: one row a model and stage, joined from evaluation and benchmark results; as text for a terminal.

Nothing is computed here: fractions are printed as percent, numbers are looked up and rounded.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

PERCENTILES = ("p50", "p90", "p95", "p99", "p99.9")
STAGE_RESULTS = ("backbone", "+NFormer", "+NFormer per-query")


@dataclass(frozen=True)
class Row:
    """One line of the summary; None where nothing was measured.

    `latency_ms` is what `latency_kind` says: the early-stopping estimate of p90, or the median of a short run.
    """

    model: str
    stage: str
    precision: str
    mAP: float
    rank1: float
    mINP: float
    latency_ms: float | None
    latency_kind: str
    size_mb: float | None
    mAP_interval: Sequence[float]
    rank1_interval: Sequence[float]


def headline(run: dict[str, Any]) -> tuple[float | None, str]:
    """The one latency to show of a stream run and what it is: ``p90`` by early stopping, or ``median, short``."""
    if run["early_stopping_ms"] is not None:
        return run["early_stopping_ms"], run["percentile"]
    return run["latency"]["p50_ms"], "median, short"


def _single_stream(results: Iterable[dict[str, Any]], label: str, stage: str) -> dict[str, Any] | None:
    for result in results:
        if result["kind"] == "benchmark" and result["model"]["label"] == label:
            for run in result["runs"]:
                if run["scenario"] == "SingleStream" and run["pipeline"] == stage:
                    found: dict[str, Any] = run
                    return found
    return None


def summary_rows(results: Sequence[dict[str, Any]]) -> list[Row]:
    """Backbone and NFormer, by each protocol, of every evaluated model in the results' order, joined by its label."""
    rows = []
    for result in results:
        if result["kind"] != "evaluation" or result["model"] is None:
            continue
        model = result["model"]
        for scored in result["results"]:
            stage = scored["name"]
            if stage not in STAGE_RESULTS:
                continue
            run = _single_stream(results, model["label"], stage)
            latency, kind = headline(run) if run else (None, "")
            precision = model["precision"]
            rows.append(
                Row(
                    model=model["label"],
                    stage=stage,
                    precision=precision["backbone"] if stage == "backbone" else precision.get("head", ""),
                    mAP=scored["mAP"],
                    rank1=scored["cmc"][0],
                    mINP=scored["mINP"],
                    latency_ms=latency,
                    latency_kind=kind,
                    size_mb=model["size_mb"].get("backbone" if stage == "backbone" else "total"),
                    mAP_interval=scored["mAP_interval"],
                    rank1_interval=scored["rank1_interval"],
                )
            )
    return rows


def percent(fraction: float | None, digits: int = 1) -> str:
    """0.8734 as ``87.3``."""
    return "" if fraction is None else f"{100 * fraction:.{digits}f}"


def number(value: float | None, digits: int = 1) -> str:
    """A number with thousands apart, empty if there is none."""
    return "" if value is None else f"{value:,.{digits}f}"


def format_table(headers: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Aligned text: the first `left` columns to the left, the others to the right."""
    widths = [max(len(str(r[i])) for r in (headers, *rows)) for i in range(len(headers))]

    def line(cells: Sequence[str]) -> str:
        aligned = (c.ljust(w) if i < left else c.rjust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=True)))
        return "  ".join(aligned).rstrip()

    return "\n".join([line(headers), "  ".join("-" * w for w in widths), *(line(r) for r in rows)])


def format_summary(results: Sequence[dict[str, Any]]) -> str:
    """The table that `demo` and `report` end with: model and stage, mAP, Rank-1, ms per image, MB."""
    rows = summary_rows(results)
    kinds = sorted({r.latency_kind for r in rows if r.latency_kind})
    body = [
        [
            r.model,
            r.stage,
            percent(r.mAP),
            percent(r.rank1),
            number(r.latency_ms) + ("" if len(kinds) == 1 or not r.latency_kind else f" ({r.latency_kind})"),
            number(r.size_mb),
        ]
        for r in rows
    ]
    latency = "ms/image" + (f" ({kinds[0]})" if len(kinds) == 1 else "")
    return format_table(["model", "stage", "mAP", "Rank-1", latency, "MB"], body, left=2)


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


def scored_with_interval(fraction: float, interval: Sequence[float]) -> str:
    """0.8734 between 0.861 and 0.885 as ``87.3 (86.1 to 88.5)``."""
    return f"{percent(fraction)} ({percent(interval[0])} to {percent(interval[1])})"


def format_evaluation(result: dict[str, Any]) -> str:
    """An evaluation as text: one line for each way of ranking, and what was ranked."""
    body = []
    for r in result["results"]:
        cmc = r["cmc"]
        sure = [scored_with_interval(r["mAP"], r["mAP_interval"]), scored_with_interval(cmc[0], r["rank1_interval"])]
        shown = [percent(v) for v in (cmc[4], cmc[9], r["mINP"])]
        body.append([_ranking(r), *sure, *shown, number(r["seconds"], 2)])
    headers = ["ranking", "mAP (95 %)", "Rank-1 (95 %)", "Rank-5", "Rank-10", "mINP", "seconds"]
    table = format_table(headers, body)
    data, first = result["data"], result["results"][0]
    model = result["model"]["label"] if result["model"] else "features"
    left_out = f", {first['left_out']:,} of them left out for want of a match" if first["left_out"] else ""
    why = result.get("per_query")
    without = f"\nno per-query protocol: {why}" if why and any("protocol" in r for r in result["results"]) else ""
    return (
        f"{table}\n{model} on {data['name']}: {data['query']:,} queries{left_out}, {data['gallery']:,} in the gallery"
        f"{without}"
    )


def _ranking(result: dict[str, Any]) -> str:
    """The name of a way of ranking, with its query protocol."""
    if "protocol" not in result:
        return result["name"]
    kept = "" if result.get("exact", True) else ", lists kept"
    return f"+NFormer, {result['protocol']}{kept}"


def format_benchmark(result: dict[str, Any]) -> str:
    """A benchmark as text: one line a run, a dash where the count allows no such figure; then the stages' means."""
    runs = result["runs"]
    body, stages = [], []
    for run in runs:
        streamed = run["scenario"] != "Offline"
        figures = [number(run["latency"][f"{p}_ms"] if streamed else None) or "-" for p in PERCENTILES]
        estimate = number(run["early_stopping_ms"]) if streamed else ""
        body.append([run["pipeline"], run["name"], estimate or "-", *figures, number(run["images_per_second"])])
        means = ", ".join(f"{name} {number(s['mean_ms'], 2)}" for name, s in run["stages"].items())
        stages.append(f"{run['pipeline']}, {run['scenario']}, mean ms a query: {means}")
    headers = ["pipeline", "run", "early stop", *PERCENTILES, "images/s"]
    model = f"{result['model']['label']}, {result['data']['gallery']:,} in the gallery; ms from issue to reply"
    return "\n".join([model, format_table(headers, body, left=2), *stages])


def format_comparison(result: dict[str, Any]) -> str:
    """A comparison as text: each model's latency, and its ratio to the first, pair by pair."""
    ratios: list[dict[str, Any] | None] = [None, *result["ratios"]]
    body = []
    for run, ratio in zip(result["runs"], ratios, strict=True):
        shown = [number(ratio[name], 3) for name in ("median", "p5", "p95")] if ratio else ["1", "", ""]
        body.append([run["label"], run["name"], number(run["latency"]["p50_ms"]), *shown])
    return format_table(["model", "run", "p50 ms", "ratio", "p5", "p95"], body, left=2)
