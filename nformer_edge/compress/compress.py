"""A model in, a smaller or faster one out, by the steps of a recipe."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

import numpy as np
import torch

from nformer_edge.compress.cost import Cost, cost_of
from nformer_edge.compress.recipe import Recipe, kind_of, read_recipe
from nformer_edge.compress.step import Lessons, Work
from nformer_edge.compress.teacher import extract_teacher, stored_teacher
from nformer_edge.core.artifact import open_plain, require_suffix, sha256_file, working_in
from nformer_edge.core.errors import ArtifactError
from nformer_edge.core.features import Features, load_features, save_features
from nformer_edge.core.spec import ModelSpec
from nformer_edge.core.values import Table, from_json, to_json, to_table
from nformer_edge.data.holdout import split_holdout
from nformer_edge.data.loaders import TrainImages
from nformer_edge.data.records import Dataset
from nformer_edge.data.summary import dataset_of
from nformer_edge.metrics.ranking import evaluate
from nformer_edge.model.backbone import Backbone, for_inference
from nformer_edge.model.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from nformer_edge.training.compute import open_compute
from nformer_edge.training.history import Epoch, Identity, Trained
from nformer_edge.training.run import Run, images_identity
from nformer_edge.training.stages import held_out

StrPath = str | os.PathLike[str]


@dataclass(frozen=True)
class Done:
    """One step of a compression, at its end.

    Args:
        step: its kind.
        held_out_map: mAP of the held-out people by the backbone as it came out, 0..1; None where nobody is held out.
    """

    step: str
    held_out_map: float | None
    cost: Cost
    epochs: tuple[Epoch, ...]
    seconds: float


@dataclass(frozen=True)
class Compression(Trained):
    """A compression that came to its end.

    Args:
        dataset: its name.
        checkpoint: the file that it wrote, with its `sha256`.
        images, identities: learnt from, without those held out.
        teacher: the model before the first step.
        teacher_map: mAP of the held-out people by the teacher, 0..1; None where nobody is held out.
        steps: what came out of each.
        threads: PyTorch's intra-op threads.
    """

    kind: ClassVar[str] = "compression"

    dataset: str
    checkpoint: str
    sha256: str
    images: int
    identities: int
    teacher: Cost
    teacher_map: float | None
    steps: tuple[Done, ...]
    identity: Identity
    versions: Mapping[str, str]
    threads: int
    device: str
    seconds: float

    def __str__(self) -> str:
        lines = [f"{self.dataset}: {self.images:,} images of {self.identities:,} identities"]
        lines.append(f"{'':<12}{'held-out mAP':>13}{'parameters':>13}{'GMACs':>8}{'seconds':>9}")
        teacher = Done("teacher", self.teacher_map, self.teacher, (), 0.0)
        for done in (teacher, *self.steps):
            reached = "-" if done.held_out_map is None else f"{100 * done.held_out_map:.1f}"
            cost = f"{done.cost.parameters:>13,}{done.cost.gmacs:>8.3f}"
            lines.append(f"{done.step:<12}{reached:>13}{cost}{done.seconds:>9.0f}")
        return "\n".join([*lines, f"wrote {self.checkpoint}"])


def compress(
    model: StrPath,
    data: StrPath | Dataset,
    recipe: StrPath | Recipe,
    out: StrPath = "student.safetensors",
    *,
    teacher: StrPath | None = None,
    layout: str = "auto",
    device: str = "cpu",
    resume: bool = False,
    force: bool = False,
) -> Compression:
    """Takes a model's backbone through the steps of `recipe`, and writes the checkpoint `out`, without a head.

    The record stands beside it as ``.compression.json``. Killed at any moment, `resume` goes on to the same bits.

    Args:
        model: the checkpoint of the teacher: what the student learns from, and where it starts if the recipe names no
            other student.
        data: a dataset, or where one lies; its training images are learnt from.
        teacher: a feature store of `model` with the dataset's training images and their views, as
            ``nformer-edge embed MODEL --splits train --views 4`` wrote it; computed here if None.
        device: ``cpu`` or a CUDA device.
        resume: go on from what an interrupted run left; begin where there is nothing.
        force: replace an earlier checkpoint.

    Raises:
        UsageError: if the recipe does not fit, or `resume` finds the state of another run.
        ArtifactError: if there is something at `out`, or `model` or `teacher` cannot be used.
    """
    begun = time.perf_counter()
    require_suffix(out, ".safetensors")
    recipe = recipe if isinstance(recipe, Recipe) else read_recipe(recipe)
    made = load_checkpoint(model)
    if made.backbone is None:
        raise ArtifactError(str(model), "a head alone", "a backbone", "Pass the model that it belongs to.")
    if made.head is None and any(getattr(getattr(step, "distil", step), "related", 0) for step in recipe.steps):
        expected, hint = "a teacher with a head, because the recipe has related", "Pass one, or leave related out."
        raise ArtifactError(str(model), "a backbone alone", expected, hint)
    dataset = dataset_of(data, layout)
    store = None
    if teacher is not None:
        with open_plain(teacher, "a feature store"):
            store = sha256_file(teacher)
    names = images_identity(dataset.train, dataset.root)
    identity = Identity(recipe.identity, images=names, initial=made.sha256, features=store)
    run = Run(out, identity, open_compute(device, recipe.precision), recipe.save_minutes, resume=resume)
    done = run.finished(Compression)
    if done is not None:
        return done
    run.begin(force)
    with working_in(run.folder, run.out), torch.random.fork_rng(devices=[]):
        record = _Compressing(run, recipe, made, dataset, teacher).all_steps(begun)
        run.finish(record)
    return record


class _Compressing:
    """A compression on its way."""

    def __init__(self, run: Run, recipe: Recipe, made: Checkpoint, dataset: Dataset, teacher: StrPath | None) -> None:
        self.run, self.recipe, self.made, self.dataset = run, recipe, made, dataset
        self.spec: ModelSpec = replace(made.spec, head=None)
        self.device = str(run.compute.device)
        records, self.holdout = split_holdout(dataset.train, recipe.holdout, recipe.seed)
        images = TrainImages(records, self.spec.preprocess, recipe.cache_mib)
        assert made.backbone is not None
        self.lessons = Lessons(images, self._teacher(images, teacher), for_inference(made.backbone), made.head)

    def _teacher(self, images: TrainImages, store: StrPath | None) -> Features:
        if store is not None:
            return stored_teacher(store, images.records, self.made.sha256)
        path, compute = self.run.kept("teacher.npz"), self.run.compute
        if compute.leads and not path.is_file():
            assert self.made.backbone is not None
            features = extract_teacher(self.made.backbone, images, self.recipe, self.device, self.made.sha256)
            save_features(path, {"train": features})
        compute.wait()
        return load_features(path)["train"]

    def judge(self, backbone: Backbone) -> float:
        """mAP of the held-out people, 0..1."""
        assert self.holdout is not None
        return evaluate(*held_out(backbone, self.holdout, self.spec, self.device)).mAP

    def all_steps(self, begun: float) -> Compression:
        made, images = self.made.backbone, self.lessons.images
        assert made is not None
        teacher_map = self.judge(made) if self.holdout else None
        size = (self.spec.preprocess.height, self.spec.preprocess.width)
        teacher, backbone = cost_of(made.to("cpu"), size), self._student(made)
        done = []
        for i in range(len(self.recipe.steps)):
            backbone, step = self._step(i, backbone, size)
            done.append(step)
        steps = [to_json(replace(step, epochs=(), seconds=0.0)) for step in done]
        extra: Table = {"dataset": self.dataset.name, "teacher": self.made.sha256, "steps": steps}
        if self.run.compute.leads:
            save_checkpoint(self.run.checkpoint, self._spec_of(backbone), backbone, None, extra)
        self.run.compute.wait()
        return Compression(
            self.dataset.name,
            str(self.run.out),
            sha256_file(self.run.checkpoint),
            len(images),
            len(np.unique(images.pids)),
            teacher,
            teacher_map,
            tuple(done),
            self.run.identity,
            {"torch": torch.__version__},
            torch.get_num_threads(),
            self.device,
            time.perf_counter() - begun,
        )

    def _student(self, made: Backbone) -> Backbone:
        if self.recipe.student is None:
            return made
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.recipe.seed)
            return Backbone(self.recipe.student)

    def _spec_of(self, backbone: Backbone) -> ModelSpec:
        return replace(self.spec, backbone=backbone.spec)

    def _step(self, number: int, backbone: Backbone, size: tuple[int, int]) -> tuple[Backbone, Done]:
        """A step, unless an earlier run has already done it."""
        start, step, run = time.perf_counter(), self.recipe.steps[number], self.run
        kind = kind_of(step)
        name = f"{number + 1}-{kind}"
        state, path = run.state(name, run.identity), run.kept(f"{name}.done.safetensors")
        finished = state.finished()
        if finished is not None and path.is_file() and sha256_file(path) == finished["sha256"]:
            kept, done = load_checkpoint(path), from_json(Done, finished["done"])
            assert kept.backbone is not None
            run.logs.rows[name] = done.epochs
            return kept.backbone, done
        judge = self.judge if self.holdout else None
        note = partial(run.logs.note, name)
        spec = self._spec_of(backbone)
        work = Work(spec, self.lessons, judge, state, run.compute, self.recipe.seed, run.kept, run.beside, note)
        backbone, rows = step.run(backbone, work)
        reached = judge(backbone) if judge is not None and run.compute.leads else None
        backbone = backbone.to("cpu").eval()
        done = Done(kind, reached, cost_of(backbone, size), tuple(rows), time.perf_counter() - start)
        if run.compute.leads:
            digest = save_checkpoint(path, self._spec_of(backbone), backbone)
            state.finish({"sha256": digest, "done": to_table(done)})
        run.compute.wait()
        return backbone, done
