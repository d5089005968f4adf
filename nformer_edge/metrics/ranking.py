"""Market-1501's protocol (Zheng et al., ICCV 2015): CMC and mAP; mINP as Ye et al. (TPAMI 2021) define it.

For each query the gallery's images of the same identity from the same camera are left out, and so is junk (pid -1).
Distances are cosine: on unit features the published code's squared Euclidean distance orders the same.

Two other projects score the same ranking by other conventions (`Scoring`): figures of theirs compare with these alone.

- ``open-reid`` (its ``cmc`` without arguments, and scikit-learn's average precision, commit 3293ca7): each of a query's
  n matches counts 1/n at its place less the matches before it; images at one distance are one step of the precision.
- ``person-reid-baseline`` (Person_reID_baseline_pytorch, commit 82ff40f): the mean of the precisions before and after
  each match; of equal distances the last image comes first; a query without a match counts as 0.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
from tqdm import tqdm

from nformer_edge.core.errors import DataError
from nformer_edge.core.features import Features
from nformer_edge.core.spec import check_choice
from nformer_edge.core.terminal import PROGRESS
from nformer_edge.metrics.distance import ROW_BLOCK, check_same_size, cosine_distances, row_blocks, smallest, unit_rows

Scoring = Literal["market1501", "open-reid", "person-reid-baseline"]

#: Query and gallery.
Pair: TypeAlias = tuple[Features, Features]

JUNK = -1
DISTRACTOR = 0
UNKNOWN_CAMERA = -1


@dataclass(frozen=True)
class RankingResult:
    """What one way of ranking is worth. Fractions, 0 to 1.

    Args:
        mAP: mean of `ap` over valid queries.
        mINP: mean over valid queries of matches / rank of the hardest match.
        cmc: float64 [max_rank], share of valid queries with a match at this rank or better; flat past the gallery.
        ap: float64 [Q], NaN for a query that was left out.
        first_hit: int64 [Q], rank of the first match counted from 1, -1 for a query that was left out.
        valid: bool [Q], which queries are in the figures: those with a match in the gallery.
        curve: float64 [Q, max_rank], each query's share of the CMC: 0 or 1, or parts of 1 by open-reid's convention.
    """

    mAP: float
    mINP: float
    cmc: np.ndarray
    ap: np.ndarray
    first_hit: np.ndarray
    valid: np.ndarray
    curve: np.ndarray

    @property
    def left_out(self) -> int:
        """Queries without a match in the gallery: in none of the figures."""
        return int((~self.valid).sum())

    def rank(self, r: int) -> float:
        """Rank-r accuracy, r from 1 to max_rank."""
        return float(self.cmc[r - 1])

    def hits(self, r: int) -> np.ndarray:
        """float64 [Q]: 1 for a query with a match at rank r or better, else 0, also where it was left out."""
        found: np.ndarray = self.curve[:, r - 1]
        return found


@dataclass(frozen=True)
class RankLists:
    """The head of each query's ranked gallery.

    Args:
        indices: int64 [Q, top], gallery rows best first, -1 where the gallery has no more.
        distances: float32 [Q, top], infinity where the gallery has no more.
    """

    indices: np.ndarray
    distances: np.ndarray


def valid(query: Features, gallery: Features, rows: slice) -> np.ndarray:
    """Which gallery images the protocol ranks for the queries in `rows`. Returns bool [B, G].

    Two unknown cameras do not count as the same one.
    """
    same_pid = query.pids[rows, None] == gallery.pids[None]
    same_camera = (query.camids[rows, None] == gallery.camids[None]) & (gallery.camids != UNKNOWN_CAMERA)[None]
    return ~(same_pid & same_camera) & (gallery.pids != JUNK)[None]


def _distance_blocks(
    query: Features, gallery: Features, distances: np.ndarray | None, block: int
) -> Iterator[tuple[slice, np.ndarray]]:
    if distances is None:
        q, g = unit_rows(query.features, "query features"), unit_rows(gallery.features, "gallery features")
        check_same_size(q, g)
    elif distances.shape != (len(query), len(gallery)):
        expected, hint = f"[Q={len(query)}, G={len(gallery)}]", "Pass one row a query and one column a gallery image."
        raise DataError("distances", f"shape {distances.shape}", expected, hint)
    elif not np.isfinite(distances).all():
        raise DataError("distances", "NaN or infinity", "finite numbers", "Compute them again.")
    slices = list(row_blocks(len(query), block))
    for rows in tqdm(slices, desc="ranking", unit="block", **PROGRESS):
        yield rows, cosine_distances(q[rows], g) if distances is None else distances[rows]


def rank(
    query: Features,
    gallery: Features,
    *,
    top: int = 10,
    distances: np.ndarray | None = None,
    protocol: bool = True,
    block: int = ROW_BLOCK,
) -> RankLists:
    """The `top` best gallery images of each query; equal distances, lower gallery row first.

    Args:
        distances: [Q, G] to rank by; cosine distances of the features if None.
        protocol: leave out what Market's protocol leaves out. Without it every gallery image is ranked.
        block: queries whose distances are held at once.
    """
    indices = np.full((len(query), top), -1, dtype=np.int64)
    values = np.full((len(query), top), np.inf, dtype=np.float32)
    for rows, found in _distance_blocks(query, gallery, distances, block):
        masked = np.where(valid(query, gallery, rows), found, np.inf) if protocol else found
        best = smallest(masked, top)
        width = best.shape[1]
        values[rows, :width] = np.take_along_axis(masked, best, axis=1)
        indices[rows, :width] = np.where(np.isfinite(values[rows, :width]), best, -1)
    return RankLists(indices, values)


def _match_ranks(distances: np.ndarray, ranked: np.ndarray, match: np.ndarray) -> np.ndarray:
    """Ranks (from 1, ascending) of the matching images among those ranked, by one unindexed sort of the distances."""
    ordered = np.sort(distances[ranked])
    wanted = distances[match]
    first = np.searchsorted(ordered, wanted, side="left")
    ranks = first + 1
    tied = np.flatnonzero(np.searchsorted(ordered, wanted, side="right") - first > 1)
    if tied.size:
        columns = np.flatnonzero(match)
        for i in tied:  # equal distances: as many more places down as equal images stand in lower gallery rows
            ranks[i] += int((ranked & (distances == wanted[i]))[: columns[i]].sum())
    return np.sort(ranks)


def _by_open_reid(distances: np.ndarray, ranked: np.ndarray, match: np.ndarray, curve: np.ndarray) -> float:
    """Average precision; adds to the CMC `curve`, at the place of each match less the matches before it."""
    ranks = _match_ranks(distances, ranked, match)
    places = ranks - np.arange(1, len(ranks) + 1)
    np.add.at(curve, places[places < len(curve)], 1 / len(ranks))
    at = distances[match]
    return float(np.mean(_count(distances[match], at) / _count(distances[ranked], at)))


def _count(values: np.ndarray, up_to: np.ndarray) -> np.ndarray:
    """How many values are at most each of `up_to`."""
    return np.searchsorted(np.sort(values), up_to, side="right")


def _by_person_reid_baseline(distances: np.ndarray, ranked: np.ndarray, match: np.ndarray, curve: np.ndarray) -> float:
    """Average precision by trapezoids; adds to the CMC `curve`."""
    ranks = _match_ranks(distances[::-1], ranked[::-1], match[::-1])  # of equal distances the last comes first
    curve[ranks[0] - 1 : ranks[0]] = 1
    i = np.arange(len(ranks))
    before = np.where(ranks > 1, i / np.maximum(ranks - 1, 1), 1.0)
    return float(np.mean((before + (i + 1) / ranks) / 2))


def _by_market1501(distances: np.ndarray, ranked: np.ndarray, match: np.ndarray, curve: np.ndarray) -> float:
    """Average precision; adds to the CMC `curve`."""
    ranks = _match_ranks(distances, ranked, match)
    curve[ranks[0] - 1 : ranks[0]] = 1
    return float(np.mean(np.arange(1, len(ranks) + 1) / ranks))


_CONVENTIONS = {
    "market1501": _by_market1501,
    "open-reid": _by_open_reid,
    "person-reid-baseline": _by_person_reid_baseline,
}


def evaluate(
    query: Features,
    gallery: Features,
    *,
    distances: np.ndarray | None = None,
    max_rank: int = 50,
    block: int = ROW_BLOCK,
    scoring: Scoring = "market1501",
) -> RankingResult:
    """CMC, mAP and mINP by Market's protocol. Memory is O(block * G) besides the features.

    Args:
        distances: [Q, G] to rank by, such as re-ranked ones; cosine distances of the features if None.
        max_rank: length of the CMC curve.
        block: queries whose distances are held at once.
        scoring: another project's convention of average precision and CMC.

    Raises:
        DataError: if no query has a match in the gallery, or features or distances cannot be used.
    """
    ap = np.full(len(query), np.nan)
    inp = np.full(len(query), np.nan)
    first_hit = np.full(len(query), -1, dtype=np.int64)
    curve = np.zeros((len(query), max_rank))
    check_choice("scoring", scoring, tuple(_CONVENTIONS))
    for rows, found in _distance_blocks(query, gallery, distances, block):
        ranked = valid(query, gallery, rows)
        match = ranked & (query.pids[rows, None] == gallery.pids[None]) & (query.pids[rows, None] != JUNK)
        for offset in np.flatnonzero(match.any(axis=1)):
            ranks = _match_ranks(found[offset], ranked[offset], match[offset])
            i = rows.start + offset
            ap[i] = _CONVENTIONS[scoring](found[offset], ranked[offset], match[offset], curve[i])
            inp[i] = len(ranks) / ranks[-1]
            first_hit[i] = ranks[0]
    scored = first_hit > 0
    if not scored.any():
        got = f"{len(query)} queries, none with a match in the gallery from another camera"
        hint = "Count matches of the same camera: --same-camera (of `embed`, for a feature store), or check the labels."
        raise DataError("query", got, "at least one", hint)
    curve = curve.cumsum(axis=1)
    counted = scored
    if scoring == "person-reid-baseline":
        counted, ap, inp = np.ones_like(scored), np.where(scored, ap, 0.0), np.where(scored, inp, 0.0)
    figures = float(ap[counted].mean()), float(inp[counted].mean()), curve[counted].mean(axis=0)
    return RankingResult(*figures, ap, first_hit, counted, curve)
