"""One part of an engine against the gates of its precision, by composition and, for the head, by landmark seed."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from nformer_edge.core.spec import Precision
from nformer_edge.metrics import agreement, gates
from nformer_edge.metrics.agreement import RankAgreement
from nformer_edge.metrics.bootstrap import DRAWS, Interval, Ratio, paired_difference, paired_ratio
from nformer_edge.metrics.gates import GateResult, Verdict
from nformer_edge.metrics.ranking import DISTRACTOR, JUNK, Pair, RankingResult, evaluate

#: Gates that need labels.
_KEPT = ("mAP_kept", "rank1_kept")

PartName = Literal["backbone", "head", "end_to_end"]


@dataclass(frozen=True)
class Outputs:
    """What one run of a part gave for the same images.

    Args:
        reference: in float32.
        engine: as built.
        exact: of the reference's float64 run, that the engine's rows are measured against; None where there is none.
        own: float64 [N], errors of the float32 reference's rows against its float64 run; None likewise.
    """

    reference: Pair
    engine: Pair
    exact: np.ndarray | None = None
    own: np.ndarray | None = None


@dataclass(frozen=True)
class RankScore:
    """What a model ranks like: fractions over the queries that have a match.

    Args:
        mAP: mean average precision.
        rank1: share of queries whose first match is correct.
        queries: how many have a match.
    """

    mAP: float
    rank1: float
    queries: int


@dataclass(frozen=True)
class Differences:
    """The engine's scores less the reference's, with two-sided 95 % bounds by the paired bootstrap.

    Args:
        mAP: mean average precision.
        rank1: share of queries whose first match is correct.
    """

    mAP: Interval
    rank1: Interval


@dataclass(frozen=True)
class Moved:
    """A query whose first image is another one with the engine.

    Args:
        query: path of its image.
        reference: path of the reference's first image.
        engine: path of the engine's.
        same_person: whether both show one person; null without labels.
    """

    query: str
    reference: str
    engine: str
    same_person: bool | None


@dataclass(frozen=True)
class PartRun:
    """A part under one landmark seed and one composition of the gallery.

    Args:
        landmark_seed: null for the backbone, which has no landmarks.
        images: gallery images a person, with one query a person (`metrics.composition`); null for the whole split.
        status: by the gates.
        gates: all of them.
        reference: its scores; null without labels.
        engine: its scores; null without labels, or where its features cannot be ranked.
        differences: of the two; null where one is missing.
        moved: queries with another first image.
    """

    landmark_seed: int | None
    images: int | None
    status: Verdict
    gates: tuple[GateResult, ...]
    reference: RankScore | None
    engine: RankScore | None
    differences: Differences | None
    moved: tuple[Moved, ...]

    @property
    def title(self) -> str:
        """Such as ``all images, landmark seed 0`` and ``1 image a person``."""
        images = "all images" if self.images is None else f"{self.images} image a person"
        return images if self.landmark_seed is None else f"{images}, landmark seed {self.landmark_seed}"


@dataclass(frozen=True)
class Cosines:
    """A histogram of the cosines to the reference, over all runs on the whole split.

    Args:
        edges: of n bins, n + 1.
        counts: images in each bin.
        not_finite: images without a cosine.
    """

    edges: tuple[float, ...]
    counts: tuple[int, ...]
    not_finite: int


@dataclass(frozen=True)
class PartParity:
    """A part of an engine against the reference's.

    Args:
        part: `end_to_end` is the engine's head on its own features.
        precision: as built; of `end_to_end`, the coarser of the two.
        float64: whether errors of tensors are against the reference's float64 run, rather than its float32 outputs.
        status: by the gates.
        seconds: that it took.
        gates: of each gate the worst run.
        cosines: to the reference.
        runs: one a composition and landmark seed.
    """

    part: PartName
    precision: Precision
    float64: bool
    status: Verdict
    seconds: float
    gates: tuple[GateResult, ...]
    cosines: Cosines
    runs: tuple[PartRun, ...]

    @property
    def title(self) -> str:
        """The part in words."""
        return self.part.replace("_", " ")


def usable(pair: Pair) -> bool:
    """Whether these features can be ranked: finite, and no row all zeros."""
    return all(bool(np.isfinite(s.features).all() and s.features.any(axis=1).all()) for s in pair)


def stacked(pair: Pair) -> np.ndarray:
    """Features of query and gallery, [Q + G, D]."""
    return np.concatenate([s.features for s in pair])


def judge_run(
    part: PartName,
    precision: Precision,
    outputs: Outputs,
    draws: int = DRAWS,
    seed: int = 0,
    landmark_seed: int | None = None,
    images: int | None = None,
) -> tuple[PartRun, np.ndarray]:
    """One run against the gates of `precision`, and its cosines [N].

    Reciprocal neighbors are a gate of the backbone alone: its features choose them. Without labels nothing can be said
    of mAP and Rank-1: their gates are undecided.
    """
    x, reference = stacked(outputs.engine), stacked(outputs.reference)
    exact = reference if outputs.exact is None else outputs.exact
    judged = {"tensor": gates.judge_tensor(precision, agreement.tensor_error(x, exact, outputs.own))}
    cosines = agreement.cosines(x, reference)
    held, note = cosines, ""
    if outputs.exact is not None and judged["tensor"].status == "passed":
        held = np.maximum(cosines, agreement.cosines(x, exact))
        if (other := int((held - cosines > 1e-6).sum())) > 0:
            note = f"{other} rows have equal neighbors in the other order; to the reference's own {cosines.min():.6g}"
    measured = {"cosine_min": float(held.min()), "cosine_mean": float(held.mean())}
    ours = evaluate(*outputs.reference) if (outputs.reference[1].pids != JUNK).any() else None
    theirs, found, differences = None, None, None
    if ours is None:
        judged |= {name: gates.undecided(gates.rule(precision, name), "no labels") for name in _KEPT}
    if usable(outputs.engine):
        found = agreement.rank_agreement(outputs.reference, outputs.engine)
        judged["first_match"] = gates.judge_first_match(precision, found)
        measured["top10_overlap"] = found.overlap
        if part == "backbone":
            measured["reciprocal_jaccard"] = agreement.reciprocal_jaccard(x, reference)
        if ours is not None:
            theirs = evaluate(*outputs.engine)
            ratios, differences = _kept(ours, theirs, draws, seed)
            judged |= {name: gates.judge_ratio(gates.rule(precision, name), ratio) for name, ratio in ratios.items()}
    names = [name for name in gates.TITLES if name != "reciprocal_jaccard" or part == "backbone"]
    for name in names:
        if name not in judged:
            judged[name] = gates.judge(gates.rule(precision, name), measured.get(name, math.nan))
    judged["cosine_min"] = dataclasses.replace(judged["cosine_min"], note=note or judged["cosine_min"].note)
    results = tuple(dataclasses.replace(judged[name], landmark_seed=landmark_seed, images=images) for name in names)
    moved = () if found is None else _moved(found, outputs.reference)
    scores = (_score(ours), _score(theirs))
    return PartRun(landmark_seed, images, gates.verdict(results), results, *scores, differences, moved), cosines


def judge_part(
    part: PartName,
    precision: Precision,
    run: Callable[[int | None, int | None], Outputs],
    settings: Sequence[tuple[int | None, int | None]] = ((None, None),),
    draws: int = DRAWS,
    seed: int = 0,
) -> PartParity:
    """A part in every setting, landmark seed (None without landmarks) and images a person (None for the whole split).

    Of each gate the worst run decides.
    """
    start = time.perf_counter()
    runs, cosines, exact = [], [], False
    for chosen, images in settings:
        outputs = run(chosen, images)
        judged, found = judge_run(part, precision, outputs, draws, seed, chosen, images)
        runs.append(judged)
        cosines += [found] if images is None else []
        exact = outputs.exact is not None
    worst = tuple(results[gates.worst(results)] for results in zip(*(r.gates for r in runs), strict=True))
    counts, not_finite = agreement.cosine_histogram(np.concatenate(cosines))
    histogram = Cosines(tuple(agreement.COSINE_EDGES.tolist()), tuple(counts.tolist()), not_finite)
    seconds = time.perf_counter() - start
    return PartParity(part, precision, exact, gates.verdict(worst), seconds, worst, histogram, tuple(runs))


def _kept(ours: RankingResult, theirs: RankingResult, draws: int, seed: int) -> tuple[dict[str, Ratio], Differences]:
    """The ratios that the gates judge, and the same comparison as differences."""
    valid = ours.valid  # labels alone decide it: the same in both
    found = {"mAP": (theirs.ap[valid], ours.ap[valid]), "rank1": (theirs.hits(1)[valid], ours.hits(1)[valid])}
    ratios = {f"{name}_kept": paired_ratio(*pair, draws, seed) for name, pair in found.items()}
    return ratios, Differences(**{name: paired_difference(*pair, draws, seed) for name, pair in found.items()})


def _score(result: RankingResult | None) -> RankScore | None:
    return None if result is None else RankScore(result.mAP, result.rank(1), int(result.valid.sum()))


def _moved(found: RankAgreement, reference: Pair) -> tuple[Moved, ...]:
    query, gallery = reference
    rows = []
    for q, ours, theirs in found.moved.tolist():
        same = bool(gallery.pids[ours] == gallery.pids[theirs] != DISTRACTOR) if found.by_person else None
        rows.append(Moved(query.paths[q], gallery.paths[ours], gallery.paths[theirs], same))
    return tuple(rows)
