"""The compiled kernels' C functions (src/binding.cpp) over numpy arrays; `native` checks them. Serves every Python."""

from __future__ import annotations

import ctypes
from pathlib import Path

import numpy as np


class _Tensors(ctypes.Structure):
    """`NFormerAttention` of binding.cpp."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("a", "b", "v", "neighbors")),
        *((name, ctypes.c_int64) for name in ("heads", "lists", "n", "r", "d", "k")),
        ("scale", ctypes.c_double),
        ("t", ctypes.c_void_p),
        ("thresholds", ctypes.c_int64),
        ("cameras", ctypes.c_void_p),
        ("camera_factor", ctypes.c_double),
        ("rows", ctypes.c_void_p),
        ("row_count", ctypes.c_int64),
    ]


#: Arguments: p an array or null, q a 64-bit number, i an int, d a double, s text, x the tensors of an attention.
_TYPES = {
    "p": ctypes.c_void_p,
    "q": ctypes.c_int64,
    "i": ctypes.c_int,
    "d": ctypes.c_double,
    "s": ctypes.c_char_p,
    "x": ctypes.POINTER(_Tensors),
}
_FUNCTIONS = {
    "first_bad_row": "pqqi",
    "first_bad_list": "pqqqi",
    "row_top_k": "ppqqqqipiiis",
    "pair_scores": "ppppqqqqqqpis",
    "row_scores": "ppqqpis",
    "k_reciprocal": "ppppqqqqqqdpis",
    "attend": "xpis",
    "gated_layer": "pppppqqqqqdddpis",
    "swap_rows": "pppqqdpi",
    "reached": "pppqqqpi",
    "attend_backward": "xpppppis",
}


class Attention:
    """An attention's arrays, which it holds while a function runs: `NFormerAttention` of binding.cpp."""

    def __init__(
        self,
        a: np.ndarray,
        b: np.ndarray,
        v: np.ndarray,
        neighbors: np.ndarray | None,
        scale: float,
        t: np.ndarray | None,
        cameras: np.ndarray | None,
        camera_factor: float,
        rows: np.ndarray | None = None,
    ) -> None:
        assert neighbors is not None
        self._held = a, b, v, neighbors, t, cameras, rows
        arrays = *(_at(x, np.float32) for x in (a, b, v)), _at(neighbors, np.int32)
        sizes = a.shape[0], neighbors.shape[0], a.shape[1], a.shape[2], v.shape[2], neighbors.shape[2]
        gate = _at(t, np.float32), 1 if t is None else t.shape[0], _at(cameras, np.int32), camera_factor
        self.tensors = _Tensors(*arrays, *sizes, scale, *gate, _at(rows, np.int32), 0 if rows is None else len(rows))


class Library:
    """The functions, the arrays' sizes taken from the arrays. The interpreter's lock is released while one runs."""

    def __init__(self, path: Path) -> None:
        self._c = ctypes.CDLL(str(path))
        self._c.nformer_error.restype = ctypes.c_char_p
        for name, arguments in _FUNCTIONS.items():
            function = getattr(self._c, f"nformer_{name}")
            function.argtypes, function.restype = [_TYPES[a] for a in arguments], ctypes.c_int64
        self.path = path
        self.MAX_TREE_RANK: int = self._c.nformer_max_tree_rank()

    def _call(self, name: str, *arguments: object) -> int:
        found: int = getattr(self._c, f"nformer_{name}")(*arguments)
        if found == -3:
            raise MemoryError("the native kernels got no memory")
        if found == -2:
            raise RuntimeError(self._c.nformer_error().decode())
        return found

    def instruction_sets(self) -> list[str]:
        """Those compiled in that this machine runs, fastest first."""
        names = (ctypes.c_char_p * 8)()
        count: int = self._c.nformer_instruction_sets(names, 8)
        return [name.decode() for name in names[:count] if name is not None]

    def first_bad_row(self, x: np.ndarray, threads: int) -> int:
        return self._call("first_bad_row", _at(x, np.float32), x.shape[0] * x.shape[1], x.shape[2], threads)

    def first_bad_list(self, x: np.ndarray, count: int, threads: int) -> int:
        return self._call("first_bad_list", _at(x, np.int32), x.shape[0] * x.shape[1], x.shape[2], count, threads)

    def row_top_k(
        self, a: np.ndarray, b: np.ndarray, out: np.ndarray, threads: int, isa: str, tree: bool, symmetric: bool
    ) -> int:
        heads, n, r = a.shape
        sizes = heads, n, b.shape[1], r, out.shape[2]
        how = tree, symmetric, threads, isa.encode()
        return self._call("row_top_k", _at(a, np.float32), _at(b, np.float32), *sizes, _at(out, np.int32), *how)

    def pair_scores(
        self,
        a: np.ndarray,
        b: np.ndarray,
        columns: np.ndarray,
        out: np.ndarray,
        threads: int,
        isa: str,
        rows: np.ndarray | None = None,
    ) -> None:
        heads, n, r = a.shape
        arrays = _at(a, np.float32), _at(b, np.float32), _at(columns, np.int32), _at(rows, np.int32)
        sizes = heads, n, b.shape[1], r, columns.shape[2], columns.shape[1]
        self._call("pair_scores", *arrays, *sizes, _at(out, np.float64), threads, isa.encode())

    def row_scores(self, rows: np.ndarray, x: np.ndarray, out: np.ndarray, threads: int, isa: str) -> None:
        arrays = _at(rows, np.float32), _at(x, np.float32)
        self._call("row_scores", *arrays, *rows.shape, _at(out, np.float32), threads, isa.encode())

    def k_reciprocal(
        self,
        unit: np.ndarray,
        lists: np.ndarray,
        same: np.ndarray,
        farthest: np.ndarray,
        half: int,
        expand: int,
        share: float,
        out: np.ndarray,
        threads: int,
        isa: str,
    ) -> None:
        arrays = _at(unit, np.float32), _at(lists, np.int32), _at(same, np.int32), _at(farthest, np.float64)
        sizes = *unit.shape, lists.shape[1], half, expand, len(out)
        self._call("k_reciprocal", *arrays, *sizes, share, _at(out, np.float32), threads, isa.encode())

    def attend(self, x: Attention, y: np.ndarray, threads: int, isa: str) -> None:
        self._call("attend", x.tensors, _at(y, np.float32), threads, isa.encode())

    def gated_layer(
        self,
        x: np.ndarray,
        lists: np.ndarray,
        t: np.ndarray,
        rows: np.ndarray,
        own: np.ndarray | None,
        k: int,
        factors: tuple[float, float, float],
        y: np.ndarray,
        threads: int,
        isa: str,
    ) -> int:
        """`factors`: scale, strength, the own rows' share."""
        arrays = _at(x, np.float32), _at(lists, np.int32), _at(t, np.float32), _at(rows, np.int32), _at(own, np.float32)
        sizes = *x.shape, lists.shape[1], k, len(rows)
        return self._call("gated_layer", *arrays, *sizes, *factors, _at(y, np.float32), threads, isa.encode())

    def swap_rows(
        self, array: np.ndarray, rows: np.ndarray, values: np.ndarray, still: float, moved: np.ndarray, threads: int
    ) -> None:
        arrays = _at(array, np.float32), _at(rows, np.int32), _at(values, np.float32)
        sizes = values[:1].size, len(rows)
        self._call("swap_rows", *arrays, *sizes, still, _at(moved, np.bool_), threads)

    def reached(self, flags: np.ndarray, lists: np.ndarray, places: np.ndarray, out: np.ndarray, threads: int) -> int:
        arrays = _at(flags, np.uint8), _at(lists, np.int32), _at(places, np.int32)
        return self._call("reached", *arrays, *lists.shape, len(places), _at(out, np.uint8), threads)

    def attend_backward(self, x: Attention, gy: np.ndarray, out: list[np.ndarray], threads: int, isa: str) -> None:
        """`out`: the gradients by a, b, v and, with a gate, t."""
        arrays = [_at(g, np.float32) for g in (gy, *out)] + [None] * (4 - len(out))
        self._call("attend_backward", x.tensors, *arrays, threads, isa.encode())


def _at(x: np.ndarray | None, kind: type) -> int | None:
    """Where the numbers are: the caller holds the array while a function runs."""
    if x is None:
        return None
    assert x.dtype == kind, f"{x.dtype}, expected {kind}"
    assert x.flags.c_contiguous, "not row-major"
    at: int = x.ctypes.data
    return at
