"""Students against their teacher: measured in one run, and who dominates whom."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from nformer_edge.compress.cost import Cost
from nformer_edge.core.errors import UsageError
from nformer_edge.data.generate import GenerateSpec, generate_dataset
from nformer_edge.report.frontier import Frontier, FrontierPoint, _dominating, frontier
from nformer_edge.report.html.page import render
from nformer_edge.report.models import MeasuredModel


def test_a_model_beside_itself_ranks_alike_and_the_page_draws_both(
    tiny_checkpoint: Path, tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nformer_edge.backends.choice.settle", lambda run: run())
    generate_dataset(tmp_path / "data", replace(GenerateSpec.tiny(), train_ids=2, seen_by=2, images=2))
    found = frontier([tiny_bundle, tiny_checkpoint], tmp_path / "data", batches=(1, 2))
    teacher, same = found.points
    assert same.overlap >= 0.99
    assert same.mAP == pytest.approx(teacher.mAP, abs=0.02)
    assert same.cost == teacher.cost
    assert teacher.speed == {1: 1.0, 2: 1.0}
    assert Frontier.from_json(found.to_json()) == found
    assert tiny_bundle.name in str(found)
    assert "mAP against ms, batch 2" in render([found], "r")
    assert sum(point.dominated_by is None for point in found.points) >= 1


def test_what_ranks_no_worse_and_takes_no_longer_dominates() -> None:
    def point(label: str, mAP: float, ms: float) -> FrontierPoint:
        return FrontierPoint(MeasuredModel(label, ""), mAP, mAP, 1.0, Cost(1, 1.0), {1: ms, 8: ms}, {1: 1.0, 8: 1.0})

    teacher, student, slow, equal = (
        point("teacher", 0.77, 5.0),
        point("student", 0.74, 2.0),
        point("slow", 0.73, 3.0),
        point("equal", 0.77, 5.0),
    )
    points = (teacher, student, slow, equal)
    assert [_dominating(p, points) for p in points] == [None, None, "student", None]


def test_one_model_is_no_frontier(tiny_bundle: Path) -> None:
    with pytest.raises(UsageError, match="at least two"):
        frontier([tiny_bundle], "nowhere")
