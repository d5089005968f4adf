"""The one place where the model meets its two operators, whoever computes them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Protocol

from torch import Tensor

from nformer_edge.model import ops


class Operators(Protocol):
    """Who computes the operators: any object or module with these two functions. Shapes as in `model.ops`."""

    def row_top_k(self, a: Tensor, b: Tensor, k: int) -> Tensor: ...

    def reciprocal_neighbor_attention(
        self, a: Tensor, b: Tensor, v: Tensor, neighbors: Tensor, scale: float | None = None
    ) -> Tensor: ...


_chosen: ContextVar[Operators] = ContextVar("operators", default=ops)


def operators() -> Operators:
    """The operators that a model's forward uses now: plain torch, unless `using` says otherwise."""
    return _chosen.get()


@contextmanager
def using(chosen: Operators) -> Iterator[None]:
    """Within the block, models compute with `chosen`: native kernels, or the nodes that an export records."""
    token = _chosen.set(chosen)
    try:
        yield
    finally:
        _chosen.reset(token)
