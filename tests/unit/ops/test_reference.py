from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from helpers.gated import gated_case, gated_formula
from torch import Tensor

from nformer_edge.core.errors import DataError, UsageError
from nformer_edge.ops import reference as ops
from nformer_edge.ops.operators import FastestOperators
from nformer_edge.ops.reference import check_finite, reciprocal_neighbor_attention, row_top_k


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def direct_top_k(a: Tensor, b: Tensor, k: int) -> np.ndarray:
    """The contract, literally: sort every row by (-score, column)."""
    scores = (a.double() @ b.double().transpose(1, 2)).numpy()
    heads, rows, columns = scores.shape
    out = np.full((heads, rows, k), -1)
    for h in range(heads):
        for i in range(rows):
            order = sorted(range(columns), key=lambda j: (-scores[h, i, j], j))[:k]
            out[h, i, : len(order)] = order
    return out


def direct_attention(a: Tensor, b: Tensor, v: Tensor, neighbors: Tensor, scale: float) -> Tensor:
    """The contract over dense matrices, with Python sets for who chose whom."""
    heads, rows, _ = v.shape
    scores = a @ b.transpose(1, 2)
    out = torch.zeros_like(v)
    for h in range(heads):
        chose = [set(r) - {-1} for r in neighbors[h if len(neighbors) > 1 else 0].tolist()]
        for i in range(rows):
            mutual = [j for j in sorted(chose[i]) if i in chose[j]]
            if mutual:
                weights = (scale * scores[h, i, mutual]).softmax(0)
                out[h, i] = weights @ v[h, mutual]
    return out


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 7, 5, 3), (3, 40, 90, 8), (1, 64, 64, 16)])
@pytest.mark.parametrize("k", [1, 4, 20])
def test_row_top_k_equals_the_contract_taken_literally(shape: tuple[int, int, int, int], k: int) -> None:
    heads, rows, columns, length = shape
    a, b = random(heads, rows, length), random(heads, columns, length, seed=1)
    neighbors = row_top_k(a, b, k)
    assert neighbors.dtype == torch.int32
    assert np.array_equal(neighbors.numpy(), direct_top_k(a, b, k))


@pytest.mark.parametrize("k", [1, 3, 6, 17, 30])
def test_row_top_k_breaks_ties_by_lower_index(k: int) -> None:
    small = torch.randint(
        -1, 2, (2, 30, 4), generator=torch.Generator().manual_seed(0)
    ).float()  # almost all scores tie
    assert np.array_equal(row_top_k(small, small, k).numpy(), direct_top_k(small, small, k))


def test_row_top_k_of_identical_images_takes_the_first_columns() -> None:
    same = torch.ones(1, 500, 8)
    assert (row_top_k(same, same, 20) == torch.arange(20)).all()


def test_row_top_k_fills_the_tail_with_minus_one_when_k_exceeds_the_columns() -> None:
    a = random(1, 4, 3)
    neighbors = row_top_k(a, a[:, :2], 5)
    assert (neighbors[:, :, 2:] == -1).all()
    assert (neighbors[:, :, :2].sort(dim=2).values == torch.tensor([0, 1])).all()


@pytest.mark.parametrize(("rows", "columns"), [(0, 0), (0, 3), (3, 0)])
def test_row_top_k_of_nothing_has_its_shape(rows: int, columns: int) -> None:
    neighbors = row_top_k(torch.zeros(2, rows, 4), torch.zeros(2, columns, 4), 5)
    assert neighbors.shape == (2, rows, 5)
    assert (neighbors == -1).all()


def test_row_top_k_does_not_depend_on_the_block_size(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = random(2, 50, 6), random(2, 70, 6, seed=1)
    whole = row_top_k(a, b, 9)
    monkeypatch.setattr(ops, "BLOCK_BYTES", 8 * 70 * 3)  # three rows at a time
    assert torch.equal(row_top_k(a, b, 9), whole)


def test_row_top_k_accumulates_half_precision_in_float32() -> None:
    a = torch.full((1, 1, 3000), 1.0, dtype=torch.float16)
    b = torch.ones(1, 2, 3000, dtype=torch.float16)
    b[0, 1, 0] = 1 + 2**-10  # 3000.001 against 3000: float16 cannot tell them apart
    assert row_top_k(a, b, 1).item() == 1


def test_row_top_k_never_chooses_a_score_that_overflowed() -> None:
    a = torch.tensor([[[3e38, 3e38], [1.0, 0.0]]])
    b = torch.tensor([[[3e38, 3e38], [1e-38, 0.0], [0.0, 2e-38]]])
    assert row_top_k(a, b, 3)[0, 0].tolist() == [2, 1, -1]


def test_row_top_k_names_the_first_row_that_is_not_finite() -> None:
    a = random(2, 9, 3)
    a[1, 4, 0] = math.nan
    with pytest.raises(DataError, match=r"a: got NaN or infinity in row 4 \(1 such\)"):
        row_top_k(a, random(2, 9, 3), 2)


@pytest.mark.parametrize(
    ("a", "b", "k"),
    [
        (torch.zeros(3, 4), torch.zeros(1, 3, 4), 1),
        (torch.zeros(1, 3, 4), torch.zeros(2, 3, 4), 1),
        (torch.zeros(1, 3, 4), torch.zeros(1, 3, 5), 1),
        (torch.zeros(1, 3, 4), torch.zeros(1, 3, 4).double(), 1),
        (torch.zeros(1, 3, 4).int(), torch.zeros(1, 3, 4).int(), 1),
        (torch.zeros(1, 3, 4), torch.zeros(1, 3, 4), 0),
    ],
)
def test_row_top_k_refuses_what_does_not_fit(a: Tensor, b: Tensor, k: int) -> None:
    with pytest.raises(UsageError, match="expected"):
        row_top_k(a, b, k)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("scale", [None, 0.7, -1.0, 0.0])
def test_attention_equals_the_dense_formula(shared: bool, scale: float | None) -> None:
    a, b, v = random(3, 25, 4), random(3, 25, 4, seed=1), random(3, 25, 6, seed=2)
    neighbors = row_top_k(a[:1], b[:1], 7) if shared else row_top_k(a, b, 7)
    got = reciprocal_neighbor_attention(a, b, v, neighbors, scale)
    want = direct_attention(a, b, v, neighbors, 6**-0.5 if scale is None else scale)
    assert (got - want).abs().max() <= 1e-13


def test_attention_of_a_row_with_no_reciprocal_neighbor_is_exactly_zero() -> None:
    neighbors = torch.tensor([[[1], [2], [1]]], dtype=torch.int32)  # 0 chose 1, which chose 2
    y = reciprocal_neighbor_attention(*(random(1, 3, 4, seed=s) for s in range(3)), neighbors)
    assert (y[0, 0] == 0).all()
    assert (y[0, 1:] != 0).all()


def test_attention_counts_a_neighbor_whose_score_is_zero() -> None:
    neighbors = torch.tensor([[[0, 1], [1, 0]]], dtype=torch.int32)
    zero, v = torch.zeros(1, 2, 3), torch.tensor([[[1.0], [3.0]]])
    assert reciprocal_neighbor_attention(zero, zero, v, neighbors)[0, :, 0].tolist() == [2.0, 2.0]


def test_attention_never_counts_minus_one() -> None:
    """-1 read as Python reads it would be the last image, which chose row 0 here."""
    neighbors = torch.tensor([[[-1, -1], [-1, -1], [0, 2]]], dtype=torch.int32)
    y = reciprocal_neighbor_attention(*(random(1, 3, 4, seed=s) for s in range(3)), neighbors)
    assert (y[0, :2] == 0).all()
    assert (y[0, 2] != 0).all()


def test_attention_survives_large_scores() -> None:
    a, v = 1e3 * random(1, 12, 4), random(1, 12, 4, seed=2)
    y = reciprocal_neighbor_attention(a, a, v, row_top_k(a, a, 5))
    assert y.isfinite().all()


def test_attention_does_not_depend_on_the_block_size(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b, v = random(2, 30, 4), random(2, 30, 4, seed=1), random(2, 30, 4, seed=2)
    neighbors = row_top_k(a, b, 6)
    whole = reciprocal_neighbor_attention(a, b, v, neighbors)
    monkeypatch.setattr(ops, "BLOCK_BYTES", 1)
    assert (reciprocal_neighbor_attention(a, b, v, neighbors) - whole).abs().max() <= 1e-15


def test_attention_has_the_gradients_of_finite_differences() -> None:
    a, b, v = (random(2, 10, 3, seed=s).requires_grad_() for s in range(3))
    neighbors = row_top_k(a, b, 4)
    assert torch.autograd.gradcheck(lambda *x: reciprocal_neighbor_attention(*x, neighbors), (a, b, v))


def test_attention_has_finite_gradients_where_no_neighbor_counts() -> None:
    a, b, v = (random(1, 3, 4, seed=s).requires_grad_() for s in range(3))
    reciprocal_neighbor_attention(a, b, v, torch.full((1, 3, 2), -1, dtype=torch.int32)).sum().backward()
    for x in (a, b, v):
        assert (x.grad == 0).all()


def test_attention_in_half_precision_is_float32_rounded_once() -> None:
    a, b, v = (random(1, 40, 8, seed=s, dtype=torch.float16) for s in range(3))
    neighbors = row_top_k(a, b, 9)
    half = reciprocal_neighbor_attention(a, b, v, neighbors)
    assert half.dtype == torch.float16
    assert torch.equal(half, reciprocal_neighbor_attention(a.float(), b.float(), v.float(), neighbors).half())


@pytest.mark.parametrize(
    "neighbors",
    [
        torch.zeros(5, 2, dtype=torch.int32),
        torch.zeros(3, 5, 2, dtype=torch.int32),
        torch.zeros(1, 4, 2, dtype=torch.int32),
        torch.zeros(1, 5, 2, dtype=torch.int64),
        torch.full((1, 5, 2), 5, dtype=torch.int32),
        torch.full((1, 5, 2), -2, dtype=torch.int32),
    ],
)
def test_attention_refuses_neighbors_that_do_not_fit(neighbors: Tensor) -> None:
    x = random(2, 5, 3)
    with pytest.raises(UsageError, match="neighbors: got"):
        reciprocal_neighbor_attention(x, x, x, neighbors)


def test_attention_refuses_values_of_another_set() -> None:
    x = random(1, 5, 3)
    with pytest.raises(UsageError, match="v: got"):
        reciprocal_neighbor_attention(x, x, random(1, 6, 3), row_top_k(x, x, 2))


def test_large_numbers_are_finite_though_their_sum_is_not() -> None:
    check_finite("x", torch.full((2, 3), 3e38))


def test_attention_names_the_value_that_is_not_finite() -> None:
    x, v = random(1, 5, 3), random(1, 5, 3)
    v[0, 2, 1] = math.inf
    with pytest.raises(DataError, match="v: got NaN or infinity in row 2"):
        reciprocal_neighbor_attention(x, x, v, row_top_k(x, x, 2))


def test_attention_of_nothing_is_empty() -> None:
    x = torch.zeros(2, 0, 3)
    assert reciprocal_neighbor_attention(x, x, x, row_top_k(x, x, 4)).shape == (2, 0, 3)


@pytest.mark.parametrize("cameras", [False, True])
@pytest.mark.parametrize("thresholds", [1, 2])
def test_gated_attention_is_the_dense_formula_and_has_the_gradients_of_finite_differences(
    thresholds: int, cameras: bool
) -> None:
    a, b, v, neighbors, scale, _, known = gated_case(2, 9, 3, 4, 5, lists=1, thresholds=1, cameras=cameras)
    t = random(thresholds, 9, seed=4)
    inputs = [x.double().requires_grad_() for x in (a, b, v, t)]

    def attend(a: Tensor, b: Tensor, v: Tensor, t: Tensor) -> Tensor:
        return reciprocal_neighbor_attention(a, b, v, neighbors, scale, t, known, 0.5)

    assert (attend(*inputs) - gated_formula(*inputs[:3], neighbors, scale, inputs[3], known)).abs().max() <= 1e-13
    assert torch.autograd.gradcheck(attend, inputs)


def test_equal_thresholds_share_their_gradient() -> None:
    one, t = torch.ones(1, 2, 1), torch.zeros(1, 2, requires_grad=True)
    reciprocal_neighbor_attention(
        one, one, one, torch.tensor([[[1], [-1]]], dtype=torch.int32), 1.0, t
    ).sum().backward()
    assert t.grad[0, 0] == t.grad[0, 1] < 0


def test_gated_attention_does_not_depend_on_the_block_size(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = gated_case(2, 30, 4, 3, 6, lists=2, thresholds=2, cameras=True)
    whole = reciprocal_neighbor_attention(*arguments, 0.5)
    monkeypatch.setattr(ops, "BLOCK_BYTES", 1)
    assert (reciprocal_neighbor_attention(*arguments, 0.5) - whole).abs().max() <= 1e-6


def test_few_scores_of_native_kernels_are_those_of_plain_torch_and_gradients_flow() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(n, 24, generator=generator) for n in (7, 11))
    names = torch.randint(11, (7, 5), generator=generator, dtype=torch.int32)
    expected = torch.gather(a @ b.T, 1, names.long())
    for chosen in (FastestOperators(), ops):
        torch.testing.assert_close(chosen.pair_scores(a, b, names), expected)
    a.requires_grad_()
    FastestOperators().pair_scores(a, b, names).sum().backward()
    torch.testing.assert_close(a.grad, b[names.long()].sum(dim=1))
