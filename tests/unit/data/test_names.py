"""What names say: splits are never people, cameras are known in their common spellings, patterns read the rest."""

from __future__ import annotations

import pytest

from nformer_edge.core.errors import DataError, UsageError
from nformer_edge.data.names import NamePattern, camera, is_camera, propose_pattern, role


@pytest.mark.parametrize("word", ["train", "val", "test", "query", "gallery"])
@pytest.mark.parametrize("form", ["{}", "image_{}", "bounding_box_{}", "{}_all", "IMG-{}", "{}2", "mask_{}_v2"])
def test_split_like_names_are_splits_in_any_case(word: str, form: str) -> None:
    for name in (form.format(word), form.format(word).upper(), form.format(word).title()):
        assert role(name) == word


def test_other_words_for_a_split_are_known() -> None:
    assert [role(name) for name in ("probe", "Valid", "training", "query_test")] == ["query", "val", "train", "query"]


@pytest.mark.parametrize("name", ["0001", "alice", "valentin", "trainer", "person_query_12b", "cam_a", "image", ""])
def test_names_of_people_are_no_splits(name: str) -> None:
    assert role(name) is None


@pytest.mark.parametrize(
    ("name", "number"),
    [("x_c3_1", "3"), ("0012_c3s1_7", "3"), ("1_cam3", "3"), ("camera_03", "03"), ("Cam-2", "2"), ("cam_a", "a"),
     ("CH01", "01"), ("Kamera 3", "3"),
     ("001cam2_5", "2"), ("0001C2T0001F001", "2"), ("c1_0", "1"), ("abc3", ""), ("camel", ""), ("scene_c", "")],
)  # fmt: skip
def test_cameras_are_read_in_their_common_spellings(name: str, number: str) -> None:
    assert camera(name) == number


def test_only_a_whole_name_makes_a_folder_a_camera() -> None:
    assert is_camera("cam_a")
    assert is_camera("c3")
    assert not is_camera("0001_c3")


def test_a_pattern_reads_the_name_or_with_a_slash_the_path() -> None:
    assert NamePattern(r"(?P<pid>\d+)_cam(?P<camid>\d+)").read("7/12_cam3.jpg") == ("12", "3")
    assert NamePattern(r"(?P<camid>\w+)/(?P<pid>\d+)_").read("hall/12_3.jpg") == ("12", "hall")
    assert NamePattern(r"(?P<pid>\d+)").read("12.jpg") == ("12", "")
    assert NamePattern(r"(?P<pid>\d+)").read("x.jpg") is None


@pytest.mark.parametrize(("text", "says"), [("(", "regular expression"), (r"(\d+)_c", "without a group pid")])
def test_a_pattern_that_cannot_be_used_is_refused_with_an_example(text: str, says: str) -> None:
    with pytest.raises(UsageError, match=says) as error:
        NamePattern(text)
    assert "(?P<pid>" in str(error.value)


def test_a_name_that_does_not_fit_shows_three_names_and_the_pattern_that_would() -> None:
    names = [f"{p:03d}_cam{c}.jpg" for p in range(1, 5) for c in (1, 2)]
    with pytest.raises(DataError, match="8 of 8 names that do not fit") as error:
        NamePattern(r"id(?P<pid>\d+)").read_all(names, "crops")
    assert "001_cam1.jpg -> does not fit; 003_cam1.jpg" in str(error.value)
    assert r"Try --pattern '(?P<pid>\d+)[_-]cam" in str(error.value)


def test_a_proposal_fits_all_names_or_there_is_none() -> None:
    assert "camid" in propose_pattern([f"cam{c}_id{p}_{c}.png" for p in range(3) for c in range(2)])
    assert propose_pattern([f"{i:06d}.jpg" for i in range(10)]) == ""
    assert propose_pattern([]) == ""
