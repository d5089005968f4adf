"""The three losses of both stages. Letters: N images, D features, C identities."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nformer_edge.model.backbone import Backbone
from nformer_edge.training.config import LossConfig

#: Rows of a distance matrix held at once while hard examples are looked for.
_ROWS = 1024


def batch_hard_triplet(
    features: Tensor,  # [N, D]
    labels: Tensor,  # int64 [N]
    margin: float,
) -> Tensor:  # scalar
    """Mean over images of ``max(0, d(hardest positive) - d(hardest negative) + margin)`` (Hermans et al., 2017).

    An image with no other of its identity, or none of another, adds nothing to the mean. Hard examples are found in
    blocks of rows without a gradient, so that memory is O(N D), not O(N^2).
    """
    positive, negative = _hardest(features.detach(), labels)
    valid = (positive >= 0) & (negative >= 0)
    if not valid.any():
        return features.sum() * 0.0
    anchors = features[valid]
    far = _distance(anchors, features[positive[valid]])
    near = _distance(anchors, features[negative[valid]])
    return (far - near + margin).clamp_min(0).mean()


def _distance(x: Tensor, y: Tensor) -> Tensor:
    return (x - y).pow(2).sum(dim=1).clamp_min(1e-12).sqrt()  # the root has no gradient at 0


def _hardest(features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Each image's farthest positive other than itself and its nearest negative, int64 [N]; -1 where there is none."""
    positives, negatives = [], []
    for start in range(0, len(features), _ROWS):
        rows = torch.arange(start, min(start + _ROWS, len(features)), device=features.device)
        distances = torch.cdist(features[rows], features)
        same = labels[rows, None] == labels[None]
        other = ~same
        same[rows - start, rows] = False
        far = distances.masked_fill(~same, -1.0).argmax(dim=1)
        near = distances.masked_fill(~other, torch.inf).argmin(dim=1)
        positives.append(far.masked_fill(~same.any(dim=1), -1))
        negatives.append(near.masked_fill(~other.any(dim=1), -1))
    return torch.cat(positives), torch.cat(negatives)


class CenterLoss(nn.Module):
    """Mean squared distance to the learnt center of the identity (Wen et al., ECCV 2016)."""

    def __init__(self, classes: int, features: int) -> None:
        super().__init__()
        self.centers = nn.Parameter(torch.randn(classes, features))

    def forward(
        self,
        features: Tensor,  # [N, D]
        labels: Tensor,  # int64 [N]
    ) -> Tensor:  # scalar
        return (features - self.centers[labels]).pow(2).sum(dim=1).mean()


class Criterion(nn.Module):
    """Identity cross-entropy, triplet and center loss with the parameters that exist only in training."""

    def __init__(self, config: LossConfig, classes: int, features: int) -> None:
        super().__init__()
        self.config = config
        self.classifier = nn.Linear(features, classes, bias=False)
        nn.init.normal_(self.classifier.weight, std=0.001)
        self.center = CenterLoss(classes, features)

    def outputs(self, backbone: Backbone, images: Tensor) -> tuple[Tensor, ...]:
        """What `forward` is given of a batch: the features before and after the neck's batch norm."""
        return backbone.both(images)

    def forward(
        self,
        before: Tensor,  # [N, D]
        after: Tensor,  # [N, D]
        labels: Tensor,  # int64 [N]
    ) -> tuple[Tensor, Tensor]:  # loss, share of images classified right
        """The weighted sum: metric losses before the neck's batch norm, the classifier after it."""
        c = self.config
        logits = self.classifier(after)
        loss = nn.functional.cross_entropy(logits, labels, label_smoothing=c.label_smoothing)
        loss = loss + c.triplet_weight * batch_hard_triplet(before, labels, c.margin)
        loss = loss + c.center_weight * self.center(before, labels)
        return loss, (logits.argmax(dim=1) == labels).float().mean()
