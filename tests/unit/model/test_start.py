from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from nformer_edge.core.errors import UsageError
from nformer_edge.core.spec import HeadSpec
from nformer_edge.model import start as module
from nformer_edge.model.nformer import NFormer
from nformer_edge.model.start import Bend, discriminant, start_as_discriminant
from nformer_edge.ops.contract import draw_landmarks


def labeled(people: int = 40, each: int = 10, size: int = 16) -> tuple[Tensor, Tensor]:
    """People who differ in all directions, under a disturbance that is strong in the first two."""
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(people), each)
    disturbance = rng.normal(size=(len(labels), size))
    disturbance[:, :2] *= 8
    rows = rng.normal(size=(people, size))[labels] + 0.3 * disturbance
    return torch.from_numpy(rows), torch.from_numpy(labels)


def within(rows: Tensor, labels: Tensor) -> Tensor:
    centers = torch.stack([rows[labels == label].mean(dim=0) for label in range(int(labels.max()) + 1)])
    apart = rows - centers[labels]
    return apart.T @ apart / len(rows)


def test_map_makes_what_varies_within_a_person_equal_in_all_directions() -> None:
    rows, labels = labeled()
    w, mean = discriminant(rows, labels, shrinkage=0, between=0)
    variance = torch.linalg.eigvalsh(within((rows - mean) @ w, labels))
    assert variance.max() / variance.min() == pytest.approx(1, abs=1e-9)


def test_mapped_rows_have_mean_square_length_d() -> None:
    rows, labels = labeled()
    w, mean = discriminant(rows, labels)
    assert ((rows - mean) @ w).pow(2).sum(dim=1).mean() == pytest.approx(16)


def test_labels_without_images_change_nothing() -> None:
    rows, labels = labeled()
    w, gaps = discriminant(rows, labels)[0], discriminant(rows, labels * 2)[0]
    assert torch.allclose(w @ w.T, gaps @ gaps.T)


def test_what_varies_between_cameras_weighs_more_than_what_varies_within_one() -> None:
    rows, labels = labeled()
    cameras = torch.arange(len(labels)) % 2
    rows[:, 5] += 4.0 * cameras  # as much as many a person differs from the next
    plain, across = (discriminant(rows, labels, seen)[0] for seen in (None, cameras))
    lengths = [w.norm(dim=1) / w.norm() for w in (plain, across)]
    assert lengths[1][5] <= 0.5 * lengths[0][5]  # the map all but drops the cameras' direction
    assert lengths[1][0] >= 1.5 * lengths[0][0]  # and keeps one that is only noisy, which a mean over images calms


def test_cameras_that_nobody_shares_change_nothing() -> None:
    rows, labels = labeled()
    assert torch.equal(discriminant(rows, labels, labels)[0], discriminant(rows, labels)[0])


def test_a_camera_with_many_images_of_a_person_weighs_no_more_than_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "WITHIN_CAMERA", 0.0)
    rows, labels = labeled()
    cameras = torch.arange(len(labels)) % 2
    many = torch.cat([torch.arange(len(rows)), *[torch.where(cameras == 0)[0]] * 3])
    maps = [discriminant(rows[i], labels[i], cameras[i], between=0)[0] for i in (torch.arange(len(rows)), many)]
    once, often = (w @ w.T / w.pow(2).sum() for w in maps)
    assert torch.allclose(once, often)


def test_first_layer_starts_as_the_map() -> None:
    rows, labels = labeled()
    torch.manual_seed(0)
    head = NFormer(HeadSpec(16, layers=2, heads=2, k=5, landmarks=8, rule="affinity")).double()
    start_as_discriminant(head, rows, labels)
    block, unit = head.h[0], torch.nn.functional.normalize(rows, dim=1)
    x = torch.nn.functional.layer_norm(unit, (16,))
    w, mean = discriminant(x, labels)
    assert torch.allclose(x + block.mlp(x), (x - mean) @ w, atol=1e-9)


def test_bend_is_near_the_power_it_stands_for() -> None:
    x = torch.nn.functional.layer_norm(torch.from_numpy(np.random.default_rng(0).normal(size=(400, 64))).relu(), (64,))
    bend = Bend.fit(x, 0.7)
    u = x - bend.low
    want = u.clamp_min(0) ** 0.7
    assert (bend(x) - bend(x).mean() - want + want.mean()).pow(2).mean() <= 0.005 * want.var()
    assert all(height < 0 for height in bend.bends)


def test_first_layer_starts_as_the_map_of_powers() -> None:
    rows, labels = labeled()
    torch.manual_seed(0)
    head = NFormer(HeadSpec(16, layers=2, heads=2, k=5, landmarks=8, rule="affinity")).double()
    start_as_discriminant(head, rows, labels, power=0.7)
    x = torch.nn.functional.layer_norm(torch.nn.functional.normalize(rows, dim=1), (16,))
    bend = Bend.fit(x, 0.7)
    w, mean = discriminant(bend(x), labels)
    assert torch.allclose(x + head.h[0].mlp(x), (bend(x) - mean) @ w, atol=1e-9)


def test_landmark_product_starts_as_the_cosine_in_units_of_sharpness() -> None:
    rows, labels = labeled(people=80, each=10)
    torch.manual_seed(0)
    head = NFormer(HeadSpec(16, layers=2, heads=1, k=5, landmarks=800, rule="affinity")).double()
    start_as_discriminant(head, rows, labels, sharpness=3.0)
    landmarks = torch.from_numpy(draw_landmarks(800, 1, 800, 0)[0]).long()
    with torch.no_grad():
        x = torch.nn.functional.layer_norm(rows / rows.norm(dim=1, keepdim=True), (16,))
        x = head.h[0].ln_2(x + head.h[0].mlp(x))
        a, b, _ = head.h[1].attn.factors(x, landmarks)
    logits = (a[0] @ b[0].T) / 4  # the softmax's scale, 1 / sqrt(D)
    cosine = torch.nn.functional.cosine_similarity(x[:, None] - x.mean(dim=0), x[None] - x.mean(dim=0), dim=2)
    assert np.corrcoef(logits.flatten(), cosine.flatten())[0, 1] >= 0.97
    assert logits.diagonal().mean() == pytest.approx(3, rel=0.1)


def test_affinity_rule_needs_a_layer_after_the_map() -> None:
    rows, labels = labeled()
    with pytest.raises(UsageError, match="2 or more"):
        start_as_discriminant(NFormer(HeadSpec(16, layers=1, rule="affinity")), rows, labels)
