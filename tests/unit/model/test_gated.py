"""The gated head: what its gates let through, and what it promises of its output."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from nformer_edge.core.errors import DataError, UsageError
from nformer_edge.core.spec import GATED_UNTOLD, HeadSpec
from nformer_edge.model.gated import LISTED, MISSING, RANKS, GatedHead, make_head, profile, start_as_gates
from nformer_edge.model.nformer import NFormer, unit
from nformer_edge.ops import reference
from nformer_edge.ops.contract import draw_landmarks
from nformer_edge.ops.operators import operators, using

SPEC = HeadSpec(32, layers=2, heads=1, k=8, landmarks=64, rule="gated")


def _people(people: int, images: int, noise: float = 0.25, seed: int = 0) -> tuple[Tensor, Tensor]:
    rng = np.random.default_rng(seed)
    means = np.repeat(rng.standard_normal((people, 32)), images, axis=0)
    rows = means + noise * rng.standard_normal(means.shape)
    return torch.from_numpy(rows.astype(np.float32)), torch.arange(people).repeat_interleave(images)


def _landmarks(rows: int, spec: HeadSpec = SPEC) -> Tensor:
    return torch.from_numpy(draw_landmarks(rows, spec.layers, spec.landmarks, 0))


def _started(spec: HeadSpec = SPEC) -> GatedHead:
    head = make_head(spec).eval()
    assert isinstance(head, GatedHead)
    start_as_gates(head, _people(40, 4)[0], None)
    return head


def _first_matches(x: Tensor, labels: Tensor) -> float:
    score = unit(x) @ unit(x).T
    score.fill_diagonal_(-9)
    return float((labels[score.argmax(dim=1)] == labels).float().mean())


def test_a_rule_makes_its_head() -> None:
    assert isinstance(make_head(SPEC), GatedHead)
    assert isinstance(make_head(HeadSpec(32)), NFormer)


@torch.no_grad()
def test_people_with_many_images_come_closer_and_people_with_one_stay_apart() -> None:
    head = _started()
    head.tell(12)
    many, labels = _people(30, 12)
    related, before = unit(head(many, _landmarks(len(many)))), unit(many - many.mean(dim=0))
    same = (labels[:, None] == labels[None]) & ~torch.eye(len(labels), dtype=torch.bool)
    assert 1 - (related @ related.T)[same].mean() < (1 - (before @ before.T)[same].mean()) / 2
    head.tell(1)
    strangers, _ = _people(300, 1)
    before = head.mapped(strangers, _landmarks(len(strangers)))
    moved = (unit(head(strangers, _landmarks(len(strangers)))) * before).sum(dim=1)
    assert moved.mean() > 0.9


@torch.no_grad()
def test_the_order_of_images_does_not_matter() -> None:
    head = _started()
    x, _ = _people(40, 5)
    landmarks = _landmarks(len(x))
    order = torch.from_numpy(np.random.default_rng(3).permutation(len(x)))
    place = order.argsort()
    shuffled = head(x[order], place[landmarks.long()].int())
    assert torch.allclose(shuffled[place], head(x, landmarks), atol=2e-6)


@torch.no_grad()
def test_native_kernels_and_plain_torch_agree_with_float64() -> None:
    head = _started()
    x, _ = _people(60, 5)
    landmarks, found = _landmarks(len(x)), []
    native = head(x, landmarks)
    with using(reference):
        found = head(x, landmarks)
        exact = head.double()(x.double(), landmarks)
    for y in (native, found):
        assert (y - exact).abs().max() <= 2e-6


@torch.no_grad()
@pytest.mark.parametrize("rows", [0, 1, 2, 9, 40])
def test_sets_smaller_than_a_list_are_related_too(rows: int) -> None:
    x, _ = _people(max(rows, 1), 1)
    y = _started()(x[:rows], _landmarks(max(rows, 1)))
    assert y.shape == (rows, 32)
    assert y.isfinite().all()


def test_a_profile_repeats_the_last_place_of_a_small_set_and_falls() -> None:
    x = unit(_people(6, 1)[0])
    neighbors = operators().row_top_k(x[None], x[None], LISTED)[0]
    scores = profile(x, neighbors)
    exact = (x @ x.T).sort(dim=1, descending=True).values
    for place, rank in enumerate(RANKS):
        missing = max(0, place - RANKS.index(4))
        assert torch.allclose(scores[:, place], exact[:, min(rank, 4)] - MISSING * missing, atol=1e-6)


def test_gradients_reach_every_gate_and_leave_the_map() -> None:
    head = _started().train()
    x, _ = _people(30, 4)
    y = head(x, _landmarks(len(x)))
    (unit(y) * y.detach().roll(1, 0)).sum().backward()
    for name, parameter in head.named_parameters():
        assert (parameter.grad is None) == name.startswith(("map.", "told.")), name
        if parameter.grad is not None:
            assert parameter.grad.abs().max() > 0, name


def test_gates_for_a_number_of_images_lie_between_those_learned_for_fewer_and_for_more() -> None:
    head = _started()
    names = [name for name in head.state_dict() if name.startswith("told.")]
    few, middle, many = (np.array([1, 4, 16]) == n for n in (1, 4, 16))
    for images, shares in ((1, few), (2, (few + middle) / 2.0), (4, middle), (8, (middle + many) / 2.0), (99, many)):
        head.tell(images)
        state = head.state_dict()
        for name in names:
            expected = np.tensordot(shares.astype(float), state[name].double().numpy(), 1)
            assert np.abs(state[name.removeprefix("told.")].numpy() - expected).max() <= 1e-6, (images, name)
    untold = _started().state_dict()
    head.tell(GATED_UNTOLD)
    assert all(torch.equal(value, untold[name]) for name, value in head.state_dict().items())
    for wrong in (0.5, float("inf"), 10**400):
        with pytest.raises(UsageError, match="images_per_person"):
            head.tell(wrong)


@torch.no_grad()
def test_the_map_makes_people_easier_to_tell_apart() -> None:
    rng = np.random.default_rng(0)
    nuisance = rng.standard_normal((4, 32)).astype(np.float32)
    x, labels = _people(60, 6)
    x = x + torch.from_numpy(3 * rng.standard_normal((len(x), 4)).astype(np.float32) @ nuisance)
    head = make_head(SPEC).eval()
    assert isinstance(head, GatedHead)
    start_as_gates(head, x, labels)
    landmarks = _landmarks(len(x))
    assert _first_matches(head.mapped(x, landmarks), labels) > _first_matches(x - x.mean(dim=0), labels) + 0.1


def test_what_does_not_fit_is_refused() -> None:
    head = _started()
    x, _ = _people(10, 2)
    with pytest.raises(UsageError, match="features"):
        head(x[:, :8], _landmarks(20))
    with pytest.raises(UsageError, match="landmarks"):
        head(x, _landmarks(40))
    with pytest.raises(DataError, match="row 3"):
        head(x.index_fill(0, torch.tensor([3]), float("nan")), _landmarks(20))
    with pytest.raises(UsageError, match="heads"):
        HeadSpec(32, heads=2, rule="gated")
    with pytest.raises(UsageError, match="layers"):
        start_as_gates(GatedHead(HeadSpec(32, layers=9, heads=1, rule="gated")), x, None)
