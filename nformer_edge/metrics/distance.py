"""Cosine distances in blocks, and the k smallest of each row with ties broken by the lower column."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from tqdm import tqdm

from nformer_edge.core.errors import DataError
from nformer_edge.core.features import check_features
from nformer_edge.core.terminal import PROGRESS

#: Rows of the left side, and of the right side, that are held in float64 at once: 256 x 20,000 takes 40 MB.
ROW_BLOCK = 256
COLUMN_BLOCK = 8192

#: Mean cosine of two images from which `alike` speaks: an untrained OSNet gives 0.994 on any images, a ResNet-50 0.999.
ALIKE = 0.99


def unit_rows(features: np.ndarray, subject: str = "features") -> np.ndarray:
    """Rows of [N, D] brought to L2 norm 1, as float32.

    Raises:
        DataError: for a row that is not finite or is all zeros.
    """
    check_features(features, subject)
    rows = np.asarray(features, dtype=np.float64)
    rows = rows / np.abs(rows).max(axis=1, keepdims=True, initial=0.0) if len(rows) else rows  # squares stay in range
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def alike(features: np.ndarray, subject: str) -> tuple[str, ...]:
    """A note where the rows of [N, D] are nearly all alike: where their mean cosine to each other is ALIKE or more.

    Blank images do that, another normalization than in training, and an untrained model. 256 rows, evenly spaced, stand
    for all; rows that are zero or not finite are left out, and of fewer than 8 nothing is said.
    """
    rows = features[np.isfinite(features).all(axis=1) & features.any(axis=1)]
    rows = unit_rows(rows[:: -(-len(rows) // 256) or 1]).astype(np.float64)
    count = len(rows)
    if count < 8:
        return ()
    mean = (np.square(rows.sum(axis=0)).sum() - count) / (count * (count - 1))
    cause = "look for blank images, another normalization than in training, or an untrained model"
    return (f"{subject}: nearly all features are alike (mean cosine {mean:.4f}): {cause}",) if mean >= ALIKE else ()


def check_same_size(query: np.ndarray, gallery: np.ndarray) -> None:
    """Raises DataError unless [Q, D] and [G, D] have the same D."""
    if query.shape[1] != gallery.shape[1]:
        got, expected = f"{gallery.shape[1]} numbers a row", f"{query.shape[1]}, as the query's"
        raise DataError("gallery features", got, expected, "Embed both with the same model.")


def cosine_distances(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """1 - cosine of unit rows [B, D] and [M, D]. Returns float32 [B, M].

    Products are summed in float64 and rounded once, so equal rows tie whatever block of a BLAS kernel they fall in.
    """
    left64 = left.astype(np.float64)
    distances = np.empty((len(left), len(right)), dtype=np.float32)
    for start in range(0, len(right), COLUMN_BLOCK):
        stop = start + COLUMN_BLOCK
        distances[:, start:stop] = 1.0 - left64 @ right[start:stop].astype(np.float64).T
    return distances


def row_blocks(rows: int, block: int = ROW_BLOCK) -> Iterator[slice]:
    """Slices that cover 0..rows in pieces of `block`."""
    for start in range(0, rows, block):
        yield slice(start, min(start + block, rows))


def smallest(distances: np.ndarray, k: int) -> np.ndarray:
    """Columns of the k smallest values of each row of [B, M], ascending; equal values, lower column first.

    Returns:
        int64 [B, min(k, M)].
    """
    columns = distances.shape[1]
    if k >= columns:
        return np.argsort(distances, axis=1, kind="stable")
    chosen = np.sort(np.argpartition(distances, k - 1, axis=1)[:, :k], axis=1)
    values = np.take_along_axis(distances, chosen, axis=1)
    # argpartition takes any of the columns that tie for the last place; such rows are rare and sorted whole
    crowded = (distances <= values.max(axis=1, keepdims=True)).sum(axis=1) > k
    order = np.argsort(values, axis=1, kind="stable")
    result = np.take_along_axis(chosen, order, axis=1)
    if crowded.any():
        result[crowded] = np.argsort(distances[crowded], axis=1, kind="stable")[:, :k]
    return result


def nearest(unit: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k nearest rows of each unit row of [N, D], itself first even where others equal it; and how far others are.

    Returns:
        int64 [N, min(k, N)], and float32 [N], each row's largest distance.
    """
    lists = np.empty((len(unit), min(k, len(unit))), dtype=np.int64)
    largest = np.empty(len(unit), dtype=np.float32)
    for rows in tqdm(list(row_blocks(len(unit))), desc="neighbors", unit="block", **PROGRESS):
        distances = cosine_distances(unit[rows], unit)
        largest[rows] = distances.max(axis=1)
        distances[np.arange(rows.stop - rows.start), np.arange(rows.start, rows.stop)] = -1.0
        lists[rows] = smallest(distances, k)
    return lists, largest


def reciprocal_mask(neighbors: np.ndarray) -> np.ndarray:
    """Of each list, who has the list's owner in their own. int [N, K] to bool [N, K]."""
    mask = np.empty(neighbors.shape, dtype=bool)
    for rows in row_blocks(len(neighbors), 4096):
        owners = np.arange(rows.start, rows.stop)[:, None, None]
        mask[rows] = (neighbors[neighbors[rows]] == owners).any(axis=2)
    return mask
