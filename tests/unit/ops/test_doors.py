"""What the kernels refuse, and what they say then."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from nformer_edge.core.errors import DataError, UsageError
from nformer_edge.ops import native

pytestmark = pytest.mark.skipif(not native.available(), reason="the kernels are not compiled in this tree")


def factors(rows: int = 6, length: int = 3) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((2, rows, length)).astype(np.float32)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_row_top_k_names_the_first_bad_row(bad: float) -> None:
    a = factors()
    a[1, 4, 2] = a[1, 5, 0] = bad
    with pytest.raises(DataError, match="row 4 of head 1"):
        native.row_top_k(a, a, 2)
    with pytest.raises(DataError, match=r"^b: got NaN or infinity in row 4 of head 1"):
        native.row_top_k(factors(), a, 2, threads=3)


@pytest.mark.parametrize(
    ("a", "b", "k", "what"),
    [
        (factors()[0], factors(), 2, "Add the head axis"),
        (factors(), factors(length=4), 2, "same heads, length and type"),
        (factors(), factors().astype(np.float16), 2, "same heads, length and type"),
        (factors().astype(np.float64), factors().astype(np.float64), 2, "float32 or float16"),
        (factors(), factors(), 0, "at least 1"),
    ],
)
def test_row_top_k_refuses_what_does_not_fit(a: np.ndarray, b: np.ndarray, k: int, what: str) -> None:
    with pytest.raises(UsageError, match=what):
        native.row_top_k(a, b, k)


def test_an_unknown_instruction_set_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="isa"):
        native.row_top_k(factors(), factors(), 2, isa="mmx")
    monkeypatch.setenv(native.ISA_VARIABLE, "mmx")
    with pytest.raises(UsageError, match=native.ISA_VARIABLE):
        native.row_top_k(factors(), factors(), 2)


def test_a_tree_over_long_factors_is_refused() -> None:
    with pytest.raises(UsageError, match="R = 17"):
        native.row_top_k(factors(length=17), factors(length=17), 2, tree=True)


@pytest.mark.parametrize(("rows", "columns"), [(0, 4), (4, 0), (0, 0)])
def test_empty_inputs_give_empty_lists(rows: int, columns: int) -> None:
    neighbors = native.row_top_k(factors(rows), factors(columns), 3)
    assert neighbors.shape == (2, rows, 3)
    assert (neighbors == -1).all()


def test_factors_of_length_zero_tie_everywhere() -> None:
    neighbors = native.row_top_k(factors(length=0), factors(length=0), 3)
    assert (neighbors == [0, 1, 2]).all()


def test_attention_refuses_neighbors_that_do_not_fit() -> None:
    a, v = factors(), factors(length=5)
    lists = native.row_top_k(a, a, 3)
    with pytest.raises(UsageError, match="Pass what row_top_k gave"):
        native.reciprocal_neighbor_attention(a, a, v, lists.astype(np.int64))
    with pytest.raises(UsageError, match="Pass what row_top_k gave"):
        native.reciprocal_neighbor_attention(a, a, v, lists[:, :5])
    lists[1, 2, 0] = 6
    with pytest.raises(UsageError, match="in row 2"):
        native.reciprocal_neighbor_attention(a, a, v, lists)
    with pytest.raises(UsageError, match="same heads and images"):
        native.reciprocal_neighbor_attention(a, a, v[:1], lists)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"lists": np.array([[0, 1], [1, 2], [2, -1]], dtype=np.int32)}, "lists: got -1 to 2, expected 0..2"),
        ({"lists": np.array([[0, 1], [1, 3], [2, 0]], dtype=np.int32)}, "neighbors: got"),
        ({"same": np.array([0, 1, 3])}, "same: got 0 to 3"),
        ({"same": np.array([0, 1])}, "same, farthest: got shapes"),
        ({"queries": 4}, "queries 4"),
        ({"half": 3}, "half: got 3, expected 1 to 2"),
        ({"expand": 0}, "expand: got 0"),
    ],
)
def test_k_reciprocal_refuses_what_does_not_fit(change: dict[str, object], what: str) -> None:
    unit = np.eye(3, dtype=np.float32)
    lists = np.array([[0, 1], [1, 2], [2, 0]], dtype=np.int32)
    fits = {"lists": lists, "same": np.arange(3), "farthest": np.ones(3), "half": 2, "expand": 2, "queries": 1}
    assert native.k_reciprocal(unit, **fits).shape == (1, 2)
    with pytest.raises(UsageError, match=what):
        native.k_reciprocal(unit, **fits | change)


def test_importing_the_kernels_loads_neither_torch_nor_starts_a_thread() -> None:
    code = (
        "import sys, threading, os, nformer_edge.ops.native; "
        "assert not {'torch', 'onnxruntime'} & set(sys.modules); "
        "assert len(os.listdir('/proc/self/task')) <= int(sys.argv[1])"
    )
    base = "import os, numpy; print(len(os.listdir('/proc/self/task')))"
    threads = subprocess.run([sys.executable, "-c", base], capture_output=True, text=True, check=True).stdout.strip()
    subprocess.run([sys.executable, "-c", code, threads], check=True)
