"""The two custom operators in plain torch: what every other backend is measured against.

The contract is `docs/operators.md`. Nothing here holds an N x N matrix: rows are taken in blocks whose scores fit in
`BLOCK_BYTES`. Half precision is accumulated in float32; float64 stays float64.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from nformer_edge.core.errors import DataError, UsageError
from nformer_edge.ops.contract import NO_NEIGHBOR, check_factors, check_gate, check_neighbors, check_values

#: Upper bound on the temporaries of one block of rows.
BLOCK_BYTES = 64 << 20

_WIDE = {torch.float16: torch.float32, torch.float32: torch.float32, torch.float64: torch.float64}


def row_top_k(
    a: Tensor,  # [H, N, R]
    b: Tensor,  # [H, M, R]
    k: int,
) -> Tensor:  # int32 [H, N, k]
    """For each row of ``a b^T``, the columns of the `k` largest scores.

    Scores descend; equal scores stand lower column first; the tail is -1 where there are fewer than `k` columns.
    A score that overflows to infinity or NaN is never chosen. No gradient flows through the choice.

    Raises:
        UsageError: if a shape, a type or `k` does not fit.
        DataError: if an input is not finite, naming the first bad row.
    """
    _check_factors(a, b)
    if k < 1:
        raise UsageError("k", k, "at least 1", "Ask for one neighbor or more.")
    check_finite("a", a)
    check_finite("b", b)
    heads, rows, _ = a.shape
    columns = b.shape[1]
    neighbors = torch.full((heads, rows, k), NO_NEIGHBOR, dtype=torch.int32, device=a.device)
    if rows == 0 or columns == 0:
        return neighbors
    wide = _WIDE[a.dtype]
    block = max(1, BLOCK_BYTES // (columns * wide.itemsize))
    with torch.no_grad():
        for head in range(heads):
            transposed = b[head].to(wide).T
            for start in range(0, rows, block):
                scores = a[head, start : start + block].to(wide) @ transposed
                chosen = _largest(scores, min(k, columns))
                neighbors[head, start : start + block, : chosen.shape[1]] = chosen
    return neighbors


def _largest(
    scores: Tensor,  # [B, M]
    k: int,
) -> Tensor:  # int32 [B, k]
    """The exact choice. `torch.topk` is fast but orders ties as it likes, so rows with a tie are sorted stably."""
    values, columns = scores.topk(min(k + 1, scores.shape[1]), dim=1)  # one more shows a tie across the border
    if not values.isfinite().all():
        scores = scores.masked_fill(~scores.isfinite(), -math.inf)
        values, columns = scores.topk(values.shape[1], dim=1)
    tied = (values[:, 1:] == values[:, :-1]).any(dim=1).nonzero()[:, 0]
    values, columns = values[:, :k], columns[:, :k]
    if len(tied):
        ordered, order = scores[tied].sort(dim=1, descending=True, stable=True)
        values[tied], columns[tied] = ordered[:, :k], order[:, :k]
    return columns.masked_fill(values == -math.inf, NO_NEIGHBOR).to(torch.int32)


def pair_scores(
    a: Tensor,  # [N, R]
    b: Tensor,  # [M, R]
    names: Tensor,  # int32 [N, K], each 0..M-1
) -> Tensor:  # [N, K]
    """The scores of each row with the columns that it names, of one head. Differentiable."""
    return torch.stack([(a * b.index_select(0, column)).sum(dim=1) for column in names.unbind(dim=1)], dim=1)


def reciprocal_neighbor_attention(
    a: Tensor,  # [H, N, R]
    b: Tensor,  # [H, N, R]
    v: Tensor,  # [H, N, D]
    neighbors: Tensor,  # int32 [H, N, K] or [1, N, K]
    scale: float | None = None,
    t: Tensor | None = None,  # [H, N] or [1, N], float32, or float64 as `a`
    cameras: Tensor | None = None,  # int32 [N]
    camera_factor: float = 1.0,
) -> Tensor:  # [H, N, D]
    """Softmax of ``scale * a b^T`` over the neighbors that chose each other, then the weighted sum of their values.

    `scale` is 1 / sqrt(D) unless given. A row with no reciprocal neighbor is exactly zero. Differentiable in
    `a`, `b` and `v` (Wang et al., CVPR 2022, section 3.3, with the sign of the published code).

    With `t` it is gated: ``sum_j sigmoid(scale * (a_i b_j - (t_i + t_j) / 2)) * f_ij * v_j`` over j != i in the list of
    i. The weights are not normalized. f_ij is `camera_factor` for two images of one known camera, otherwise 1.
    Differentiable in `t`, too.

    Raises:
        UsageError: if a shape or a type does not fit, a neighbor is out of range, or `cameras` come without `t`.
        DataError: if an input is not finite, naming the first bad row.
    """
    _check_factors(a, b)
    check_values(a, b, v)
    check_neighbors(neighbors, a, torch.int32)
    check_gate(t, cameras, a, _WIDE[a.dtype], torch.int32)
    if neighbors.numel() and not (int(neighbors.min()) >= -1 and int(neighbors.max()) < a.shape[1]):
        got, expected = f"{int(neighbors.min())}..{int(neighbors.max())}", f"-1..{a.shape[1] - 1}"
        raise UsageError("neighbors", got, expected, "Pass what row_top_k gave for the same images.")
    for name, x in (("a", a), ("b", b), ("v", v)):
        check_finite(name, x)
    if t is not None:
        check_finite("t", t[:, :, None])
    heads, rows, size = v.shape
    if rows == 0:
        return torch.zeros_like(v)
    scale = 1.0 / math.sqrt(size) if scale is None else scale
    wide, count = _WIDE[v.dtype], neighbors.shape[2]
    per_row = count * (wide.itemsize * (a.shape[2] + size) + 8 * count)
    block = max(1, BLOCK_BYTES // per_row)
    out = []
    for head in range(heads):
        chosen = neighbors[head if neighbors.shape[0] > 1 else 0].long()
        factors = (a[head].to(wide), b[head].to(wide), v[head].to(wide))
        spans = [slice(s, min(s + block, rows)) for s in range(0, rows, block)]
        if t is None:
            blocks = [_attend(*factors, chosen, span, scale) for span in spans]
        else:
            own = t[head if t.shape[0] > 1 else 0]
            blocks = [_gate(*factors, own, chosen, span, scale, cameras, camera_factor) for span in spans]
        out.append(torch.cat(blocks))
    return torch.stack(out).to(v.dtype)


def _attend(
    a: Tensor,  # [N, R]
    b: Tensor,  # [N, R]
    v: Tensor,  # [N, D]
    neighbors: Tensor,  # int64 [N, K]
    rows: slice,
    scale: float,
) -> Tensor:  # [rows, D]
    mine = neighbors[rows]
    places = mine.clamp_min(0)  # -1 would read the last row; it is masked below
    index = torch.arange(rows.start, rows.stop, device=a.device)
    counts = (mine >= 0) & (neighbors[places] == index[:, None, None]).any(dim=2)
    scores = (a[rows, None, :] * b[places]).sum(dim=2)
    counts = counts & scores.isfinite()
    scores = torch.where(counts, scores * scale, -math.inf)
    highest = scores.detach().amax(dim=1, keepdim=True)
    weights = (scores - highest.masked_fill(highest == -math.inf, 0.0)).exp()
    total = weights.sum(dim=1, keepdim=True)
    weights = weights / total.masked_fill(total == 0, 1.0)
    return (weights[:, None, :] @ v[places])[:, 0, :]


def _gate(
    a: Tensor,  # [N, R]
    b: Tensor,  # [N, R]
    v: Tensor,  # [N, D]
    t: Tensor,  # [N]
    neighbors: Tensor,  # int64 [N, K]
    rows: slice,
    scale: float,
    cameras: Tensor | None,  # [N]
    camera_factor: float,
) -> Tensor:  # [rows, D]
    mine = neighbors[rows]
    index = torch.arange(rows.start, rows.stop, device=a.device)[:, None]
    places = torch.where(mine < 0, index, mine)
    scores = (a[rows, None, :] * b[places]).sum(dim=2)
    own, theirs = t[rows, None], t[places]
    counts = (places != index) & (scores - own).isfinite() & (scores - theirs).isfinite()
    gaps = torch.where(counts, 0.5 * (scores - own) + 0.5 * (scores - theirs), 0.0)
    weights = torch.where(counts, (scale * gaps).sigmoid(), 0.0)
    if cameras is not None:
        same = (cameras[places] == cameras[rows, None]) & (cameras[places] >= 0)
        weights = torch.where(same, camera_factor * weights, weights)
    return (weights[:, None, :] @ v[places])[:, 0, :]


def check_finite(name: str, x: Tensor) -> None:
    """Raises DataError naming the first row of `x` [..., N, D] that holds NaN or infinity, if there is one."""
    if x.sum().isfinite() or x.isfinite().all():  # the sum is quicker, and may overflow where no number did
        return
    bad = ~x.detach().isfinite().all(dim=-1)
    bad = bad.flatten(0, -2).any(dim=0) if bad.dim() > 1 else bad
    row = int(bad.nonzero()[0, 0])
    got = f"NaN or infinity in row {row} ({int(bad.sum())} such)"
    raise DataError(name, got, "finite numbers", "Look at what these images show.")


def _check_factors(a: Tensor, b: Tensor) -> None:
    check_factors(a, b, _WIDE, "float32, float16 or float64")
