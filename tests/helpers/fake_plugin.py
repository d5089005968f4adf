"""What our code takes of `tensorrt.plugin`, on plain numbers: sizes that the graph tells, and sizes of a run.

NVIDIA's own package is asked the same in `play_tensorrt.py`, where its wheels are at hand.
"""

from __future__ import annotations

import enum
import inspect
import types
from typing import Any


class DataType(enum.Enum):
    FLOAT = "FP32"
    HALF = "FP16"
    INT32 = "INT32"


class ShapeExpr:
    def __init__(self, value: int | ShapeExpr | None = None, constant: bool = True) -> None:
        if isinstance(value, ShapeExpr):
            value, constant = value.value, value.constant
        self.value, self.constant, self.is_fake = value, constant, value is None

    is_constant = property(lambda self: self.constant)

    def constant_value(self) -> int:
        assert self.constant
        return self.value

    def __mul__(self, other: ShapeExpr) -> ShapeExpr:
        return ShapeExpr(self.value * other.value, self.constant and other.constant)


class TensorDesc:
    def __init__(self, shape: tuple[ShapeExpr | int, ...], dtype: DataType) -> None:
        self.shape_expr = [size if isinstance(size, ShapeExpr) else ShapeExpr(size) for size in shape]
        self.dtype = dtype

    def like(self) -> TensorDesc:
        return TensorDesc(tuple(self.shape_expr), self.dtype)


class KernelLaunchParams:
    grid_x = grid_y = grid_z = block_x = block_y = block_z = 1
    shared_mem = 0


class SymExprs(list):
    @classmethod
    def from_tuple(cls, given: list) -> SymExprs:
        return cls(given)


def fake_plugin() -> types.ModuleType:
    """A new module, whose ``registered`` has by name the functions that were given."""
    trtp = types.ModuleType("tensorrt.plugin")
    trtp.registered = {}

    def kept(what: str) -> Any:
        def decorator_of(name: str) -> Any:
            def decorate(function: Any) -> Any:
                functions = trtp.registered.setdefault(name, {})
                if what in functions:
                    raise ValueError(f"'_Op' already has a defintion for '{name}'")
                functions[what] = function
                inspect.signature(function)
                return function

            return decorate

        return decorator_of

    trtp.register, trtp.autotune, trtp.aot_impl = kept("register"), kept("autotune"), kept("aot_impl")
    trtp.TensorDesc, trtp.ShapeExpr, trtp.SymInt32 = TensorDesc, ShapeExpr, ShapeExpr
    trtp.KernelLaunchParams, trtp.SymExprs, trtp.SymIntExprs = KernelLaunchParams, SymExprs, SymExprs
    trtp.from_shape_expr = TensorDesc
    trtp.AutoTuneCombination = lambda io_types: [kind.strip() for kind in io_types.split(",")]
    trtp.cdiv = lambda a, b: ShapeExpr(-(-a.value // b), a.constant)
    trtp.max = lambda a, b: ShapeExpr(max(a.value, b), a.constant)
    return trtp
