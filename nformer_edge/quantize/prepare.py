"""What a build in low precision goes by, found before any backend builds: ranges, nodes in float, numbers beyond FP16.

The one way from a bundle to `LowPrecision`: `build-engine`, `prepare` and the budget search all take it.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from nformer_edge.core.artifact import sha256_file
from nformer_edge.core.errors import ArtifactError, BackendError, GateError, UsageError
from nformer_edge.core.journal import Journal
from nformer_edge.core.machine import saturates_int8
from nformer_edge.core.spec import CalibrationMethod
from nformer_edge.core.values import Table, from_json, to_table
from nformer_edge.data.calibration import calibration_images, calibration_sha256
from nformer_edge.data.records import Dataset
from nformer_edge.data.summary import dataset_of
from nformer_edge.exporting.bundle import BACKBONE, Bundle
from nformer_edge.quantize.spec import AUTO, BudgetSpec, QuantizeSpec
from nformer_edge.quantize.values import (
    BUDGET,
    BudgetSearch,
    CalibrationFacts,
    LowPrecision,
    MethodChoice,
    Ranges,
    Score,
    read_ranges,
)

if TYPE_CHECKING:
    from nformer_edge.quantize.evaluator import Evaluator

Data = Dataset | str | os.PathLike[str]

#: Held-out images that choose a calibration method, unless a budget says how many.
_IMAGES = 600

#: What the choice of a precision may cost, unless a budget says otherwise: points of mAP, and the share of each image's
#: ten nearest that stays, where nobody labeled the images. About what the gates of `parity` allow.
_POINTS, _OVERLAP = 1.0, 0.95


@dataclass(frozen=True)
class CalibrationData:
    """What low precision is measured on.

    Args:
        images: the dataset that the model was trained on (its training images are used), a folder of images, or for
            INT8 the `calibration.json` of an earlier engine.
        force: accept query or gallery images.
        budget: for INT8, what it may cost in accuracy; None for no search.
        budget_data: the dataset of whose training people some are held out to measure that; `images` if None.
    """

    images: Data | None = None
    force: bool = False
    budget: BudgetSpec | None = None
    budget_data: Data | None = None

    @property
    def table(self) -> Path | None:
        """Another engine's ranges, where `images` are those."""
        is_path = isinstance(self.images, (str, os.PathLike))
        return Path(self.images) if is_path and Path(self.images).suffix == ".json" else None  # type: ignore[arg-type]


@dataclass(frozen=True)
class Judging:
    """What engines of several precisions are judged by, before one of them is taken.

    Args:
        evaluator: by held-out people.
        budget: what must hold.
        rest: what is left to calibrate with.
    """

    evaluator: Evaluator
    budget: BudgetSpec
    rest: Data | None


def judging(bundle: Bundle, spec: QuantizeSpec, data: CalibrationData) -> Judging:
    """For a choice of precision. Raises as `prepare` does for INT8 with a budget."""
    _require_int8(bundle, spec)
    if data.images is None:
        _images(None, spec, data)
    evaluator, rest = _evaluator(bundle, spec, data)
    usual = BudgetSpec(_POINTS) if evaluator.held_out.labeled else BudgetSpec(min_overlap=_OVERLAP)
    return Judging(evaluator, data.budget or usual, rest)


def prepare(
    bundle: Bundle,
    spec: QuantizeSpec,
    calib_data: CalibrationData | Data | None,
    out: Path,
    *,
    half: bool,
    judge: Judging | None = None,
) -> LowPrecision:
    """Calibrates, searches for the nodes that a budget needs in float, and for numbers that FP16 does not hold.

    What is measured on held-out people is kept in ``OUT.measured.jsonl``: an interrupted search goes on there, a
    finished one costs nothing, and neither does another budget.

    Args:
        bundle: what is built.
        spec: precision, calibration, and nodes to exclude in any case.
        calib_data: what to measure on.
        out: the engine's folder to be.
        half: whether what is not INT8 will be FP16.
        judge: what was held out already, if it was.

    Raises:
        UsageError: for INT8 without images, a budget without INT8 or without a dataset to hold people out of, nodes
            that are not there, or a backbone that is in INT8 or FP16 already.
        BackendError: without the packages that measure.
        DataError: for images that cannot be used, query and gallery images among them.
        ArtifactError: for ranges of another backbone.
        GateError: if no choice of nodes keeps within the budget; the search is in ``OUT.budget.json``.
    """
    data = calib_data if isinstance(calib_data, CalibrationData) else CalibrationData(calib_data)
    if spec.precision != "int8" and data.budget is not None:
        raise UsageError("max_map_drop", f"a budget for {spec.precision}", "int8", "Add --int8.")
    if spec.precision in ("fp32", "bf16") and data.images is not None:
        hint = "Add --int8, or leave --calib-data out."
        raise UsageError("calib_data", f"images for {spec.precision}", "int8 or fp16", hint)
    if spec.precision in ("fp32", "bf16") or (spec.precision == "fp16" and data.images is None):
        return LowPrecision()
    if spec.precision == "fp16":
        images = _images(data.images, spec, data)
        return _with_overflow(LowPrecision(), bundle, images) if half else LowPrecision()
    _require_int8(bundle, spec)
    evaluator, source, journal = None, data.images, Journal()
    if judge is not None:
        evaluator, source = judge.evaluator, judge.rest
    elif data.budget is not None or (spec.calib_method == AUTO and data.table is None):
        evaluator, source = _evaluator(bundle, spec, data)
    if evaluator is not None:
        journal = Journal(out.with_name(f"{out.name}.measured.jsonl"))
    reduced = saturates_int8() if spec.reduce_range is None else spec.reduce_range
    images = () if data.table is not None else _images(source, spec, data)
    if data.table is not None:
        ranges = _read_table(data.table, bundle)
    else:
        ranges = _measure(bundle, images, spec, data.force, evaluator, journal, reduced)
    found = LowPrecision(ranges, spec.exclude_nodes, reduced)
    if data.budget is not None:
        assert evaluator is not None, "made for every budget"
        found = _within_budget(found, bundle, data.budget, evaluator, journal, out)
    return _with_overflow(found, bundle, images) if half and images else found


def _require_int8(bundle: Bundle, spec: QuantizeSpec) -> None:
    """Raises UsageError or BackendError where INT8 cannot be built of this bundle here."""
    try:
        import onnx

        from nformer_edge.quantize.placement import require_nodes
        from nformer_edge.quantize.placement_cpu import place_for_cpu  # noqa: F401 - it needs both packages
    except ImportError as e:
        hint = "pip install 'nformer-edge[quant]'"
        raise BackendError("INT8", f"no package {e.name}", "onnx and onnxruntime", hint) from e
    if bundle.backbone_precision != "fp32":
        got = f"int8 for a backbone that is in {bundle.backbone_precision} already"
        hint = "Build without --int8: the graph keeps its types. --fp16 sets the head to FP16."
        raise UsageError("precision", got, "one in FP32", hint)
    require_nodes(onnx.load_from_string(bundle.backbone), spec.exclude_nodes)


def _images(source: Data | None, spec: QuantizeSpec, data: CalibrationData) -> tuple[str, ...]:
    if source is None:
        hint = (
            "Name the dataset that it was trained on, or a folder of your own crops, without labels: --calib-data DIR"
        )
        raise UsageError("calib_data", "none", "images to calibrate INT8 with", hint)
    return calibration_images(source, spec.calib_num, spec.seed, force=data.force)


def _evaluator(bundle: Bundle, spec: QuantizeSpec, data: CalibrationData) -> tuple[Evaluator, Data | None]:
    """An evaluator by held-out people, and what is left to calibrate with."""
    from nformer_edge.quantize.evaluator import Evaluator, hold_out

    source = data.images if data.budget_data is None else data.budget_data
    if source is None or (not isinstance(source, Dataset) and Path(source).suffix == ".json"):
        hint = "Name the dataset that it was trained on, or a folder of your own crops: --budget-data DIR"
        raise UsageError("budget_data", "no dataset", "one to hold images out of", hint)
    dataset = dataset_of(source, whole=True)
    rest, held_out = hold_out(dataset.as_training(), _IMAGES if data.budget is None else data.budget.images, spec.seed)
    if not held_out.labeled and data.budget is not None and data.budget.max_map_drop is not None:
        got, hint = "images that nobody labeled", "Ask for --min-overlap 0.95: it needs no labels."
        raise UsageError("max_map_drop", got, "labels, because mAP is about who is who", hint)
    evaluator = Evaluator(bundle, held_out)
    if data.budget is not None:
        data.budget.counts(evaluator.scopes)  # refused before minutes are spent
    same = data.images is not None and _place(data.images) == _place(source)
    return evaluator, rest if same else data.images


def _place(data: Data) -> str:
    return os.path.realpath(data.root if isinstance(data, Dataset) else data)


def _measure(
    bundle: Bundle,
    images: Sequence[str],
    spec: QuantizeSpec,
    force: bool,
    evaluator: Evaluator | None,
    journal: Journal,
    reduced: bool,
) -> Ranges:
    from nformer_edge.quantize.calibrate import METHODS, measure_ranges

    methods = METHODS if spec.calib_method == AUTO else (spec.calib_method,)
    hashed = calibration_sha256(images, {"backbone": bundle.backbone_sha256})
    tables = journal.recall(
        {"calibration": hashed, "methods": list(methods)},
        lambda: to_table(measure_ranges(bundle.backbone, images, bundle.spec.preprocess, methods)),
    )
    found = {method: from_json(Ranges, tables[method]) for method in methods}
    method, choice = methods[0], None
    if spec.calib_method == AUTO:
        assert evaluator is not None, "made for every choice"
        method, choice = choose_method(bundle, found, evaluator, journal, reduced)
    settings: Table = {"method": spec.calib_method, "seed": spec.seed, "forced": force, "num": len(images)}
    sha256 = calibration_sha256(images, settings)
    short = tuple(sha256_file(path)[: CalibrationFacts.SHORT] for path in images)
    facts = CalibrationFacts(method, spec.seed, force, len(images), sha256, choice, short)
    return replace(found[method], backbone_sha256=bundle.backbone_sha256, calibration=facts)


def choose_method(
    bundle: Bundle, found: dict[CalibrationMethod, Ranges], evaluator: Evaluator, journal: Journal, reduced: bool
) -> tuple[CalibrationMethod, MethodChoice]:
    """The method by which held-out people are found best: the least lost mAP, to a thousandth, then the greatest
    overlap@10, of the worse scope each."""
    from nformer_edge.quantize.placement_cpu import place_for_cpu
    from nformer_edge.quantize.search import Scores, recall_scores

    scores: dict[str, Scores] = {}
    scope = evaluator.scopes[-1]
    for method, ranges in found.items():
        facts: Table = {**evaluator.facts(), "ranges": to_table(ranges), "reduce_range": reduced, "score": []}

        def score(ranges: Ranges = ranges) -> dict[str, Score]:
            return evaluator.score(place_for_cpu(bundle.backbone, ranges, reduce_range=reduced).without())

        scores[method] = recall_scores(journal, facts, score)
    best = max(found, key=lambda m: tuple(min(one) for one in zip(*(s.order for s in scores[m].values()), strict=True)))
    return best, MethodChoice(scope, evaluator.held_out.facts, scores)


def _read_table(table: Path, bundle: Bundle) -> Ranges:
    ranges = read_ranges(table)
    if ranges.backbone_sha256 != bundle.backbone_sha256:
        expected = f"those of {BACKBONE}, sha256 {bundle.backbone_sha256[:12]}..."
        raise ArtifactError(str(table), "ranges of another backbone", expected, "Calibrate again: --calib-data DIR")
    return ranges


def _within_budget(
    found: LowPrecision, bundle: Bundle, budget: BudgetSpec, evaluator: Evaluator, journal: Journal, out: Path
) -> LowPrecision:
    from nformer_edge.quantize.placement import node_groups
    from nformer_edge.quantize.placement_cpu import excluded_multiplications, place_for_cpu, quantized_nodes
    from nformer_edge.quantize.search import Search, run_search

    assert found.ranges is not None, "measured before"
    plain = replace(found.ranges, backbone_sha256="", calibration=None)
    placement = place_for_cpu(bundle.backbone, plain, reduce_range=found.reduce_range)
    nodes = [n for n in quantized_nodes(placement.plain) if n not in found.exclude_nodes]
    facts: Table = {**evaluator.facts(), "ranges": to_table(plain), "reduce_range": found.reduce_range}
    groups = node_groups(placement.plain, nodes)
    size = bundle.spec.preprocess
    search = run_search(
        Search(placement, groups, evaluator, journal, facts, found.exclude_nodes),
        budget,
        excluded_multiplications(placement.plain, nodes) // 2,
        model=f"{bundle.spec.backbone.arch}_{size.height}x{size.width}",
        calibration=plain.method,
    )
    if search.chosen is None:
        kept = out.with_name(f"{out.name}.{BUDGET}")
        search.save(kept)
        raise _infeasible(search, kept)
    return replace(found, exclude_nodes=search.float_nodes, budget=search)


def _infeasible(search: BudgetSearch, kept: Path) -> GateError:
    best = search.best()
    score = search.score(best)
    lost = ""
    if not math.isnan(score.map_drop):
        lost = (
            f"{100 * score.map_drop:.2f} points lost at best ({100 * score.map_drop_upper:.2f} with 95 % confidence), "
        )
    got = f"{lost}overlap@10 {score.overlap_at_10:.3f} at best, with {len(best.float_nodes)} nodes in float"
    hint = f"Allow more, measure with more images (--budget-images), or build FP16 or FP32. The search is in {kept}."
    return GateError("budget", got, search.budget, hint)


def _with_overflow(found: LowPrecision, bundle: Bundle, images: Sequence[str]) -> LowPrecision:
    from nformer_edge.quantize.overflow import search_overflow

    return replace(found, overflow=search_overflow(bundle, images))
