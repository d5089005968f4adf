"""One threshold for "the same person": from a wanted rate of false matches to a cosine (ISO/IEC 19795-1's terms).

A pair of a query and a gallery image, junk left out, is of one identity (genuine) or of two (impostor); it is accepted
at a cosine of the threshold or more.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from tqdm import tqdm

from nformer_edge.core.errors import DataError, UsageError
from nformer_edge.core.features import Features
from nformer_edge.core.terminal import PROGRESS
from nformer_edge.metrics.distance import ROW_BLOCK, check_same_size, cosine_distances, row_blocks, unit_rows
from nformer_edge.metrics.ranking import DISTRACTOR, JUNK, UNKNOWN_CAMERA


@dataclass(frozen=True)
class Rates:
    """What a threshold accepts, 0 to 1.

    Args:
        false_match: share of impostor pairs.
        true_match: share of genuine pairs.
    """

    false_match: float
    true_match: float


@dataclass(frozen=True)
class Operating:
    """A fitted threshold and what it accepts.

    Args:
        threshold: cosine; halfway between the last impostor pair accepted and the first one refused.
        rates: at `threshold`. The false-match rate is the wanted one rounded down to whole pairs; lower where equal
            cosines stand at that place, for they are accepted or refused together.
        genuine, impostor: number of pairs.
        elsewhere: the rates at another threshold, None if none was asked about.
    """

    threshold: float
    rates: Rates
    genuine: int
    impostor: int
    elsewhere: Rates | None = None


def _pairs(query: Features, gallery: Features, rows: slice) -> tuple[np.ndarray, np.ndarray]:
    """Genuine and impostor pairs of the queries in `rows`: two bool [B, G]. Unknown cameras are not the same one."""
    across = (query.camids[rows, None] != gallery.camids[None]) | (gallery.camids == UNKNOWN_CAMERA)[None]
    known = (query.pids[rows, None] != JUNK) & (gallery.pids != JUNK)[None]
    same = query.pids[rows, None] == gallery.pids[None]
    return across & known & same, across & known & ~same


def _distances(query: Features, gallery: Features, block: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Distances of genuine and of impostor pairs, float32, a block of queries at a time."""
    q, g = unit_rows(query.features, "query features"), unit_rows(gallery.features, "gallery features")
    check_same_size(q, g)
    for rows in tqdm(list(row_blocks(len(query), block)), desc="pairs", unit="block", **PROGRESS):
        genuine, impostor = _pairs(query, gallery, rows)
        found = cosine_distances(q[rows], g)
        yield found[genuine], found[impostor]


def fit_threshold(
    query: Features, gallery: Features, false_match_rate: float, *, also_at: float | None = None, block: int = ROW_BLOCK
) -> Operating:
    """The cosine that accepts a wanted share of the impostor pairs, and the share of genuine pairs it accepts.

    Pairs are of different cameras; unknown cameras are not the same one.
    Exact, not from a histogram. Memory besides the features is O(block * G), the genuine distances, and the
    `false_match_rate` nearest of the impostor ones.

    Args:
        false_match_rate: wanted share of impostor pairs accepted, above 0 and below 1.
        also_at: another cosine whose rates to tell, such as the one in use.
        block: queries whose distances are held at once.

    Raises:
        UsageError: if the rate is not between 0 and 1, or is less than one pair of those there are.
        DataError: if there is no genuine or no impostor pair, or features cannot be used.
    """
    if not 0 < false_match_rate < 1:
        raise UsageError("false-match rate", false_match_rate, "above 0, below 1", "Such as 0.001.")
    pairs = (_pairs(query, gallery, rows) for rows in row_blocks(len(query), block))
    counts = np.array([[int(mask.sum()) for mask in both] for both in pairs], np.int64).reshape(-1, 2)
    genuine_count, impostor_count = counts.sum(axis=0).tolist()
    if not (genuine_count and impostor_count):
        got = f"{genuine_count} of one identity and {impostor_count} of two"
        hint = "Give images of several people from different cameras, or count those of one camera: --same-camera"
        raise DataError("pairs", got, "some of both", hint)
    accept = min(int(false_match_rate * impostor_count * (1 + 1e-12)), impostor_count - 1)
    if accept < 1:
        got = f"{false_match_rate:g} of {impostor_count:,} pairs"
        expected = f"at least one pair: {1 / impostor_count:.3g}"
        raise UsageError("false-match rate", got, expected, "Raise the rate or give more images.")
    lowest, genuine, elsewhere = np.empty(0, np.float32), [], 0
    for same, other in _distances(query, gallery, block):
        genuine.append(same)
        lowest = np.concatenate([lowest, other])
        if len(lowest) > accept + 1:
            lowest = np.partition(lowest, accept)[: accept + 1]
        if also_at is not None:
            elsewhere += int((other <= 1.0 - also_at).sum())
    cut = _cut(np.sort(lowest).astype(np.float64), accept)
    own = np.concatenate(genuine)

    def rates(distance: float, accepted: int) -> Rates:
        return Rates(accepted / impostor_count, float((own <= distance).mean()))

    there = None if also_at is None else rates(1.0 - also_at, elsewhere)
    fitted = rates(cut, int((lowest <= cut).sum()))
    return Operating(1.0 - cut, fitted, genuine_count, impostor_count, there)


def _cut(ordered: np.ndarray, accept: int) -> float:
    """A distance that takes the first `accept` of ascending distances [accept + 1], or fewer where the next equals."""
    refused = ordered[accept]
    below = ordered[ordered < refused]
    return float((below[-1] + refused) / 2) if len(below) else float(np.nextafter(np.float32(refused), np.float32(-9)))


#: Thresholds that are tried: every 0.0005 of cosine.
CUTS = np.round(np.arange(-2000, 2001) / 2000, 4)


@dataclass(frozen=True)
class Acceptance:
    """What each of CUTS accepts, one number a cut.

    Args:
        queries: that were counted.
        strangers: impostor pairs.
        known: queries with an image of their own person in the gallery.
        known_across: queries with one from another camera.
        wrong: share of queries that accept a stranger among so many drawn at random.
        false_match: share of impostor pairs.
        found: share of `known` that accept their own person; NaN without any.
        found_across: share of `known_across` that accept their own person in another camera's image; likewise.
    """

    queries: int
    strangers: int
    known: int
    known_across: int
    wrong: np.ndarray
    false_match: np.ndarray
    found: np.ndarray
    found_across: np.ndarray


def measure_acceptance(
    query: Features,
    gallery: Features,
    scores: Iterable[tuple[slice, np.ndarray]],
    size: int,
    *,
    nearest_left_out: int | None = None,
) -> Acceptance:
    """What thresholds accept, a query at a time; pairs of the same camera count too, junk does not.

    Args:
        query: with labels.
        gallery: likewise.
        scores: cosines of all queries: rows of `query`, and their float [B, G]; NaN for a pair that does not count.
        size: of the gallery that `Acceptance.wrong` is for. Up to the strangers that a query has here they are drawn
            without replacement, and beyond with it: an extrapolation.
        nearest_left_out: for images without labels: every pair is one of strangers but for so many nearest images of
            each query, which are taken for its own person and left out.

    Raises:
        DataError: if no query has a stranger in the gallery.
    """
    draws = _Draws(len(gallery), size)
    wrong, accepted, found, across = (np.zeros(len(CUTS)) for _ in range(4))
    queries = strangers = known = known_across = 0
    for rows, block in scores:
        for row, cosines in zip(range(len(query))[rows], np.asarray(block, np.float64), strict=True):
            if nearest_left_out is None:
                counts = np.isfinite(cosines) & (gallery.pids != JUNK)
                same = gallery.pids == query.pids[row]
                own = counts & same & (query.pids[row] != DISTRACTOR)
                other = own & ((gallery.camids != query.camids[row]) | (gallery.camids == UNKNOWN_CAMERA))
                theirs = cosines[counts & ~same]
                for mask, total in ((own, found), (other, across)):
                    if mask.any():
                        total += cosines[mask].max() >= CUTS
                known, known_across = known + bool(own.any()), known_across + bool(other.any())
            else:
                theirs = np.sort(cosines[np.isfinite(cosines)])
                theirs = theirs[: max(len(theirs) - nearest_left_out, 0)]
            if not len(theirs) or (nearest_left_out is None and query.pids[row] == JUNK):
                continue
            above = np.bincount(np.maximum(np.searchsorted(CUTS, theirs, side="right") - 1, 0), minlength=len(CUTS))
            above = above[::-1].cumsum()[::-1]
            wrong += draws.some(above, len(theirs))
            accepted += above
            queries, strangers = queries + 1, strangers + len(theirs)
    if not queries:
        hint = "Give images of several people, or crops that nobody labeled: --layout unlabeled"
        raise DataError("pairs", "none of different people", "at least one", hint)

    def share(total: np.ndarray, count: int) -> np.ndarray:
        return total / count if count else np.full(len(CUTS), np.nan)

    own_person = share(found, known), share(across, known_across)
    return Acceptance(queries, strangers, known, known_across, wrong / queries, accepted / strangers, *own_person)


class _Draws:
    """Chances when a gallery of `size` strangers is drawn at random from those that a query was compared with."""

    def __init__(self, most: int, size: int) -> None:
        self._size = size
        self._log = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, most + 1)))])  # of factorials

    def some(self, accepted: np.ndarray, strangers: int) -> np.ndarray:
        """Chance that one of those drawn is among the `accepted` of `strangers`, for each number accepted."""
        if self._size > strangers:
            return 1.0 - (1.0 - accepted / strangers) ** self._size
        rest, log = strangers - self._size, self._log
        possible = np.minimum(accepted, rest)
        none = log[rest] - log[rest - possible] - log[strangers] + log[strangers - possible]
        return np.where(accepted > rest, 1.0, -np.expm1(none))
