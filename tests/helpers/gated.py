"""The gated attention of docs/operators.md, read literally: dense matrices, in the tensors' own precision."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

FACTOR = 0.5


def gated_formula(
    a: Tensor,
    b: Tensor,
    v: Tensor,
    neighbors: Tensor,
    scale: float,
    t: Tensor,
    cameras: Tensor | None = None,
    camera_factor: float = FACTOR,
) -> Tensor:
    heads, rows, _ = v.shape
    lists = neighbors.expand(heads, -1, -1).long()
    listed = torch.zeros(heads, rows, rows + 1, dtype=torch.bool)
    listed = listed.scatter(2, torch.where(lists < 0, rows, lists), True)[:, :, :rows]
    listed = listed & ~torch.eye(rows, dtype=torch.bool)
    t = t.expand(heads, rows)
    weights = torch.sigmoid(scale * (a @ b.transpose(1, 2) - (t[:, :, None] + t[:, None, :]) / 2)) * listed
    if cameras is not None:
        same = (cameras[:, None] == cameras[None]) & (cameras[:, None] >= 0)
        weights = weights * torch.where(same, camera_factor, 1.0).to(weights.dtype)
    return weights @ v


def gated_case(
    heads: int, rows: int, length: int, size: int, k: int, *, lists: int, thresholds: int, cameras: bool, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor, float, Tensor, Tensor | None]:
    """Random float32 arguments of the attention up to `cameras`. Some places of a list are -1, some are the row itself,
    some thresholds are equal, and some cameras are unknown."""
    rng = np.random.default_rng(seed)
    a, b, v = (torch.from_numpy(rng.standard_normal((heads, rows, d)).astype("f4")) for d in (length, length, size))
    chosen = np.argsort(rng.random((lists, rows, max(rows, k))), axis=2)[:, :, :k]
    neighbors = torch.from_numpy(np.where((chosen < rows) & (rng.random(chosen.shape) < 0.9), chosen, -1).astype("i4"))
    t = torch.from_numpy(rng.integers(-2, 3, (thresholds, rows)).astype("f4") * np.float32(0.3))
    known = torch.from_numpy(rng.integers(-1, 3, rows).astype("i4")) if cameras else None
    return a, b, v, neighbors, 1.3, t, known
