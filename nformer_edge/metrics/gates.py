"""The parity gates as data, and what becomes of each: passed, failed, undecided, or only reported.

Both sides see the same images, preprocessing and landmarks; FP32, FP16 and INT8 have their own bounds. BF16 has
those of INT8.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from nformer_edge.core.spec import Precision
from nformer_edge.metrics.agreement import RankAgreement, TensorError
from nformer_edge.metrics.bootstrap import Ratio

#: A gate decides; an alarm is printed and decides nothing; a report has no bound.
Kind = Literal["gate", "alarm", "report"]
Status = Literal["passed", "failed", "undecided", "alarm", "quiet", "reported"]
Verdict = Literal["passed", "failed", "undecided"]

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


#: What FP16's tensor error may be, as a share of the row's norm. FP32 beyond it is no matter of rounding.
HALF_ERROR = 2e-3

#: Of each precision its column in the table. BF16 has 8 bits of significand: it is as coarse as INT8.
_COLUMN: dict[Precision, int] = {"fp32": 0, "fp16": 1, "bf16": 2, "int8": 2}

#: Of each gate its title, and its bound in each precision.
_TABLE: dict[str, tuple[str, float | None, float | None, float | None]] = {
    "tensor": ("tensor error, L2 of a row", 1.0, HALF_ERROR, None),
    "cosine_min": ("cosine to the reference, lowest", 0.9999, 0.998, 0.97),
    "cosine_mean": ("cosine to the reference, mean", 0.99999, 0.9995, 0.99),
    "first_match": ("first match agrees", 1.0, 0.995, 0.98),
    "top10_overlap": ("top-10 overlap", 0.999, 0.99, 0.95),
    "reciprocal_jaccard": ("reciprocal-neighbor sets, mean Jaccard", 0.999, 0.99, None),
    "mAP_kept": ("mAP kept, of the reference's", 0.999, 0.999, 0.99),
    "rank1_kept": ("Rank-1 kept, of the reference's", 0.999, 0.999, 0.99),
}

TITLES: dict[str, str] = {gate: title for gate, (title, *_) in _TABLE.items()}


def rule(precision: Precision, gate: str) -> Rule:
    """The table's line of `gate` for `precision`. In INT8 and BF16 cosines are alarms, and ratios have an aim."""
    bound = _TABLE[gate][1:][_COLUMN[precision]]
    if bound is None:
        return Rule(gate, "report")
    if _COLUMN[precision] < 2:
        return Rule(gate, "gate", bound)
    if gate.startswith("cosine"):
        return Rule(gate, "alarm", bound)
    return Rule(gate, "gate", bound, *((0.995, True) if gate.endswith("_kept") else ()))


GATES: dict[Precision, tuple[Rule, ...]] = {p: tuple(rule(p, gate) for gate in _TABLE) for p in _COLUMN}


@dataclass(frozen=True)
class GateResult:
    """What one gate came to.

    Args:
        gate: its name.
        kind: a gate decides; an alarm is printed and decides nothing; a report has no bound.
        status: what became of it.
        measured: the number, null where it could not be computed.
        bound: the least allowed, for `tensor` the most; null for a report.
        margin: how far on the good side of the bound it is (negative: beyond it); null without bound or number.
        lower: for a ratio, the lower confidence bound; null otherwise.
        upper: for a ratio, the upper one.
        note: what a reader should know besides.
        landmark_seed: of the run; null for a part without landmarks.
        images: gallery images a person of the run; null for all.
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
    landmark_seed: int | None = None
    images: int | None = None

    @property
    def title(self) -> str:
        """The gate in words."""
        return TITLES[self.gate]

    @property
    def shown(self) -> str:
        """The number, with its confidence bounds if it has any."""
        if math.isnan(self.measured):
            return "not a number" if self.status == "failed" else "-"
        value = f"{self.measured:.6g}"
        return value if math.isnan(self.lower) else f"{value} [{self.lower:.4f}, {self.upper:.4f}]"

    @property
    def failure(self) -> str:
        """What a failed gate came to: measured, bound, by how much, and of which run."""
        measured = "not a number" if math.isnan(self.measured) else f"{self.measured:.6g}"
        edge = "" if math.isnan(self.upper) else f" (upper bound {self.upper:.6g})"
        miss = "" if math.isnan(self.margin) else f", missed by {abs(self.margin):.3g}"
        seed = "" if self.landmark_seed is None else f" with landmark seed {self.landmark_seed}"
        few = "" if self.images is None else f" at {self.images} gallery image a person"
        return f"{self.title}: {measured}{edge} against {self.bound:g}{miss}{seed}{few}"

    @property
    def shown_bound(self) -> str:
        """The bound with the side that is good."""
        return "" if self.bound is None else f"{'<=' if self.gate == 'tensor' else '>='} {self.bound:g}"


def judge(rule: Rule, measured: float, note: str = "") -> GateResult:
    """One number against its rule. NaN is never on the good side."""
    if rule.bound is None:
        return GateResult(rule.gate, rule.kind, "reported", measured, None, math.nan, note=note)
    margin = _sign(rule.gate) * (measured - rule.bound)
    good = bool(margin >= 0)
    status: Status = ("quiet" if good else "alarm") if rule.kind == "alarm" else ("passed" if good else "failed")
    return GateResult(rule.gate, rule.kind, status, measured, rule.bound, margin, note=note)


def undecided(rule: Rule, why: str) -> GateResult:
    """A gate that there is nothing to judge by."""
    return GateResult(rule.gate, rule.kind, "undecided", math.nan, rule.bound, math.nan, note=why)


def judge_tensor(precision: Precision, error: TensorError) -> GateResult:
    """Rows against the float64 run of the reference, or against the reference itself where there is none.

    FP32 is judged by its worst row, in units of what that row is allowed: `OWN_ERRORS` times the reference's own error
    or `ROUNDING` of its norm. Without a float64 run the own error is not known: a row beyond `ROUNDING` leaves the gate
    undecided, and one beyond `HALF_ERROR` fails it. FP16 and INT8 are measured by the mean over rows.
    """
    line = rule(precision, "tensor")
    known = not math.isnan(error.own)
    against = f"the reference's own is {error.own:.3g}" if known else "against the reference in float32"
    note = f"largest {error.largest:.3g} of a row's norm, {against}"
    if error.non_finite:
        note = f"{error.non_finite} numbers are NaN or infinite"
    result = judge(line, error.worst if precision == "fp32" else error.mean, note)
    if precision == "fp32" and not known and result.status == "failed" and error.largest <= HALF_ERROR:
        note += ": its own error is not known; compare with a checkpoint"
        return replace(result, status="undecided", note=note)
    return result


def judge_first_match(precision: Precision, found: RankAgreement) -> GateResult:
    """The share of agreeing first matches; undecided where no query could be compared."""
    note = f"by person, {found.compared} queries"
    if not found.by_person:
        note = f"by image, {found.compared} queries; the reference is undecided for {found.undecided} more"
    result = judge(rule(precision, "first_match"), found.first, f"{note}; {len(found.moved)} first images differ")
    return result if found.compared else replace(result, status="undecided")


def judge_ratio(rule: Rule, ratio: Ratio) -> GateResult:
    """A ratio with its confidence bounds: passed if the lower bound is above the rule's, failed if the upper is below.

    Between the two, or without bounds, too few queries were scored to tell: undecided. Where no query scores worse
    the draws' lower bound is 1 or more; a `sampled` rule then takes the share that may do so unseen off it.
    """
    assert rule.bound is not None, "ratios have bounds in every column of the table"
    lower = min(ratio.lower, 1 - ratio.unseen) if rule.sampled and ratio.unseen else ratio.lower
    failed = ratio.upper < rule.bound
    status: Status = "passed" if lower > rule.bound else "failed" if failed else "undecided"
    note = f"{ratio.queries} queries, {ratio.draws} draws"
    if lower < ratio.lower:
        note += f"; none of them scores worse, {ratio.unseen:.2%} of all may"
    if rule.aim is not None:
        note += f"; aim {rule.aim:.1%} {'reached' if lower > rule.aim else 'not shown to be reached'}"
    margin = (ratio.upper if status == "failed" else lower) - rule.bound
    return GateResult(rule.gate, rule.kind, status, ratio.value, rule.bound, margin, lower, ratio.upper, note)


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


def verdict(results: Sequence[GateResult]) -> Verdict:
    """Of the gates' statuses the worst. Alarms and reports decide nothing."""
    return worst_verdict(r.status for r in results if r.kind == "gate")


def worst_verdict(statuses: Iterable[Status]) -> Verdict:
    """Failed if any is, else undecided if any is, else passed."""
    found = set(statuses)
    return "failed" if "failed" in found else "undecided" if "undecided" in found else "passed"
