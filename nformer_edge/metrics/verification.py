"""One threshold for "the same person": from a wanted false-match rate to a cosine distance (ISO/IEC 19795-1's terms).

Pairs are a query and a gallery image from different cameras, junk left out: of one identity (genuine) or of two
(impostor). A pair is accepted at a distance of the threshold or less.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from tqdm import tqdm

from nformer_edge.core.errors import DataError, UsageError
from nformer_edge.core.features import Features
from nformer_edge.core.terminal import PROGRESS
from nformer_edge.metrics.distance import ROW_BLOCK, check_same_size, cosine_distances, row_blocks, unit_rows
from nformer_edge.metrics.ranking import JUNK, UNKNOWN_CAMERA


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
        threshold: cosine distance; halfway between the last impostor pair accepted and the first one refused.
        rates: at `threshold`. The false-match rate is the wanted one rounded down to whole pairs; lower where equal
            distances stand at that place, for they are accepted or refused together.
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
    """The threshold that accepts a wanted share of the impostor pairs, and the share of genuine pairs it accepts.

    Exact, not from a histogram. Memory besides the features is O(block * G), the genuine distances, and the
    `false_match_rate` nearest of the impostor ones.

    Args:
        false_match_rate: wanted share of impostor pairs accepted, above 0 and below 1.
        also_at: another threshold whose rates to tell, such as the one in use.
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
        hint = "Give queries and gallery images of several people from different cameras."
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
            elsewhere += int((other <= also_at).sum())
    threshold = _cut(np.sort(lowest).astype(np.float64), accept)
    own = np.concatenate(genuine)

    def rates(at: float, accepted: int) -> Rates:
        return Rates(accepted / impostor_count, float((own <= at).mean()))

    there = None if also_at is None else rates(also_at, elsewhere)
    fitted = rates(threshold, int((lowest <= threshold).sum()))
    return Operating(threshold, fitted, genuine_count, impostor_count, there)


def _cut(ordered: np.ndarray, accept: int) -> float:
    """A threshold that takes the first `accept` of ascending distances [accept + 1], or fewer where the next equals."""
    refused = ordered[accept]
    below = ordered[ordered < refused]
    return float((below[-1] + refused) / 2) if len(below) else float(np.nextafter(np.float32(refused), np.float32(-9)))
