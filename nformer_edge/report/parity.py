"""Does an engine rank as its reference does: backbone, head and end to end, each against the gates.

The head and end to end are judged under several landmark seeds; of each gate the worst of them decides.

JSON of a result (fractions 0 to 1; numbers that could not be computed are null)::

    {"kind": "parity", "version": 2, "machine": {...}, "reference": {model}, "engine": {model},
     "data": {"name", "query", "gallery"}, "landmark_seeds": [0, 1, 2] ([] without a head), "draws": 10000,
     "stages": [{"stage": "backbone" | "head" | "end_to_end", "precision": "fp32" | "fp16" | "int8",
                 "status": "passed" | "failed" | "undecided", "seconds",
                 "gates": [{"gate", "title", "kind", "status", "measured", "bound", "margin", "lower", "upper",
                            "note", "landmark_seed"}]  (of each gate the worst run),
                 "cosines": {"edges": [n + 1], "counts": [n], "not_finite"}  (to the reference, over all runs),
                 "runs": [{"landmark_seed": 0 or null, "status", "gates": [as above],
                           "scores": {"reference": {"mAP", "rank1", "queries"}, "engine": {...} or null},
                           "differences": {"mAP": {"value", "lower", "upper"}, "rank1": {...}} or null}]}],
     "input": {"images", "error" (L2 norm of the difference over that of the reference's; null: another size),
               "preprocess": ["channels: BGR, the reference RGB", ...]},
     "layers": [{"stage", "samples", "compared", "tensors", "outside", "note",
                 "nodes": [{"node", "op", "tensor", "error", "band", "sqnr_db", "cosine", "inside"}],
                 "first": null or {the first node out, "own_error", "inputs": [{"tensor", "inside"}],
                                   "inputs_inside"}}],
     "status": "passed" | "failed" | "undecided", "passed": true only for "passed",
     "blame": "backbone" | "head" | "backbone and head" | "end_to_end" | null}

Differences are the engine's less the reference's, with two-sided 95 % bounds by the paired bootstrap. ``layers`` has
the stages that failed on the same input, or all if asked for; what its numbers mean stands in `report.layers`. Where a
stage's output agrees as FP32's should there is no ``first``, whatever is ``outside`` in between.
``note`` says why a stage could not be compared so.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from nformer_edge.backends.runner import Runner
from nformer_edge.core.errors import UsageError
from nformer_edge.core.machine import machine
from nformer_edge.core.values import to_json
from nformer_edge.gallery.embed import embed_records
from nformer_edge.gallery.protocols import relate_sets
from nformer_edge.metrics.bootstrap import DRAWS
from nformer_edge.report.diagnosis import compare_inputs, compare_layers
from nformer_edge.report.models import Data, Opener, describe_model, evenly, open_dataset, open_model, part_precision
from nformer_edge.report.part import Pair, judge_stage, usable

VERSION = 2

#: Landmark seeds that the head is judged under, unless told otherwise: the engine's own and those after it.
LANDMARK_SEEDS = 3


def parity(
    reference_path: str | os.PathLike[str],
    engine_path: str | os.PathLike[str],
    data: Data,
    *,
    batch: int = 32,
    limit: int | None = None,
    draws: int = DRAWS,
    seed: int = 0,
    threads: int | None = None,
    layout: str = "auto",
    reference_label: str | None = None,
    engine_label: str | None = None,
    opener: Opener | None = None,
    landmark_seeds: Sequence[int] | None = None,
    layers: bool = False,
) -> dict[str, Any]:
    """Scores an engine against its reference on the same images, preprocessing and landmarks.

    The head is scored on the reference's features, so that it answers for itself alone.

    Args:
        reference_path: what to agree with, as a rule the checkpoint.
        engine_path: the engine or bundle to judge. Its precision picks the gates, stage by stage.
        data: a dataset or its folder.
        limit: only so many queries and gallery images (evenly spaced); all if None.
        draws: of the bootstrap.
        seed: of the bootstrap.
        landmark_seeds: the head is judged under each; the engine's own and the two after it if None.
        layers: compare every stage layer by layer, not only one that fails.

    Returns:
        the JSON that this module's docstring describes; `require_passed` turns a failure into an error.

    Raises:
        UsageError: if one of the two has a head and the other has none, or there is no landmark seed.
    """
    dataset = open_dataset(data, layout)
    records = [_thin(dataset.split(s), limit) for s in ("query", "gallery")]
    with open_model(engine_path, threads, opener) as engine:
        query, gallery = (embed_records(engine, r, batch, finite=False) for r in records)  # the gates judge a NaN
        theirs = query, gallery
        with open_model(reference_path, threads, opener, reference=True, native=engine.native) as reference:
            _check_heads(str(engine_path), engine, reference)
            ours = embed_records(reference, records[0], batch=batch), embed_records(reference, records[1], batch=batch)
            seeds = _landmark_seeds(engine, landmark_seeds)
            stages = _stages(reference, engine, ours, theirs, seeds, draws, seed)
            models = {
                "reference": to_json(describe_model(reference_path, reference, reference_label)),
                "engine": to_json(describe_model(engine_path, engine, engine_label)),
            }
            specs = reference.spec, engine.spec
    status = _worst([s["status"] for s in stages])
    seen = compare_inputs(specs[0].preprocess, specs[1].preprocess, records[0])
    asked = [s for s in stages if s["stage"] != "end_to_end" and (layers or _unexplained(s, seen))]
    return {
        "kind": "parity",
        "version": VERSION,
        "machine": to_json(machine()),
        **models,
        "data": {"name": dataset.name, "query": len(ours[0]), "gallery": len(ours[1])},
        "landmark_seeds": list(seeds),
        "draws": draws,
        "stages": stages,
        "input": seen,
        "layers": compare_layers(reference_path, engine_path, asked, specs[0], records[0], ours),
        "status": status,
        "passed": status == "passed",
        "blame": blame(stages),
    }


def _unexplained(stage: dict[str, Any], seen: dict[str, Any]) -> bool:
    """Whether a stage failed, and not for what it was given: another input fails a backbone by itself."""
    return stage["status"] == "failed" and (stage["stage"] != "backbone" or seen["error"] == 0)


def _check_heads(where: str, engine: Runner, reference: Runner) -> None:
    if reference.has_head != engine.has_head:
        raise UsageError(
            where,
            "a head" if engine.has_head else "no head",
            "a head" if reference.has_head else "no head, as the reference",
            "Compare an engine with the checkpoint that it was made from.",
        )


def _landmark_seeds(engine: Runner, wanted: Sequence[int] | None) -> tuple[int, ...]:
    if not engine.has_head:
        return ()
    seeds = range(engine.landmark_seed, engine.landmark_seed + LANDMARK_SEEDS) if wanted is None else wanted
    if not seeds:
        raise UsageError("landmark seeds", "none", "at least one", "Leave them out for three.")
    return tuple(dict.fromkeys(seeds))


def _stages(
    reference: Runner, engine: Runner, ours: Pair, theirs: Pair, seeds: tuple[int, ...], draws: int, seed: int
) -> list[dict[str, Any]]:
    """Backbone, and where there is a head, the head on the reference's features and the two together."""

    def features(_: int | None) -> tuple[Pair, Pair]:
        return ours, theirs

    def related_from(inputs: Pair) -> Callable[[int | None], tuple[Pair, Pair]]:
        return lambda chosen: (relate_sets(reference, *ours, seed=chosen), _related(engine, inputs, chosen))

    stages = [judge_stage("backbone", part_precision(engine, "backbone"), features, draws=draws, seed=seed)]
    if engine.has_head:
        for stage, inputs in (("head", ours), ("end_to_end", theirs)):
            precision = part_precision(engine, stage)
            stages.append(judge_stage(stage, precision, related_from(inputs), seeds, draws, seed))
    return stages


def _thin(records: tuple[Any, ...], limit: int | None) -> tuple[Any, ...]:
    if limit is None:
        return records
    if limit < 1:
        raise UsageError("limit", limit, "at least 1", "Raise it or leave it out.")
    return tuple(records[i] for i in evenly(limit, len(records)))


def _related(engine: Runner, inputs: Pair, seed: int | None) -> Pair:
    """The engine's head on `inputs`; features that no head can take come out as NaN, so that the gates fail."""
    if usable(inputs):
        return relate_sets(engine, *inputs, seed=seed)
    query, gallery = (s.with_features(np.full_like(s.features, np.nan)) for s in inputs)
    return query, gallery


def _worst(statuses: list[str]) -> str:
    return next((s for s in ("failed", "undecided") if s in statuses), "passed")


def blame(stages: list[dict[str, Any]]) -> str | None:
    """Which stage a failure comes from: one that fails on the reference's own inputs, else their interplay."""
    failed = [s["stage"] for s in stages if s["status"] == "failed"]
    alone = [s for s in failed if s != "end_to_end"]
    return " and ".join(alone) if alone else (failed[0] if failed else None)
