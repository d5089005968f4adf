"""Does an engine rank as its reference does: backbone, head and end to end, each against the gates."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Protocol, runtime_checkable

import numpy as np

from nformer_edge.backends.runner import Runner
from nformer_edge.core.errors import DataError, GateError, UsageError
from nformer_edge.core.features import Features
from nformer_edge.core.machine import MachineFacts, machine
from nformer_edge.core.spec import check_at_least
from nformer_edge.core.values import Result
from nformer_edge.data.spread import evenly
from nformer_edge.gallery.embed import embed_records
from nformer_edge.gallery.protocols import relate_sets
from nformer_edge.metrics import gates
from nformer_edge.metrics.agreement import TIE, row_errors, row_tolerance
from nformer_edge.metrics.bootstrap import DRAWS
from nformer_edge.metrics.composition import thin
from nformer_edge.metrics.gates import Verdict
from nformer_edge.metrics.ranking import Pair
from nformer_edge.ops.contract import draw_landmarks
from nformer_edge.report.diagnosis import InputDifference, Layers, compare_inputs, compare_layers
from nformer_edge.report.models import (
    Data,
    MeasuredData,
    MeasuredModel,
    Source,
    calibration_note,
    open_dataset,
    open_model,
    precision_of,
)
from nformer_edge.report.part import Outputs, PartName, PartParity, PartRun, judge_part, stacked, usable
from nformer_edge.report.table import format_table, percent

#: Landmark seeds that the head is judged under, unless told otherwise: the engine's own and those after it.
LANDMARK_SEEDS = 3

#: Gallery images a person that every part is judged at; None is the whole split.
COMPOSITIONS: tuple[int | None, ...] = (None, 1)

#: What to say where the name of the blamed part does not say it.
_CAUSES = {"end_to_end": "neither part alone: small differences of the backbone, grown in the head"}


@dataclass(frozen=True)
class Parity(Result):
    """How an engine ranks against its reference. Fractions are 0 to 1.

    Args:
        machine: where it was measured.
        reference: what to agree with.
        engine: what was judged.
        data: what was ranked.
        landmark_seeds: that the head was judged under; none without a head.
        draws: of the bootstrap.
        parts: backbone and, where there is a head, head and end to end.
        input: what both make of the same image files.
        layers: of the parts that failed on the same input, or all if asked for.
        status: of the parts, the worst.
        blame: the part, or parts, that a failure comes from; null if none failed.
        notes: what limits the figures.
    """

    kind: ClassVar[str] = "parity"
    version: ClassVar[int] = 5

    machine: MachineFacts
    reference: MeasuredModel
    engine: MeasuredModel
    data: MeasuredData
    landmark_seeds: tuple[int, ...]
    draws: int
    parts: tuple[PartParity, ...]
    input: InputDifference
    layers: tuple[Layers, ...]
    status: Verdict
    blame: str | None
    notes: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether every gate did; undecided is not passed."""
        return self.status == "passed"

    @property
    def title(self) -> str:
        """Both models' labels."""
        return f"{self.engine.label} against {self.reference.label}"

    @property
    def cause(self) -> str:
        """The blamed part in words; "" if none failed."""
        return _CAUSES.get(self.blame or "", self.blame or "")

    @property
    def failures(self) -> list[str]:
        """One line for each failed gate: part, gate, measured, bound, by how much, and of which run."""
        failed = [(p, g) for p in self.parts for g in p.gates if (g.kind, g.status) == ("gate", "failed")]
        return [f"{part.title} {part.precision}, {gate.failure}" for part, gate in failed]

    @property
    def causes(self) -> list[str]:
        """What is at fault, as far as it can be told: the input, then of each compared part the first node off."""
        lines = [line for found in self.layers for line in found.lines]
        if self.input.error == 0:
            return lines
        return [f"the input itself differs, so it is the preprocessing: {'; '.join(self.input.preprocess)}", *lines]

    def __str__(self) -> str:
        body = [[p.part, p.precision, g.title, g.shown, g.shown_bound, g.status] for p in self.parts for g in p.gates]
        table = format_table(["part", "precision", "gate", "measured", "bound", "status"], body, left=3)
        blame = f", to blame: {self.blame}" if self.blame else ""
        lines = [table, f"{self.title}: {self.status}{blame}"]
        lines += [*(line for part in self.parts for line in _notes(part)), *self.notes]
        return "\n".join(lines + (self.causes if self.status == "failed" or self.layers else []))

    def require_passed(self) -> None:
        """Nothing if no gate failed (undecided is not failed).

        Raises:
            GateError: naming each failed gate, by how much, the part to blame, and what in it is at fault.
        """
        if self.status == "failed":
            told = [*self.failures, f"to blame: {self.cause}", *self.causes]
            raise GateError(f"{self.title}: {'; '.join(told)}", hint=self._hint())

    def _hint(self) -> str:
        if self.input.error != 0:
            return "Export the bundle again from this reference: its preprocessing is another."
        if any(p.precision == "fp32" for p in self.parts if p.part in (self.blame or "")):
            return "Export and build it again from this reference."
        blamed = [p for p in self.parts if p.part in (self.blame or "")]
        if not any(p.precision == "int8" for p in blamed):
            return "Build that part in a finer precision."
        budget = "--max-map-drop 0.5"
        failed = [g for p in blamed for g in p.gates if (g.gate, g.status) == ("top10_overlap", "failed")]
        if failed and failed[0].bound is not None and not math.isnan(failed[0].margin):
            # the budget is measured on fewer images: as much above the bound as this is below it
            budget = f"--min-overlap {min(math.ceil(100 * (failed[0].bound - failed[0].margin)) / 100, 0.99):g}"
        return f"Build it again with {budget}, which keeps the most sensitive nodes in float, or in a finer precision."


def _notes(part: PartParity) -> list[str]:
    """Below the table: what a gate's number alone does not say."""
    lines = []
    for gate in part.gates:
        told = gate.gate == "tensor" and gate.kind == "gate" and gate.status != "failed" and not part.float64
        if told or (gate.status == "undecided" and gate.gate != "tensor"):
            lines.append(f"{part.title}, {gate.title}: {gate.note}")
    noted = [(run, gate) for run in part.runs for gate in run.gates if gate.gate == "cosine_min" and gate.note]
    lines += [f"{part.title}, {run.title}: {gate.note}" for run, gate in noted]
    run = max(part.runs, key=lambda run: len(run.moved))
    moved = run.moved
    if moved:
        same = sum(bool(m.same_person) for m in moved)
        who = "" if moved[0].same_person is None else f", {same} of them of the same person"
        lines.append(f"{part.title}, {run.title}: another first image for {len(moved)} queries{who}")
    if len(part.runs) > 1:
        lines += [f"{part.title}, {r.title}: {r.status} ({_scored(r)})" for r in part.runs]
    return lines


def _scored(run: PartRun) -> str:
    if run.engine is None:
        return "no ranking"
    return f"mAP {percent(run.engine.mAP, 2)}, Rank-1 {percent(run.engine.rank1, 2)}"


@runtime_checkable
class _HasFloat64(Protocol):
    """A reference that can be run in double precision: a checkpoint in PyTorch."""

    def float64(self) -> _Float64: ...


@runtime_checkable
class _Tells(Protocol):
    """A reference whose gates can be set as the engine's were: a checkpoint in PyTorch."""

    def tell(self, images: float) -> None: ...


class _Float64(Runner, Protocol):
    """Neighbors of `relate` are those that float32 chooses on `like`; see `backends.torch.Float64Runner`."""

    def relate(
        self,
        features: np.ndarray,
        landmarks: np.ndarray | None = None,
        like: np.ndarray | None = None,
        swap: float = 0.0,
    ) -> np.ndarray: ...


def parity(
    reference: Source,
    engine: Source,
    data: Data,
    *,
    batch: int = 32,
    limit: int | None = None,
    draws: int = DRAWS,
    seed: int = 0,
    intra_op_threads: int | None = None,
    layout: str = "auto",
    reference_label: str | None = None,
    engine_label: str | None = None,
    landmark_seeds: Sequence[int] | None = None,
    layers: bool = False,
) -> Parity:
    """Scores an engine against its reference on the same images, preprocessing and landmarks.

    Errors of tensors in FP32 and FP16 are against a float64 run of the reference, where that is a checkpoint: the
    backbone on the same images, the head on the reference's features as float32 gave them, end to end on those of the
    float64 backbone. In each the head's neighbors are those that float32 chooses on the features at hand, the engine's
    own end to end: two nearly equal neighbors may fall either way, and the gate on reciprocal neighbors judges that. A
    row that is too far off is held to the other order of them, too (cosines nearer than `metrics.agreement.TIE`).
    Every gate is judged on the whole split and on one with one gallery image and one query a person
    (`metrics.composition.thin`), where the images have labels: a head related to strangers alone must rank alike, too.
    Reported errors (INT8), and those where the reference is a bundle or an engine, are against its float32 outputs.

    Args:
        reference: what to agree with, as a rule the checkpoint.
        engine: the engine or bundle to judge. Its precision picks the gates, part by part. Its head is scored on the
            reference's features, so that it answers for itself alone.
        data: a dataset or its folder.
        batch: images that the backbone sees at once.
        limit: only so many queries and gallery images (evenly spaced); all if None.
        draws: of the bootstrap.
        seed: of the bootstrap.
        intra_op_threads: of each backend; its own choice if None.
        layout: of the dataset's folder.
        reference_label: what the report calls it.
        engine_label: likewise.
        landmark_seeds: the head is judged under each and of each gate the worst decides; the engine's own and the two
            after it if None.
        layers: compare every part layer by layer, not only one that fails.

    Raises:
        UsageError: if one of the two has a head and the other has none, or there is no landmark seed.
    """
    if limit is not None:
        check_at_least("limit", limit, 1)
    dataset = open_dataset(data, layout, labels=False).asking()
    sets = dataset.query, dataset.gallery
    query, gallery = ([images[i] for i in evenly(limit or len(images), len(images))] for images in sets)

    def embed(runner: Runner, finite: bool = True) -> Pair:
        return embed_records(runner, query, batch, finite=finite), embed_records(runner, gallery, batch, finite=finite)

    with open_model(engine, intra_op_threads) as built:
        theirs = embed(built, finite=False)  # the gates judge a NaN
        with open_model(reference, intra_op_threads, reference=True, native=built.native) as original:
            _check_heads(built, original)
            if built.images_per_person is not None and isinstance(original, _Tells):
                original.tell(built.images_per_person)
            seeds = _landmark_seeds(built, landmark_seeds)
            shorten = built.spec.unit_features and not original.spec.unit_features

            def as_built(pair: Pair) -> Pair:
                return (_unit(pair[0]), _unit(pair[1])) if shorten else pair

            judged = _Parts(original, built, as_built(embed(original)), theirs)
            double = original.float64() if isinstance(original, _HasFloat64) else None
            if double is not None:
                judged.use(double, as_built(embed(double)) if judged.needs_backbone else None)
            parts = judged.judge(seeds, draws, seed)
            ours, its = (reference, original, reference_label), (engine, built, engine_label)
            models = MeasuredModel.of(*ours), MeasuredModel.of(*its)
            spec, seen = original.spec, compare_inputs(original.spec.preprocess, built.spec.preprocess, query)
            alike = original.spec.preprocess.pixels == built.spec.preprocess.pixels
    asked = [p for p in parts if p.part != "end_to_end" and (layers or _unexplained(p, seen))]
    pixels = [p for p in asked if p.part == "backbone" and not alike]
    compared = tuple(Layers(p.part, note="one graph takes pixels, the other normalized numbers") for p in pixels)
    compared += compare_layers(reference, engine, [p for p in asked if p not in pixels], spec, query, judged.ours)
    measured = MeasuredData(dataset.name, len(query), len(gallery))
    status = gates.worst_verdict(p.status for p in parts)
    notes = calibration_note(built, *theirs)
    return Parity(machine(), *models, measured, seeds, draws, parts, seen, compared, status, blame(parts), notes)


def _unit(features: Features) -> Features:
    rows = features.features
    return features.with_features(rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12))


class _Parts:
    """Outputs of each part, of reference and engine, for the same images."""

    def __init__(self, reference: Runner, engine: Runner, ours: Pair, theirs: Pair) -> None:
        self.reference, self.engine, self.ours, self.theirs = reference, engine, ours, theirs
        names: tuple[PartName, ...] = ("backbone", "head", "end_to_end") if engine.has_head else ("backbone",)
        self.precision = {part: precision_of(engine, part) for part in names}
        self._gated = {p for p, precision in self.precision.items() if gates.rule(precision, "tensor").kind == "gate"}
        self._double: _Float64 | None = None
        self._exact: np.ndarray | None = None

    @property
    def needs_backbone(self) -> bool:
        """Whether a gate asks for the float64 backbone; a head in FP32 behind INT8 has the float32 features."""
        return bool({"backbone", "end_to_end"} & self._gated)

    def use(self, double: _Float64, features: Pair | None) -> None:
        """Errors of tensors are from now on against this float64 run, and its backbone's features."""
        self._double, self._exact = double, None if features is None else stacked(features)

    def judge(self, seeds: Sequence[int], draws: int, seed: int) -> tuple[PartParity, ...]:
        """All parts against their gates."""
        runs = {"backbone": self._backbone, "head": self._head, "end_to_end": self._end_to_end}
        compositions = self._compositions()

        def settings(part: PartName) -> list[tuple[int | None, int | None]]:
            chosen = (None,) if part == "backbone" else seeds
            return [(landmark_seed, images) for images in compositions for landmark_seed in chosen]

        return tuple(
            judge_part(part, precision, runs[part], settings(part), draws, seed)
            for part, precision in self.precision.items()
        )

    def _compositions(self) -> tuple[int | None, ...]:
        try:
            thin(*self.ours, 1)
        except DataError:  # no labels
            return (None,)
        return COMPOSITIONS

    def _inputs(self, images: int | None) -> tuple[Pair, Pair, np.ndarray | None]:
        """What the reference's, the engine's and the float64 backbone made of a composition's images."""
        if images is None:
            return self.ours, self.theirs, self._exact
        asks, stays = thin(*self.ours, images)
        ours, theirs = ((query.take(asks), gallery.take(stays)) for query, gallery in (self.ours, self.theirs))
        rows = np.concatenate([asks, len(self.ours[0]) + stays])
        return ours, theirs, None if self._exact is None else self._exact[rows]

    def _backbone(self, _: int | None, images: int | None) -> Outputs:
        ours, theirs, exact = self._inputs(images)
        if exact is None or "backbone" not in self._gated:
            return Outputs(ours, theirs)
        return Outputs(ours, theirs, exact, row_errors(stacked(ours), exact))

    def _head(self, seed: int | None, images: int | None) -> Outputs:
        ours, _, _ = self._inputs(images)
        outputs = Outputs(relate_sets(self.reference, *ours, seed=seed), self._related(ours, seed))
        if self._double is None or "head" not in self._gated:
            return outputs
        features = stacked(ours)
        exact = self._related_exactly(features, ours, seed)
        own = row_errors(stacked(outputs.reference), exact)
        return replace(outputs, exact=self._nearer(outputs, exact, own, features, ours, seed), own=own)

    def _end_to_end(self, seed: int | None, images: int | None) -> Outputs:
        ours, theirs, features = self._inputs(images)
        outputs = Outputs(relate_sets(self.reference, *ours, seed=seed), self._related(theirs, seed))
        if features is None or "end_to_end" not in self._gated:
            return outputs
        exact = self._related_exactly(features, ours, seed)
        own = row_errors(stacked(outputs.reference), exact)
        if usable(theirs):
            exact = self._related_exactly(features, theirs, seed)
            exact = self._nearer(outputs, exact, own, features, theirs, seed)
        return replace(outputs, exact=exact, own=own)

    def _related(self, inputs: Pair, seed: int | None) -> Pair:
        """The engine's head on `inputs`; features that no head can take come out as NaN, so that the gates fail."""
        if usable(inputs):
            return relate_sets(self.engine, *inputs, seed=seed)
        query, gallery = (s.with_features(np.full_like(s.features, np.nan)) for s in inputs)
        return query, gallery

    def _nearer(
        self, outputs: Outputs, exact: np.ndarray, own: np.ndarray, features: np.ndarray, like: Pair, seed: int | None
    ) -> np.ndarray:
        """`exact`, and where the engine's row is too far from it, the nearer of both orders of equal neighbors."""
        x = stacked(outputs.engine)
        far = row_errors(x, exact)
        if not (far > row_tolerance(own)).any():
            return exact
        other = self._related_exactly(features, like, seed, TIE)
        return np.where((row_errors(x, other) < far)[:, None], other, exact)

    def _related_exactly(self, features: np.ndarray, like: Pair, seed: int | None, swap: float = 0.0) -> np.ndarray:
        assert self._double is not None, "`use` gave one"
        head = self.reference.spec.head
        assert head is not None, "the part is there"
        chosen = self.reference.landmark_seed if seed is None else seed
        landmarks = draw_landmarks(len(features), head.layers, head.landmarks, chosen)
        return self._double.relate(features, landmarks, stacked(like), swap)


def _unexplained(part: PartParity, seen: InputDifference) -> bool:
    """Whether a part failed, and not for what it was given: another input fails a backbone by itself."""
    return part.status == "failed" and (part.part != "backbone" or seen.error == 0)


def _check_heads(engine: Runner, reference: Runner) -> None:
    if reference.has_head != engine.has_head:
        got, expected = ("a head" if has else "no head" for has in (engine.has_head, reference.has_head))
        hint = "Compare an engine with the checkpoint that it was made from."
        raise UsageError(engine.name, got, f"{expected}, as the reference", hint)


def _landmark_seeds(engine: Runner, wanted: Sequence[int] | None) -> tuple[int, ...]:
    if not engine.has_head:
        return ()
    seeds = range(engine.landmark_seed, engine.landmark_seed + LANDMARK_SEEDS) if wanted is None else wanted
    if not seeds:
        raise UsageError("landmark seeds", "none", "at least one", "Leave them out for three.")
    return tuple(dict.fromkeys(seeds))


def blame(parts: Sequence[PartParity]) -> str | None:
    """Which part a failure comes from: one that fails on the reference's own inputs, else their interplay."""
    failed = [p.part for p in parts if p.status == "failed"]
    alone = [name for name in failed if name != "end_to_end"]
    return " and ".join(alone) if alone else (failed[0] if failed else None)
