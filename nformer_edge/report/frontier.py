"""The frontier: ranking against time of a teacher, its students, prunings and precisions, on one table and picture."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import ClassVar

import numpy as np

from nformer_edge.backends.choice import seconds_of, take_turns
from nformer_edge.backends.runner import Runner
from nformer_edge.compress.cost import Cost
from nformer_edge.core.errors import UsageError
from nformer_edge.core.machine import MachineFacts, machine
from nformer_edge.core.values import Result
from nformer_edge.gallery.embed import embed_dataset
from nformer_edge.metrics.agreement import rank_agreement
from nformer_edge.metrics.ranking import Pair, evaluate
from nformer_edge.report.models import Data, MeasuredData, MeasuredModel, Source, open_dataset, open_model
from nformer_edge.report.table import format_table, number, percent


@dataclass(frozen=True)
class FrontierPoint:
    """One backbone: how it ranks, what it costs, how long it takes.

    Args:
        mAP, rank1: on the data, 0 to 1.
        overlap: share of the ten nearest images that are the teacher's too (overlap@10), 0 to 1.
        cost: of one image.
        ms: median of a forward pass, by batch size.
        speed: the teacher's time over this one's, median of the rounds, by batch size.
        dominated_by: label of the fastest model that ranks no worse and takes no longer with the largest batch, and is
            better in one of the two; null on the frontier.
    """

    model: MeasuredModel
    mAP: float
    rank1: float
    overlap: float
    cost: Cost
    ms: Mapping[int, float]
    speed: Mapping[int, float]
    dominated_by: str | None = None

    def cells(self) -> list[str]:
        """As text, under `Frontier.headers`."""
        size = number(self.model.size_mb.get("backbone"), 2)
        costs = [f"{self.cost.gmacs:.3f}", f"{self.cost.parameters / 1e6:.2f}", size]
        times = [f"{number(ms, 2)} ({self.speed[batch]:.2f} x)" for batch, ms in self.ms.items()]
        scores = [percent(self.mAP), percent(self.rank1), percent(self.overlap)]
        return [self.model.label, *scores, *costs, *times, self.dominated_by or "-"]


@dataclass(frozen=True)
class Frontier(Result):
    """Backbones by ranking and time, measured in one run.

    Args:
        machine: where it was measured.
        data: what was ranked.
        rounds: of the times, by batch size; the models take turns.
        points: the first is the teacher.
    """

    kind: ClassVar[str] = "frontier"

    machine: MachineFacts
    data: MeasuredData
    rounds: Mapping[int, int]
    points: tuple[FrontierPoint, ...]

    @property
    def headers(self) -> tuple[str, ...]:
        """Of the table."""
        times = (f"ms, batch {batch}" for batch in self.rounds)
        return ("backbone", "mAP", "Rank-1", "overlap@10", "GMACs", "M parameters", "MB", *times, "dominated by")

    @property
    def note(self) -> str:
        """How to read the table."""
        teacher, batch = self.points[0].model.label, max(self.rounds)
        return (
            f"In brackets: how many times faster than {teacher}, in turn with it on {self.machine.cpu}. overlap@10: "
            f"ten nearest images that are those of {teacher} too. Dominated: another model ranks no worse by mAP "
            f"and takes no longer with batch {batch}."
        )

    def __str__(self) -> str:
        return f"{format_table(self.headers, [p.cells() for p in self.points])}\n{self.note}"


def frontier(
    models: Sequence[Source],
    data: Data,
    *,
    batches: Sequence[int] = (1, 8),
    layout: str = "auto",
    batch: int = 32,
    intra_op_threads: int | None = None,
) -> Frontier:
    """Ranks a dataset with each backbone and times them in turn.

    Args:
        models: checkpoints, bundles or engines; the first is the teacher, such as its engine in FP32.
        data: a dataset with query and gallery images, or its folder.
        batches: sizes to time.
        batch: images in one forward pass while the dataset is embedded.
        intra_op_threads: of the backends; their own choice if None.

    Raises:
        UsageError: for fewer than two models.
        DataError: if the dataset has no query or no gallery images.
    """
    if len(models) < 2:
        raise UsageError("models", len(models), "at least two", "Name the teacher first, then its students.")
    dataset = open_dataset(data, layout)
    points: list[FrontierPoint] = []
    first: Pair | None = None
    rounds, taken = {}, {}
    with ExitStack() as stack:
        runners = [stack.enter_context(open_model(model, intra_op_threads)) for model in models]
        for size in batches:
            taken[size] = take_turns([partial(r.embed, _noise(r, size)) for r in runners], seconds_of)
            rounds[size] = taken[size].shape[1]
        for i, (source, runner) in enumerate(zip(models, runners, strict=True)):
            query, gallery = embed_dataset(runner, dataset, ("query", "gallery"), batch).values()
            first = first or (query, gallery)
            found, agreed = evaluate(query, gallery), rank_agreement(first, (query, gallery))
            ms = {size: statistics.median(times[i].tolist()) for size, times in taken.items()}
            speed = {size: statistics.median((times[0] / times[i]).tolist()) for size, times in taken.items()}
            name = Path(source).name if isinstance(source, str | Path) else None
            model = MeasuredModel.of(source, runner, name)
            points.append(FrontierPoint(model, found.mAP, found.rank(1), agreed.overlap, _cost(runner), ms, speed))
    assert first is not None
    told = tuple(replace(point, dominated_by=_dominating(point, points)) for point in points)
    return Frontier(machine(), MeasuredData.of(dataset, *first), rounds, told)


def _noise(runner: Runner, size: int) -> np.ndarray:
    values = np.random.default_rng(0).normal(size=(size, *runner.spec.preprocess.shape))
    return values.astype(runner.spec.preprocess.dtype)


def _cost(runner: Runner) -> Cost:
    from nformer_edge.compress.cost import cost_of
    from nformer_edge.model.backbone import Backbone

    size = runner.spec.preprocess
    return cost_of(Backbone(runner.spec.backbone), (size.height, size.width))


def _dominating(point: FrontierPoint, points: Sequence[FrontierPoint]) -> str | None:
    largest = max(point.ms)

    def dominates(other: FrontierPoint) -> bool:
        better = other.mAP > point.mAP or other.ms[largest] < point.ms[largest]
        return other.mAP >= point.mAP and other.ms[largest] <= point.ms[largest] and better

    found = [other for other in points if dominates(other)]
    return min(found, key=lambda other: other.ms[largest]).model.label if found else None
