"""One stage of an engine against the gates of its precision: the backbone once, the head under each landmark seed."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from nformer_edge.core.features import Features
from nformer_edge.core.spec import Precision
from nformer_edge.metrics import agreement, gates
from nformer_edge.metrics.bootstrap import DRAWS, Ratio, paired_difference, paired_ratio
from nformer_edge.metrics.ranking import RankingResult, evaluate

#: Query and gallery.
Pair = tuple[Features, Features]


def usable(pair: Pair) -> bool:
    """Whether these features can be ranked: finite, and no row all zeros."""
    return all(bool(np.isfinite(s.features).all() and s.features.any(axis=1).all()) for s in pair)


@dataclasses.dataclass(frozen=True)
class Judged:
    """What one run of a stage came to: the gates, and its part of the result's JSON."""

    gates: tuple[gates.GateResult, ...]
    histogram: np.ndarray
    not_finite: int
    plain: dict[str, Any]


def judge_run(
    stage: str,
    precision: Precision,
    reference: Pair,
    engine: Pair,
    draws: int = DRAWS,
    seed: int = 0,
    landmark_seed: int | None = None,
) -> Judged:
    """One run's outputs for the same images against the gates of `precision`.

    Reciprocal neighbors are a gate of the backbone alone: its features choose them.
    """
    tolerance = gates.TOLERANCES[precision]
    x, ref = (np.concatenate([s.features for s in pair]) for pair in (engine, reference))
    error = agreement.tensor_error(x, ref, tolerance.atol, tolerance.rtol)
    note = f"largest difference {error.max_abs:.3g}, atol {tolerance.atol:g}, rtol {tolerance.rtol:g}"
    if error.non_finite:
        note = f"{error.non_finite} numbers are NaN or infinite"
    cosines = agreement.cosines(x, ref)
    measured = {"tensor": error.worst, "cosine_min": float(cosines.min()), "cosine_mean": float(cosines.mean())}
    ours, theirs = evaluate(*reference), None
    ratios: dict[str, Ratio] = {}
    differences: dict[str, Any] | None = None
    if usable(engine):
        theirs = evaluate(*engine)
        first, overlap = agreement.rank_agreement(*reference, engine[0].features, engine[1].features)
        measured |= {"rank1_agreement": first, "top10_overlap": overlap}
        if stage == "backbone":
            measured["reciprocal_jaccard"] = agreement.reciprocal_jaccard(x, ref)
        ratios, differences = _kept(ours, theirs, draws, seed)
    results = tuple(_results(stage, precision, measured, ratios, note))
    histogram, not_finite = agreement.cosine_histogram(cosines)
    plain = {
        "landmark_seed": landmark_seed,
        "status": gates.verdict(results),
        "scores": {"reference": _brief(ours), "engine": _brief(theirs) if theirs else None},
        "differences": differences,
        "gates": [_plain(r, landmark_seed) for r in results],
    }
    return Judged(results, histogram, not_finite, plain)


def _results(
    stage: str, precision: Precision, measured: dict[str, float], ratios: dict[str, Ratio], note: str
) -> list[gates.GateResult]:
    results = []
    for name in gates.TITLES:
        rule = gates.rule(precision, name)
        if name in ratios:
            results.append(gates.judge_ratio(rule, ratios[name]))
        elif name != "reciprocal_jaccard" or stage == "backbone":
            results.append(gates.judge(rule, measured.get(name, math.nan), note if name == "tensor" else ""))
    return results


def judge_stage(
    stage: str,
    precision: Precision,
    run: Callable[[int | None], tuple[Pair, Pair]],
    landmark_seeds: Sequence[int | None] = (None,),
    draws: int = DRAWS,
    seed: int = 0,
) -> dict[str, Any]:
    """A stage under every landmark seed; of each gate the worst run decides.

    Args:
        run: reference's and engine's outputs under a landmark seed.
        landmark_seeds: None alone for a stage without landmarks.

    Returns:
        A stage's part of the result's JSON, see `report.parity`.
    """
    start = time.perf_counter()
    judged = [judge_run(stage, precision, *run(chosen), draws, seed, chosen) for chosen in landmark_seeds]
    worst = []
    for results in zip(*(j.gates for j in judged), strict=True):
        i = gates.worst(results)
        worst.append((results[i], landmark_seeds[i]))
    return {
        "stage": stage,
        "precision": precision,
        "status": gates.verdict([result for result, _ in worst]),
        "seconds": time.perf_counter() - start,
        "gates": [_plain(result, chosen) for result, chosen in worst],
        "cosines": {
            "edges": agreement.COSINE_EDGES.tolist(),
            "counts": sum(j.histogram for j in judged).tolist(),  # type: ignore[union-attr]
            "not_finite": sum(j.not_finite for j in judged),
        },
        "runs": [j.plain for j in judged],
    }


def _kept(ours: RankingResult, theirs: RankingResult, draws: int, seed: int) -> tuple[dict[str, Ratio], dict[str, Any]]:
    """The ratios that the gates judge, and the same comparison as differences, fractions with 95 % intervals."""
    valid = ours.valid  # labels alone decide it: the same in both
    found = {"mAP": (theirs.ap[valid], ours.ap[valid]), "rank1": (theirs.hits(1)[valid], ours.hits(1)[valid])}
    ratios = {f"{name}_kept": paired_ratio(*pair, draws, seed) for name, pair in found.items()}
    return ratios, {n: dataclasses.asdict(paired_difference(*pair, draws, seed)) for n, pair in found.items()}


def _brief(result: RankingResult) -> dict[str, Any]:
    return {"mAP": result.mAP, "rank1": result.rank(1), "queries": int(result.valid.sum())}


def _plain(result: gates.GateResult, landmark_seed: int | None) -> dict[str, Any]:
    """A gate's result as JSON: NaN becomes null."""
    data = dataclasses.asdict(result) | {"title": gates.TITLES[result.gate], "landmark_seed": landmark_seed}
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in data.items()}
