"""Does an engine rank as its reference does: backbone, head and end to end, each against the gates.

JSON of a result (numbers that could not be computed are null)::

    {"kind": "parity", "version": 1, "machine": {...}, "reference": {model}, "engine": {model},
     "data": {"name", "query", "gallery"}, "landmark_seed": 0, "draws": 10000,
     "stages": [{"stage": "backbone" | "head" | "end_to_end", "precision": "fp32" | "fp16" | "int8",
                 "status": "passed" | "failed" | "undecided", "seconds",
                 "scores": {"reference": {"mAP", "rank1", "queries"}, "engine": {...} or null},
                 "gates": [{"gate", "title", "kind", "status", "measured", "bound", "margin", "lower", "upper",
                            "note"}]}],
     "status": "passed" | "failed" | "undecided", "passed": true only for "passed",
     "blame": "backbone" | "head" | "backbone and head" | "end_to_end" | null}
"""

from __future__ import annotations

import dataclasses
import math
import os
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from tqdm import tqdm

from nformer_edge.core.errors import GateError, UsageError
from nformer_edge.core.features import FeatureSet
from nformer_edge.core.spec import Precision
from nformer_edge.core.terminal import PROGRESS
from nformer_edge.data.batches import iter_batches
from nformer_edge.data.records import ImageRecord
from nformer_edge.evaluate import agreement, gates
from nformer_edge.evaluate.bootstrap import DRAWS, paired_ratio
from nformer_edge.evaluate.ranking import RankingResult, evaluate
from nformer_edge.measure.machine import machine
from nformer_edge.measure.models import Data, Opener, describe_model, open_dataset, open_model, stage_precision
from nformer_edge.runtime.embed import embed_records, relate_sets
from nformer_edge.runtime.runner import Runner

VERSION = 1

#: What to say where the name of the blamed stage does not say it.
CAUSES = {"end_to_end": "neither stage alone: small differences of the backbone, grown in the head"}

Pair = tuple[FeatureSet, FeatureSet]


def parity(
    reference_path: str | os.PathLike[str], engine_path: str | os.PathLike[str], data: Data, *, batch: int = 32,
    limit: int | None = None, draws: int = DRAWS, seed: int = 0, threads: int | None = None, layout: str = "auto",
    reference_label: str | None = None, engine_label: str | None = None, opener: Opener | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Scores an engine against its reference on the same images, preprocessing and landmarks.

    The head is scored on the reference's features, so that it answers for itself alone.

    Args:
        reference_path: what to agree with, as a rule the checkpoint.
        engine_path: the engine or bundle to judge. Its precision picks the gates, stage by stage.
        data: a dataset or its folder.
        limit: only so many queries and gallery images (evenly spaced); all if None.
        draws: of the bootstrap.
        seed: of the bootstrap.

    Returns:
        the JSON that this module's docstring describes; `require_passed` turns a failure into an error.

    Raises:
        UsageError: if one of the two has a head and the other has none.
    """
    dataset = open_dataset(data, layout)
    records = [_thin(dataset.split(s), limit) for s in ("query", "gallery")]
    with open_model(engine_path, threads, opener) as engine:
        theirs = _embed(engine, records[0], batch), _embed(engine, records[1], batch)
        with open_model(reference_path, threads, opener, reference=True, native=engine.native) as reference:
            if reference.has_head != engine.has_head:
                raise UsageError(
                    str(engine_path), got="a head" if engine.has_head else "no head",
                    expected="a head" if reference.has_head else "no head, as the reference",
                    mend="Compare an engine with the checkpoint that it was made from.",
                )  # fmt: skip
            ours = embed_records(reference, records[0], batch=batch), embed_records(reference, records[1], batch=batch)
            stages = [judge_stage("backbone", stage_precision(engine, "backbone"), ours, theirs, draws, seed)]
            if engine.has_head:
                related = relate_sets(reference, *ours, seed=engine.landmark_seed)
                for stage, inputs in (("head", ours), ("end_to_end", theirs)):
                    found = _related(engine, inputs)
                    stages.append(judge_stage(stage, stage_precision(engine, stage), related, found, draws, seed))
            models = {
                "reference": describe_model(reference_path, reference, reference_label),
                "engine": describe_model(engine_path, engine, engine_label),
            }
        landmark_seed = engine.landmark_seed
    status = _worst([s["status"] for s in stages])
    return {
        "kind": "parity",
        "version": VERSION,
        "machine": machine(),
        **models,
        "data": {"name": dataset.name, "query": len(ours[0]), "gallery": len(ours[1])},
        "landmark_seed": landmark_seed,
        "draws": draws,
        "stages": stages,
        "status": status,
        "passed": status == "passed",
        "blame": blame(stages),
    }


def _thin(records: tuple[Any, ...], limit: int | None) -> tuple[Any, ...]:
    if limit is None or limit >= len(records):
        return records
    if limit < 1:
        raise UsageError("limit", got=limit, expected="at least 1", mend="Raise it or leave it out.")
    return tuple(records[i * len(records) // limit] for i in range(limit))


def _embed(engine: Runner, records: Sequence[ImageRecord], batch: int) -> FeatureSet:
    """As `embed_records`, but a NaN goes through: here it is for the gates to judge."""
    features = np.empty((len(records), engine.spec.backbone.features), np.float32)
    start = 0
    with tqdm(total=len(records), desc="embed (engine)", unit="image", **PROGRESS) as bar:
        for images in iter_batches([r.path for r in records], engine.spec.preprocess, batch):
            features[start : start + len(images)] = engine.embed(images)
            start += len(images)
            bar.update(len(images))
    pids, camids = (np.array([getattr(r, name) for r in records], np.int64) for name in ("pid", "camid"))
    return FeatureSet(features, pids, camids, tuple(r.path for r in records))


def _usable(pair: Pair) -> bool:
    return all(bool(np.isfinite(s.features).all() and s.features.any(axis=1).all()) for s in pair)


def _related(engine: Runner, inputs: Pair) -> Pair:
    """The engine's head on `inputs`; features that no head can take come out as NaN, so that the gates fail."""
    if _usable(inputs):
        return relate_sets(engine, *inputs, seed=engine.landmark_seed)
    query, gallery = (s.with_features(np.full_like(s.features, np.nan)) for s in inputs)
    return query, gallery


def judge_stage(
    stage: str, precision: Precision, reference: Pair, engine: Pair, draws: int = DRAWS, seed: int = 0
) -> dict[str, Any]:
    """One stage's outputs for the same images against the gates of `precision`.

    Reciprocal neighbours are a gate of the backbone alone: its features choose them.
    """
    start = time.perf_counter()
    tolerance = gates.TOLERANCES[precision]
    x, ref = (np.concatenate([s.features for s in pair]) for pair in (engine, reference))
    error = agreement.tensor_error(x, ref, tolerance.atol, tolerance.rtol)
    note = f"largest difference {error.max_abs:.3g}, atol {tolerance.atol:g}, rtol {tolerance.rtol:g}"
    if error.non_finite:
        note = f"{error.non_finite} numbers are NaN or infinite"
    cosines = agreement.cosines(x, ref)
    measured = {"tensor": error.worst, "cosine_min": float(cosines.min()), "cosine_mean": float(cosines.mean())}
    wanted = [n for n in gates.TITLES if n != "reciprocal_jaccard" or stage == "backbone"]
    ours, theirs = evaluate(*reference), None
    ratios = {}
    if _usable(engine):
        theirs = evaluate(*engine)
        first, overlap = agreement.rank_agreement(*reference, engine[0].features, engine[1].features)
        measured |= {"rank1_agreement": first, "top10_overlap": overlap}
        if stage == "backbone":
            measured["reciprocal_jaccard"] = agreement.reciprocal_jaccard(x, ref)
        ratios = _ratios(ours, theirs, draws, seed)
    results = []
    for name in wanted:
        rule = gates.rule(precision, name)
        if name in ratios:
            results.append(gates.judge_ratio(rule, ratios[name]))
        else:
            results.append(gates.judge(rule, measured.get(name, math.nan), note if name == "tensor" else ""))
    return {
        "stage": stage,
        "precision": precision,
        "status": gates.verdict(results),
        "seconds": time.perf_counter() - start,
        "scores": {"reference": _brief(ours), "engine": _brief(theirs) if theirs else None},
        "gates": [_plain(r) for r in results],
    }


def _ratios(ours: RankingResult, theirs: RankingResult, draws: int, seed: int) -> dict[str, Any]:
    valid = ours.valid  # labels alone decide it: the same in both
    return {
        "mAP_kept": paired_ratio(theirs.ap[valid], ours.ap[valid], draws, seed),
        "rank1_kept": paired_ratio(
            (theirs.first_hit[valid] == 1).astype(float), (ours.first_hit[valid] == 1).astype(float), draws, seed
        ),
    }


def _brief(result: RankingResult) -> dict[str, Any]:
    return {"mAP": result.mAP, "rank1": result.rank(1), "queries": int(result.valid.sum())}


def _plain(result: gates.GateResult) -> dict[str, Any]:
    """A gate's result as JSON: NaN becomes null."""
    data = dataclasses.asdict(result) | {"title": gates.TITLES[result.gate]}
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in data.items()}


def _worst(statuses: list[str]) -> str:
    return next((s for s in ("failed", "undecided") if s in statuses), "passed")


def blame(stages: list[dict[str, Any]]) -> str | None:
    """Which stage a failure comes from: one that fails on the reference's own inputs, else their interplay."""
    failed = [s["stage"] for s in stages if s["status"] == "failed"]
    alone = [s for s in failed if s != "end_to_end"]
    return " and ".join(alone) if alone else (failed[0] if failed else None)


def describe_failures(result: dict[str, Any]) -> list[str]:
    """One line for each failed gate: stage, gate, measured, bound, by how much."""
    lines = []
    for stage in result["stages"]:
        for gate in stage["gates"]:
            if gate["kind"] == "gate" and gate["status"] == "failed":
                measured = "not a number" if gate["measured"] is None else f"{gate['measured']:.6g}"
                edge = f" (upper bound {gate['upper']:.6g})" if gate["upper"] is not None else ""
                miss = "" if gate["margin"] is None else f", missed by {abs(gate['margin']):.3g}"
                lines.append(
                    f"{stage['stage'].replace('_', ' ')} {stage['precision']}, {gate['title']}: "
                    f"{measured}{edge} against {gate['bound']:g}{miss}"
                )
    return lines


def require_passed(result: dict[str, Any]) -> None:
    """Nothing if no gate failed (undecided is not failed).

    Raises:
        GateError: naming each failed gate, by how much, and the stage to blame.
    """
    if result["status"] != "failed":
        return
    raise GateError(
        f"{result['engine']['label']} against {result['reference']['label']}: "
        + "; ".join(describe_failures(result))
        + f"; to blame: {CAUSES.get(result['blame'], result['blame'])}",
        mend="Build that stage in a finer precision, or calibrate it on more images.",
    )
