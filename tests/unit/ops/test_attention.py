"""The native ReciprocalNeighborAttention against the dense formulation in float64, forward and backward."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nformer_edge.core.errors import UsageError
from nformer_edge.ops import native

torch = pytest.importorskip("torch")

from helpers.gated import FACTOR, gated_case, gated_formula  # noqa: E402

from nformer_edge.ops import operators, reference  # noqa: E402

pytestmark = pytest.mark.skipif(not native.available(), reason="the kernels are not compiled in this tree")


def dense(a, b, v, neighbors, scale):  # type: ignore[no-untyped-def]
    """The contract read literally: an N x N mask, a softmax, a product. In the tensors' own precision."""
    heads, rows, _ = v.shape
    lists = neighbors.expand(heads, -1, -1).long()
    mask = torch.zeros(heads, rows, rows + 1, dtype=torch.bool)
    mask.scatter_(2, torch.where(lists < 0, rows, lists), True)
    mask = mask[:, :, :rows] & mask[:, :, :rows].transpose(1, 2)
    scores = (scale * (a @ b.transpose(1, 2))).masked_fill(~mask, -torch.inf)
    scores = scores.masked_fill(~mask.any(dim=2, keepdim=True), 0.0)
    return (torch.softmax(scores, dim=2) * mask) @ v


def case(heads: int, rows: int, length: int, size: int, k: int, seed: int, shared: bool = False):  # type: ignore[no-untyped-def]
    generator = torch.Generator().manual_seed(seed)
    a, b, v = (torch.randn(heads, rows, d, generator=generator) for d in (length, length, size))
    neighbors = operators.row_top_k(a[:1] if shared else a, b[:1] if shared else b, k)
    return a, b, v, neighbors


def results(function, a, b, v, neighbors, scale):  # type: ignore[no-untyped-def]
    """y and the gradients by a, b, v of a loss that weighs every output differently."""
    inputs = [x.detach().clone().requires_grad_() for x in (a, b, v)]
    y = function(*inputs, neighbors, scale)
    (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
    return [y.detach(), *(x.grad for x in inputs)]


SHAPES = [(2, 61, 5, 32, 20), (1, 130, 256, 128, 20), (3, 17, 2, 1, 4), (2, 9, 5, 67, 30), (1, 1, 1, 1, 1)]


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize(("heads", "rows", "length", "size", "k"), SHAPES)
def test_values_and_gradients_err_at_most_twice_as_much_as_plain_torch(
    heads: int, rows: int, length: int, size: int, k: int, shared: bool
) -> None:
    a, b, v, neighbors = case(heads, rows, length, size, k, seed=1, shared=shared)
    truth = results(dense, a.double(), b.double(), v.double(), neighbors, 0.3)
    plain = results(dense, a, b, v, neighbors, 0.3)
    ours = results(operators.reciprocal_neighbor_attention, a, b, v, neighbors, 0.3)
    for exact, torchs, got in zip(truth, plain, ours, strict=True):
        error = (got - exact).abs().max().item()
        assert error <= 2 * (torchs - exact).abs().max().item() + 1e-6 * exact.abs().max().item()


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 40), length=st.integers(1, 20), size=st.integers(1, 140), k=st.integers(1, 40),
    scale=st.floats(-4, 4), seed=st.integers(0, 2**31), data=st.data(),
)  # fmt: skip
def test_any_shape_agrees_with_the_dense_form_on_every_instruction_set(
    rows: int, length: int, size: int, k: int, scale: float, seed: int, data: st.DataObject
) -> None:
    a, b, v, neighbors = case(2, rows, length, size, k, seed)
    arrays = [x.numpy() for x in (a, b, v, neighbors)]
    gradient = torch.linspace(-1, 1, v.numel()).view_as(v).numpy()
    truth = results(dense, a.double(), b.double(), v.double(), neighbors, scale)
    sets = native.instruction_sets()
    outs = []
    for isa in sets:
        threads = data.draw(st.integers(1, 3))
        y = native.reciprocal_neighbor_attention(*arrays, scale, threads=threads, isa=isa)
        back = native.reciprocal_neighbor_attention_backward(gradient, *arrays, scale, threads=threads, isa=isa)
        outs.append((y, *back))
    for exact, got in zip(truth, outs[0], strict=True):
        assert np.abs(got - exact.numpy()).max() <= 2e-5 * (1 + exact.abs().max().item())
    assert all((x == y).all() for other in outs for x, y in zip(outs[0], other, strict=True))


def test_a_row_without_reciprocal_neighbors_is_exactly_zero() -> None:
    v = np.ones((1, 3, 4), dtype=np.float32)
    a = np.ones((1, 3, 2), dtype=np.float32)
    lists = np.array([[[1, -1], [2, -1], [2, 1]]], dtype=np.int32)  # 0 chose 1, which did not choose it back
    y = native.reciprocal_neighbor_attention(a, a, v, lists)
    assert (y[0, 0] == 0).all()
    assert (y[0, 1] == 1).all()
    grads = native.reciprocal_neighbor_attention_backward(v, a, a, v, lists)
    assert all((g[0, 0] == 0).all() for g in grads)


def test_a_neighbor_with_score_zero_counts() -> None:
    a = np.zeros((1, 2, 2), dtype=np.float32)
    v = np.array([[[1.0], [3.0]]], dtype=np.float32)
    lists = np.array([[[0, 1], [0, 1]]], dtype=np.int32)
    assert native.reciprocal_neighbor_attention(a, a, v, lists).ravel().tolist() == [2.0, 2.0]


def test_a_bad_value_reaches_only_the_rows_that_count_it() -> None:
    a, b, v, neighbors = (x.numpy() for x in case(1, 40, 5, 16, 4, seed=2))
    clean = native.reciprocal_neighbor_attention(a, b, v, neighbors)
    v[0, 7] = np.nan
    y = native.reciprocal_neighbor_attention(a, b, v, neighbors)
    touched = np.isnan(y).any(axis=2)[0]
    chose = (neighbors[0] == 7).any(axis=1) & np.isin(np.arange(40), neighbors[0, 7])
    assert (touched == chose).all()
    assert (y[0, ~touched] == clean[0, ~touched]).all()


@pytest.mark.parametrize("size", [1e15, 1e30])
def test_scores_beyond_float32_leave_a_finite_softmax(size: float) -> None:
    a = np.full((1, 4, 2), size, dtype=np.float32)
    v = np.arange(4, dtype=np.float32).reshape(1, 4, 1)
    lists = native.row_top_k(a, a, 4)
    assert native.reciprocal_neighbor_attention(a, a, v, lists).ravel().tolist() == [1.5] * 4


def test_half_precision_in_gives_half_precision_out() -> None:
    a, b, v, neighbors = case(2, 50, 5, 64, 8, seed=3)
    half = [x.half().numpy() for x in (a, b, v)]
    y = native.reciprocal_neighbor_attention(*half, neighbors.numpy())
    wide = native.reciprocal_neighbor_attention(*(x.astype(np.float32) for x in half), neighbors.numpy())
    assert y.dtype == np.float16
    assert (y == wide.astype(np.float16)).all()


def test_torch_registers_the_operators_completely() -> None:
    a, b, v, neighbors = case(2, 30, 5, 16, 4, seed=4)
    torch.library.opcheck(torch.ops.nformer.row_top_k.default, (a, b, 4))
    inputs = [x.clone().requires_grad_() for x in (a, b, v)]
    torch.library.opcheck(torch.ops.nformer.reciprocal_neighbor_attention.default, (*inputs, neighbors, 0.3))


def test_torch_operators_are_seen_by_compile() -> None:
    a, b, v, _ = case(2, 30, 5, 16, 4, seed=5)

    def attend(a, b, v):  # type: ignore[no-untyped-def]
        return operators.reciprocal_neighbor_attention(a, b, v, operators.row_top_k(a, b, 4)) * 2

    compiled = torch.compile(attend, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(a, b, v), attend(a, b, v))


def test_torch_operators_refuse_what_only_the_twin_takes() -> None:
    from nformer_edge.core.errors import UsageError

    a, b, v, neighbors = (x.double() if x.is_floating_point() else x for x in case(1, 5, 3, 4, 2, seed=6))
    with pytest.raises(UsageError, match=r"ops\.reference"):
        operators.row_top_k(a, b, 2)
    with pytest.raises(UsageError, match=r"ops\.reference"):
        operators.reciprocal_neighbor_attention(a, b, v, neighbors)


GATED = [
    {"lists": 2, "thresholds": 2, "cameras": False},
    {"lists": 1, "thresholds": 1, "cameras": True},
    {"lists": 2, "thresholds": 1, "cameras": True},
]


def gated_results(function, a, b, v, neighbors, scale, t, cameras):  # type: ignore[no-untyped-def]
    """y and the gradients by a, b, v, t, in which every output weighs differently."""
    inputs = [x.detach().clone().requires_grad_() for x in (a, b, v, t)]
    y = function(*inputs[:3], neighbors, scale, inputs[3], cameras, FACTOR)
    (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
    return [y.detach(), *(x.grad for x in inputs)]


@pytest.mark.parametrize("kind", GATED)
@pytest.mark.parametrize(
    ("rows", "length", "size", "k"), [(61, 5, 32, 20), (40, 70, 19, 50), (1, 3, 4, 2), (7, 1, 1, 3)]
)
def test_the_gated_attention_and_its_gradients_are_the_dense_formula(
    rows: int, length: int, size: int, k: int, kind: dict[str, int]
) -> None:
    a, b, v, neighbors, scale, t, cameras = gated_case(2, rows, length, size, k, **kind)
    wide = [x.double() for x in (a, b, v)]
    truth = gated_results(gated_formula, *wide, neighbors, scale, t.double(), cameras)
    ours = gated_results(operators.reciprocal_neighbor_attention, a, b, v, neighbors, scale, t, cameras)
    plain = gated_results(reference.reciprocal_neighbor_attention, a, b, v, neighbors, scale, t, cameras)
    for exact, got, torchs in zip(truth, ours, plain, strict=True):
        most = 2e-6 * (1 + exact.abs().max().item())
        assert (got - exact).abs().max().item() <= most
        assert (torchs - exact).abs().max().item() <= 10 * most


@pytest.mark.parametrize("kind", GATED)
def test_the_gated_attention_has_the_same_bits_on_every_instruction_set_and_thread_count(kind: dict[str, int]) -> None:
    a, b, v, neighbors, scale, t, cameras = gated_case(2, 300, 37, 41, 20, **kind)
    given = [x.numpy() for x in (a, b, v, neighbors)]
    gate = (scale, t.numpy(), None if cameras is None else cameras.numpy(), FACTOR)
    outs = []
    for isa in native.instruction_sets():
        for threads in (1, 3):
            y = native.reciprocal_neighbor_attention(*given, *gate, threads=threads, isa=isa)
            back = native.reciprocal_neighbor_attention_backward(y, *given, *gate, threads=threads, isa=isa)
            outs.append((y, *back))
    assert all((x == y).all() for other in outs for x, y in zip(outs[0], other, strict=True))


def test_the_gated_attention_reads_only_the_list_of_the_row_and_never_the_row_itself() -> None:
    a = np.ones((1, 3, 2), dtype=np.float32)
    v = np.array([[[1.0], [2.0], [4.0]]], dtype=np.float32)
    lists = np.array([[[0, 1], [1, -1], [0, 1]]], dtype=np.int32)  # 1 chose nobody; 0 and 2 chose it
    y = native.reciprocal_neighbor_attention(a, a, v, lists, 1.0, np.full((1, 3), 2.0, dtype=np.float32))
    assert y.ravel().tolist() == [1.0, 0.0, 1.5]  # every score is 2, so every weight is a half


def test_a_pair_without_a_finite_score_or_threshold_does_not_count() -> None:
    a, b, v, neighbors, scale, t, _ = gated_case(1, 30, 4, 3, 30, lists=1, thresholds=1, cameras=False)
    given, t = [x.numpy() for x in (a, b, v, neighbors)], t.numpy().copy()
    without = given[3].copy()
    for bad, row in ((np.nan, 4), (np.inf, 5), (-np.inf, 6)):
        t[0, row] = bad
        without[without == row] = -1
        without[0, row] = -1
    given[1][0, 7] = [3e38, 0, 0, 0]
    given[0][0, :8, 0], given[0][0, 8:, 0] = 2, 1e-38  # the scores of the first eight with image 7 overflow
    without[0, :8][without[0, :8] == 7] = -1
    clean = native.reciprocal_neighbor_attention(*given[:3], without, scale, np.nan_to_num(t, posinf=0, neginf=0))
    assert (native.reciprocal_neighbor_attention(*given, scale, t) == clean).all()


def test_the_gated_attention_in_half_precision_is_float32_rounded_once() -> None:
    a, b, v, neighbors, scale, t, cameras = gated_case(2, 50, 5, 64, 8, lists=1, thresholds=2, cameras=True)
    half = [x.half() for x in (a, b, v)]
    for attend in (operators.reciprocal_neighbor_attention, reference.reciprocal_neighbor_attention):
        y = attend(*half, neighbors, scale, t, cameras, FACTOR)
        wide = attend(*(x.float() for x in half), neighbors, scale, t, cameras, FACTOR)
        assert y.dtype == torch.float16
        assert torch.equal(y, wide.half())


def test_torch_registers_the_gated_attention_completely() -> None:
    a, b, v, neighbors, scale, t, cameras = gated_case(2, 12, 3, 4, 5, lists=1, thresholds=1, cameras=True)
    inputs = [x.requires_grad_() for x in (a, b, v)]
    operator = torch.ops.nformer.reciprocal_neighbor_attention.default
    torch.library.opcheck(operator, (*inputs, neighbors, scale, t.requires_grad_(), cameras, FACTOR))
    torch.library.opcheck(operator, (*inputs, neighbors, scale, t))


def test_cameras_without_thresholds_are_refused() -> None:
    from nformer_edge.core.errors import UsageError

    a, b, v, neighbors, _, t, cameras = gated_case(2, 9, 3, 4, 2, lists=1, thresholds=2, cameras=True)
    for attend in (operators.reciprocal_neighbor_attention, reference.reciprocal_neighbor_attention):
        with pytest.raises(UsageError, match="cameras: got no t"):
            attend(a, b, v, neighbors, cameras=cameras)
        with pytest.raises(UsageError, match=r"t: got shape \(2, 8\)"):
            attend(a, b, v, neighbors, t=t[:, 1:])
        with pytest.raises(UsageError, match=r"t: got .*float64"):
            attend(a, b, v, neighbors, t=t.double())
        with pytest.raises(UsageError, match=r"cameras: got shape \(9,\) .*int64"):
            attend(a, b, v, neighbors, t=t, cameras=cameras.long())


def test_the_gated_attention_of_nothing_is_empty() -> None:
    nothing, lists, t = torch.zeros(2, 0, 3), torch.zeros(1, 0, 4, dtype=torch.int32), torch.zeros(1, 0)
    for attend in (operators.reciprocal_neighbor_attention, reference.reciprocal_neighbor_attention):
        assert attend(nothing, nothing, nothing, lists, t=t).shape == (2, 0, 3)


@pytest.mark.parametrize("gated", [False, True])
def test_chosen_rows_are_those_of_all(gated: bool) -> None:
    a, b, v, neighbors = (x.numpy() for x in case(2, 61, 5, 32, 20, seed=3))
    t = np.linspace(-1, 1, 61, dtype=np.float32)[None] if gated else None
    rows = np.array([60, 3, 3, 17])
    whole = native.reciprocal_neighbor_attention(a, b, v, neighbors, t=t)
    assert np.array_equal(native.reciprocal_neighbor_attention(a, b, v, neighbors, t=t, rows=rows), whole[:, rows])
    assert native.reciprocal_neighbor_attention(a, b, v, neighbors, t=t, rows=rows[:0]).shape == (2, 0, 32)


@pytest.mark.parametrize("rows", [[61], [-1], [[1]]])
def test_rows_that_are_not_there_are_refused(rows: list) -> None:
    a, b, v, neighbors = (x.numpy() for x in case(1, 61, 5, 32, 20, seed=3))
    with pytest.raises(UsageError, match="rows"):
        native.reciprocal_neighbor_attention(a, b, v, neighbors, rows=np.array(rows))
    with pytest.raises(UsageError, match="rows"):
        native.pair_scores(a, b, neighbors, rows=np.array(rows))
    with pytest.raises(UsageError, match="rows"):
        native.gated_layer(v[0], neighbors[0], np.zeros(61, np.float32), np.array(rows), 20, 1.0, 1.0)


def layer_case() -> tuple[np.ndarray, ...]:
    """x [61, 37], lists [61, 20], the last place of which nobody has, thresholds [61], rows."""
    x, _, _, neighbors = (x.numpy() for x in case(1, 61, 37, 1, 20, seed=3))
    lists = np.where(np.arange(20) < 19, neighbors[0], np.int32(-1))
    return x[0], lists, np.linspace(-1, 1, 61, dtype=np.float32), np.array([60, 3, 3, 17])


def test_a_gated_layer_is_attention_joined_at_unit_length() -> None:
    x, lists, t, rows = layer_case()
    own = x[::-1].copy()
    y = native.reciprocal_neighbor_attention(x[None], x[None], x[None], lists[None, :, :12], 0.7, t=t[None])[0][rows]
    joined = x[rows] + np.float32(0.4) * y
    joined /= np.linalg.norm(joined, axis=1, keepdims=True)
    both = joined + np.float32(0.2) * own[rows]
    both /= np.linalg.norm(both, axis=1, keepdims=True)
    for expected, with_own in ((joined, ()), (both, (own, 0.2))):
        found = native.gated_layer(x, lists, t, rows, 12, 0.7, 0.4, *with_own)
        assert np.abs(found - expected).max() <= 3e-7
        for isa in native.instruction_sets():
            again = native.gated_layer(x, lists, t, rows, 12, 0.7, 0.4, *with_own, threads=3, isa=isa)
            assert np.array_equal(again, found)


def test_a_gated_layer_refuses_what_does_not_fit() -> None:
    x, lists, t, rows = layer_case()
    wrong = lists.copy()
    wrong[17, 5] = 61
    with pytest.raises(UsageError, match=r"neighbors: got .* in row 17"):
        native.gated_layer(x, wrong, t, rows, 12, 1.0, 1.0)
    native.gated_layer(x, wrong, t, rows, 5, 1.0, 1.0)  # what it does not read
    with pytest.raises(UsageError, match="k: got 21"):
        native.gated_layer(x, lists, t, rows, 21, 1.0, 1.0)
    with pytest.raises(UsageError, match="x, t, own"):
        native.gated_layer(x, lists, t[1:], rows, 12, 1.0, 1.0)


def test_rows_are_exchanged_where_they_differ_and_back() -> None:
    array = np.array([[1, 2], [3, 4], [5, -np.inf], [np.nan, 0]], np.float32)
    before, rows = array.copy(), np.array([3, 0, 2, 1])
    values = np.array([[0, 0], [1, 2.5], [5, -np.inf], [9, 4]], np.float32)
    given = values.copy()
    assert native.swap_rows(array, rows, values, 0.5).tolist() == [True, False, False, True]
    assert array[[0, 1, 3]].tolist() == [[1, 2], [9, 4], [0, 0]]
    assert values[1:].tolist() == [[1, 2.5], [5, -np.inf], [3, 4]]
    native.swap_rows(array, rows, values, 0.5)
    assert np.array_equal(array, before, equal_nan=True)
    assert np.array_equal(values, given)
    assert native.swap_rows(array[:, 0].copy(), rows, values[:, 0].copy()).tolist() == [True, False, False, True]
    with pytest.raises(UsageError, match="array, values"):
        native.swap_rows(array.T, np.arange(2), values.T)
    with pytest.raises(UsageError, match="rows"):
        native.swap_rows(array, rows + 1, values)


def test_flags_reach_those_who_name_their_bearers() -> None:
    lists = np.array([[1, 2, -1], [0, 2, 1], [-1, -1, -1], [3, 0, 0]], np.int32)
    flags = np.array([0, 1, 2, 4], np.uint8)
    assert native.reached(flags, lists, np.arange(3)).tolist() == [3, 3, 0, 4]
    assert native.reached(flags > 1, lists, np.array([0])).tolist() == [False, False, False, True]
    with pytest.raises(UsageError, match=r"neighbors: got .* in row 2"):
        native.reached(flags[:3], lists[[0, 2, 3]], np.array([0]))
    with pytest.raises(UsageError, match="places: got 0 to 3"):
        native.reached(flags, lists, np.array([0, 3]))
    with pytest.raises(UsageError, match="flags"):
        native.reached(flags.astype(np.int32), lists, np.arange(3))
