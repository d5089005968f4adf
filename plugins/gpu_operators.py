"""The kernels on torch tensors, and what they are compared with: the operators in float64 and in plain torch."""

from __future__ import annotations

import ctypes
import math
from pathlib import Path

import torch
from torch import Tensor

TYPES = {torch.float32: 0, torch.float16: 1}
DEVICE = "cuda"


class Kernels:
    """The C functions of ``nformer/kernels.h`` on torch tensors; every argument and return is checked."""

    def __init__(self, library: Path) -> None:
        self.lib = ctypes.CDLL(str(library))

    def row_top_k(
        self,
        a: Tensor,  # [H, N, R]
        b: Tensor,  # [H, M, R]
        k: int,
        out: Tensor | None = None,  # int32 [H, N, k]
    ) -> Tensor:
        (heads, rows, factors), columns = a.shape, b.shape[1]
        assert b.shape == (heads, columns, factors)
        assert a.is_contiguous()
        assert b.is_contiguous()
        assert a.dtype == b.dtype
        out = torch.empty((heads, rows, k), dtype=torch.int32, device=a.device) if out is None else out
        sizes = [ctypes.c_int64(n) for n in (heads, rows, columns, factors, k)]
        code = self.lib.nformer_row_top_k(
            _pointer(a), _pointer(b), _pointer(out), *sizes, ctypes.c_int32(TYPES[a.dtype]), _stream()
        )
        assert code == 0, f"row_top_k: CUDA error {code}"
        return out

    def attention(
        self,
        a: Tensor,  # [H, N, R]
        b: Tensor,  # [H, N, R]
        v: Tensor,  # [H, N, D]
        neighbors: Tensor,  # int32 [H or 1, N, K]
        scale: float,
        t: Tensor | None = None,  # float32 [H or 1, N]
        cameras: Tensor | None = None,  # int32 [N]
        camera_factor: float = 1.0,
        out: Tensor | None = None,  # [H, N, D]
    ) -> Tensor:
        (heads, rows, factors), size = a.shape, v.shape[2]
        assert b.shape == a.shape
        assert v.shape[:2] == a.shape[:2]
        assert all(x.is_contiguous() for x in (a, b, v, neighbors))
        assert a.dtype == b.dtype == v.dtype
        assert neighbors.dtype == torch.int32
        assert t is None or (t.dtype == torch.float32 and t.shape[1] == rows and t.is_contiguous())
        assert cameras is None or (cameras.dtype == torch.int32 and cameras.shape == (rows,))
        out = torch.empty_like(v) if out is None else out
        lists, count = neighbors.shape[::2]
        thresholds = 1 if t is None else t.shape[0]
        sizes = [ctypes.c_int64(n) for n in (heads, rows, factors, size, lists, thresholds, count)]
        code = self.lib.nformer_reciprocal_neighbor_attention(
            *(_pointer(x) for x in (a, b, v, neighbors, t, cameras, out)), *sizes,
            ctypes.c_float(scale), ctypes.c_float(camera_factor), ctypes.c_int32(TYPES[a.dtype]), _stream(),
        )  # fmt: skip
        assert code == 0, f"reciprocal_neighbor_attention: CUDA error {code}"
        return out


def _pointer(x: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if x is None else x.data_ptr())


def _stream() -> ctypes.c_void_p:
    return ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)


def scores_of(a: Tensor, b: Tensor) -> Tensor:  # float64 [H, N, M]
    return a.double() @ b.double().transpose(1, 2)


def reference_top_k(
    scores: Tensor,  # float64 [H, N, M]
    k: int,
) -> Tensor:  # int32 [H, N, k]
    ranked = scores.masked_fill(~scores.isfinite(), -math.inf)
    values, order = ranked.sort(dim=2, descending=True, stable=True)
    chosen = order[:, :, :k].masked_fill(values[:, :, :k] == -math.inf, -1)
    out = torch.full((*scores.shape[:2], k), -1, dtype=torch.int32, device=scores.device)
    out[:, :, : chosen.shape[2]] = chosen.to(torch.int32)
    return out


def reference_attention(a: Tensor, b: Tensor, v: Tensor, neighbors: Tensor, scale: float) -> Tensor:
    heads, rows, _ = v.shape
    mask = torch.zeros((neighbors.shape[0], rows, rows + 1), dtype=torch.bool, device=v.device)
    mask.scatter_(2, neighbors.long().masked_fill(neighbors < 0, rows), True)
    mask = mask[:, :, :rows].expand(heads, rows, rows)
    scores = scores_of(a, b)
    mask = mask & mask.transpose(1, 2) & scores.isfinite()
    scaled = (scores * scale).masked_fill(~mask, -math.inf)
    weights = scaled.softmax(dim=2).masked_fill(~mask, 0.0)  # a row without a neighbor is NaN before the mask
    return weights @ v.double()


def reference_gate(
    a: Tensor,
    b: Tensor,
    v: Tensor,
    neighbors: Tensor,
    scale: float,
    t: Tensor,  # [H or 1, N]
    cameras: Tensor | None = None,
    camera_factor: float = 1.0,
    dtype: torch.dtype = torch.float64,  # that it computes in
) -> Tensor:
    """The gated attention, dense."""
    rows = v.shape[1]
    mask = torch.zeros((neighbors.shape[0], rows, rows + 1), dtype=torch.bool, device=v.device)
    mask.scatter_(2, neighbors.long().masked_fill(neighbors < 0, rows), True)
    mask = mask[:, :, :rows] & ~torch.eye(rows, dtype=torch.bool, device=v.device)
    a, b, v, t = (x.to(dtype) for x in (a, b, v, t))
    gap = a @ b.transpose(1, 2) - (t[:, :, None] + t[:, None, :]) / 2
    weights = torch.sigmoid(scale * gap) * mask
    if cameras is not None:
        same = (cameras[:, None] == cameras[None]) & (cameras[None] >= 0)
        weights = torch.where(same, camera_factor * weights, weights)
    return weights @ v


def plain_attention(a: Tensor, b: Tensor, v: Tensor, neighbors: Tensor, scale: float) -> Tensor:
    """Dense torch in the precision of the input, scores in float32."""
    heads, rows, _ = v.shape
    mask = torch.zeros((neighbors.shape[0], rows, rows + 1), dtype=torch.bool, device=v.device)
    mask.scatter_(2, neighbors.long().masked_fill(neighbors < 0, rows), True)
    mask = mask[:, :, :rows].expand(heads, rows, rows)
    mask = mask & mask.transpose(1, 2)
    scores = (a.float() @ b.float().transpose(1, 2) * scale).masked_fill(~mask, -math.inf)
    return (scores.softmax(dim=2).masked_fill(~mask, 0.0) @ v.float()).to(v.dtype)


def draw(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(DEVICE, dtype)


def integers(seed: int, low: int, high: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(low, high, shape, generator=generator).to(DEVICE, dtype)
