"""How far an engine's outputs are from the reference's: numbers only; `gates` judges them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from nformer_edge.core.errors import DataError
from nformer_edge.metrics.distance import cosine_distances, nearest, reciprocal_mask, row_blocks, unit_rows
from nformer_edge.metrics.ranking import DISTRACTOR, JUNK, Pair, rank

#: What the FP32 gate allows a row: so many times the float32 reference's own error, or so much of its norm.
OWN_ERRORS, ROUNDING = 4.0, 1e-5

#: Cosine distances nearer than this are a tie: what float32 rounding moves them by at 512 features.
TIE = 1e-6

#: 1 - cosine spans decades between FP32 and INT8, so it is counted in eighths of a decade, from 1 down to 1e-8.
COSINE_EDGES = np.concatenate([1.0 - np.logspace(0, -8, 65), [1.0]])


@dataclass(frozen=True)
class TensorError:
    """How far rows are off, in L2. Errors are NaN if `non_finite` > 0.

    Args:
        mean: of the rows' errors, each in units of its reference row's norm.
        largest: likewise.
        own: largest error of the float32 reference itself; NaN without a float64 run of it.
        worst: largest error of a row in units of what the FP32 gate allows it; see `row_tolerance`.
        non_finite: numbers that are NaN or infinite.
    """

    mean: float
    largest: float
    own: float
    worst: float
    non_finite: int


def _check_pair(x: np.ndarray, reference: np.ndarray) -> None:
    if x.shape != reference.shape or x.ndim != 2 or not len(x):
        got = f"shapes {x.shape} and {reference.shape}"
        raise DataError("features", got, "the same [N, D] with N >= 1", "Give both models the same images.")


def row_errors(x: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """L2 norm of the difference of each row of [N, D] over that of its reference row. Returns float64 [N].

    NaN for a row that is not finite; a row of zeros has norm 1.
    """
    _check_pair(x, reference)
    x, reference = x.astype(np.float64), reference.astype(np.float64)
    with np.errstate(invalid="ignore", over="ignore"):
        norm = np.linalg.norm(reference, axis=1)
        errors = np.linalg.norm(x - reference, axis=1) / np.where(norm > 0, norm, 1)
    return np.where(np.isfinite(errors), errors, np.nan)


def row_tolerance(own: np.ndarray | None) -> np.ndarray | float:
    """What the FP32 gate allows rows, in units of their norms, by the reference's own `row_errors` [N] if known."""
    return ROUNDING if own is None else np.maximum(OWN_ERRORS * own, ROUNDING)


def tensor_error(x: np.ndarray, exact: np.ndarray, own: np.ndarray | None = None) -> TensorError:
    """Errors of an engine's rows [N, D] against the reference's float64 run, or itself where there is no such run.

    `own` is float64 [N], the float32 reference's `row_errors` against that run.
    """
    errors = row_errors(x, exact)
    bad = int((~np.isfinite(x)).sum() + (~np.isfinite(exact)).sum())
    worst = float((errors / row_tolerance(own)).max())
    own_largest = math.nan if own is None else float(own.max())
    return TensorError(float(errors.mean()), float(errors.max()), own_largest, worst, bad)


def cosines(x: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Cosine of each row of [N, D] to its reference row, float64 [N]. NaN for a row that is zero or not finite."""
    _check_pair(x, reference)
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        x, reference = x.astype(np.float64), reference.astype(np.float64)
        product = np.einsum("nd,nd->n", x, reference)
        return product / (np.linalg.norm(x, axis=1) * np.linalg.norm(reference, axis=1))


def cosine_histogram(found: np.ndarray) -> tuple[np.ndarray, int]:
    """How many of the cosines [N] lie between two neighbors of `COSINE_EDGES`, and how many are not finite.

    Returns:
        int64 [len(COSINE_EDGES) - 1]; a cosine below 0 counts in the first, one that rounding put above 1 in the last.
    """
    finite = found[np.isfinite(found)]
    counts, _ = np.histogram(np.clip(finite, 0.0, 1.0), COSINE_EDGES)
    return counts, len(found) - len(finite)


@dataclass(frozen=True)
class RankAgreement:
    """How far an engine ranks as its reference does.

    Args:
        first: share of the `compared` queries whose first match agrees; NaN if there is none.
        overlap: mean overlap of the best images, over all queries.
        compared: queries that `first` counts.
        undecided: queries without labels whose reference is not decided; `first` leaves them out.
        by_person: whether first matches are compared by person rather than by image.
        moved: int64 [M, 3] of the queries with another first image: query, the reference's gallery row, the engine's.
    """

    first: float
    overlap: float
    compared: int
    undecided: int
    by_person: bool
    moved: np.ndarray


def rank_agreement(reference: Pair, engine: Pair, top: int = 10) -> RankAgreement:
    """First matches and the `top` best gallery images of an engine against its reference's.

    With labels, the first match agrees when it is the same person; Market's protocol leaves out what it leaves out.
    Without (every gallery image unknown), it is the same image, over the queries whose reference is decided: its first
    match leads the second by more than twice the root mean square difference of the two models' scores. An image
    agrees also where the reference finds it as near as its own choice, up to TIE. The reference's sets have the labels.
    """
    query, gallery = reference
    for original, x in zip(reference, engine, strict=True):
        _check_pair(x.features, original.features)
    labeled = bool((gallery.pids != JUNK).any())
    ours = rank(query, gallery, top=max(top, 2), protocol=labeled)
    theirs = rank(*engine, top=top, protocol=labeled)
    q, g = unit_rows(query.features).astype(np.float64), unit_rows(gallery.features).astype(np.float64)
    ranked = theirs.indices >= 0
    seen = np.empty(theirs.indices.shape)
    for block in row_blocks(len(query)):  # the reference's distance to what the engine chose
        seen[block] = 1.0 - np.einsum("qd,qkd->qk", q[block], g[theirs.indices[block]])
    listed = (theirs.indices[:, :, None] == ours.indices[:, None, :top]).any(axis=2)
    counts = ranked.sum(axis=1)
    some = counts > 0
    if not some.any():
        raise DataError("gallery", "no image to rank", "at least one", "Add gallery images.")
    last = np.take_along_axis(ours.distances, np.maximum(counts - 1, 0)[:, None], axis=1)
    overlap = ((listed | (seen <= last + TIE)) & ranked).sum(axis=1)[some] / counts[some]
    first, chosen = ours.indices[:, 0], theirs.indices[:, 0]
    agrees = (first == chosen) | (seen[:, 0] <= ours.distances[:, 0] + TIE)
    compared = some
    if labeled:
        agrees |= (gallery.pids[first] == gallery.pids[chosen]) & (gallery.pids[first] != DISTRACTOR)
    else:
        compared = some & (ours.distances[:, 1] - ours.distances[:, 0] > 2 * score_difference(reference, engine))
    moved = np.flatnonzero(some & (first != chosen))
    share = float(agrees[compared].mean()) if compared.any() else math.nan
    counted = int(compared.sum()), int((some & ~compared).sum())
    rows = np.stack([moved, first[moved], chosen[moved]], axis=1)
    return RankAgreement(share, float(overlap.mean()), *counted, labeled, rows)


def score_difference(reference: Pair, engine: Pair) -> float:
    """Root mean square difference of two models' cosines, over all pairs of a query and a gallery image."""
    q, g, x_q, x_g = (unit_rows(s.features) for s in (*reference, *engine))
    total = 0.0
    for rows in row_blocks(len(q)):
        difference = cosine_distances(x_q[rows], x_g).astype(np.float64) - cosine_distances(q[rows], g)
        total += float(np.square(difference).sum())
    return math.sqrt(total / (len(q) * len(g)))


def reciprocal_jaccard(x: np.ndarray, reference: np.ndarray, k: int = 20) -> float:
    """Mean over images of |A & B| / |A | B|, A and B the reciprocal top-k neighbors in [N, D] and its reference.

    The image itself is in no set, so it cannot prop up the figure; two empty sets are alike.
    """
    _check_pair(x, reference)
    lists = [nearest(unit_rows(rows), k)[0] for rows in (reference, x)]
    ours, theirs = (np.where(reciprocal_mask(n), n, -1)[:, 1:] for n in lists)
    total = 0.0
    for rows in row_blocks(len(x), 4096):
        both = ((ours[rows, :, None] == theirs[rows, None, :]) & (ours[rows, :, None] >= 0)).sum(axis=(1, 2))
        either = (ours[rows] >= 0).sum(axis=1) + (theirs[rows] >= 0).sum(axis=1) - both
        total += float(np.where(either > 0, both / np.maximum(either, 1), 1.0).sum())
    return total / len(x)
