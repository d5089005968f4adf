"""Re-ranking without a model: k-reciprocal (Zhong et al., CVPR 2017) and simpler baselines beside NFormer.

The published k-reciprocal code holds several N x N matrices; here a row holds its 21 nearest images and its encoding
(some tens of images, some hundred after query expansion), so Market-1501's 19,281 images fit in little more than their
distances.
"""

from __future__ import annotations

import numpy as np

from nformer_edge.core.spec import check_at_least
from nformer_edge.metrics.distance import check_same_size, reciprocal_mask, row_blocks, unit_rows
from nformer_edge.ops import native


def k_reciprocal_distances(
    query: np.ndarray, gallery: np.ndarray, k1: int = 20, k2: int = 6, lambda_: float = 0.3
) -> np.ndarray:
    """Distances of every query to every gallery image after k-reciprocal re-ranking.

    ``(1 - lambda) * Jaccard distance + lambda * d``, where d is the squared Euclidean distance of unit features over
    the largest of its query's. Encodings are rounded to half precision where the published code rounds them. Equal
    images have equal distances, however many they are; the published code separates more than k1 / 2 of them.

    Args:
        query: [Q, D] features, brought to unit norm here.
        gallery: [G, D].
        k1: neighbors that must choose each other.
        k2: neighbors whose encodings are averaged (local query expansion).
        lambda_: share of the original distance, 0 to 1.

    Returns:
        float32 [Q, G].

    Raises:
        DataError: if features are not finite, zero or of two sizes.
        UsageError: if a parameter is out of range.
        BackendError: if the native kernels are not compiled here.
    """
    check_at_least("k1", k1, 1)
    check_at_least("k2", k2, 1)
    check_at_least("lambda", lambda_, 0)
    check_at_least("1 - lambda", 1 - lambda_, 0)
    unit = _together(query, gallery)
    queries, images = len(query), len(unit)
    same = _firsts(unit.view(np.dtype((np.void, unit.shape[1] * unit.itemsize)))[:, 0])
    together = unit[None]
    lists = native.row_top_k(together, together, min(k1 + 1, images))[0]
    largest = (1 - native.smallest_scores(together)[0]).astype(np.float32)
    farthest = np.where(largest > 0, 2 * largest, 1)
    half, expand = (min(places, lists.shape[1]) for places in (int(np.around(k1 / 2)) + 1, k2))
    result = native.k_reciprocal(
        unit, lists, same, farthest, half=half, expand=expand, queries=queries, share=float(np.float16(1 - lambda_))
    )
    for rows in row_blocks(queries):
        original = 2 * (1 - unit[rows] @ unit[queries:].T) / farthest[rows, None]
        result[rows] += np.float32(lambda_) * original
    if (same < np.arange(images)).any():  # a matrix product may round equal rows apart
        result = result[_firsts(same[:queries])][:, _firsts(same[queries:])]
    return result


def _together(query: np.ndarray, gallery: np.ndarray) -> np.ndarray:
    """Unit rows of both, [Q + G, D]."""
    check_same_size(query, gallery)
    return np.concatenate([unit_rows(query, "query features"), unit_rows(gallery, "gallery features")]) + np.float32(0)


def _firsts(keys: np.ndarray) -> np.ndarray:
    """Where each of the keys [N] stands first. Returns int32 [N]."""
    _, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
    return first[inverse].astype(np.int32)


def reciprocal_mean(query: np.ndarray, gallery: np.ndarray, k: int = 20) -> tuple[np.ndarray, np.ndarray]:
    """Each unit feature replaced by the mean over its reciprocal top-k neighbors, itself among them.

    NFormer's neighbor rule without its weights: a baseline that learns nothing. Queries and gallery are seen together.

    Returns:
        float32 [Q, D] and [G, D].
    """
    unit = _together(query, gallery)
    lists = _lists(unit, k)
    mutual = reciprocal_mask(lists)
    means = _sums(unit, lists, mutual / mutual.sum(axis=1, keepdims=True, dtype=np.float32))
    return means[: len(query)], means[len(query) :]


def mutual_sum(query: np.ndarray, gallery: np.ndarray, k: int = 2) -> tuple[np.ndarray, np.ndarray]:
    """Each unit feature plus those of its k nearest images that have it among their own k.

    Neighbor feature centralization as in Pose2ID (Yuan et al., CVPR 2025), with its k.

    Returns:
        float32 [Q, D] and [G, D].
    """
    unit = _together(query, gallery)
    lists, own = _lists(unit, k + 1), np.arange(len(unit))[:, None]
    sums = unit + _sums(unit, lists, reciprocal_mask(lists) & (lists != own))
    return sums[: len(query)], sums[len(query) :]


def graph_propagation(
    query: np.ndarray, gallery: np.ndarray, k: int = 7, hops: int = 2
) -> tuple[np.ndarray, np.ndarray]:
    """Features sent along the graph of the k nearest images, `hops` times, by the squares of their cosines.

    The message passing of GNN re-ranking (Zhang et al., 2020; its second neighbor number), over features instead of
    adjacency rows.

    Returns:
        unit float32 [Q, D] and [G, D].
    """
    unit = _together(query, gallery)
    lists = _lists(unit, k)
    weights = np.empty(lists.shape, dtype=np.float32)
    for rows in row_blocks(len(unit)):
        weights[rows] = np.einsum("bd,bkd->bk", unit[rows], unit[lists[rows]]).clip(0) ** 2
    sent = unit
    for _ in range(hops):
        sent = unit_rows(_sums(sent, lists, weights))
    return sent[: len(query)], sent[len(query) :]


def _lists(unit: np.ndarray, k: int) -> np.ndarray:
    """The k nearest images of each of [N, D], itself among them though more than k equal it. int32 [N, min(k, N)]."""
    together, own = unit[None], np.arange(len(unit), dtype=np.int32)
    lists = native.row_top_k(together, together, min(k, len(unit)))[0]
    missing = (lists != own[:, None]).all(axis=1)
    lists[missing, -1] = own[missing]
    return lists


def _sums(x: np.ndarray, lists: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Of each list, the weighted sum of its images' rows: [M, D], [N, K] and [N, K] to float32 [N, D]."""
    sums = np.empty((len(lists), x.shape[1]), dtype=np.float32)
    for rows in row_blocks(len(lists)):
        sums[rows] = np.einsum("bk,bkd->bd", weights[rows], x[lists[rows]])
    return sums


def average_query_expansion(query: np.ndarray, gallery: np.ndarray, k: int = 5) -> np.ndarray:
    """Each query averaged with its k nearest gallery features (Chum et al., ICCV 2007). Returns unit float32 [Q, D]."""
    check_same_size(query, gallery)
    q, g = unit_rows(query, "query features"), unit_rows(gallery, "gallery features")
    lists = native.row_top_k(q[None], g[None], min(k, len(g)))[0]
    return unit_rows(q + _sums(g, lists, np.ones(lists.shape, np.float32)), "expanded queries")
