"""The two operators where the model meets them: whoever computes them, and the native kernels as PyTorch operators.

``nformer::row_top_k`` and ``nformer::reciprocal_neighbor_attention`` have fake tensors, so that `torch.compile` and
`torch.export` see through them, and autograd: gradients flow through the scores of the kept neighbors and through the
values, never through the choice. They take CPU tensors of float32 or float16 (`supports`); the plain torch of
`ops.reference` serves all else and is what they are tested against.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Protocol

import torch
from torch import Tensor

from nformer_edge.core.errors import UsageError
from nformer_edge.ops import native
from nformer_edge.ops import reference as plain


class Operators(Protocol):
    """Who computes the operators, and few scores of long lists: any object or module with these functions. Shapes as in
    `ops.reference`."""

    def row_top_k(self, a: Tensor, b: Tensor, k: int) -> Tensor: ...

    def pair_scores(self, a: Tensor, b: Tensor, names: Tensor) -> Tensor: ...

    def reciprocal_neighbor_attention(
        self,
        a: Tensor,
        b: Tensor,
        v: Tensor,
        neighbors: Tensor,
        scale: float | None = None,
        t: Tensor | None = None,
        cameras: Tensor | None = None,
        camera_factor: float = 1.0,
    ) -> Tensor: ...


class FastestOperators:
    """The native kernels for the tensors that they take, plain torch for all others: same results, call by call."""

    def row_top_k(self, a: Tensor, b: Tensor, k: int) -> Tensor:
        return (row_top_k if supports(a, b) else plain.row_top_k)(a, b, k)

    def pair_scores(self, a: Tensor, b: Tensor, names: Tensor) -> Tensor:
        if not supports(a, b) or (torch.is_grad_enabled() and (a.requires_grad or b.requires_grad)):
            return plain.pair_scores(a, b, names)
        found = native.pair_scores(*(x[None].detach().numpy() for x in (a, b, names)), threads=torch.get_num_threads())
        return torch.from_numpy(found[0]).to(a.dtype)

    def reciprocal_neighbor_attention(
        self,
        a: Tensor,
        b: Tensor,
        v: Tensor,
        neighbors: Tensor,
        scale: float | None = None,
        t: Tensor | None = None,
        cameras: Tensor | None = None,
        camera_factor: float = 1.0,
    ) -> Tensor:
        attend = reciprocal_neighbor_attention if supports(a, b, v) else plain.reciprocal_neighbor_attention
        return attend(a, b, v, neighbors, scale, t, cameras, camera_factor)


_chosen: ContextVar[Operators] = ContextVar("operators", default=FastestOperators())  # noqa: B039 - it has no state


def operators() -> Operators:
    """The operators that a model's forward uses now: `FastestOperators`, unless `using` says otherwise."""
    return _chosen.get()


@contextmanager
def using(chosen: Operators) -> Iterator[None]:
    """Within the block, models compute with `chosen`: native kernels, or the nodes that an export records."""
    token = _chosen.set(chosen)
    try:
        yield
    finally:
        _chosen.reset(token)


_DTYPES = (torch.float32, torch.float16)


def supports(*tensors: Tensor) -> bool:
    """Whether the native kernels take these factors or values: compiled here, on the CPU, float32 or float16."""
    return native.available() and all(t.device.type == "cpu" and t.dtype in _DTYPES for t in tensors)


def row_top_k(
    a: Tensor,  # [H, N, R]
    b: Tensor,  # [H, M, R]
    k: int,
) -> Tensor:  # int32 [H, N, k]
    """`native.row_top_k` on tensors, with as many threads as torch uses.

    Raises:
        UsageError: for tensors that `supports` does not take, or a shape that does not fit.
        DataError: if an input is not finite, naming the first bad row.
    """
    _check_supported(a, b)
    chosen: Tensor = _row_top_k(a.detach(), b.detach(), k)
    return chosen


def reciprocal_neighbor_attention(
    a: Tensor,  # [H, N, R]
    b: Tensor,  # [H, N, R]
    v: Tensor,  # [H, N, D]
    neighbors: Tensor,  # int32 [H, N, K] or [1, N, K]
    scale: float | None = None,
    t: Tensor | None = None,  # float32 [H, N] or [1, N]
    cameras: Tensor | None = None,  # int32 [N]
    camera_factor: float = 1.0,
) -> Tensor:  # [H, N, D]
    """`native.reciprocal_neighbor_attention` on tensors, differentiable once in `a`, `b`, `v` and `t`.

    Raises:
        UsageError: for tensors that `supports` does not take, a shape that does not fit, or `cameras` without `t`.
    """
    _check_supported(a, b, v)
    given = 1.0 / math.sqrt(max(1, v.shape[-1])) if scale is None else scale
    y: Tensor = _attention(a, b, v, neighbors, given, t, cameras, camera_factor)
    return y


def _check_supported(*tensors: Tensor) -> None:
    if not supports(*tensors):
        got = ", ".join(f"{t.device} {t.dtype}" for t in tensors)
        raise UsageError("native operators", got, "kernels and CPU tensors of float32 or float16", "Use ops.reference.")


@torch.library.custom_op("nformer::row_top_k", mutates_args=(), device_types="cpu")
def _row_top_k(a: Tensor, b: Tensor, k: int) -> Tensor:
    factor = a.numpy()
    same = a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride()
    chosen = native.row_top_k(factor, factor if same else b.numpy(), k, threads=torch.get_num_threads())
    return torch.from_numpy(chosen)


@_row_top_k.register_fake
def _(a: Tensor, b: Tensor, k: int) -> Tensor:
    return a.new_empty((a.shape[0], a.shape[1], k), dtype=torch.int32)


@torch.library.custom_op("nformer::reciprocal_neighbor_attention", mutates_args=(), device_types="cpu")
def _attention(
    a: Tensor,
    b: Tensor,
    v: Tensor,
    neighbors: Tensor,
    scale: float,
    t: Tensor | None = None,
    cameras: Tensor | None = None,
    camera_factor: float = 1.0,
) -> Tensor:
    inputs = (*_arrays(a, b, v, neighbors), scale, *_arrays(t, cameras), camera_factor)
    return torch.from_numpy(native.reciprocal_neighbor_attention(*inputs, threads=torch.get_num_threads()))


@_attention.register_fake
def _(a: Tensor, b: Tensor, v: Tensor, *others: Any) -> Tensor:
    return torch.empty_like(v, memory_format=torch.contiguous_format)


@torch.library.custom_op("nformer::reciprocal_neighbor_attention_backward", mutates_args=(), device_types="cpu")
def _attention_backward(
    gradient: Tensor,
    a: Tensor,
    b: Tensor,
    v: Tensor,
    neighbors: Tensor,
    scale: float,
    t: Tensor | None,
    cameras: Tensor | None,
    camera_factor: float,
) -> list[Tensor]:  # by a, b, v and, if given, t
    inputs = (*_arrays(gradient, a, b, v, neighbors), scale, *_arrays(t, cameras), camera_factor)
    found = native.reciprocal_neighbor_attention_backward(*inputs, threads=torch.get_num_threads())
    return [torch.from_numpy(x) for x in found]


@_attention_backward.register_fake
def _(
    gradient: Tensor, a: Tensor, b: Tensor, v: Tensor, neighbors: Tensor, scale: float, t: Tensor | None, *others: Any
) -> list[Tensor]:
    by = (a, b, v) if t is None else (a, b, v, t)
    return [torch.empty_like(x, memory_format=torch.contiguous_format) for x in by]


def _arrays(*tensors: Tensor | None) -> tuple[Any, ...]:
    return tuple(None if x is None else x.detach().numpy() for x in tensors)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    a, b, v, neighbors, ctx.scale, t, cameras, ctx.camera_factor = inputs
    ctx.save_for_backward(a, b, v, neighbors, t, cameras)


def _differentiate(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    a, b, v, neighbors, t, cameras = ctx.saved_tensors
    found = _attention_backward(gradient, a, b, v, neighbors, ctx.scale, t, cameras, ctx.camera_factor)
    ga, gb, gv, gt = (*found, None) if t is None else found
    return ga, gb, gv, None, None, gt, None, None


_attention.register_autograd(_differentiate, setup_context=_keep)
