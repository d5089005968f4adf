"""What low precision hands on, as values: ranges, scores, searches. Loads neither onnx nor onnxruntime."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from nformer_edge.core.artifact import read_json
from nformer_edge.core.errors import ArtifactError
from nformer_edge.core.spec import CalibrationMethod
from nformer_edge.core.values import Result
from nformer_edge.quantize.spec import BudgetSpec

#: In an INT8 engine: the ranges that were measured.
TABLE = "calibration.json"

#: In an engine that was built to a budget: the search.
BUDGET = "budget.json"

#: The largest number of FP16, and the smallest that has all its bits.
LARGEST, SMALLEST = 65504.0, 2.0**-14

#: How far what is served may go beyond what was searched: the limits are a quarter and four times of FP16's own.
MARGIN = 4.0

#: Nodes that a budget's table names.
_NODES = 8

#: Nodes kept by FP16's policy that are named in the log.
_NAMED = 5


@dataclass(frozen=True)
class Score:
    """What a backbone is worth on held-out images, against FP32 on the same images. All are fractions.

    Of images that nobody labeled all but `overlap_at_10` are null.

    Args:
        mAP: mean average precision.
        rank1: share of queries whose nearest image is of the same person.
        map_drop: mAP that FP32 has more.
        map_drop_upper: its one-sided 95 % bound, by the paired bootstrap over queries.
        overlap_at_10: overlap of the ten nearest with FP32's, the protocol's own images left out.
    """

    mAP: float
    rank1: float
    map_drop: float
    map_drop_upper: float
    overlap_at_10: float

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            unknown = math.isnan(value) and name != "overlap_at_10"  # of images that nobody labeled
            if not (unknown or (-1 if name.startswith("map_drop") else 0) <= value <= 1):
                raise ArtifactError(name, value, "a share", "Measure again.")

    @property
    def order(self) -> tuple[float, float]:
        """Greater is better: what mAP loses, to a thousandth, then overlap@10."""
        return (0.0 if math.isnan(self.map_drop) else -round(max(self.map_drop, 0.0), 3)), self.overlap_at_10


@dataclass(frozen=True)
class HeldOutFacts:
    """Images of training people that calibrated nothing.

    Args:
        identities: people.
        queries: images that were searched for.
        images: images that were searched in.
        sha256: over every image's content, identity and camera.
    """

    identities: int
    queries: int
    images: int
    sha256: str

    @property
    def whom(self) -> str:
        """Who the images show, as far as it is known."""
        return f"{self.identities:,} people" if self.identities else "people whom nobody named (no mAP)"


@dataclass(frozen=True)
class MethodChoice:
    """What the calibration method ``auto`` chose by.

    Args:
        scope: ``backbone``, or ``end_to_end`` with the head: whose scores are printed.
        held_out: whom the methods were scored on.
        scores: of each method, by scope. The worse scope decides, since parity judges both.
    """

    scope: str
    held_out: HeldOutFacts
    scores: Mapping[str, Mapping[str, Score]]


@dataclass(frozen=True)
class CalibrationFacts:
    """What INT8 was calibrated with.

    Args:
        method: how ranges follow from activations.
        seed: of the choice of images.
        forced: whether query and gallery images were accepted.
        num: images.
        sha256: over the settings and every image's content.
        auto: what the method was chosen by, or null.
        images: first `SHORT` digits of each image file's sha256; none from earlier versions and other tools.
    """

    SHORT: ClassVar[int] = 12

    method: CalibrationMethod
    seed: int
    forced: bool
    num: int
    sha256: str
    auto: MethodChoice | None = None
    images: tuple[str, ...] = ()

    def lines(self) -> list[str]:
        """The same in words."""
        lines = [f"calibrated with {self.num} images, {self.method}, sha256 {self.sha256[:12]}"]
        if self.auto is not None:
            scores = {method: found[self.auto.scope] for method, found in self.auto.scores.items()}
            held = self.auto.held_out
            told = ", ".join(
                f"{m} {s.overlap_at_10:.3f}" if math.isnan(s.mAP) else f"{m} {100 * s.mAP:.2f} ({s.overlap_at_10:.3f})"
                for m, s in scores.items()
            )
            by = f"mAP (overlap@10) of {held.identities} people held out"
            if not held.identities:
                by = f"overlap@10 of {held.images} images held out (nobody labeled them, so mAP could not be judged)"
            lines.append(f"chosen by {by}: {told}")
        return lines


@dataclass(frozen=True)
class Ranges(Result):
    """Lowest and highest value of each tensor, as `method` makes them of what was measured: `TABLE` in an engine.

    Args:
        method: how ranges follow from activations.
        table: by the tensor's name.
        backbone_sha256: of the backbone that was measured.
        calibration: what it was measured with.
    """

    kind = "calibration"
    version = 3
    sealed = True

    method: CalibrationMethod
    table: Mapping[str, tuple[float, float]]
    backbone_sha256: str = ""
    calibration: CalibrationFacts | None = None

    def __post_init__(self) -> None:
        for name, (low, high) in self.table.items():
            if not (math.isfinite(low) and math.isfinite(high)):
                raise ArtifactError(f"table[{name}]", (low, high), "two finite ends", "Calibrate again.")

    def largest(self, tensor: str) -> float:
        """The range of `tensor` when it is symmetric about 0.

        Raises:
            ArtifactError: if the tensor was not measured.
        """
        if tensor not in self.table:
            expected = "one for every tensor that is quantized"
            raise ArtifactError(f"calibration: {tensor}", "no range", expected, "Calibrate again, with this bundle.")
        return max(abs(value) for value in self.table[tensor])


def read_ranges(path: str | os.PathLike[str]) -> Ranges:
    """An engine's `TABLE`.

    Raises:
        ArtifactError: if it is something else, or was changed.
    """
    return Ranges.from_json(read_json(path, f"an engine's {TABLE}", "Calibrate again."), os.fspath(path))


@dataclass(frozen=True)
class Point:
    """A backbone with some nodes in float.

    Args:
        float_nodes: their names.
        scores: by scope.
        float_ms: FP32's latency in the same run, one image.
        latency_ratio: to FP32.
        latency_ms: one image; on FP32's median over all points, so that points can be compared.
        size_mb: of the graphs, the head's among them.
    """

    float_nodes: tuple[str, ...]
    scores: Mapping[str, Score]
    float_ms: float
    latency_ratio: float
    latency_ms: float
    size_mb: float


@dataclass(frozen=True)
class NodeCost:
    """What one node costs, or nodes in a row of one kind.

    Args:
        node: its name; the first one's.
        op: its operator.
        members: all their names.
        harm: what they are put in order by: overlap@10 lost alone, and gained left out.
        alone: with these nodes alone in INT8.
        left_out: with all nodes but these in INT8.
    """

    node: str
    op: str
    members: tuple[str, ...]
    harm: float
    alone: Score
    left_out: Score


@dataclass(frozen=True)
class BudgetSearch(Result):
    """INT8 to an accuracy budget: `BUDGET` in an engine.

    Args:
        model: its architecture and size.
        calibration: the method of the ranges.
        scope: ``backbone``, or ``end_to_end`` with the head: whose scores count.
        budget: what must hold.
        held_out: whom it was measured on.
        fp32: the FP32 model.
        nodes: the worst first.
        frontier: by how many nodes are in float.
        chosen: index of the first point that keeps the budget, or null.
        measured: how many scores and costs were measured.
        reused: how many an earlier run had measured.
        seconds: what all of them took to measure.
    """

    kind = "budget"
    version = 3
    sealed = True

    model: str
    calibration: str
    scope: str
    budget: BudgetSpec
    held_out: HeldOutFacts
    fp32: Point
    nodes: tuple[NodeCost, ...]
    frontier: tuple[Point, ...]
    chosen: int | None
    measured: int
    reused: int
    seconds: float

    def __post_init__(self) -> None:
        if self.chosen is not None and not 0 <= self.chosen < len(self.frontier):
            raise ArtifactError("chosen", self.chosen, f"0..{len(self.frontier) - 1}", "Search again.")
        unscored = [p for p in (self.fp32, *self.frontier) if self.scope not in p.scores]
        if unscored or not self.frontier:
            raise ArtifactError(
                "frontier", f"no score of the scope {self.scope!r}", "one of each point", "Search again."
            )

    @property
    def float_nodes(self) -> tuple[str, ...]:
        """The nodes of the chosen point; none where nothing was chosen."""
        return () if self.chosen is None else self.frontier[self.chosen].float_nodes

    def score(self, point: Point) -> Score:
        """The score that counts."""
        return point.scores[self.scope]

    def best(self) -> Point:
        """The point that comes nearest to the budget."""
        if self.budget.max_map_drop is not None:
            return min(self.frontier, key=lambda point: self.score(point).map_drop_upper)
        return max(self.frontier, key=lambda point: self.score(point).overlap_at_10)

    def __str__(self) -> str:
        held, count = self.held_out, self.measured + self.reused
        lines = [
            f"budget, {self.scope.replace('_', ' ')}: {self.budget}; on {held.images} images of {held.whom} held out",
            f"  {count} measurements of {self.seconds:.0f} s, {self.reused} of them known before",
            "  in float    mAP  drop (95 %)  Rank-1  overlap@10  ms/image  ratio     MB",
            self._line("all", self.fp32),
        ]
        for i, point in enumerate(self.frontier):
            lines.append(self._line(str(len(point.float_nodes)), point) + ("  <- chosen" if i == self.chosen else ""))
        lines.append("  most costly nodes        alone: overlap@10 lost, drop   in float: overlap@10 gained")
        whole = self.score(self.frontier[0]).overlap_at_10
        for row in self.nodes[:_NODES]:
            more = f" and {len(row.members) - 1} more" if len(row.members) > 1 else ""
            lost, gained = 1 - row.alone.overlap_at_10, row.left_out.overlap_at_10 - whole
            lines.append(f"  {lost:.3f}  {_points(row.alone.map_drop, 5)}  {gained:6.3f}  {row.op} {row.node}{more}")
        return "\n".join(lines)

    def _line(self, name: str, point: Point) -> str:
        score = self.score(point)
        return (
            f"  {name:>8}  {_points(score.mAP, 5)}  {_points(score.map_drop, 4)} ({_points(score.map_drop_upper, 4)})  "
            f"{_points(score.rank1, 6)}  {score.overlap_at_10:10.3f}  {point.latency_ms:8.2f}  "
            f"{point.latency_ratio:5.2f}  {point.size_mb:5.2f}"
        )


def _points(share: float, width: int) -> str:
    """Per cent, or a dash for what could not be judged."""
    return f"{'-' if math.isnan(share) else f'{100 * share:.2f}':>{width}}"


@dataclass(frozen=True)
class Reach:
    """How far the numbers of one node went, over everything that was run. All are magnitudes.

    Args:
        kind: the node's operator.
        tensors: the largest number that it reads or writes.
        sums: the largest that a partial sum inside it can have been; 0 for a node that sums nothing.
        faintest: of the rows (the first axis) that it reads or writes, and of its sums of squares, the smallest whose
            largest number is not 0; infinite where there is none.
    """

    kind: str
    tensors: float = 0.0
    sums: float = 0.0
    faintest: float = math.inf

    def trouble(self) -> str:
        """Why the node must stay FP32, in words; "" if FP16 holds it with `MARGIN` to spare."""
        if not self.tensors * MARGIN <= LARGEST:
            return f"numbers up to {self.tensors:.3g}"
        if not self.sums * MARGIN <= LARGEST:
            return f"sums up to {self.sums:.3g}"
        if not self.faintest >= SMALLEST * MARGIN:
            return f"numbers down to {self.faintest:.3g}"
        return ""


@dataclass(frozen=True)
class Searched:
    """Images that were searched for numbers beyond FP16.

    Args:
        images: how many.
        sha256: of their contents.
    """

    images: int
    sha256: str


@dataclass(frozen=True)
class Overflow:
    """How far numbers reach on real images.

    Args:
        searched: the images.
        reach: of each part, of each node.
    """

    searched: Searched
    reach: Mapping[str, Mapping[str, Reach]]

    def unfit(self, part: str) -> dict[str, str]:
        """Of the part's nodes that FP16 would not hold, why; those that the policy keeps in FP32 among them."""
        return {name: why for name, found in self.reach.get(part, {}).items() if (why := found.trouble())}


@dataclass(frozen=True)
class HalfFacts:
    """What FP16 was built by.

    Args:
        searched: images that were searched for overflow, or null.
        kept: of each part, the nodes that are FP32 beyond the policy, with the reason.
    """

    searched: Searched | None
    kept: Mapping[str, Mapping[str, str]]

    def lines(self) -> list[str]:
        """The same in words."""
        first = (
            f"FP16: overflow searched on {self.searched.images} images"
            if self.searched
            else "FP16: overflow was not searched; --calib-data DIR searches it on real images"
        )
        kept = [f"{part}: {name} stays FP32: {why}" for part, nodes in self.kept.items() for name, why in nodes.items()]
        return [first, *kept]


def half_log(part: str, overflow: Overflow | None, beyond: Mapping[str, str]) -> str:
    """For the build log: what was found in a part, and what the policy alone would have let through.

    Args:
        part: ``backbone`` or ``head``.
        overflow: what was searched.
        beyond: nodes that are FP32 beyond the policy, with the reason.
    """
    if overflow is None:
        lines = ["overflow was not searched"]
    else:
        unfit = [f"{name} ({why})" for name, why in overflow.unfit(part).items() if name not in beyond]
        lines = [f"searched {overflow.searched.images} images; {len(beyond)} nodes stay FP32 beyond the policy"]
        lines += [f"kept by policy, and FP16 would not hold: {', '.join(unfit[:_NAMED])}"] if unfit else []
    lines += [f"{name} stays FP32: {why}" for name, why in beyond.items()]
    return "".join(f"fp16: {part}: {line}\n" for line in lines)


@dataclass(frozen=True)
class LowPrecision:
    """What a build in low precision goes by, measured before any backend builds. For FP32 it is empty.

    Args:
        ranges: for INT8.
        exclude_nodes: for INT8, nodes that stay in float beside those that always do.
        reduce_range: for INT8 on a CPU, 7-bit weights.
        overflow: for FP16 and what is FP16 beside INT8, where images were given.
        budget: for INT8 to a budget, the search.
    """

    ranges: Ranges | None = None
    exclude_nodes: tuple[str, ...] = ()
    reduce_range: bool = False
    overflow: Overflow | None = None
    budget: BudgetSearch | None = None

    @property
    def calibration(self) -> CalibrationFacts | None:
        """What the ranges were measured with."""
        return None if self.ranges is None else self.ranges.calibration

    @property
    def searched(self) -> Searched | None:
        """Images that were searched for numbers beyond FP16."""
        return None if self.overflow is None else self.overflow.searched

    def save(self, folder: Path) -> None:
        """Writes `TABLE` and `BUDGET` into an engine's folder, where there are ranges and a search."""
        for name, value in ((TABLE, self.ranges), (BUDGET, self.budget)):
            if value is not None:
                value.save(folder / name)
