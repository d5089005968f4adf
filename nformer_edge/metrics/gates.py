"""The parity gates as data, and what becomes of each: passed, failed, undecided, or only reported.

Both sides see the same images, preprocessing and landmarks; FP32, FP16 and INT8 have their own bounds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from nformer_edge.core.spec import Precision
from nformer_edge.metrics.bootstrap import Ratio

#: A gate decides; an alarm is printed and decides nothing; a report has no bound.
Kind = Literal["gate", "alarm", "report"]
Status = Literal["passed", "failed", "undecided", "alarm", "quiet", "reported"]

_WORST_FIRST: tuple[Status, ...] = ("failed", "undecided", "alarm", "passed", "quiet", "reported")


@dataclass(frozen=True)
class Rule:
    """One line of the table for one precision.

    Args:
        bound: the least allowed, except for `tensor`: the most.
        aim: what a ratio should reach besides.
        sampled: nothing but these queries speaks for a ratio, as INT8 has no tensor gate: that none of a few scores
            worse does not show how the others score.
    """

    gate: str
    kind: Kind
    bound: float | None = None
    aim: float | None = None
    sampled: bool = False


@dataclass(frozen=True)
class Tolerance:
    """abs(x - ref) <= atol + rtol * abs(ref)."""

    atol: float
    rtol: float


TITLES: dict[str, str] = {
    "tensor": "tensor, worst error in units of its tolerance",
    "cosine_min": "cosine to the reference, lowest",
    "cosine_mean": "cosine to the reference, mean",
    "rank1_agreement": "rank-1 agreement",
    "top10_overlap": "top-10 overlap",
    "reciprocal_jaccard": "reciprocal-neighbor sets, mean Jaccard",
    "mAP_kept": "mAP kept, of the reference's",
    "rank1_kept": "Rank-1 kept, of the reference's",
}

#: INT8 has no tensor gate; its error is reported in units of the FP16 tolerance.
TOLERANCES: dict[Precision, Tolerance] = {
    "fp32": Tolerance(1e-6, 1e-3),
    "fp16": Tolerance(2.5e-3, 1e-3),
    "int8": Tolerance(2.5e-3, 1e-3),
}

GATES: dict[Precision, tuple[Rule, ...]] = {
    "fp32": (
        Rule("tensor", "gate", 1.0),
        Rule("cosine_min", "gate", 0.9999),
        Rule("cosine_mean", "gate", 0.99999),
        Rule("rank1_agreement", "gate", 1.0),
        Rule("top10_overlap", "gate", 0.999),
        Rule("reciprocal_jaccard", "gate", 0.999),
        Rule("mAP_kept", "gate", 0.999),
        Rule("rank1_kept", "gate", 0.999),
    ),
    "fp16": (
        Rule("tensor", "gate", 1.0),
        Rule("cosine_min", "gate", 0.998),
        Rule("cosine_mean", "gate", 0.9995),
        Rule("rank1_agreement", "gate", 0.995),
        Rule("top10_overlap", "gate", 0.99),
        Rule("reciprocal_jaccard", "gate", 0.99),
        Rule("mAP_kept", "gate", 0.999),
        Rule("rank1_kept", "gate", 0.999),
    ),
    "int8": (
        Rule("tensor", "report"),
        Rule("cosine_min", "alarm", 0.97),
        Rule("cosine_mean", "alarm", 0.99),
        Rule("rank1_agreement", "gate", 0.98),
        Rule("top10_overlap", "gate", 0.95),
        Rule("reciprocal_jaccard", "report"),
        Rule("mAP_kept", "gate", 0.99, aim=0.995, sampled=True),
        Rule("rank1_kept", "gate", 0.99, aim=0.995, sampled=True),
    ),
}


@dataclass(frozen=True)
class GateResult:
    """What one gate came to.

    Args:
        measured: the number, NaN where it could not be computed.
        margin: how far on the good side of the bound it is (negative: beyond it); NaN without bound or number.
        lower: for a ratio, the bound that decides; NaN otherwise.
        upper: for a ratio, the other bound.
        note: what a reader should know besides.
    """

    gate: str
    kind: Kind
    status: Status
    measured: float
    bound: float | None
    margin: float
    lower: float = math.nan
    upper: float = math.nan
    note: str = ""


def rule(precision: Precision, gate: str) -> Rule:
    """The table's line of `gate` for `precision`."""
    return next(r for r in GATES[precision] if r.gate == gate)


def judge(rule: Rule, measured: float, note: str = "") -> GateResult:
    """One number against its rule. NaN is never on the good side."""
    if rule.bound is None:
        return GateResult(rule.gate, rule.kind, "reported", measured, None, math.nan, note=note)
    margin = _sign(rule.gate) * (measured - rule.bound)
    good = bool(margin >= 0)
    status: Status = ("quiet" if good else "alarm") if rule.kind == "alarm" else ("passed" if good else "failed")
    return GateResult(rule.gate, rule.kind, status, measured, rule.bound, margin, note=note)


def judge_ratio(rule: Rule, ratio: Ratio) -> GateResult:
    """A ratio with its confidence bounds: passed if the lower bound is above the rule's, failed if the upper is below.

    Between the two, or without bounds, too few queries were scored to tell: undecided. Where no query scores worse
    the draws' lower bound is 1 or more; a `sampled` rule then takes the share that may do so unseen off it.
    """
    assert rule.bound is not None, "ratios have bounds in every column of the table"
    status: Status = "undecided"
    lower = min(ratio.lower, 1 - ratio.unseen) if rule.sampled and ratio.unseen else ratio.lower
    if lower > rule.bound:
        status = "passed"
    elif ratio.upper < rule.bound:
        status = "failed"
    note = f"{ratio.queries} queries, {ratio.draws} draws"
    if lower < ratio.lower:
        note += f"; none of them scores worse, {ratio.unseen:.2%} of all may"
    if rule.aim is not None:
        note += f"; aim {rule.aim:.1%} {'reached' if lower > rule.aim else 'not shown to be reached'}"
    edge = ratio.upper if status == "failed" else lower
    return GateResult(
        rule.gate, rule.kind, status, ratio.value, rule.bound, edge - rule.bound, lower, ratio.upper, note
    )


def worst(results: Sequence[GateResult]) -> int:
    """Which of several results of one gate decides: the first of those with the worst status and the least margin.

    A number without a bound is worse where it says less agreement. NaN is worse than any number.
    """

    def order(i: int) -> tuple[int, float]:
        result = results[i]
        good = result.margin if result.bound is not None else _sign(result.gate) * result.measured
        return _WORST_FIRST.index(result.status), good if math.isfinite(good) else -math.inf

    return min(range(len(results)), key=order)


def _sign(gate: str) -> int:
    return -1 if gate == "tensor" else 1


def verdict(results: Sequence[GateResult]) -> Literal["passed", "failed", "undecided"]:
    """Failed if any gate failed, else undecided if any is, else passed. Alarms and reports decide nothing."""
    statuses = {r.status for r in results if r.kind == "gate"}
    if "failed" in statuses:
        return "failed"
    return "undecided" if "undecided" in statuses else "passed"
