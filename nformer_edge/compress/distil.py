"""Distillation: a student learns from what its teacher says of views of the training images. B images, D features."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nformer_edge.compress.step import Lessons, Work
from nformer_edge.compress.teacher import keep_maps, keep_related
from nformer_edge.core.errors import UsageError
from nformer_edge.core.spec import PreprocessSpec, check_at_least
from nformer_edge.data.loaders import AugmentSpec, one_ahead
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
        maps: of the squared distance between the last feature maps of their trunks, the student's through a 1x1
            convolution, each channel of the teacher's in units of its deviation (FitNets: Romero et al., ICLR 2015).
            The teacher's are computed once and kept on disk while the run lasts: with 8 x 4 places of 128 channels
            8 KiB a view.
        related: of the squared distance at length 1 between the student's features and what the teacher's head makes of
            its plain training images, all in one set; a gated head is told how many images a person has. All views of
            an image have this one target. With ``feature = 0`` the student follows it alone.
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
    maps: float = 0.0
    related: float = 0.0
    half_epochs: int = 0
    keep_mib: int = 2048
    train: BackboneConfig = field(default_factory=lambda: BackboneConfig(epochs=10, schedule="cosine", warmup=1))

    def __post_init__(self) -> None:
        for name in (f.name for f in fields(self) if f.name != "train"):
            check_at_least(name, getattr(self, name), 0)
        if self.train.augment != AugmentSpec():
            raise UsageError("train.augment", self.train.augment, "none", "Set the recipe's own augment.")

    def run(
        self, backbone: Backbone, work: Work, after_step: Callable[[], None] | None = None
    ) -> tuple[Backbone, list[Epoch]]:
        maps = self._teachers_maps(backbone, work) if self.maps else None  # [V, N, C, h, w]
        loader = ViewLoader(work, self, maps, self._teachers_related(work) if self.related else None)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(work.seed)
            criterion = DistilCriterion(self, work.lessons, backbone.spec.features)
            if maps is not None:
                criterion.learn_maps(backbone, maps)
        rows = work.train(backbone, self.train, loader, criterion, after_step)
        return backbone, rows

    def _teachers_maps(self, backbone: Backbone, work: Work) -> np.ndarray:
        """Of the smaller of both models' sizes."""
        spec = work.spec.preprocess
        with torch.inference_mode():
            models = (copy.deepcopy(backbone).to("cpu").eval(), work.lessons.model.to("cpu"))
            sizes = [model.trunk(torch.zeros(1, 3, spec.height, spec.width)).shape[2:] for model in models]
        size = (min(h for h, _ in sizes), min(w for _, w in sizes))
        path = work.kept(f"maps-{size[0]}x{size[1]}.npy")
        if work.compute.leads:
            keep_maps(path, work.lessons, size, work.compute.device)
        work.compute.wait()
        return np.load(path, mmap_mode="r")

    def _teachers_related(self, work: Work) -> np.ndarray:
        path = work.kept("related.npy")
        if work.compute.leads:
            keep_related(path, work.lessons, work.compute.device)
        work.compute.wait()
        related: np.ndarray = np.load(path)
        return related


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

    def learn_maps(
        self,
        backbone: Backbone,
        maps: np.ndarray,  # float16 [V, N, C, h, w], the teacher's
    ) -> None:
        """From now on the batches bring the teacher's maps, and the loss asks for them."""
        student: Any = backbone.trunk.channels
        self.adapt = nn.Conv2d(student, maps.shape[2], 1)
        plain = torch.from_numpy(maps[0].astype(np.float32))
        self.register_buffer("mean", plain.mean((0, 2, 3)).view(-1, 1, 1))
        self.register_buffer("deviation", plain.std((0, 2, 3)).clamp_min(1e-5).view(-1, 1, 1))

    def outputs(self, backbone: Backbone, images: Tensor) -> tuple[Tensor, ...]:
        if not self.distil.maps:
            return super().outputs(backbone, images)
        maps = backbone.trunk(images)
        return (*backbone.embedded(maps), maps)

    def forward(  # type: ignore[override]
        self,
        before: Tensor,  # [B, D]
        after: Tensor,  # [B, D]
        *rest: Tensor,  # the student's maps if they are learned; labels, int64 [B]; the teacher's features and the like
    ) -> tuple[Tensor, Tensor]:  # loss, share of images nearest to their person's mean teacher feature
        c, told, loss = self.distil, list(rest), before.new_zeros(())
        mine = F.normalize(self.projection(after), dim=1)
        if c.related:
            loss = loss + c.related * _apart(mine, F.normalize(told.pop().to(after.dtype), dim=1))
        if c.maps:
            maps, theirs = told.pop(0), told.pop()
            loss = loss + c.maps * self._maps_apart(maps, theirs.to(maps.dtype))
        labels, taught = told
        theirs = F.normalize(taught.to(after.dtype), dim=1)
        people = self.people.to(after.dtype)
        scores = mine @ people.T
        loss = loss + c.feature * _apart(mine, theirs)
        if c.similarity:
            loss = loss + c.similarity * _apart(_cosines(mine), _cosines(theirs))
        if c.relation:
            loss = loss + c.relation * F.smooth_l1_loss(_distances(mine), _distances(theirs))
        if c.logits:
            wanted = F.softmax(c.sharpness * theirs @ people.T, dim=1)
            said = F.log_softmax(c.sharpness * scores, dim=1)
            loss = loss + c.logits * F.kl_div(said, wanted, reduction="batchmean")
        if c.identity:
            loss = loss + c.identity * super().forward(before, after, labels)[0]
        return loss, (scores.argmax(dim=1) == labels).float().mean()

    def _maps_apart(self, mine: Tensor, theirs: Tensor) -> Tensor:  # [B, C, h, w] each, of other sizes and channels
        size = (min(mine.shape[2], theirs.shape[2]), min(mine.shape[3], theirs.shape[3]))
        wanted = (theirs - self.get_buffer("mean")) / self.get_buffer("deviation")
        mine, wanted = (F.adaptive_avg_pool2d(maps, size) for maps in (mine, wanted))
        return F.mse_loss(self.adapt(mine), wanted)


def _apart(a: Tensor, b: Tensor) -> Tensor:  # [B, D] each; the mean squared distance of their rows
    return (a - b).pow(2).sum(dim=1).mean()


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

    def __init__(
        self,
        work: Work,
        config: Distil,
        maps: np.ndarray | None = None,  # [V, N, C, h, w], the teacher's
        related: np.ndarray | None = None,  # [N, D], likewise
    ) -> None:
        images, teacher = work.lessons.images, work.lessons.teacher
        self.lessons, self.half_epochs, self.seed, self.maps = work.lessons, config.half_epochs, work.seed, maps
        self.related = related
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

    def _prepare(self, step: int, rows: np.ndarray) -> tuple[Tensor, ...]:
        views = np.random.default_rng([self.seed, self.epoch, step]).integers(len(self.features), size=len(rows))
        mine = slice(self.first * self.count, (self.first + 1) * self.count)
        rows, views = rows[mine], views[mine]
        if self._half is not None and self.epoch < self.half_epochs:
            images = self._half(views, rows, self.lessons.drawn)
        else:
            images = self.lessons.drawn(views, rows)
        labels, features = self.lessons.images.labels[rows], self.features[views, rows]
        told = [labels, features]
        if self.maps is not None:
            told.append(self.maps[views, rows].astype(np.float32))
        if self.related is not None:
            told.append(self.related[rows])
        return images, *(torch.from_numpy(one) for one in told)

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        """Images float32 [B, 3, H, W], their labels int64, the teacher's features float32 [B, D], its maps and
        related features where they are learned."""
        return one_ahead(self.sampler, self._prepare, self.start)
