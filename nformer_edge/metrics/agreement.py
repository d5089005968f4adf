"""How far an engine's outputs are from the reference's: numbers only; `gates` judges them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from nformer_edge.core.errors import DataError
from nformer_edge.core.features import Features
from nformer_edge.metrics.distance import nearest, reciprocal_mask, row_blocks, unit_rows
from nformer_edge.metrics.ranking import rank

#: Cosine distances nearer than this are a tie: what float32 rounding moves them by at 512 features.
TIE = 1e-6

#: 1 - cosine spans decades between FP32 and INT8, so it is counted in eighths of a decade, from 1 down to 1e-8.
COSINE_EDGES = np.concatenate([1.0 - np.logspace(0, -8, 65), [1.0]])


@dataclass(frozen=True)
class TensorError:
    """`worst` is the largest abs(x - ref) / (atol + rtol * abs(ref)): at most 1 holds. NaN if `non_finite` > 0."""

    worst: float
    max_abs: float
    non_finite: int


def _check_pair(x: np.ndarray, reference: np.ndarray) -> None:
    if x.shape != reference.shape or x.ndim != 2 or not len(x):
        raise DataError(
            "features",
            f"shapes {x.shape} and {reference.shape}",
            "the same [N, D] with N >= 1",
            "Give both models the same images.",
        )


def tensor_error(x: np.ndarray, reference: np.ndarray, atol: float, rtol: float) -> TensorError:
    """The sum form over [N, D], each row measured in units of its reference row's L2 norm.

    Embeddings are compared by direction, so an absolute tolerance means something only on that scale; dividing both
    sides by the reference's norm keeps an error of length visible.
    """
    _check_pair(x, reference)
    bad = int((~np.isfinite(x)).sum() + (~np.isfinite(reference)).sum())
    if bad:
        return TensorError(float("nan"), float("nan"), bad)
    x, reference = x.astype(np.float64), reference.astype(np.float64)
    norm = np.linalg.norm(reference, axis=1, keepdims=True)
    scale = np.where(norm > 0, norm, 1)
    error = np.abs(x - reference) / scale
    return TensorError(float((error / (atol + rtol * np.abs(reference) / scale)).max()), float(error.max()), 0)


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


def rank_agreement(
    query: Features, gallery: Features, x_query: np.ndarray, x_gallery: np.ndarray, top: int = 10
) -> tuple[float, float]:
    """Share of queries with the same best gallery image, and the mean overlap of the `top` best.

    An engine's choice agrees when the reference finds it as near as its own, up to TIE.

    Args:
        query: the reference's features with their labels; Market's protocol leaves out what it leaves out.
        gallery: as `query`.
        x_query: [Q, D] of the engine.
        x_gallery: [G, D] of the engine.
    """
    _check_pair(x_query, query.features)
    _check_pair(x_gallery, gallery.features)
    ours = rank(query, gallery, top=top)
    theirs = rank(query.with_features(x_query), gallery.with_features(x_gallery), top=top)
    q, g = unit_rows(query.features).astype(np.float64), unit_rows(gallery.features).astype(np.float64)
    ranked = theirs.indices >= 0
    seen = np.empty(theirs.indices.shape)
    for rows in row_blocks(len(query)):  # the reference's distance to what the engine chose
        seen[rows] = 1.0 - np.einsum("qd,qkd->qk", q[rows], g[theirs.indices[rows]])
    listed = (theirs.indices[:, :, None] == ours.indices[:, None, :]).any(axis=2)
    counts = ranked.sum(axis=1)
    some = counts > 0
    if not some.any():
        raise DataError("gallery", "no image to rank", "at least one", "Add gallery images.")
    last = np.take_along_axis(ours.distances, np.maximum(counts - 1, 0)[:, None], axis=1)
    overlap = ((listed | (seen <= last + TIE)) & ranked).sum(axis=1)[some] / counts[some]
    first = (theirs.indices[:, 0] == ours.indices[:, 0]) | (seen[:, 0] <= ours.distances[:, 0] + TIE)
    return float(first[some].mean()), float(overlap.mean())


def reciprocal_jaccard(x: np.ndarray, reference: np.ndarray, k: int = 20) -> float:
    """Mean over images of |A & B| / |A | B|, A and B the reciprocal top-k neighbors in [N, D] and its reference.

    The image itself is in no set, so it cannot prop up the figure; two empty sets are alike.
    """
    _check_pair(x, reference)
    lists = [nearest(unit_rows(rows), k) for rows in (reference, x)]
    ours, theirs = (np.where(reciprocal_mask(n), n, -1)[:, 1:] for n in lists)
    total = 0.0
    for rows in row_blocks(len(x), 4096):
        both = ((ours[rows, :, None] == theirs[rows, None, :]) & (ours[rows, :, None] >= 0)).sum(axis=(1, 2))
        either = (ours[rows] >= 0).sum(axis=1) + (theirs[rows] >= 0).sum(axis=1) - both
        total += float(np.where(either > 0, both / np.maximum(either, 1), 1.0).sum())
    return total / len(x)
