"""The landmark rule is part of a bundle's contract: another language must be able to repeat it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nformer_edge.core.errors import UsageError
from nformer_edge.ops.contract import draw_landmarks


@given(st.integers(1, 300), st.integers(1, 5), st.integers(1, 40), st.integers(0, 2**63))
def test_each_image_serves_before_any_serves_twice(n: int, layers: int, count: int, seed: int) -> None:
    drawn = draw_landmarks(n, layers, count, seed)
    assert drawn.shape == (layers, count)
    assert drawn.dtype == np.int32
    assert ((drawn >= 0) & (drawn < n)).all()
    for row in drawn:
        assert len(set(row.tolist())) == min(n, count)


def test_splitmix64_gives_the_published_sequence() -> None:
    from nformer_edge.ops.contract import _splitmix64

    # The first outputs from state 1234567, as in the reference implementation's test (Vigna, splitmix64.c).
    state, outputs = 1234567, []
    for _ in range(3):
        state, output = _splitmix64(state)
        outputs.append(output)
    assert outputs == [6457827717110365317, 3203168211198807973, 9817491932198370423]


def test_layers_and_seeds_draw_apart() -> None:
    drawn = draw_landmarks(10_000, 4, 5, seed=0)
    assert len({tuple(row) for row in drawn}) == 4
    assert not np.array_equal(drawn, draw_landmarks(10_000, 4, 5, seed=1))


def test_draws_are_spread_evenly() -> None:
    counts = np.bincount(np.concatenate([draw_landmarks(8, 4, 3, seed).ravel() for seed in range(2000)]), minlength=8)
    assert np.abs(counts / counts.sum() - 1 / 8).max() < 0.01


@pytest.mark.parametrize("bad", [(0, 1, 1, 0), (1, 0, 1, 0), (1, 1, 0, 0), (1, 1, 1, -1)])
def test_numbers_out_of_range_are_refused(bad: tuple[int, int, int, int]) -> None:
    with pytest.raises(UsageError, match="expected"):
        draw_landmarks(*bad)
