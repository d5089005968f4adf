"""Market-1501's protocol (Zheng et al., ICCV 2015): CMC and mAP; mINP as Ye et al. (TPAMI 2021) define it.

For each query the gallery's images of the same identity from the same camera are left out, and so is junk (pid -1).
Distances are cosine: on unit features the published code's squared Euclidean distance orders the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from tqdm import tqdm

from nformer_edge.core.errors import DataError
from nformer_edge.core.features import Features
from nformer_edge.core.terminal import PROGRESS
from nformer_edge.metrics.distance import ROW_BLOCK, check_same_size, cosine_distances, row_blocks, smallest, unit_rows

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
        valid: bool [Q], which queries have a match in the gallery.
    """

    mAP: float
    mINP: float
    cmc: np.ndarray
    ap: np.ndarray
    first_hit: np.ndarray
    valid: np.ndarray

    @property
    def left_out(self) -> int:
        """Queries without a match in the gallery: in none of the figures."""
        return int((~self.valid).sum())

    def rank(self, r: int) -> float:
        """Rank-r accuracy, r from 1 to max_rank."""
        return float(self.cmc[r - 1])

    def hits(self, r: int) -> np.ndarray:
        """float64 [Q]: 1 for a query with a match at rank r or better, else 0, also where it was left out."""
        return ((self.first_hit > 0) & (self.first_hit <= r)).astype(np.float64)


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


def evaluate(
    query: Features,
    gallery: Features,
    *,
    distances: np.ndarray | None = None,
    max_rank: int = 50,
    block: int = ROW_BLOCK,
) -> RankingResult:
    """CMC, mAP and mINP by Market's protocol. Memory is O(block * G) besides the features.

    Args:
        distances: [Q, G] to rank by, such as re-ranked ones; cosine distances of the features if None.
        max_rank: length of the CMC curve.
        block: queries whose distances are held at once.

    Raises:
        DataError: if no query has a match in the gallery, or features or distances cannot be used.
    """
    ap = np.full(len(query), np.nan)
    inp = np.full(len(query), np.nan)
    first_hit = np.full(len(query), -1, dtype=np.int64)
    for rows, found in _distance_blocks(query, gallery, distances, block):
        ranked = valid(query, gallery, rows)
        match = ranked & (query.pids[rows, None] == gallery.pids[None]) & (query.pids[rows, None] != JUNK)
        for offset in np.flatnonzero(match.any(axis=1)):
            ranks = _match_ranks(found[offset], ranked[offset], match[offset])
            i = rows.start + offset
            ap[i] = np.mean(np.arange(1, len(ranks) + 1) / ranks)
            inp[i] = len(ranks) / ranks[-1]
            first_hit[i] = ranks[0]
    scored = first_hit > 0
    if not scored.any():
        got = f"{len(query)} queries, none with a match in the gallery from another camera"
        hint = "Count matches of the same camera: --same-camera (of `embed`, for a feature store), or check the labels."
        raise DataError("query", got, "at least one", hint)
    cmc = (first_hit[scored, None] <= np.arange(1, max_rank + 1)).mean(axis=0)
    return RankingResult(float(ap[scored].mean()), float(inp[scored].mean()), cmc, ap, first_hit, scored)
