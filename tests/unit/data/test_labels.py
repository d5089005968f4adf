"""Labels are judged before pixels are read: each count has a dataset that raises it and one that does not."""

from __future__ import annotations

from pathlib import Path

import pytest

from nformer_edge.core.errors import DataError
from nformer_edge.data.labels import judge_labels
from nformer_edge.data.records import Dataset, ImageRecord


def record(root: Path, name: str, pid: int, camid: int, content: str = "") -> ImageRecord:
    (root / name).write_text(content or name)
    return ImageRecord(str(root / name), pid, camid)


@pytest.fixture
def parts(tmp_path: Path) -> dict[str, tuple[ImageRecord, ...]]:
    return {
        "train": (record(tmp_path, "a", 1, 1), record(tmp_path, "b", 2, 2)),
        "query": (record(tmp_path, "c", 3, 1), record(tmp_path, "d", 4, 2)),
        "gallery": (record(tmp_path, "e", 3, 2), record(tmp_path, "f", 4, 1), record(tmp_path, "g", 0, 1)),
    }


def test_a_dataset_without_fault_has_no_warning(parts: dict) -> None:
    report = judge_labels(Dataset("d", "d", **parts))
    assert report.warnings == ()
    assert (report.queries, report.test_people, report.images) == (2, 2, 7)
    report.require_matches()


def test_people_in_train_and_test_are_counted_unless_numbers_start_anew(parts: dict, tmp_path: Path) -> None:
    parts["train"] += (record(tmp_path, "h", 3, 1),)
    assert judge_labels(Dataset("d", "d", **parts)).warnings == ("1 of 2 test people are also in training",)
    assert judge_labels(Dataset("d", "d", **parts, apart=True)).people_in_both == 0


@pytest.mark.parametrize(("camid", "pid", "copies"), [(1, 3, 0), (2, 3, 1), (1, 9, 1), (-1, 3, 1)])
def test_copies_of_queries_count_unless_the_rule_of_the_same_camera_leaves_them_out(
    parts: dict, tmp_path: Path, camid: int, pid: int, copies: int
) -> None:
    parts["gallery"] += (record(tmp_path, "h", pid, camid, content="c"),)
    assert judge_labels(Dataset("d", "d", **parts)).copies == copies


def test_one_camera_is_an_error_with_the_way_out_which_works(parts: dict) -> None:
    one = {s: tuple(ImageRecord(r.path, r.pid, 7) for r in records) for s, records in parts.items()}
    report = judge_labels(Dataset("d", "d", **one))
    assert report.one_camera == 7
    with pytest.raises(DataError, match=r"2 queries, none with a match.*all are of camera 7.*--same-camera"):
        report.require_matches()
    same = judge_labels(Dataset("d", "d", **one).same_camera())
    same.require_matches()
    assert same.warnings == ("the camera of 7 of 7 images is unknown: matches of the same camera count",)


def test_queries_without_a_match_are_counted(parts: dict, tmp_path: Path) -> None:
    parts["query"] += (record(tmp_path, "h", 8, 1), record(tmp_path, "i", 4, 1))
    report = judge_labels(Dataset("d", "d", **parts))
    assert report.unmatched == 2
    assert report.warnings == ("2 of 4 queries have no match from another camera in the gallery",)
    report.require_matches()
