"""What an INT8 build decides before its backend builds: the ranges, and which nodes stay in float."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nformer_edge.core.artifact import atomic_write_json
from nformer_edge.core.errors import GateError, UsageError
from nformer_edge.core.journal import Journal
from nformer_edge.core.machine import saturates_int8
from nformer_edge.data.readers import read_dataset
from nformer_edge.data.records import Dataset
from nformer_edge.exporting.bundle import BACKBONE, read_graph
from nformer_edge.quantize.calibrate import AUTO, Calibration, choose_calibration, require_packages
from nformer_edge.quantize.held_out import HeldOut, hold_out
from nformer_edge.quantize.score import Judge
from nformer_edge.quantize.search import BudgetSpec, Search, run_search
from nformer_edge.quantize.spec import EngineSpec, OpenBundle

Data = Dataset | str | os.PathLike[str]

#: In an engine that was built to a budget: the search, as JSON.
BUDGET = "budget.json"

#: Held-out images that choose a calibration method, unless a budget says how many.
_IMAGES = 600


@dataclass(frozen=True)
class Decisions:
    """What the backend builds by. `budget` is JSON of kind ``budget``, where one was asked for."""

    spec: EngineSpec
    calibration: Calibration
    budget: dict[str, Any] | None = None


def decide(
    bundle: OpenBundle,
    out: Path,
    spec: EngineSpec,
    calib_data: Data | None,
    *,
    budget: BudgetSpec | None = None,
    budget_data: Data | None = None,
    force: bool = False,
) -> Decisions:
    """Calibrates, and searches for the nodes that a budget needs in float. `spec` comes back with these excluded.

    What is measured on held-out people is kept in ``OUT.measured.jsonl``: an interrupted search goes on there, a
    finished one costs nothing, and neither does another budget.

    Args:
        bundle: verified.
        out: the engine's folder to be.
        spec: method, number, seed, nodes to exclude in any case.
        calib_data: as for `choose_calibration`.
        budget: what INT8 may cost; None for no search.
        budget_data: the dataset of whose training people some are held out; `calib_data` if None.
        force: accept query or gallery images for calibration.

    Raises:
        UsageError: without a dataset to hold people out of, or for nodes that are not there.
        DataError: for images that cannot be used.
        GateError: if no choice of nodes keeps within the budget; the search is in ``OUT.budget.json``.
    """
    require_packages()
    _require_nodes(bundle, spec)
    table = isinstance(calib_data, (str, os.PathLike)) and Path(calib_data).suffix == ".json"
    if budget is None and (spec.calib_method != AUTO or table):
        return Decisions(spec, choose_calibration(calib_data, spec, force=force))
    images = _IMAGES if budget is None else budget.images
    rest, held_out = _held_out(calib_data, budget_data, images, spec.seed)
    calibration = choose_calibration(calib_data if rest is None else rest, spec, force=force)
    judge = Judge(bundle, held_out)
    if budget is not None:
        budget.judged_stage(judge.stages)  # refused before minutes are spent
    calibration.judge, calibration.reduce_range = judge, weights_have_7_bits(spec)
    calibration.journal = Journal(out.with_name(f"{out.name}.measured.jsonl"))
    if budget is None:
        return Decisions(spec, calibration)
    found = _search(bundle, spec, calibration, budget)
    if found["chosen"] is None:
        kept = out.with_name(f"{out.name}.{BUDGET}")
        atomic_write_json(kept, found)
        raise _infeasible(found, budget, kept)
    chosen = found["frontier"][found["chosen"]]["float_nodes"]
    return Decisions(replace(spec, exclude_nodes=tuple(chosen)), calibration, found)


def weights_have_7_bits(spec: EngineSpec) -> bool:
    """Whether the CPU's INT8 weights lose a bit: as the spec says, or as this machine's CPU needs."""
    return saturates_int8() if spec.reduce_range is None else spec.reduce_range


def _require_nodes(bundle: OpenBundle, spec: EngineSpec) -> None:
    if spec.exclude_nodes:
        import onnx

        from nformer_edge.quantize.placement import require_nodes

        model = onnx.load_from_string(read_graph(bundle.folder, bundle.manifest, BACKBONE))
        require_nodes(model, spec.exclude_nodes)


def _held_out(
    calib_data: Data | None, budget_data: Data | None, images: int, seed: int
) -> tuple[Dataset | None, HeldOut]:
    """The dataset without the people held out, None where calibration does not come from it, and these people."""
    source = calib_data if budget_data is None else budget_data
    if source is None or (not isinstance(source, Dataset) and Path(source).suffix == ".json"):
        raise UsageError(
            "budget_data",
            "no dataset",
            "one to hold training people out of",
            "Name the dataset that the model was trained on: --budget-data DIR",
        )
    dataset = source if isinstance(source, Dataset) else read_dataset(source, whole=True)
    rest, held_out = hold_out(dataset.as_training(), images, seed)
    return (rest if calib_data is not None and _place(calib_data) == _place(source) else None), held_out


def _place(data: Data) -> str:
    return os.path.realpath(data.root if isinstance(data, Dataset) else data)


def _search(bundle: OpenBundle, spec: EngineSpec, calibration: Calibration, budget: BudgetSpec) -> dict[str, Any]:
    from nformer_edge.quantize.place_cpu import excluded_products, place_for_cpu, quantized_nodes
    from nformer_edge.quantize.placement import node_groups

    ranges, _ = calibration.measure(bundle)
    judge, reduced = calibration.judge, weights_have_7_bits(spec)
    assert judge is not None, "decide gave one"
    placement = place_for_cpu(bundle.folder / BACKBONE, ranges, reduce_range=reduced)
    nodes = [n for n in quantized_nodes(placement.plain) if n not in spec.exclude_nodes]
    facts = {**judge.facts(), "ranges": ranges.to_json(), "reduce_range": reduced}
    search = Search(
        placement, node_groups(placement.plain, nodes), judge, calibration.journal, facts, spec.exclude_nodes
    )
    limit = excluded_products(placement.plain, nodes) // 2
    model = f"{bundle.spec.backbone.arch}_{bundle.spec.preprocess.height}x{bundle.spec.preprocess.width}"
    return {"model": model, "calibration": ranges.method, **run_search(search, budget, limit)}


def _infeasible(found: dict[str, Any], budget: BudgetSpec, kept: Path) -> GateError:
    by = "map_drop_upper" if budget.max_map_drop is not None else "overlap_at_10"
    best = sorted(found["frontier"], key=lambda point: point[by])[0 if budget.max_map_drop is not None else -1]
    return GateError(
        "budget",
        f"{100 * best['map_drop']:.2f} points lost at best ({100 * best['map_drop_upper']:.2f} with 95 % "
        f"confidence), {best['overlap_at_10']:.3f} of the neighbors kept, with {len(best['float_nodes'])} nodes in "
        "float",
        budget,
        f"Allow more, judge by more images (--budget-images), or build FP16 or FP32. The search is in {kept}.",
    )
