"""TensorRT's side of an ahead-of-time plugin, played on its real Python package: a process of its own.

    python play_tensorrt.py NODES.json ANSWERS.json

`tensorrt_bindings`, with stubs for the libraries that it wants, must be importable. Of TensorRT itself only the parts
in C++ are played: the registry, expressions over sizes, and the calls that a build makes of a plugin, in its order.
A node has operator, inputs (shape and type of each), attributes; sizes that are strings are free until they are looked
up in its "sizes". The answer has the launch with every expression worked out at those sizes.
"""

from __future__ import annotations

import json
import operator
import sys
from pathlib import Path

import numpy as np
import tensorrt_bindings as trt

sys.modules["tensorrt"] = trt
trt.__name__ = "tensorrt"
ROOT = Path(__file__).parents[3]
sys.path.insert(0, str(ROOT))


class Expr:
    """A size: its value at run time, and whether the graph tells it."""

    def __init__(self, value: int, constant: bool) -> None:
        self.value, self.constant = value, constant

    def is_constant(self) -> bool:
        return self.constant

    def get_constant_value(self) -> int:
        assert self.constant
        return self.value


class Builder:
    """trt.IExprBuilder, for as long as one call of the plugin lasts."""

    alive = True

    def constant(self, value: int) -> Expr:
        assert self.alive, "an expression builder outlived its call"
        assert 0 <= value < 2**31, value  # what a size can be
        return Expr(value, True)

    def operation(self, op, first: Expr, second: Expr) -> Expr:
        assert self.alive
        names = {"SUM": operator.add, "SUB": operator.sub, "PROD": operator.mul, "MAX": max, "MIN": min,
                 "FLOOR_DIV": operator.floordiv, "CEIL_DIV": lambda a, b: -(-a // b)}  # fmt: skip
        return Expr(names[op.name](first.value, second.value), first.constant and second.constant)


class SymExpr:
    """trt.ISymExpr: keeps what is set."""


class Registry:
    creators: dict = {}

    def register_creator(self, creator, namespace):
        assert isinstance(creator, trt.IPluginCreatorV3Quick)
        self.creators[namespace, creator.name] = creator
        return True

    def get_creator(self, name, version, namespace):
        return self.creators.get((namespace, name))


trt.IDimensionExpr, trt.ISymExpr = Expr, SymExpr
trt.get_plugin_registry = Registry

from nformer_edge.backends.tensorrt.plugin.ahead import AheadOfTime  # noqa: E402
from nformer_edge.backends.tensorrt.plugin.kernels import find_compilers  # noqa: E402


class Recorded:
    """What TensorRT hands over to be filled."""


class Expressions(list):
    @property
    def nbSymExprs(self):
        return len(self)

    @nbSymExprs.setter
    def nbSymExprs(self, count):
        self[:] = [None] * count


def described(shape, kind, sizes, dynamic):
    """A tensor as TensorRT describes it while it builds."""
    desc = trt.DynamicPluginTensorDesc() if dynamic else trt.PluginTensorDesc()
    inner = desc.desc if dynamic else desc
    inner.type, inner.format = getattr(trt.DataType, kind), trt.TensorFormat.LINEAR
    dims = [sizes.get(size, size) for size in shape]
    if dynamic:
        inner.dims = trt.Dims([-1 if isinstance(size, str) else size for size in shape])
        desc.min = desc.opt = desc.max = trt.Dims(dims)
    else:
        inner.dims = trt.Dims(dims)
    if dynamic:
        desc.desc = inner
    return desc


def in_one_call(work):
    builder = Builder()
    try:
        return work(builder)
    finally:
        builder.alive = False  # as in TensorRT, where it is gone


def launched(node) -> dict:
    sizes, shapes = node["sizes"], [shape for shape, _ in node["inputs"]]
    creator = Registry().get_creator(node["operator"], "1", "nformer")
    fields = [trt.PluginField(name, np.array([value], kind), getattr(trt.PluginFieldType, word))
              for name, value, kind, word in node["attributes"]]  # fmt: skip
    plugin = creator.create_plugin(
        node["operator"], "nformer", trt.PluginFieldCollection(fields), trt.TensorRTPhase.BUILD,
        trt.QuickPluginCreationRequest.PREFER_AOT,
    )  # fmt: skip
    kinds = [getattr(trt.DataType, kind) for _, kind in node["inputs"]]
    assert plugin.get_num_outputs() == 1
    (kind,) = plugin.get_output_data_types(kinds, [len(shape) for shape in shapes])
    exprs = [[Expr(sizes.get(size, size), not isinstance(size, str)) for size in shape] for shape in shapes]
    made = Recorded()
    trt_dims, trt.DimsExprs = trt.DimsExprs, lambda length: [None] * length
    try:
        (out,) = in_one_call(lambda builder: plugin.get_output_shapes(exprs, [], builder))
    finally:
        trt.DimsExprs = trt_dims
    tensors = [*node["inputs"], [[e.value if e.constant else "free" for e in out], kind.name]]
    at_run = {**sizes, "free": 1}
    in_out = [described(shape, word, at_run, True) for shape, word in tensors]
    combinations = plugin.get_supported_format_combinations(in_out, len(shapes))
    rows = [combinations[i : i + len(tensors)] for i in range(0, len(combinations), len(tensors))]
    wanted = [*kinds, kind]
    assert any([c.type for c in row] == wanted for row in rows), rows
    plugin.configure_plugin(in_out[:-1], in_out[-1:])
    assert plugin.get_valid_tactics() == []
    plugin.set_tactic(0)
    numbers = Expressions()
    in_one_call(lambda builder: plugin.get_launch_params(exprs, in_out, len(shapes), made, numbers, builder))
    static = [described(shape, word, at_run, False) for shape, word in tensors]
    name, ptx = plugin.get_kernel(static[:-1], static[-1:])
    names = ("grid_x", "grid_y", "grid_z", "block_x", "block_y", "block_z", "shared_mem")
    assert all(n.dtype == trt.PluginArgDataType.INT32 for n in numbers)
    return {
        "output": [e.value for e in out],
        "type": kind.name,
        "entry": name,
        "ptx": ptx.decode(),
        "launch": {n: getattr(made, n).expr.value for n in names},
        "numbers": [n.expr.value for n in numbers],
    }


def main(nodes: str, answers: str) -> None:
    compiler = find_compilers()[0]
    errors: list[str] = []
    AheadOfTime(trt, compiler, 89, errors)
    found = [launched(node) for node in json.loads(Path(nodes).read_text())]
    Path(answers).write_text(json.dumps({"version": trt.__version__, "answers": found, "errors": errors}))


if __name__ == "__main__":
    main(*sys.argv[1:])
