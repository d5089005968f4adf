"""What a step of a recipe is, and what it works with."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from nformer_edge.core.features import Features
from nformer_edge.core.spec import ModelSpec, from_dict
from nformer_edge.data.loaders import AugmentSpec, TrainImages, draw_view
from nformer_edge.exporting.export import export_bundle
from nformer_edge.model.backbone import Backbone
from nformer_edge.model.checkpoint import save_checkpoint
from nformer_edge.model.gated import Head
from nformer_edge.training.backbone import Loader, train_backbone
from nformer_edge.training.compute import Compute
from nformer_edge.training.config import BackboneConfig
from nformer_edge.training.history import Epoch
from nformer_edge.training.losses import Criterion
from nformer_edge.training.state import StateFile


@dataclass(frozen=True)
class Lessons:
    """Images to learn from, and what the teacher says of them.

    Args:
        images: training images without the held-out people.
        teacher: its features of the same images in the same order; view 0 is the plain one, the others can be drawn
            again (`data.loaders.draw_view`).
        model: the teacher itself, for what `teacher` does not hold.
        head: its head, if it has one.
    """

    images: TrainImages
    teacher: Features
    model: Backbone
    head: Head | None = None

    def drawn(
        self,
        views: np.ndarray,  # int64 [B]
        rows: np.ndarray,  # int64 [B]
    ) -> Tensor:  # float32 [B, 3, H, W]
        """Those views of those images, as the teacher saw them."""
        how = json.loads(self.teacher.augmentation or "{}")
        seed = int(how.pop("seed", 0))
        recipe = from_dict(AugmentSpec, how, "the teacher's views")
        pixels, spec = self.images.pixels(rows), self.images.spec
        drawn = np.empty((len(rows), 3, spec.height, spec.width), np.float32)
        for view in np.unique(views):
            chosen = np.flatnonzero(views == view)
            hashes = [self.teacher.hashes[row] for row in rows[chosen]]
            drawn[chosen] = draw_view(pixels[chosen], hashes, int(view), spec, recipe, seed)
        return torch.from_numpy(drawn)


@dataclass(frozen=True)
class Work:
    """What a step works with.

    Args:
        spec: of the model that comes in; it says how images are preprocessed.
        judge: mAP of the held-out people, 0..1; None where nobody is held out.
        state: where the step keeps what it needs to go on after an interruption.
        seed: everything random follows from it.
        kept: where a step keeps what must not be computed twice; it goes when the run ends.
        beside: where a further file ``<stem>.<name>`` of the result is written.
        note: called with all rows after each epoch.
    """

    spec: ModelSpec
    lessons: Lessons
    judge: Callable[[Backbone], float] | None
    state: StateFile
    compute: Compute
    seed: int
    kept: Callable[[str], Path]
    beside: Callable[[str], Path]
    note: Callable[[list[Epoch]], None]

    def train(
        self,
        backbone: Backbone,
        config: BackboneConfig,
        loader: Loader | None = None,
        criterion: Criterion | None = None,
        after_step: Callable[[], None] | None = None,
    ) -> list[Epoch]:
        """`training.backbone.train_backbone` in place, which watches held-out people and can be resumed."""
        return train_backbone(
            self.lessons.images,
            backbone,
            config,
            seed=self.seed,
            watch=self.judge,
            compute=self.compute,
            loader=loader,
            criterion=criterion,
            after_step=after_step,
            state=self.state,
            on_row=self.note,
        )


def exported(backbone: Backbone, spec: ModelSpec, folder: Path) -> Path:
    """The bundle of `backbone` alone, in a new folder under `folder`; `spec` says how images are preprocessed."""
    made = Path(tempfile.mkdtemp(dir=folder))
    save_checkpoint(made / "model.safetensors", replace(spec, backbone=backbone.spec, head=None), backbone)
    return export_bundle(made / "model.safetensors", made / "bundle")


class Step(Protocol):
    """One step: a frozen dataclass whose fields are the keys of its table in a recipe.

    It must give the same bits whenever it gets the same backbone and seed, whether interrupted on the way or not:
    what takes longer than a minute goes through `Work.train` or keeps its own progress in `Work.state`.
    """

    def run(self, backbone: Backbone, work: Work) -> tuple[Backbone, list[Epoch]]:
        """The backbone after this step, on the CPU in evaluation mode with its own spec, and a row for each epoch."""
        ...
