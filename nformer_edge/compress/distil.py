"""Distillation: a student learns from what its teacher says of views of the training images. B images, D features."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nformer_edge.compress.step import Lessons, Work
from nformer_edge.core.errors import UsageError
from nformer_edge.core.spec import PreprocessSpec, check_at_least, from_dict
from nformer_edge.data.loaders import AugmentSpec, draw_view, one_ahead
from nformer_edge.data.sampler import PKSampler
from nformer_edge.model.backbone import Backbone
from nformer_edge.training.config import BackboneConfig
from nformer_edge.training.history import Epoch
from nformer_edge.training.losses import Criterion


@dataclass(frozen=True)
class Distil:
    """The student learns the teacher's features, of the same views.

    Args:
        feature: weight of the squared distance between the features of student and teacher at length 1. A student
            with another number of features gets a linear projection, which exists in training alone.
        similarity: of the distance between their rows of cosines in the batch (Tung and Mori, ICCV 2019).
        relation: of the difference of their pairwise distances, each in units of its mean (Park et al., CVPR 2019).
        logits: of the divergence of their softmax over training people, who stand at the mean of their teacher
            features (Hinton et al., 2015).
        sharpness: of that softmax, in logits from cosine 0 to 1.
        identity: of the labels' own losses, as ``train.loss`` says.
        half_epochs: epochs at the start on images of half the sides, which take a quarter of the time.
        keep_mib: views of half the sides are drawn once and kept, as float16, when all of them take at most this many
            MiB.
        train: batches and rates. Its `augment` is not used: the recipe's is, which the teacher saw.
    """

    feature: float = 1.0
    similarity: float = 1.0
    relation: float = 0.0
    logits: float = 0.0
    sharpness: float = 16.0
    identity: float = 0.0
    half_epochs: int = 0
    keep_mib: int = 2048
    train: BackboneConfig = field(default_factory=lambda: BackboneConfig(epochs=10, schedule="cosine", warmup=1))

    def __post_init__(self) -> None:
        for name in ("feature", "similarity", "relation", "logits", "sharpness", "identity", "half_epochs", "keep_mib"):
            check_at_least(name, getattr(self, name), 0)
        if self.train.augment != AugmentSpec():
            raise UsageError("train.augment", self.train.augment, "none", "Set the recipe's own augment.")

    def run(
        self, backbone: Backbone, work: Work, after_step: Callable[[], None] | None = None
    ) -> tuple[Backbone, list[Epoch]]:
        loader = ViewLoader(work, self)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(work.seed)
            criterion = DistilCriterion(self, work.lessons, backbone.spec.features)
        rows = work.train(backbone, self.train, loader, criterion, after_step)
        return backbone, rows


class DistilCriterion(Criterion):
    """The weighted sum of `Distil`, with the parameters that exist only in training."""

    def __init__(self, config: Distil, lessons: Lessons, features: int) -> None:
        super().__init__(config.train.loss, lessons.images.num_classes, features)
        self.distil = config
        taught = lessons.teacher.features.shape[1]
        self.projection = nn.Identity() if taught == features else nn.Linear(features, taught, bias=False)
        unit = F.normalize(torch.from_numpy(lessons.teacher.features), dim=1)
        labels = torch.from_numpy(lessons.images.labels)
        means = torch.zeros(lessons.images.num_classes, taught).index_add_(0, labels, unit)
        self.people: Tensor  # [C, D]
        self.register_buffer("people", F.normalize(means, dim=1))

    def forward(  # type: ignore[override]
        self,
        before: Tensor,  # [B, D]
        after: Tensor,  # [B, D]
        labels: Tensor,  # int64 [B]
        taught: Tensor,  # [B, D of the teacher]
    ) -> tuple[Tensor, Tensor]:  # loss, share of images nearest to their person's mean teacher feature
        c = self.distil
        mine, theirs = F.normalize(self.projection(after), dim=1), F.normalize(taught.to(after.dtype), dim=1)
        people = self.people.to(after.dtype)
        scores = mine @ people.T
        loss = c.feature * (mine - theirs).pow(2).sum(dim=1).mean()
        if c.similarity:
            loss = loss + c.similarity * (_cosines(mine) - _cosines(theirs)).pow(2).sum(dim=1).mean()
        if c.relation:
            loss = loss + c.relation * F.smooth_l1_loss(_distances(mine), _distances(theirs))
        if c.logits:
            wanted = F.softmax(c.sharpness * theirs @ people.T, dim=1)
            said = F.log_softmax(c.sharpness * scores, dim=1)
            loss = loss + c.logits * F.kl_div(said, wanted, reduction="batchmean")
        if c.identity:
            loss = loss + c.identity * super().forward(before, after, labels)[0]
        return loss, (scores.argmax(dim=1) == labels).float().mean()


def _cosines(unit: Tensor) -> Tensor:  # [B, D] -> [B, B], rows of length 1
    return F.normalize(unit @ unit.T, dim=1)


def _distances(unit: Tensor) -> Tensor:  # [B, D] -> [B, B], in units of the mean
    distances = (2 - 2 * unit @ unit.T).clamp_min(1e-12).sqrt()
    return distances / distances.detach().mean()


class _HalfViews:
    """Views of half the sides, drawn when they are first asked for. Kept or not, they have the same bits."""

    def __init__(self, views: tuple[int, int], spec: PreprocessSpec, keep_mib: int) -> None:
        shape = (*views, 3, spec.height // 2, spec.width // 2)
        self._kept = np.empty(shape, np.float16) if 2 * math.prod(shape) <= keep_mib * 2**20 else None  # V, N, 3, H, W
        self._there = np.zeros(views, bool)

    def __call__(
        self,
        views: np.ndarray,  # int64 [B]
        rows: np.ndarray,  # int64 [B]
        draw: Callable[[np.ndarray, np.ndarray], Tensor],
    ) -> Tensor:  # float32 [B, 3, H / 2, W / 2]
        if self._kept is None:
            return F.avg_pool2d(draw(views, rows), 2).half().float()
        new = ~self._there[views, rows]
        if new.any():
            self._kept[views[new], rows[new]] = F.avg_pool2d(draw(views[new], rows[new]), 2).half().numpy()
            self._there[views[new], rows[new]] = True
        return torch.from_numpy(self._kept[views, rows].astype(np.float32))


class ViewLoader:
    """Batches of P x K views that the teacher saw, prepared by a thread while the model works on the one before."""

    def __init__(self, work: Work, config: Distil) -> None:
        images, teacher = work.lessons.images, work.lessons.teacher
        self.images, self.teacher, self.half_epochs, self.seed = images, teacher, config.half_epochs, work.seed
        how = json.loads(teacher.augmentation or "{}")
        self.view_seed = int(how.pop("seed", 0))
        self.recipe = from_dict(AugmentSpec, how, "the teacher's views")
        self.sampler = PKSampler(images.pids, config.train.p, config.train.k, work.seed)
        self.features = np.stack([teacher.view(v).features for v in range(teacher.views)])  # [V, N, D]
        self.epoch = self.start = 0
        self._half = _HalfViews(self.features.shape[:2], images.spec, config.keep_mib) if config.half_epochs else None
        self.first, self.count = work.compute.rank, work.compute.share_of(self.sampler.p, "p") * config.train.k

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """The next iteration draws what belongs to `epoch`, without its first `start` batches."""
        self.epoch, self.start = epoch, start
        self.sampler.set_epoch(epoch)

    def __len__(self) -> int:
        """Batches in a whole epoch."""
        return len(self.sampler)

    def _prepare(self, step: int, rows: np.ndarray) -> tuple[Tensor, Tensor, Tensor]:
        views = np.random.default_rng([self.seed, self.epoch, step]).integers(len(self.features), size=len(rows))
        mine = slice(self.first * self.count, (self.first + 1) * self.count)
        rows, views = rows[mine], views[mine]
        if self._half is not None and self.epoch < self.half_epochs:
            images = self._half(views, rows, self._drawn)
        else:
            images = self._drawn(views, rows)
        return images, torch.from_numpy(self.images.labels[rows]), torch.from_numpy(self.features[views, rows])

    def _drawn(self, views: np.ndarray, rows: np.ndarray) -> Tensor:  # int64 [B], int64 [B] -> [B, 3, H, W]
        pixels, spec = self.images.pixels(rows), self.images.spec
        drawn = np.empty((len(rows), 3, spec.height, spec.width), np.float32)
        for view in np.unique(views):
            chosen = np.flatnonzero(views == view)
            hashes = [self.teacher.hashes[row] for row in rows[chosen]]
            drawn[chosen] = draw_view(pixels[chosen], hashes, int(view), spec, self.recipe, self.view_seed)
        return torch.from_numpy(drawn)

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        """Images float32 [B, 3, H, W], their labels int64 and the teacher's features float32 [B, D]."""
        return one_ahead(self.sampler, self._prepare, self.start)
