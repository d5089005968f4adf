"""How well a model ranks: backbone, NFormer by both query protocols, and re-ranking beside them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar, TypeAlias

import numpy as np

from nformer_edge.backends.runner import Runner
from nformer_edge.core.errors import UsageError
from nformer_edge.core.features import Features
from nformer_edge.core.machine import MachineFacts, machine
from nformer_edge.core.values import Result
from nformer_edge.data.labels import judge_labels
from nformer_edge.data.spread import evenly
from nformer_edge.gallery.embed import embed_dataset
from nformer_edge.gallery.protocols import JOINT, PER_QUERY, ask_each, can_ask, map_sets, relate_per_query, relate_sets
from nformer_edge.metrics import ranking
from nformer_edge.metrics.bootstrap import mean_interval
from nformer_edge.metrics.composition import Composition, Scores, composition
from nformer_edge.metrics.distance import alike
from nformer_edge.metrics.ranking import Pair, RankingResult, Scoring
from nformer_edge.metrics.rerank import (
    average_query_expansion,
    graph_propagation,
    k_reciprocal_distances,
    mutual_sum,
    reciprocal_mean,
)
from nformer_edge.report.models import (
    Data,
    MeasuredData,
    MeasuredModel,
    Source,
    calibration_note,
    open_dataset,
    open_model,
    open_store,
)
from nformer_edge.report.table import format_table, number, percent

#: `metrics.ranking.evaluate` by one convention.
Score: TypeAlias = Callable[..., RankingResult]

BACKBONE, NFORMER, NFORMER_PER_QUERY = "backbone", "+NFormer", "+NFormer per-query"

#: The same, of a head that knows how many images a person has.
NFORMER_TOLD = "+NFormer per-query, told"
MAPPED = ", mapped"


@dataclass(frozen=True)
class Ranking:
    """The figures of one way to rank the gallery. All but `seconds` are fractions, 0 to 1.

    Args:
        name: backbone, +NFormer, +NFormer per-query, k-reciprocal, reciprocal mean, query expansion,
            graph propagation or mutual sum; the last five and cosine also with ``, mapped`` after it.
        mAP: mean average precision; this and the next two are means over the landmark seeds, where there are several.
        mINP: mean inverse negative penalty (Ye et al. 2021).
        cmc: share of queries with a correct match among the first 1 to 50.
        mAP_interval: two-sided 95 % bounds by the bootstrap over queries (10,000 draws).
        rank1_interval: likewise, of Rank-1.
        queries: that have a match in the gallery.
        unmatched: queries excluded because the gallery has no match.
        seconds: for all queries.
        protocol: joint or per-query; null where the head is not run.
        seeds: landmark seeds.
        mAP_by_seed: of each landmark seed.
        rank1_by_seed: of each landmark seed.
        exact: whether the distances are those of a whole pass for each query; null but for the per-query protocol.
        changed_rows: gallery rows that a query changes, on average; null but for the per-query protocol.
    """

    name: str
    mAP: float
    mINP: float
    cmc: tuple[float, ...]
    mAP_interval: tuple[float, float]
    rank1_interval: tuple[float, float]
    queries: int
    unmatched: int
    seconds: float
    protocol: str | None = None
    seeds: tuple[int, ...] = ()
    mAP_by_seed: tuple[float, ...] = ()
    rank1_by_seed: tuple[float, ...] = ()
    exact: bool | None = None
    changed_rows: float | None = None

    @property
    def title(self) -> str:
        """The name, with the query protocol where the head is run."""
        if self.protocol is None:
            return self.name
        return f"{NFORMER}, {self.protocol}{', fixed lists' if self.exact is False else ''}"


@dataclass(frozen=True)
class Listed:
    """A gallery image in a rank list.

    Args:
        path: of its file.
        correct: whether it shows the query's person.
        distance: cosine distance to the query.
    """

    path: str
    correct: bool
    distance: float


@dataclass(frozen=True)
class RankList:
    """A query and the gallery images nearest to it.

    Args:
        ranking: name of the ranking.
        query: path of the query image.
        gallery: the images found, best first.
    """

    ranking: str
    query: str
    gallery: tuple[Listed, ...]


@dataclass(frozen=True)
class Evaluation(Result):
    """The ranking accuracy of a model, or of a feature store as it is.

    Args:
        machine: where it was measured.
        model: what was measured; null for a feature store alone.
        data: what was ranked.
        embed_seconds: time to embed all images; null if a feature store was read.
        no_per_query: why the per-query protocol is missing; null where it is there.
        notes: what is wrong with the features at a glance; none as a rule.
        rankings: one for each way to rank, of all queries and the whole gallery.
        composition: the same by the number of gallery images a person, one query a person; null if not asked for.
        rank_lists: some queries with their matches.
        scoring: the project by whose convention `rankings` are scored.
    """

    kind: ClassVar[str] = "evaluation"
    version: ClassVar[int] = 7

    machine: MachineFacts
    model: MeasuredModel | None
    data: MeasuredData
    embed_seconds: float | None
    no_per_query: str | None
    notes: tuple[str, ...]
    rankings: tuple[Ranking, ...]
    composition: Composition | None
    rank_lists: tuple[RankList, ...]
    scoring: Scoring = "market1501"

    @property
    def label(self) -> str:
        """The model's label, or the name of the feature store."""
        return self.model.label if self.model else self.data.name

    def __str__(self) -> str:
        body = []
        for r in self.rankings:
            bounded = [_bounded(r.mAP, r.mAP_interval), _bounded(r.cmc[0], r.rank1_interval)]
            figures = [percent(v) for v in (r.cmc[4], r.cmc[9], r.mINP)]
            body.append([r.title, *bounded, *figures, number(r.seconds, 2)])
        headers = ["ranking", "mAP (95 %)", "Rank-1 (95 %)", "Rank-5", "Rank-10", "mINP", "seconds"]
        unmatched = self.rankings[0].unmatched
        excluded = f" ({unmatched:,} excluded: the gallery has no match)" if unmatched else ""
        model = self.model.label if self.model else "features"
        ranked = f"{self.data.query:,} queries{excluded}, {self.data.gallery:,} in the gallery"
        related = any(r.protocol for r in self.rankings)
        note = f"\nno per-query protocol: {self.no_per_query}" if self.no_per_query and related else ""
        table = [] if self.composition is None else ["", *composition_lines(self.composition), ""]
        scored = "" if self.scoring == "market1501" else f", scored as {self.scoring} does"
        last = f"{model} on {self.data.name}: {ranked}{scored}{note}"
        return "\n".join([format_table(headers, body), *table, last, *self.notes])


def _bounded(fraction: float, interval: tuple[float, float]) -> str:
    """0.8734 between 0.861 and 0.885 as ``87.3 (86.1 to 88.5)``."""
    return f"{percent(fraction)} ({percent(interval[0])} to {percent(interval[1])})"


COMPOSITION_HEADERS = ("images a person", "part", "mAP (95 %)", "Rank-1 (95 %)", "mAP gain", "Rank-1 gain", "gallery")


def composition_cells(found: Composition) -> list[list[str]]:
    """A line for each number of images a person and each part, under `COMPOSITION_HEADERS`."""
    lines = []
    for row in found.rows:
        for part, scores, gain in (
            (BACKBONE, row.backbone, None),
            (NFORMER, row.head, row.gain),
            (NFORMER_PER_QUERY, row.alone, row.alone_gain),
            (NFORMER_TOLD, row.told, row.told_gain),
        ):
            if scores is not None:
                bounded = [_bounded(i.value, (i.lower, i.upper)) for i in (scores.mAP, scores.rank1)]
                lines.append([row.title, part, *bounded, *_gains(gain), number(row.gallery, 0)])
    return lines


def _gains(gain: Scores | None) -> list[str]:
    """Head less backbone in points, with its sign; empty for the backbone."""
    return ["", ""] if gain is None else [f"{100 * i.value:+.1f}" for i in (gain.mAP, gain.rank1)]


def composition_lines(found: Composition) -> list[str]:
    """The table in text, and what it was measured on."""
    draws = f", mean of {found.draws} draws" if found.draws > 1 else ""
    people = f"one query a person ({found.rows[0].people:,} people of {found.measured_on}){draws}"
    about = f"{people}; {NFORMER} has all queries in one set"
    return [format_table(COMPOSITION_HEADERS, composition_cells(found), left=2), about]


def evaluate(
    model: Source | None,
    data: Data,
    *,
    batch: int = 32,
    rerank: bool = False,
    seeds: Sequence[int] | None = None,
    rank_lists: int = 6,
    top: int = 10,
    intra_op_threads: int | None = None,
    label: str | None = None,
    layout: str = "auto",
    per_query: bool = True,
    draws: int = 1,
    scoring: Scoring = "market1501",
) -> Evaluation:
    """Ranks a dataset's queries against its gallery and scores the ranking.

    Args:
        model: an open model, or the path of a checkpoint, bundle or engine; None to score a feature store as it is.
        data: a dataset, its folder, or a feature store (`.npz`) whose features the model's head takes.
        batch: images that the backbone sees at once.
        rerank: add k-reciprocal re-ranking and the other ways of `metrics.rerank`, each on the backbone's features
            and, for a gated head, on the features as the head compares them (mapped, less their center).
        seeds: of the landmarks; the model's own seed if None. Several give the spread over draws.
        rank_lists: how many queries' ranked galleries to record, spread evenly over the queries with a match.
        top: length of a recorded list.
        intra_op_threads: of the backend; its own choice if None.
        label: what the report calls the model.
        layout: of the dataset's folder.
        per_query: also rank each query alone with the gallery (`gallery.protocols`), where PyTorch runs the head.
        draws: of the queries and gallery images of the table by images a person (`metrics.composition`); no table if 0.
        scoring: of the rankings, as another project does it (`metrics.ranking`); the table is only in our own.

    Raises:
        UsageError: if there is no model for a dataset of images.
        DataError: if the data cannot be read, or lacks queries or a gallery.
    """
    with nullcontext() if model is None else open_model(model, intra_op_threads) as runner:
        seconds, store = None, open_store(data)
        if store is not None:
            query, gallery = store
        elif runner is None:
            raise UsageError("model", "none", "a model, or a feature store", "Name a model.")
        else:
            start = time.perf_counter()
            data = open_dataset(data, layout)
            judge_labels(data).require_matches()
            query, gallery = embed_dataset(runner, data, ("query", "gallery"), batch).values()
            seconds = time.perf_counter() - start
        score = partial(ranking.evaluate, scoring=scoring)
        backbone, found = _ranked(BACKBONE, lambda _: score(query, gallery))
        matched = np.flatnonzero(backbone.first_hit > 0)
        shown = matched[evenly(rank_lists, len(matched))]
        rankings, lists = [found], _rank_lists(BACKBONE, query, gallery, shown, top)
        why = _no_per_query(runner, per_query)
        if runner is not None and runner.has_head:
            chosen = tuple(seeds or (runner.landmark_seed,))
            first, found = _joint(score, runner, query, gallery, chosen)
            rankings.append(found)
            lists += _rank_lists(NFORMER, *first, shown, top)
            if why is None:
                rankings.append(_per_query(score, runner, query, gallery, chosen))
        if rerank:
            rankings += _baselines(score, query, gallery)
            rankings += [] if runner is None else _mapped_baselines(score, runner, query, gallery)
        measured = None if runner is None or model is None else MeasuredModel.of(model, runner, label)
        notes = alike(query.features, "query") + alike(gallery.features, "gallery")
        notes += () if runner is None else calibration_note(runner, query, gallery)
        about = MeasuredData.of(data, query, gallery)
        draws = draws if scoring == "market1501" else 0
        table = _composition(runner, query, gallery, seeds, draws, about.name) if draws else None
        told = seconds, why, notes, tuple(rankings), table, tuple(lists), scoring
        return Evaluation(machine(), measured, about, *told)


def _composition(
    runner: Runner | None, query: Features, gallery: Features, seeds: Sequence[int] | None, draws: int, name: str
) -> Composition:
    if runner is None or not runner.has_head:
        return composition(query, gallery, draws=draws, measured_on=name)
    chosen = tuple(seeds or (runner.landmark_seed,))
    together, alone = partial(relate_sets, runner), partial(ask_each, runner) if can_ask(runner) else None
    return composition(query, gallery, together, alone, landmark_seeds=chosen, draws=draws, measured_on=name)


def _ranked(
    name: str, way: Callable[[int], RankingResult], seeds: tuple[int, ...] = ()
) -> tuple[RankingResult, Ranking]:
    """Runs and times `way` with each landmark seed, or once; the first result, and the mean figures of all."""
    start = time.perf_counter()
    results = [way(seed) for seed in seeds or (0,)]
    seconds = (time.perf_counter() - start) / len(results)
    valid = results[0].valid  # labels alone decide it: the same for every seed
    mAP = mean_interval(np.mean([r.ap[valid] for r in results], axis=0))
    rank1 = mean_interval(np.mean([r.hits(1)[valid] for r in results], axis=0))
    return results[0], Ranking(
        name=name,
        mAP=float(np.mean([r.mAP for r in results])),
        mINP=float(np.mean([r.mINP for r in results])),
        cmc=tuple(np.mean([r.cmc for r in results], axis=0).tolist()),
        mAP_interval=(mAP.lower, mAP.upper),
        rank1_interval=(rank1.lower, rank1.upper),
        queries=int(valid.sum()),
        unmatched=results[0].left_out,
        seconds=seconds,
        seeds=seeds,
        mAP_by_seed=tuple(float(r.mAP) for r in results) if seeds else (),
        rank1_by_seed=tuple(float(r.rank(1)) for r in results) if seeds else (),
    )


def _no_per_query(runner: Runner | None, wanted: bool) -> str | None:
    """Why an evaluation of this model has no per-query protocol; None where it has."""
    if runner is None or not runner.has_head:
        return "the model has no head"
    if not hasattr(runner, "with_head"):
        return f"{runner.backend} runs the head as one graph: evaluate the checkpoint that it was made from"
    return None if wanted else "not asked for"


def _joint(
    score: Score, runner: Runner, query: Features, gallery: Features, seeds: tuple[int, ...]
) -> tuple[Pair, Ranking]:
    """What the head makes of both with the first seed, and the ranking."""
    related: list[Pair] = []

    def together(seed: int) -> RankingResult:
        found = relate_sets(runner, query, gallery, seed=seed)
        related[:] = related or [found]
        return score(*found)

    _, scored = _ranked(NFORMER, together, seeds)
    return related[0], replace(scored, protocol=JOINT)


def _per_query(score: Score, runner: Runner, query: Features, gallery: Features, seeds: tuple[int, ...]) -> Ranking:
    exact, changed = True, 0.0

    def alone(seed: int) -> RankingResult:
        nonlocal exact, changed
        found = relate_per_query(runner, query, gallery, seed)
        exact, changed = found.exact, changed + found.changed / len(seeds)
        return score(found.query, found.gallery, distances=found.distances)

    _, scored = _ranked(NFORMER_PER_QUERY, alone, seeds)
    return replace(scored, protocol=PER_QUERY, exact=exact, changed_rows=changed)


def _baselines(score: Score, query: Features, gallery: Features, after: str = "") -> list[Ranking]:
    """Each way of `metrics.rerank`, its name followed by `after`."""
    q, g = query.features, gallery.features

    def changed(queries: np.ndarray, images: np.ndarray) -> RankingResult:
        return score(query.with_features(queries), gallery.with_features(images))

    ways: dict[str, Callable[[int], RankingResult]] = {
        "k-reciprocal": lambda _: score(query, gallery, distances=k_reciprocal_distances(q, g)),
        "reciprocal mean": lambda _: changed(*reciprocal_mean(q, g)),
        "query expansion": lambda _: changed(average_query_expansion(q, g), g),
        "graph propagation": lambda _: changed(*graph_propagation(q, g)),
        "mutual sum": lambda _: changed(*mutual_sum(q, g)),
    }
    return [_ranked(name + after, way)[1] for name, way in ways.items()]


def _mapped_baselines(score: Score, runner: Runner, query: Features, gallery: Features) -> list[Ranking]:
    """Cosine and the same ways, on the features as the gated head compares them; nothing under another rule."""
    mapped = map_sets(runner, query, gallery)
    if mapped is None:
        return []
    return [_ranked("cosine" + MAPPED, lambda _: score(*mapped))[1], *_baselines(score, *mapped, MAPPED)]


def _rank_lists(name: str, query: Features, gallery: Features, rows: np.ndarray, top: int) -> list[RankList]:
    shown = query.take(rows)
    found = ranking.rank(shown, gallery, top=top)
    lists = []
    for path, pid, images, distances in zip(shown.paths, shown.pids, found.indices, found.distances, strict=True):
        pairs = [(g, d) for g, d in zip(images, distances, strict=True) if g >= 0]
        listed = tuple(Listed(gallery.paths[g], bool(gallery.pids[g] == pid), float(d)) for g, d in pairs)
        lists.append(RankList(name, path, listed))
    return lists
