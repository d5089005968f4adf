"""Exactness of the native RowTopK against float64, however it is computed."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nformer_edge.core.errors import UsageError
from nformer_edge.ops import native

pytestmark = pytest.mark.skipif(not native.available(), reason="the kernels are not compiled in this tree")

ULPS = 4


def variants(length: int) -> list[dict]:
    """Every way to compute: threads x instruction set x tree or product."""
    ways = [False, True] if 1 <= length <= 16 else [False]
    sets = native.instruction_sets() if native.available() else ()
    return [{"threads": t, "isa": isa, "tree": tree} for t in (1, 3) for isa in sets for tree in ways]


def true_scores(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return a.astype(np.float64) @ b.astype(np.float64).swapaxes(1, 2)


def check_list(a: np.ndarray, b: np.ndarray, k: int, neighbors: np.ndarray) -> None:
    """Each row is what float64 gives, but for scores within ULPS of each other, which may stand in any order."""
    scores = true_scores(a, b)
    heads, rows, columns = scores.shape
    kept = min(k, columns)
    assert neighbors.shape == (heads, rows, k)
    assert neighbors.dtype == np.int32
    assert (neighbors[:, :, kept:] == -1).all()
    chosen = neighbors[:, :, :kept]
    assert ((chosen >= 0) & (chosen < columns)).all()
    assert all(len(set(row)) == kept for row in chosen.reshape(-1, kept).tolist())
    best = -np.sort(-scores, axis=2)[:, :, :kept]
    got = np.take_along_axis(scores, chosen.astype(np.int64), axis=2)
    # One ulp of float32, relative, where float32 has no subnormals: the kernels keep the whole exponent range.
    slack = ULPS * 2.0**-23 * np.abs(best) + 1e-13 * rounding(a, b)
    assert (np.abs(got - best) <= slack).all()


def rounding(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """What float64 itself may lose when a sum cancels: [H, N, 1], in units of 1e-13."""
    return (np.abs(a).astype(np.float64) @ np.abs(b).astype(np.float64).max(axis=1)[:, :, None]) + 0.0


def make(kind: str, rows: int, columns: int, length: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    a, b = (rng.standard_normal((2, n, length)).astype(np.float32) for n in (rows, columns))
    if kind == "clustered":
        centers = 3 * rng.standard_normal((5, length)).astype(np.float32)
        a, b = ((x * np.float32(0.1) + centers[rng.integers(5, size=x.shape[:2])]) for x in (a, b))
    elif kind == "constant":
        a[:], b[:] = 0.3, 0.7
    elif kind == "duplicated":
        a, b = a[:, rng.integers(max(1, rows // 4), size=rows)], b[:, rng.integers(max(1, columns // 4), size=columns)]
    elif kind == "sorted":
        a, b = np.sort(a, axis=1), np.sort(b, axis=1)
    elif kind == "one-hot":
        a, b = (np.eye(length, dtype=np.float32)[rng.integers(length, size=x.shape[:2])] for x in (a, b))
    elif kind == "huge":
        a, b = a * np.float32(3e37), b * np.float32(3e37)
    elif kind == "tiny":
        a, b = a * np.float32(1e-30), b * np.float32(1e-38)
    elif kind == "mixed":
        a, b = (
            x * np.float32(10.0) ** rng.integers(-30, 30, size=(*x.shape[:2], 1)).astype(np.float32) for x in (a, b)
        )
    elif kind == "spiky":  # what is small beside a row's largest number, integers lose
        a[:, :, 0], b[:, :, 0] = 1e4, 1e-3
    elif kind == "near":  # scores nearer to each other than integers can tell
        a, b = (np.float32(1) + x * np.float32(1e-5) for x in (a, b))
    elif kind == "zero":
        a[:], b[:, ::2] = 0, 0
    return np.ascontiguousarray(a, dtype=np.float32), np.ascontiguousarray(b, dtype=np.float32)


KINDS = [
    "random",
    "clustered",
    "constant",
    "duplicated",
    "sorted",
    "one-hot",
    "huge",
    "tiny",
    "mixed",
    "spiky",
    "near",
    "zero",
]


# One shape for the boxes and one for the product; odd sizes between them are the next but one test's.
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("rows", "columns", "length", "k"), [(203, 203, 5, 20), (130, 593, 256, 20)])
def test_row_top_k_equals_float64_on_every_path(kind: str, rows: int, columns: int, length: int, k: int) -> None:
    a, b = make(kind, rows, columns, length, seed=1)
    lists = [native.row_top_k(a, b, k, **variant) for variant in variants(length)]
    check_list(a, b, k, lists[0])
    assert all((other == lists[0]).all() for other in lists)


@pytest.mark.parametrize(
    ("kind", "rows", "length"),
    [*((kind, 401, 256) for kind in KINDS), ("duplicated", 385, 3), ("duplicated", 192, 64), ("random", 1, 8)],
)
def test_row_top_k_of_a_set_with_itself_equals_that_of_a_copy(kind: str, rows: int, length: int) -> None:
    a, _ = make(kind, rows, rows, length, seed=2)
    copy = native.row_top_k(a, a.copy(), 20)
    check_list(a, a, 20, copy)
    assert all((native.row_top_k(a, a, 20, **variant) == copy).all() for variant in variants(length))


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(KINDS), rows=st.integers(1, 90), columns=st.integers(1, 300), length=st.integers(1, 40),
    k=st.integers(1, 128), seed=st.integers(0, 2**32 - 1), data=st.data(),
)  # fmt: skip
def test_row_top_k_equals_float64_for_any_shape(
    kind: str, rows: int, columns: int, length: int, k: int, seed: int, data: st.DataObject
) -> None:
    a, b = make(kind, rows, columns, length, seed)
    variant = data.draw(st.sampled_from(variants(length)))
    neighbors = native.row_top_k(a, b, k, **variant)
    check_list(a, b, k, neighbors)
    assert (neighbors == native.row_top_k(a, b, k)).all()


@settings(max_examples=40, deadline=None)
@given(
    values=st.lists(st.integers(-3, 3), min_size=4, max_size=240), length=st.integers(1, 4), k=st.integers(1, 9),
    data=st.data(),
)  # fmt: skip
def test_row_top_k_breaks_ties_by_lower_index(values: list[int], length: int, k: int, data: st.DataObject) -> None:
    rows = len(values) // length
    a = np.array(values[: rows * length], dtype=np.float32).reshape(1, rows, length)
    expected = np.argsort(-true_scores(a, a), axis=2, kind="stable")[:, :, :k]
    variant = data.draw(st.sampled_from(variants(length)))
    neighbors = native.row_top_k(a, a, k, **variant)
    assert (neighbors[:, :, : expected.shape[2]] == expected).all()


@pytest.mark.parametrize("length", [1, 7, 8, 9, 16, 17, 511, 512])
def test_row_top_k_takes_every_factor_length(length: int) -> None:
    a, b = make("random", 37, 101, length, seed=3)
    for variant in variants(length):
        check_list(a, b, 10, native.row_top_k(a, b, 10, **variant))


def test_row_top_k_separates_scores_that_float32_sums_confuse() -> None:
    # 1e8 + 1 - 1e8 is 0 in float32, in any order that adds the small number to a large one.
    a = np.ones((1, 1, 3), dtype=np.float32)
    b = np.array([[[1e8, 1, -1e8], [1e8, 2, -1e8], [1e8, 3, -1e8]]], dtype=np.float32)
    for variant in variants(3):
        assert native.row_top_k(a, b, 3, **variant).tolist() == [[[2, 1, 0]]]


def test_row_top_k_in_half_precision_accumulates_in_full() -> None:
    a, b = (x.astype(np.float16) for x in make("random", 50, 90, 5, seed=4))
    wide = native.row_top_k(a.astype(np.float32), b.astype(np.float32), 20)
    assert (native.row_top_k(a, b, 20) == wide).all()


def test_row_top_k_on_a_deep_tree_equals_the_product() -> None:
    a, b = make("clustered", 300, 20_011, 5, seed=5)  # three levels of boxes
    lists = [native.row_top_k(a, b, 20, **variant) for variant in variants(5)]
    assert all((other == lists[0]).all() for other in lists)
    check_list(a[:, :40], b, 20, lists[0][:, :40])


def test_row_top_k_does_not_heed_the_callers_floating_point_mode() -> None:
    torch = pytest.importorskip("torch")
    a, b = make("tiny", 40, 70, 5, seed=6)
    expected = native.row_top_k(a, b, 9)
    if not torch.set_flush_denormal(True):
        pytest.skip("this machine cannot flush subnormals")
    try:
        assert (native.row_top_k(a, b, 9, threads=1) == expected).all()
    finally:
        torch.set_flush_denormal(False)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("rows", "length"), [(1, 5), (401, 40)])
def test_smallest_scores_are_float64s(kind: str, rows: int, length: int) -> None:
    x, _ = make(kind, rows, rows, length, seed=10)
    expected = true_scores(x, x).min(axis=2)
    found = native.smallest_scores(x)
    assert (np.abs(found - expected) <= 2.0**-23 * np.abs(expected) + 1e-13 * rounding(x, x)[:, :, 0]).all()
    sets = native.instruction_sets()
    assert all((native.smallest_scores(x, threads=t, isa=isa) == found).all() for t in (1, 3) for isa in sets)


@pytest.mark.parametrize("columns", [900, 1337])
def test_integers_leave_few_scores_and_change_no_list(columns: int) -> None:
    rng = np.random.default_rng(11)
    centers = rng.standard_normal((columns // 20, 512))
    x = centers[rng.integers(len(centers), size=columns)] + 0.7 * rng.standard_normal((columns, 512))
    b = (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)[None]
    for a in (b, b[:, :400].copy()):
        lists = [native.row_top_k(a, b, 20, isa=isa) for isa in native.instruction_sets()]
        check_list(a, b, 20, lists[0])
        assert all((other == lists[0]).all() for other in lists)
        with_integers = [isa for isa in native.instruction_sets() if native.confirmed_scores(a, b, 20, isa=isa)]
        assert not {"avx512", "avx2", "neon"} & set(with_integers)  # float32 products are as fast there
        for isa in with_integers:
            assert native.confirmed_scores(a, b, 20, isa=isa) <= 0.1 * a.shape[1] * columns


def test_where_integers_rule_out_little_float32_takes_over() -> None:
    a, _ = make("near", 1200, 1, 256, seed=12)
    assert all(native.confirmed_scores(a, a, 20, isa=isa) <= 0.05 * 1200**2 for isa in native.instruction_sets())


def test_comparison_with_float64_notices_a_wrong_list() -> None:
    a, b = make("random", 20, 30, 5, seed=7)
    neighbors = native.row_top_k(a, b, 4)
    neighbors[0, 3, 1] = next(c for c in range(30) if c not in neighbors[0, 3])
    with pytest.raises(AssertionError):
        check_list(a, b, 4, neighbors)


@pytest.mark.parametrize("length", [5, 40])
def test_a_new_column_enters_exactly_the_lists_that_change(length: int) -> None:
    rng = np.random.default_rng(8)
    a = np.round(rng.standard_normal((2, 60, length)) * 2).astype(np.float32)  # whole numbers: many ties
    b = np.round(rng.standard_normal((2, 90, length)) * 2).astype(np.float32)
    lists = native.row_top_k(a, b[:, :80], 6)
    entered = native.enters(a, b[:, 80:], native.kth_scores(a, b[:, :80], lists))
    for new in range(10):
        grown = np.concatenate([b[:, :80], b[:, 80 + new : 81 + new]], axis=1)
        assert ((native.row_top_k(a, grown, 6) == 80).any(axis=2) == entered[:, :, new]).all()


def test_every_new_column_enters_a_list_that_is_not_full() -> None:
    a, b = make("random", 5, 3, 4, seed=9)
    kth = native.kth_scores(a, b, native.row_top_k(a, b, 4))
    assert (kth == -np.inf).all()
    assert native.enters(a, b, kth).all()


def test_pair_scores_are_those_that_lists_are_ordered_by() -> None:
    a, b = make("random", 20, 30, 7, seed=4)
    lists = native.row_top_k(a, b, 40)
    scores = native.pair_scores(a, b, lists)
    assert (np.diff(scores[:, :, :30], axis=2) <= 0).all()
    assert np.isneginf(scores[:, :, 30:]).all()
    assert np.array_equal(scores[:, :, 29], native.kth_scores(a, b, lists[:, :, :30]))
    rows = np.array([19, 4, 4])
    assert np.array_equal(native.pair_scores(a, b, lists[:, rows], rows=rows), scores[:, rows])
    for isa in native.instruction_sets():
        found = native.row_scores(b[0], a[0, 4], threads=3, isa=isa)
        assert np.array_equal(found[lists[0, 4, :30]], scores[0, 4, :30].astype(np.float32))
    with pytest.raises(UsageError, match="x: got shape"):
        native.row_scores(b[0], a[0])
