"""The summary table: one row a model and part, joined from evaluations and benchmarks by the models' labels."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from nformer_edge.core.values import Result
from nformer_edge.report.accuracy import BACKBONE, NFORMER, NFORMER_PER_QUERY, NFORMER_TOLD, Evaluation, Ranking
from nformer_edge.report.benchmark import Benchmark, Run
from nformer_edge.report.models import MeasuredModel
from nformer_edge.report.table import format_table, number, percent


@dataclass(frozen=True)
class Row:
    """One line of the summary: a model's ranking, and its latency where there is one."""

    model: MeasuredModel
    ranking: Ranking
    run: Run | None

    @property
    def part(self) -> str:
        """``backbone``, or ``head`` where that is run after it."""
        return "backbone" if self.ranking.name == BACKBONE else "head"

    @property
    def precision(self) -> str:
        return self.model.precision.get(self.part, "")

    @property
    def size_mb(self) -> float | None:
        return self.model.size_mb.get("backbone" if self.part == "backbone" else "total")

    @property
    def latency_ms(self) -> float | None:
        """The early-stopping estimate of p90, or the median of a short run; None if nothing was timed."""
        return None if self.run is None else self.run.early_stopping_ms or self.run.latency.p50_ms

    @property
    def latency_kind(self) -> str:
        """What `latency_ms` is."""
        if self.run is None:
            return ""
        return self.run.percentile or "" if self.run.early_stopping_ms else "median, short"


def summary_rows(results: Iterable[Result]) -> list[Row]:
    """Backbone and NFormer, by each protocol, of every evaluated model in the results' order."""
    results = list(results)
    runs = {
        (result.model.label, run.pipeline): run
        for result in reversed(results)  # the first of several is shown
        if isinstance(result, Benchmark)
        for run in reversed(result.runs)
        if run.scenario == "SingleStream"
    }
    return [
        Row(result.model, ranking, runs.get((result.model.label, ranking.name)))
        for result in results
        if isinstance(result, Evaluation) and result.model is not None
        for ranking in result.rankings
        if ranking.name in (BACKBONE, NFORMER, NFORMER_PER_QUERY)
    ]


def format_summary(results: Sequence[Result]) -> str:
    """The table that `demo` ends with: model and part, mAP, Rank-1, ms per image, MB."""
    rows = summary_rows(results)
    kinds = sorted({r.latency_kind for r in rows if r.latency_kind})
    body = []
    for r in rows:
        kind = f" ({r.latency_kind})" if len(kinds) > 1 and r.latency_kind else ""
        figures = [percent(r.ranking.mAP), percent(r.ranking.cmc[0]), number(r.latency_ms) + kind, number(r.size_mb)]
        body.append([r.model.label, r.ranking.name, *figures])
    latency = "ms/image" + (f" ({kinds[0]})" if len(kinds) == 1 else "")
    return format_table(["model", "part", "mAP", "Rank-1", latency, "MB"], body, left=2)


def format_ends(results: Iterable[Result]) -> str:
    """Backbone and head of every evaluated model with one gallery image a person and with all; "" without a head."""
    body = []
    for result in results:
        if isinstance(result, Evaluation) and result.composition is not None:
            for row in result.composition.rows:
                parts = (BACKBONE, row.backbone), (NFORMER, row.head), (NFORMER_PER_QUERY, row.alone)
                for part, scores in (*parts, (NFORMER_TOLD, row.told)):
                    if row.images in (1, None) and row.head is not None and scores is not None:
                        figures = [percent(scores.mAP.value), percent(scores.rank1.value)]
                        body.append([result.label, row.title, part, *figures])
    return format_table(["model", "images a person", "part", "mAP", "Rank-1"], body, left=3) if body else ""
