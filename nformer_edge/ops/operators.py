"""The one place where the model meets its two operators, whoever computes them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Protocol

from torch import Tensor

from nformer_edge.ops import reference as ops
from nformer_edge.ops import torch_ops


class Operators(Protocol):
    """Who computes the operators: any object or module with these two functions. Shapes as in `ops.reference`."""

    def row_top_k(self, a: Tensor, b: Tensor, k: int) -> Tensor: ...

    def reciprocal_neighbor_attention(
        self, a: Tensor, b: Tensor, v: Tensor, neighbors: Tensor, scale: float | None = None
    ) -> Tensor: ...


class FastestOperators:
    """The native kernels for the tensors that they take, plain torch for all others: same results, call by call."""

    def row_top_k(self, a: Tensor, b: Tensor, k: int) -> Tensor:
        return (torch_ops if torch_ops.supports(a, b) else ops).row_top_k(a, b, k)

    def reciprocal_neighbor_attention(
        self, a: Tensor, b: Tensor, v: Tensor, neighbors: Tensor, scale: float | None = None
    ) -> Tensor:
        chosen = torch_ops if torch_ops.supports(a, b, v) else ops
        return chosen.reciprocal_neighbor_attention(a, b, v, neighbors, scale)


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
