"""The two operators on the CPU, over numpy arrays: checks at the door, then C++ on raw arrays.

The contract is `docs/operators.md`. What the kernels add to it:

- A score is summed in float64 in a fixed order and rounded to float32's 24 significant bits, ties to even, without
  float32's limits on the exponent. It is the float32 nearest to the true score wherever there is one, and a score that
  float32 could not hold keeps its place in the order.
- Results have the same bits for every number of threads and every instruction set.
- Threads live for one call, the GIL is released, and importing this module starts nothing.
"""

from __future__ import annotations

import math
import os
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from nformer_edge.core.errors import BackendError, DataError, UsageError
from nformer_edge.core.spec import check_at_least, check_choice
from nformer_edge.ops.contract import NO_NEIGHBOR, check_factors, check_gate, check_neighbors, check_values
from nformer_edge.ops.library import Attention, Library

_found = find_spec(
    "nformer_edge.ops._kernels"
)  # a plain library, which is not imported; None in a tree that was copied
_native = Library(Path(_found.origin)) if _found is not None and _found.origin else None

#: Names the instruction set for every call that does not, here and in onnxruntime: one of `instruction_sets`.
ISA_VARIABLE = "NFORMER_EDGE_ISA"


def available() -> bool:
    """Whether the compiled kernels can be used here."""
    return _native is not None


def folder() -> Path | None:
    """Where the compiled kernels lie, which is not beside this file in an editable install."""
    return _native.path.parent if _native is not None else None


def instruction_sets() -> tuple[str, ...]:
    """The instruction sets that are compiled in and that this machine runs, fastest first."""
    return tuple(_library().instruction_sets())


def default_threads() -> int:
    """The CPUs that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def row_top_k(
    a: np.ndarray,  # [H, N, R]
    b: np.ndarray,  # [H, M, R]
    k: int,
    *,
    threads: int | None = None,
    isa: str | None = None,
    tree: bool | None = None,
) -> np.ndarray:  # int32 [H, N, k]
    """For each row of ``a b^T``, the columns of the `k` largest scores; the tail is -1 where there are fewer.

    Passing one array as both `a` and `b` halves the work for long factors.

    Args:
        a, b: float32 or float16.
        threads: at most this many; the CPUs that this process may use unless given.
        isa: one of `instruction_sets`; the fastest, or what `ISA_VARIABLE` says, unless given.
        tree: True searches boxes of near columns (R up to 16), False goes through a matrix product; chosen by R
            unless given. The result is the same.

    Raises:
        UsageError: if a shape, a type or an argument does not fit.
        DataError: if an input is not finite, naming the first bad row.
        BackendError: if the kernels are not compiled here.
    """
    return _row_top_k(a, b, k, threads, isa, tree)[0]


def confirmed_scores(
    a: np.ndarray,  # [H, N, R]
    b: np.ndarray,  # [H, M, R]
    k: int,
    *,
    threads: int | None = None,
    isa: str | None = None,
) -> int:
    """How many scores `row_top_k` computes exactly because its integer products do not rule them out.

    0 where the instruction set, short factors or few columns leave all to float32. Raises as `row_top_k` does.
    """
    return _row_top_k(a, b, k, threads, isa, tree=False)[1]


def _row_top_k(
    a: np.ndarray, b: np.ndarray, k: int, threads: int | None, isa: str | None, tree: bool | None
) -> tuple[np.ndarray, int]:
    """The lists, and the number of `confirmed_scores`."""
    library = _library()
    _check_factors(a, b)
    check_at_least("k", k, 1)
    same = a is b
    a, count, name = _wide(a), _threads(threads), _isa(isa)
    b = a if same else _wide(b)
    _check_finite("a", a, count)
    if not same:
        _check_finite("b", b, count)
    heads, rows, length = a.shape
    found = min(k, b.shape[1])
    neighbors = np.full((heads, rows, k), NO_NEIGHBOR, dtype=np.int32)
    if found == 0 or neighbors.size == 0:
        return neighbors, 0
    if length == 0:
        neighbors[:, :, :found] = np.arange(found)  # every score is an empty sum
        return neighbors, 0
    tree = length <= library.MAX_TREE_RANK if tree is None else tree
    if tree and length > library.MAX_TREE_RANK:
        raise UsageError("tree", f"R = {length}", f"R <= {library.MAX_TREE_RANK}", "Leave tree out.")
    chosen = neighbors if found == k else np.empty((heads, rows, found), dtype=np.int32)
    confirmed: int = library.row_top_k(a, b, chosen, count, name, tree, same)
    neighbors[:, :, :found] = chosen
    return neighbors, confirmed


def pair_scores(
    a: np.ndarray,  # [H, N, R]
    b: np.ndarray,  # [H, M, R]
    columns: np.ndarray,  # int32 [H, N, K] or [1, N, K], each -1..M-1; [..., P, K] with rows
    *,
    rows: np.ndarray | None = None,  # int32 [P], each 0..N-1
    threads: int | None = None,
    isa: str | None = None,
) -> np.ndarray:  # float64 [H, N, K], or [H, P, K]
    """The scores of each row with the columns that it names, as `row_top_k` orders by; -infinity for -1.

    With `rows` only theirs are computed.
    """
    library = _library()
    _check_factors(a, b)
    count, scored = _threads(threads), a
    if rows is not None:
        rows = _chosen(rows, a.shape[1])
        scored = np.broadcast_to(a[:, :1], (a.shape[0], len(rows), a.shape[2]))  # the same shape as theirs
    _check_lists(columns, scored, b.shape[1], count)
    named = np.ascontiguousarray(np.broadcast_to(columns, (*scored.shape[:2], columns.shape[2])))
    scores = np.empty(named.shape, dtype=np.float64)
    library.pair_scores(_wide(a), _wide(b), named, scores, count, _isa(isa), rows)
    return scores


def row_scores(
    rows: np.ndarray,  # float32 [N, D]
    x: np.ndarray,  # float32 [D]
    *,
    threads: int | None = None,
    isa: str | None = None,
) -> np.ndarray:  # float32 [N]
    """The scores of all rows with one more, as `row_top_k` orders by.

    About as quick as a product by numpy's BLAS, whose threads spin for 0.1 s after it, on cores that others need.
    """
    library = _library()
    if rows.ndim != 2 or x.shape != rows.shape[1:]:
        raise UsageError("x", f"shape {x.shape}, rows {rows.shape}", "[D] and [N, D]", "Pass one row.")
    scores = np.empty(len(rows), np.float32)
    library.row_scores(_wide(rows), _wide(x), scores, _threads(threads), _isa(isa))
    return scores


def kth_scores(
    a: np.ndarray,  # [H, N, R]
    b: np.ndarray,  # [H, M, R]
    neighbors: np.ndarray,  # int32 [H, N, k], from row_top_k(a, b, k)
    *,
    threads: int | None = None,
    isa: str | None = None,
) -> np.ndarray:  # float64 [H, N]
    """The score of the last place in each row's list; -infinity where the list is not full.

    With `enters` it answers, for a gallery that grows, which lists a new image changes.
    """
    return pair_scores(a, b, neighbors[:, :, -1:], threads=threads, isa=isa)[:, :, 0]


def smallest_scores(
    x: np.ndarray,  # [H, N, R]
    *,
    threads: int | None = None,
    isa: str | None = None,
) -> np.ndarray:  # float64 [H, N]
    """The smallest score of each row of ``x x^T``, exact as those that `row_top_k` orders by. Raises as it does."""
    library = _library()
    _check_factors(x, x)
    count, name = _threads(threads), _isa(isa)
    x = _wide(x)
    _check_finite("x", x, count)
    scores = np.zeros((*x.shape[:2], 1), dtype=np.float64)
    if x.size:
        lists = np.empty(scores.shape, dtype=np.int32)
        library.row_top_k(-x, x, lists, count, name, False, True)
        library.pair_scores(x, x, lists, scores, count, name)
    return scores[:, :, 0]


def k_reciprocal(
    unit: np.ndarray,  # float32 [N, D]
    lists: np.ndarray,  # int32 [N, K], from row_top_k, without -1
    same: np.ndarray,  # int32 [N], the first image whose features equal each one's
    farthest: np.ndarray,  # float64 [N]
    *,
    half: int,
    expand: int,
    queries: int,
    share: float = 1.0,
    threads: int | None = None,
    isa: str | None = None,
) -> np.ndarray:  # float32 [queries, N - queries]
    """`share` of the Jaccard distances of the first `queries` images to the others, by their k-reciprocal encodings.

    Encodings are sparse, weights ``exp(-2 (1 - score) / farthest)``; sums go column by column in half precision, as in
    the published code (`metrics.rerank` is the whole method).

    Args:
        half: places of a list in which a neighbor's own neighbors must choose each other, 1 to K.
        expand: nearest images whose encodings are averaged, 1 to K.

    Raises:
        UsageError: if a shape or a type does not fit, or an index is out of range.
        BackendError: if the kernels are not compiled here.
    """
    library = _library()
    count = _threads(threads)
    images = len(unit)
    if same.shape != (images,) or farthest.shape != (images,) or not 0 <= queries <= images:
        got = f"shapes {same.shape} and {farthest.shape}, queries {queries}"
        raise UsageError("same, farthest", got, f"({images},) twice, 0 to {images} queries", "Pass one of each image.")
    _check_lists(lists[None], unit[None], images, count)
    for name, indices in (("lists", lists), ("same", same)):
        if images and not 0 <= indices.min() <= indices.max() < images:
            raise UsageError(name, f"{indices.min()} to {indices.max()}", f"0..{images - 1}", "Leave out what is -1.")
    for name, places in (("half", half), ("expand", expand)):
        if not 1 <= places <= lists.shape[1]:
            raise UsageError(name, places, f"1 to {lists.shape[1]}, places of a list", "Pass longer lists.")
    distances = np.empty((queries, images - queries), dtype=np.float32)
    lists, same = np.ascontiguousarray(lists, np.int32), np.ascontiguousarray(same, np.int32)
    farthest = np.ascontiguousarray(farthest, np.float64)
    library.k_reciprocal(_wide(unit), lists, same, farthest, half, expand, share, distances, count, _isa(isa))
    return distances


def enters(
    a: np.ndarray,  # [H, N, R]
    new: np.ndarray,  # [H, M', R], columns that stand after all those that the lists were made from
    kth: np.ndarray,  # float64 [H, N], from kth_scores
    *,
    threads: int | None = None,
    isa: str | None = None,
) -> np.ndarray:  # bool [H, N, M']
    """Whether each new column, alone, would enter each row's list: its score is above the last place's.

    A tie does not enter: equal scores stand lower column first. The answer is the one that computing the list anew
    would give, bit for bit.
    """
    library = _library()
    _check_factors(a, new)
    if kth.shape != a.shape[:2] or kth.dtype != np.float64:
        raise UsageError("kth", f"shape {kth.shape} {kth.dtype}", f"{a.shape[:2]} float64", "Pass kth_scores.")
    count = _threads(threads)
    a, new = _wide(a), _wide(new)
    _check_finite("a", a, count)
    _check_finite("new", new, count)
    shape = (*a.shape[:2], new.shape[1])
    columns = np.ascontiguousarray(np.broadcast_to(np.arange(shape[2], dtype=np.int32), shape))
    scores = np.empty(shape, dtype=np.float64)
    library.pair_scores(a, new, columns, scores, count, _isa(isa))
    entered: np.ndarray = scores > kth[:, :, None]
    return entered


def reciprocal_neighbor_attention(
    a: np.ndarray,  # [H, N, R]
    b: np.ndarray,  # [H, N, R]
    v: np.ndarray,  # [H, N, D]
    neighbors: np.ndarray,  # int32 [H, N, K] or [1, N, K]
    scale: float | None = None,
    t: np.ndarray | None = None,  # float32 [H, N] or [1, N]
    cameras: np.ndarray | None = None,  # int32 [N]
    camera_factor: float = 1.0,
    *,
    rows: np.ndarray | None = None,  # int32 [P], each 0..N-1
    threads: int | None = None,
    isa: str | None = None,
) -> np.ndarray:  # [H, N, D], or [H, P, D], as v
    """Softmax of ``scale * a b^T`` over the neighbors that chose each other, then the weighted sum of their values.

    `scale` is 1 / sqrt(D) unless given. A row with no reciprocal neighbor is exactly zero; a row of `v` that is not
    finite reaches the rows that count it and no other. With `t` it is gated, see `ops.reference`: a pair whose score
    or thresholds are not finite does not count. With `rows` only theirs are computed.

    Raises:
        UsageError: if a shape or a type does not fit, a neighbor or a row is out of range, or `cameras` come without
            `t`.
        BackendError: if the kernels are not compiled here.
    """
    library = _library()
    count = _threads(threads)
    scale = _check_attention(a, b, v, neighbors, scale, t, cameras, count)
    rows = None if rows is None else _chosen(rows, a.shape[1])
    y = np.zeros((v.shape[0], v.shape[1] if rows is None else len(rows), v.shape[2]), dtype=np.float32)
    if y.size and neighbors.shape[2]:
        x = Attention(
            _wide(a), _wide(b), _wide(v), _rows(neighbors), scale, _rows(t), _rows(cameras), camera_factor, rows
        )
        library.attend(x, y, count, _isa(isa))
    return y.astype(v.dtype, copy=False)


def gated_layer(
    x: np.ndarray,  # float32 [N, D]
    lists: np.ndarray,  # int32 [N, W], each -1..N-1
    t: np.ndarray,  # float32 [N]
    rows: np.ndarray,  # int32 [P], each 0..N-1
    k: int,
    scale: float,
    strength: float,
    own: np.ndarray | None = None,  # float32 [N, D]
    own_share: float = 0.0,
    *,
    threads: int | None = None,
    isa: str | None = None,
) -> np.ndarray:  # float32 [P, D]
    """``unit(x + strength * y)`` of some rows, y what the gated attention over the first `k` of their lists gives.

    With `own`, ``unit(that + own_share * own)``. See `model.gated` for what this is a layer of.

    Raises:
        UsageError: if a shape or a type does not fit, or a neighbor or a row is out of range.
        BackendError: if the kernels are not compiled here.
    """
    library, size = _library(), len(x)
    if x.ndim != 2 or t.shape != (size,) or (own is not None and own.shape != x.shape):
        got = f"shapes {x.shape}, {t.shape}, {None if own is None else own.shape}"
        raise UsageError("x, t, own", got, "[N, D], [N], [N, D]", "Pass one row and one threshold an image.")
    check_neighbors(lists[None], x[None], np.dtype(np.int32))
    if not 0 <= k <= lists.shape[1]:
        raise UsageError("k", k, f"0 to {lists.shape[1]}, places of a list", "Pass longer lists.")
    rows = _chosen(rows, size)
    y = np.empty((len(rows), x.shape[1]), np.float32)
    arrays = _wide(x), np.ascontiguousarray(lists), _wide(t), rows, None if own is None else _wide(own)
    factors = float(scale), float(strength), float(own_share)
    bad = library.gated_layer(*arrays, k, factors, y, _threads(threads), _isa(isa))
    if bad >= 0:
        raise _bad_list(lists, bad, size)
    return y


def swap_rows(
    array: np.ndarray,  # float32 [N, ...], row-major
    rows: np.ndarray,  # int32 [P], each 0..N-1 and once
    values: np.ndarray,  # float32 [P, ...], row-major
    still: float = 0.0,
    *,
    threads: int | None = None,
) -> np.ndarray:  # bool [P]
    """Exchanges in place the rows that differ from `values` by more than `still` anywhere. Returns which did.

    A second call takes the first one back.

    Raises:
        UsageError: if a shape or a type does not fit, or a row is out of range.
        BackendError: if the kernels are not compiled here.
    """
    library, rows = _library(), _chosen(rows, len(array))
    fit = values.shape == (len(rows), *array.shape[1:]) and array.dtype == values.dtype == np.float32
    if not fit or not (array.flags.carray and values.flags.carray):
        got = f"{array.dtype} {array.shape}, {values.dtype} {values.shape}"
        raise UsageError("array, values", got, "float32 [N, ...] and [P, ...], row-major", "Pass whole arrays.")
    moved = np.empty(len(rows), bool)
    library.swap_rows(array, rows, values, still, moved, _threads(threads))
    return moved


def reached(
    flags: np.ndarray,  # bool or uint8 [N]
    lists: np.ndarray,  # int32 [N, W], each -1..N-1
    places: np.ndarray,  # int32 [K], each 0..W-1
    *,
    threads: int | None = None,
) -> np.ndarray:  # as flags
    """The flags of those whom each list names at some places, together (bitwise or); -1 has none.

    Raises:
        UsageError: if a shape or a type does not fit, or a neighbor or a place is out of range.
        BackendError: if the kernels are not compiled here.
    """
    library = _library()
    if flags.ndim != 1 or flags.dtype not in (np.bool_, np.uint8):
        raise UsageError("flags", f"shape {flags.shape} {flags.dtype}", "[N] bool or uint8", "Pass one an image.")
    check_neighbors(lists[None], flags[None, :, None], np.dtype(np.int32))
    places = np.ascontiguousarray(places, np.int32)
    width = lists.shape[1]
    if places.size and not 0 <= places.min() <= places.max() < width:
        raise UsageError("places", f"{places.min()} to {places.max()}", f"0..{width - 1}", "Pass longer lists.")
    out = np.empty(flags.shape, flags.dtype)
    bits = np.ascontiguousarray(flags).view(np.uint8), np.ascontiguousarray(lists), places, out.view(np.uint8)
    bad = library.reached(*bits, _threads(threads))
    if bad >= 0:
        raise _bad_list(lists, bad, len(flags))
    return out


def reciprocal_neighbor_attention_backward(
    gradient: np.ndarray,  # [H, N, D], of the loss by y
    a: np.ndarray,
    b: np.ndarray,
    v: np.ndarray,
    neighbors: np.ndarray,
    scale: float | None = None,
    t: np.ndarray | None = None,
    cameras: np.ndarray | None = None,
    camera_factor: float = 1.0,
    *,
    threads: int | None = None,
    isa: str | None = None,
) -> tuple[np.ndarray, ...]:
    """The gradients by `a`, `b`, `v` and, if given, `t`, shaped and typed as they are. The lists have none.

    Raises as `reciprocal_neighbor_attention` does.
    """
    library = _library()
    count = _threads(threads)
    scale = _check_attention(a, b, v, neighbors, scale, t, cameras, count)
    if gradient.shape != v.shape:
        raise UsageError("gradient", f"shape {gradient.shape}", v.shape, "Pass that of y.")
    by = (a, b, v) if t is None else (a, b, v, t)
    out = [np.zeros(x.shape, dtype=np.float32) for x in by]
    if v.size and a.size and neighbors.shape[2]:
        x = Attention(_wide(a), _wide(b), _wide(v), _rows(neighbors), scale, _rows(t), _rows(cameras), camera_factor)
        library.attend_backward(x, _wide(gradient), out, count, _isa(isa))
    return tuple(g.astype(x.dtype, copy=False) for g, x in zip(out, by, strict=True))


def _library() -> Library:
    if _native is None:
        hint = "Run pip install ., which compiles it."
        raise BackendError("native kernels", "no compiled library", "nformer_edge.ops._kernels", hint)
    return _native


def _threads(threads: int | None) -> int:
    if threads is None:
        return default_threads()
    check_at_least("threads", threads, 1)
    return threads


def _isa(isa: str | None) -> str:
    name = os.environ.get(ISA_VARIABLE, "") if isa is None else isa
    if name:
        check_choice(ISA_VARIABLE if isa is None else "isa", name, instruction_sets())
    return name


def _wide(x: np.ndarray) -> np.ndarray:
    """float32 and row-major; every float16 is a float32, so nothing is lost."""
    return np.ascontiguousarray(x, dtype=np.float32)


def _rows(x: np.ndarray | None) -> np.ndarray | None:
    """Row-major."""
    return None if x is None else np.ascontiguousarray(x)


def _chosen(rows: np.ndarray, count: int) -> np.ndarray:  # [P] -> int32 [P]
    rows = np.ascontiguousarray(rows, dtype=np.int32)
    if rows.ndim != 1 or (rows.size and not (rows.min() >= 0 and rows.max() < count)):
        raise UsageError("rows", f"shape {rows.shape}", f"[P] of 0..{count - 1}", "Name rows that are there.")
    return rows


def _check_finite(name: str, x: np.ndarray, threads: int) -> None:
    bad = _library().first_bad_row(x, threads)
    if bad >= 0:
        head, row = divmod(bad, x.shape[1])
        got = f"NaN or infinity in row {row} of head {head}"
        raise DataError(name, got, "finite numbers", "Look at what these images show.")


def _check_lists(neighbors: np.ndarray, a: np.ndarray, columns: int, threads: int) -> None:
    check_neighbors(neighbors, a, np.dtype(np.int32))
    bad = _library().first_bad_list(np.ascontiguousarray(neighbors), columns, threads) if neighbors.size else -1
    if bad >= 0:
        head, row = divmod(bad, a.shape[1])
        raise _bad_list(neighbors[head], row, columns)


def _bad_list(lists: np.ndarray, row: int, columns: int) -> UsageError:
    got = f"{lists[row].tolist()} in row {row}"
    return UsageError("neighbors", got, f"-1..{columns - 1}", "Pass what row_top_k gave.")


def _check_factors(a: np.ndarray, b: np.ndarray) -> None:
    check_factors(a, b, (np.float32, np.float16), "float32 or float16")
    if b.shape[1] >= 1 << 29:
        raise UsageError("b", f"{b.shape[1]} columns", "fewer than 2**29", "Split the gallery.")


def _check_attention(
    a: np.ndarray,
    b: np.ndarray,
    v: np.ndarray,
    neighbors: np.ndarray,
    scale: float | None,
    t: np.ndarray | None,
    cameras: np.ndarray | None,
    threads: int,
) -> float:
    """Checks everything but finiteness; returns the scale to use."""
    _check_factors(a, b)
    check_values(a, b, v)
    _check_lists(neighbors, a, a.shape[1], threads)
    check_gate(t, cameras, a, np.dtype(np.float32), np.dtype(np.int32))
    return 1.0 / math.sqrt(max(1, v.shape[2])) if scale is None else float(scale)
