"""What the operators must compute, in float64 and in plain numpy, and the cases that they are compared on."""

from __future__ import annotations

import numpy as np


def exact_scores(
    a: np.ndarray,  # [H, N, R]
    b: np.ndarray,  # [H, M, R]
) -> np.ndarray:  # float64 [H, N, M]
    return np.einsum("hir,hjr->hij", a.astype(np.float64), b.astype(np.float64))


def reference_top_k(
    scores: np.ndarray,  # [H, N, M]
    k: int,
) -> np.ndarray:  # int32 [H, N, k]
    """Score descending, equal scores by lower column, non-finite never, -1 behind."""
    heads, rows, columns = scores.shape
    ranked = np.where(np.isfinite(scores), scores, -np.inf)
    order = np.argsort(-ranked, axis=2, kind="stable")[:, :, :k]
    chosen = np.where(np.take_along_axis(ranked, order, 2) == -np.inf, -1, order)
    out = np.full((heads, rows, k), -1, np.int32)
    out[:, :, : min(k, columns)] = chosen
    return out


def sums_in_float32(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Scores as the kernels sum them: one fused multiply-add a factor, in ascending order.

    A product of two float32 is exact in float64; adding in float64 and rounding once is the fused operation but for
    double rounding, which these cases (small integers, single factors) cannot meet.
    """
    total = np.zeros((a.shape[0], a.shape[1], b.shape[1]), np.float32)
    for r in range(a.shape[2]):
        product = a[:, :, None, r].astype(np.float64) * b[:, None, :, r].astype(np.float64)
        with np.errstate(over="ignore", invalid="ignore"):
            total = (total.astype(np.float64) + product).astype(np.float32)
    return total


def assert_top_k_within_rounding(got: np.ndarray, a: np.ndarray, b: np.ndarray, k: int) -> None:
    """Distinct columns whose exact scores are, place by place, the exact best but for float32 rounding."""
    scores = exact_scores(a, b)
    bound = np.einsum("hir,hjr->hij", np.abs(a).astype(np.float64), np.abs(b).astype(np.float64)).max()
    slack = 2 * a.shape[2] * 2.0**-24 * bound
    filled = min(k, b.shape[1])
    assert (got[:, :, filled:] == -1).all()
    assert ((got[:, :, :filled] >= 0) & (got[:, :, :filled] < b.shape[1])).all()
    ordered = np.sort(got[:, :, :filled], axis=2)
    assert (np.diff(ordered, axis=2) > 0).all()
    best = -np.sort(-scores, axis=2)[:, :, :filled]
    assert (np.abs(np.take_along_axis(scores, got[:, :, :filled].astype(np.int64), 2) - best) <= slack).all()


def draw(seed: int, *shape: int, dtype: type = np.float32) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def reference_attention(
    a: np.ndarray,  # [H, N, R]
    b: np.ndarray,  # [H, N, R]
    v: np.ndarray,  # [H, N, D]
    neighbors: np.ndarray,  # int32 [H or 1, N, K]
    scale: float,
) -> np.ndarray:  # float64 [H, N, D]
    """A dense softmax over a dense mask, in float64: nothing in common with the kernels but the contract."""
    heads, rows, _ = v.shape
    out = np.zeros(v.shape)
    for h in range(heads):
        chosen = neighbors[h % neighbors.shape[0]]
        mask = np.zeros((rows, rows), bool)
        for i in range(rows):
            mask[i, chosen[i][(chosen[i] >= 0) & (chosen[i] < rows)]] = True
        with np.errstate(invalid="ignore"):
            scores = exact_scores(a[h : h + 1], b[h : h + 1])[0]
        mask &= mask.T & np.isfinite(scores)
        for i in np.flatnonzero(mask.any(axis=1)):
            j = np.flatnonzero(mask[i])
            weight = np.exp(scale * scores[i, j] - (scale * scores[i, j]).max())
            out[h, i] = (weight / weight.sum()) @ v[h, j].astype(np.float64)
    return out


def attention_case(seed: int, heads: int, rows: int, factors: int, size: int, k: int, dtype: type = np.float32):
    a, b = draw(seed, heads, rows, factors, dtype=dtype), draw(seed + 1, heads, rows, factors, dtype=dtype)
    neighbors = reference_top_k(exact_scores(a, a), k)  # symmetric scores: many choose each other
    return a, b, draw(seed + 2, heads, rows, size, dtype=dtype), neighbors
