from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nformer_edge.training import losses
from nformer_edge.training.config import LossConfig
from nformer_edge.training.losses import CenterLoss, Criterion, batch_hard_triplet


def direct_triplet(x: Tensor, labels: list[int], margin: float) -> Tensor:
    """The formula, image by image."""
    terms = []
    for i in range(len(x)):
        d = [(x[i] - x[j]).norm() for j in range(len(x))]
        positives = [d[j] for j in range(len(x)) if j != i and labels[j] == labels[i]]
        negatives = [d[j] for j in range(len(x)) if labels[j] != labels[i]]
        if positives and negatives:
            terms.append((max(positives) - min(negatives) + margin).clamp_min(0))
    return torch.stack(terms).mean()


@pytest.mark.parametrize("labels", [[0, 0, 1, 1, 2, 2], [0, 0, 0, 1, 2, 2], [5, 3, 3, 5, 5, 9]])
@pytest.mark.parametrize("margin", [0.0, 0.3, 2.0])
def test_triplet_equals_the_formula_taken_literally(labels: list[int], margin: float) -> None:
    torch.manual_seed(0)
    x = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    got, want = batch_hard_triplet(x, torch.tensor(labels), margin), direct_triplet(x, labels, margin)
    assert (got - want).abs() <= 1e-10
    ours, theirs = torch.autograd.grad(got, x)[0], torch.autograd.grad(want, x)[0]
    assert (ours - theirs).abs().max() <= 1e-10


def test_triplet_does_not_depend_on_the_block_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    x, labels = torch.randn(20, 4), torch.arange(20) // 4
    whole = batch_hard_triplet(x, labels, 0.3)
    monkeypatch.setattr(losses, "_ROWS", 3)
    assert (batch_hard_triplet(x, labels, 0.3) - whole).abs() <= 1e-6


@pytest.mark.parametrize("labels", [[0, 1, 2], [4, 4, 4]])
def test_triplet_of_a_batch_without_pairs_is_zero_and_differentiable(labels: list[int]) -> None:
    x = torch.randn(3, 4, requires_grad=True)
    loss = batch_hard_triplet(x, torch.tensor(labels), 0.3)
    loss.backward()
    assert loss.item() == 0
    assert x.grad is not None
    assert (x.grad == 0).all()


def test_triplet_of_identical_features_has_finite_gradients() -> None:
    x = torch.ones(4, 3, requires_grad=True)
    batch_hard_triplet(x, torch.tensor([0, 0, 1, 1]), 0.3).backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()


def test_center_loss_is_the_mean_squared_distance_to_the_own_center() -> None:
    loss = CenterLoss(2, 3)
    loss.centers.data = torch.tensor([[0.0, 0.0, 0.0], [1.0, 1.0, 1.0]])
    x = torch.tensor([[1.0, 2.0, 2.0], [1.0, 1.0, 3.0]])
    assert loss(x, torch.tensor([0, 1])).item() == pytest.approx((9 + 4) / 2)


def test_label_smoothing_is_that_of_szegedy() -> None:
    """The target is (1 - e) + e / C for the right class and e / C for each other one."""
    torch.manual_seed(0)
    config = LossConfig(label_smoothing=0.1, triplet_weight=0.0, center_weight=0.0)
    criterion = Criterion(config, 5, 4)
    criterion.classifier.weight.data.normal_()
    x, labels = torch.randn(6, 4), torch.tensor([0, 1, 2, 3, 4, 0])
    target = torch.full((6, 5), 0.1 / 5)
    target[torch.arange(6), labels] += 0.9
    want = -(target * (x @ criterion.classifier.weight.T).log_softmax(dim=1)).sum(dim=1).mean()
    loss, _ = criterion(x, x, labels)
    assert (loss - want).abs() <= 1e-6


def test_criterion_sums_its_losses_by_weight() -> None:
    torch.manual_seed(0)
    before, after, labels = torch.randn(6, 4), torch.randn(6, 4), torch.tensor([0, 0, 1, 1, 2, 2])
    criterion = Criterion(LossConfig(triplet_weight=0.5, center_weight=0.25), 3, 4)
    loss, right = criterion(before, after, labels)
    logits = criterion.classifier(after)
    want = torch.nn.functional.cross_entropy(logits, labels, label_smoothing=0.1)
    want = want + 0.5 * batch_hard_triplet(before, labels, 0.3) + 0.25 * criterion.center(before, labels)
    assert (loss - want).abs() <= 1e-6
    assert right.item() == pytest.approx((logits.argmax(1) == labels).float().mean().item())
