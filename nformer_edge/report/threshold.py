"""From which cosine a match counts: by the share of queries that may accept a stranger in a gallery of a given size."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from nformer_edge.backends.runner import Runner
from nformer_edge.core.errors import UsageError
from nformer_edge.core.features import Features
from nformer_edge.core.machine import MachineFacts, machine
from nformer_edge.core.spec import check_at_least
from nformer_edge.core.values import Result
from nformer_edge.data.records import DISTRACTOR, JUNK, Dataset
from nformer_edge.data.spread import evenly
from nformer_edge.gallery.embed import embed_records
from nformer_edge.gallery.protocols import JOINT, PER_QUERY, relate_each, relate_per_query, relate_sets
from nformer_edge.metrics.distance import alike, cosine_distances, row_blocks, unit_rows
from nformer_edge.metrics.verification import CUTS, Acceptance, measure_acceptance
from nformer_edge.report.models import (
    Data,
    MeasuredData,
    MeasuredModel,
    Source,
    calibration_note,
    open_dataset,
    open_model,
)
from nformer_edge.report.table import format_table, number, percent

#: Rates of the curve, besides the wanted one.
RATES = (0.5, 0.3, 0.2, 0.1, 0.05, 0.03, 0.02, 0.01, 0.005, 0.002, 0.001)

#: Queries with the head, unless told otherwise, where each is a whole pass of it.
PASSES = 200

#: Images of one person, unless told otherwise, in crops that nobody labeled. Too few make the threshold too strict, too
#: many too lax.
IMAGES_PER_PERSON = 4

Rows = tuple[slice, np.ndarray]


@dataclass(frozen=True)
class CurvePoint:
    """A threshold and what it accepts. Rates are 0 to 1.

    Args:
        threshold: cosine from which a match counts, rounded up to 0.0005; null if no cosine is high enough.
        rate: the rate that it was chosen for.
        wrong_queries: share of queries that accept a stranger (ISO/IEC 19795-1's false-positive identification rate).
        false_match_rate: share of pairs of different people that are accepted.
        found: share of queries whose own person is accepted, in any camera's image; null where that is not known.
        found_across: likewise, in another camera's image.
    """

    threshold: float | None
    rate: float
    wrong_queries: float
    false_match_rate: float
    found: float
    found_across: float


@dataclass(frozen=True)
class Curve:
    """The thresholds of one way to rank.

    Args:
        name: backbone or +NFormer.
        protocol: what the head saw: per-query, as `search` does; joint where every crop asks for all others; null for
            the backbone alone.
        queries: that were scored.
        strangers: images of other people that a query was compared with, on average.
        points: by falling rate.
        chosen: for the wanted rate.
    """

    name: str
    protocol: Literal["per-query", "joint"] | None
    queries: int
    strangers: float
    points: tuple[CurvePoint, ...]
    chosen: CurvePoint


@dataclass(frozen=True)
class Threshold(Result):
    """The cosine that `search --threshold` should have with a model.

    Args:
        machine: where it was measured.
        model: what was measured.
        data: what it was measured on.
        rate: wanted share of queries that accept a stranger.
        gallery_size: images of strangers that a query is compared with in use.
        images_per_person: assumed of unlabeled crops; null where labels say who is who.
        curves: of the backbone and, where there is one, of the head.
        notes: what limits the figures.
    """

    kind: ClassVar[str] = "threshold"

    machine: MachineFacts
    model: MeasuredModel
    data: MeasuredData
    rate: float
    gallery_size: int
    images_per_person: int | None
    curves: tuple[Curve, ...]
    notes: tuple[str, ...]

    def __str__(self) -> str:
        body = []
        for curve in self.curves:
            for point in curve.points:
                shown = "-" if point.threshold is None else f"{point.threshold:.4f}"
                own = [percent(v, 1) if v >= 0 else "-" for v in (point.found, point.found_across)]
                mark = "<-" if point == curve.chosen else ""
                rates = percent(point.wrong_queries, 2), f"{point.false_match_rate:.2g}"
                body.append([curve.name, shown, *rates, *own, mark])
        headers = ["ranking", "cosine", "wrong %", "pairs", "found %", "other camera %", ""]
        chosen = [
            f"--threshold {curve.chosen.threshold:.4f}{_flag(curve) if len(self.curves) > 1 else ''}"
            for curve in self.curves
            if curve.chosen.threshold is not None
        ]
        about = (
            f"wrong: queries that accept a stranger in a gallery of {number(self.gallery_size, 0)} images of others; "
            "pairs: share of pairs of strangers accepted; found: queries whose own person is accepted, and in another "
            f"camera's image. Wanted: {percent(self.rate, 2)} % wrong."
        )
        advice = f"search: {', or '.join(chosen)}" if chosen else "no cosine is high enough for that rate"
        return "\n".join([format_table(headers, body), about, *self.notes, advice])


def _flag(curve: Curve) -> str:
    """What `search` is told besides, so that it ranks likewise."""
    return " --head no" if curve.protocol is None else " --head yes"


def threshold(
    model: Source,
    data: Data,
    *,
    rate: float = 0.01,
    gallery_size: int | None = None,
    images_per_person: int = IMAGES_PER_PERSON,
    limit: int | None = None,
    batch: int = 32,
    intra_op_threads: int | None = None,
    layout: str = "auto",
) -> Threshold:
    """The cosine from which a match counts, so that few queries accept a stranger; with and without the head.

    With labels each query is compared with the gallery, images of its own camera among them. Crops that nobody labeled
    ask for each other, and the nearest of each are taken for its own person: weaker, and what is found is not known.

    Args:
        model: an open model, checkpoint, bundle or engine.
        data: a dataset or its folder, or a folder of crops.
        rate: wanted share of queries that accept a stranger, above 0 and below 1.
        gallery_size: images of others that a query meets in use; as many as every query meets in `data` if None.
        images_per_person: of crops that nobody labeled, about; fewer give a higher threshold, which is safer.
        limit: only so many queries (evenly spaced). If None, all; with a head that a graph runs, 200.
        batch: images that the backbone sees at once.
        intra_op_threads: of the backend; its own choice if None.
        layout: of the dataset's folder.

    Raises:
        UsageError: for a rate that is no share, or less than one query of those there are.
        DataError: if the data cannot be read, or shows one person only.
    """
    if not 0 < rate < 1:
        raise UsageError("rate", rate, "above 0, below 1", "Such as 0.01: one query in a hundred.")
    for name, value in (("limit", limit), ("gallery_size", gallery_size), ("images_per_person", images_per_person)):
        check_at_least(name, 1 if value is None else value, 1)
    dataset = open_dataset(data, layout, labels=False)
    with open_model(model, intra_op_threads) as runner:
        gallery = embed_records(runner, dataset.gallery, batch)
        query = gallery if not dataset.query else embed_records(runner, dataset.query, batch)
        left_out = images_per_person - 1 if dataset.unlabeled else None
        size = gallery_size or _strangers(gallery, left_out)
        curves = []
        for protocol in (None, JOINT if dataset.unlabeled else PER_QUERY) if runner.has_head else (None,):
            asking = _asking(runner, query, protocol, limit)
            scores = _scores(runner, query.take(asking), gallery, protocol, asking if dataset.unlabeled else None)
            found = measure_acceptance(query.take(asking), gallery, scores, size, nearest_left_out=left_out)
            curves.append(_curve(found, protocol, rate))
        measured = MeasuredModel.of(model, runner)
    about = MeasuredData(dataset.name, len(query), len(gallery))
    notes = (*_limits(dataset, curves, size, images_per_person), *alike(gallery.features, "gallery"))
    notes += calibration_note(runner, gallery)
    assumed = images_per_person if dataset.unlabeled else None
    return Threshold(machine(), measured, about, rate, size, assumed, tuple(curves), notes)


def _strangers(gallery: Features, left_out: int | None) -> int:
    """How many strangers every query meets in a gallery, at least."""
    if left_out is not None:
        return max(len(gallery) - 1 - left_out, 1)
    people, counts = np.unique(gallery.pids[gallery.pids != JUNK], return_counts=True)
    return max(int(counts.sum() - counts[people > DISTRACTOR].max(initial=0)), 1)


def _asking(runner: Runner, query: Features, protocol: str | None, limit: int | None) -> np.ndarray:
    """The rows of the queries that are scored."""
    passes = protocol == PER_QUERY and not hasattr(runner, "with_head")
    return np.array(evenly(limit or (PASSES if passes else len(query)), len(query)), np.int64)


def _scores(
    runner: Runner, query: Features, gallery: Features, protocol: str | None, itself: np.ndarray | None
) -> Iterator[Rows]:
    """Cosines of `query` and `gallery`, in blocks of queries; NaN where a query is the gallery's row `itself`."""
    if protocol == PER_QUERY and not hasattr(runner, "with_head"):
        for row, (asked, seen) in enumerate(relate_each(runner, query, gallery)):
            yield slice(row, row + 1), _cosines(unit_rows(asked.features), unit_rows(seen.features))
        return
    if protocol == PER_QUERY:
        distances = relate_per_query(runner, query, gallery).distances
        yield from ((rows, np.float32(1) - distances[rows]) for rows in row_blocks(len(query)))
        return
    if protocol == JOINT:  # every crop sees all others once: what a query sees that is not in the gallery
        none = gallery.take(np.zeros(len(gallery), bool))
        gallery, _ = relate_sets(runner, gallery, none)
        query = gallery.take(np.arange(len(gallery)) if itself is None else itself)
    q, g = unit_rows(query.features, "query features"), unit_rows(gallery.features, "gallery features")
    for rows in row_blocks(len(q)):
        cosines = _cosines(q[rows], g)
        if itself is not None:
            cosines[np.arange(len(cosines)), itself[rows]] = np.nan
        yield rows, cosines


def _cosines(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """As `search` prints them: float32."""
    return np.float32(1) - cosine_distances(left, right)


def _curve(found: Acceptance, protocol: Literal["per-query", "joint"] | None, rate: float) -> Curve:
    if rate * found.queries < 1:
        least = math.ceil(1000 / found.queries) / 1000
        got, expected = f"{rate:g} of {found.queries:,} queries", f"at least one query: {least:g}"
        raise UsageError("rate", got, expected, f"Give more images, or ask for --rate {least:g} or more.")
    rates = sorted({rate, *(r for r in RATES if r * found.queries >= 1)}, reverse=True)
    points = {wanted: _point(found, wanted) for wanted in rates}
    name = "backbone" if protocol is None else "+NFormer"
    strangers = found.strangers / found.queries
    return Curve(name, protocol, found.queries, strangers, tuple(points.values()), points[rate])


def _point(found: Acceptance, rate: float) -> CurvePoint:
    """The lowest cut that accepts no more than `rate`."""
    enough = found.wrong <= rate
    at = int(enough.argmax()) if enough.any() else len(CUTS) - 1
    columns = found.wrong, found.false_match, found.found, found.found_across
    return CurvePoint(float(CUTS[at]) if enough.any() else None, rate, *(float(column[at]) for column in columns))


def _limits(dataset: Dataset, curves: list[Curve], size: int, images_per_person: int) -> list[str]:
    """What the figures do not say by themselves."""
    said = []
    if dataset.unlabeled:
        own, flag = images_per_person - 1, f"--images-per-person {images_per_person}"
        said.append(
            f"weaker, because nobody labeled the images: of each crop its {own} nearest were taken for its own person "
            f"({flag}; fewer are safer) and left out; which share of people is found could not be judged"
        )
    strangers = min(curve.strangers for curve in curves)
    if size > strangers:
        said.append(
            f"extrapolated: a query met about {strangers:,.0f} strangers here, and --gallery-size asks for {size:,}. "
            "They are drawn again and again, so far more strangers than here are wrong more often than shown"
        )
    if len({curve.queries for curve in curves}) > 1:
        counts = ", ".join(f"{curve.name} {curve.queries:,}" for curve in curves)
        said.append(f"queries: {counts}; each query is a whole pass of the head (--limit)")
    return said
