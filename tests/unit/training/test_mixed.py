"""Sets of mixed composition, and the loss that ranks them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from nformer_edge.model.nformer import unit
from nformer_edge.training.mixed import IMAGES, draw_mixed, ranking_loss

LABELS, CAMERAS = np.repeat(np.arange(40), 6), np.tile(np.array([0, 0, 1, 1, 2, 2]), 40)


@pytest.mark.parametrize("images", IMAGES)
def test_a_set_has_one_query_a_person_and_so_many_images_of_each(images: int) -> None:
    drawn = draw_mixed(LABELS, CAMERAS, images, 10_000, np.random.default_rng(1))
    assert len(np.unique(drawn.rows)) == len(drawn.rows)
    asked, gallery = LABELS[drawn.rows[: drawn.queries]], LABELS[drawn.rows[drawn.queries :]]
    assert len(np.unique(asked)) == len(asked) == 20
    for row in drawn.rows[: drawn.queries]:
        mine = drawn.rows[drawn.queries :][gallery == LABELS[row]]
        assert len(mine) == min(images, 5)
        assert (CAMERAS[mine] != CAMERAS[row]).any()
    strangers = gallery[~np.isin(gallery, asked)]
    assert np.unique(strangers, return_counts=True)[1].tolist() == [2] * 20


def test_a_set_stays_below_its_size_but_for_the_last_person() -> None:
    drawn = draw_mixed(LABELS, CAMERAS, 1 << 30, 50, np.random.default_rng(1))
    assert 50 <= len(drawn.rows) < 56


def _loss(x: torch.Tensor, labels: torch.Tensor, cameras: torch.Tensor, queries: int) -> tuple[torch.Tensor, ...]:
    x = unit(x)
    query, gallery = ((labels[part], cameras[part]) for part in (slice(queries), slice(queries, None)))
    return ranking_loss(x[:queries] @ x[queries:].T, query, gallery, np.random.default_rng(0))


def test_the_loss_is_near_nothing_where_people_are_apart_and_high_where_they_are_not() -> None:
    rng = np.random.default_rng(0)
    drawn = draw_mixed(LABELS, CAMERAS, 4, 10_000, rng)
    labels, cameras = torch.from_numpy(LABELS[drawn.rows]), torch.from_numpy(CAMERAS[drawn.rows])
    apart = torch.nn.functional.one_hot(labels, 40).float()
    loss, first = _loss(apart, labels, cameras, drawn.queries)
    assert loss < 1e-3
    assert first == 1
    noise = torch.from_numpy(rng.standard_normal((len(labels), 32)).astype("f4"))
    loss, first = _loss(noise, labels, cameras, drawn.queries)
    assert loss > 0.7
    assert first < 0.4


def test_matches_of_the_querys_own_camera_do_not_count() -> None:
    labels, cameras = torch.tensor([1, 1, 1, 2]), torch.tensor([0, 0, 1, 1])
    x = torch.tensor([[1.0, 0], [1, 0], [0.5, 1], [0.9, 0.5]])  # the other camera's match is behind a stranger
    loss, first = _loss(x, labels, cameras, 1)
    assert first == 0
    assert loss == pytest.approx(0.5, abs=0.17)
    unknown, first = _loss(x, labels, torch.full((4,), -1), 1)
    assert first == 1
    assert unknown < loss
