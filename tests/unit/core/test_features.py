"""The feature store, and the door that features come through."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from nformer_edge.core.errors import ArtifactError, DataError
from nformer_edge.core.features import FeatureSet, check_features, load_features, save_features


def make(rows: int = 4) -> FeatureSet:
    features = np.random.default_rng(0).standard_normal((rows, 8)).astype(np.float32)
    return FeatureSet(features, np.arange(rows), np.arange(rows) % 2, tuple(f"ä{i}.jpg" for i in range(rows)), "abc")


def test_a_feature_store_comes_back_as_it_was(tmp_path: Path) -> None:
    sets = {"query": make(3), "gallery": make(0)}
    save_features(tmp_path / "f.npz", sets)
    back = load_features(tmp_path / "f.npz")
    assert list(back) == ["query", "gallery"]
    for split, s in sets.items():
        np.testing.assert_array_equal(back[split].features, s.features)
        np.testing.assert_array_equal(back[split].pids, s.pids)
        assert (back[split].paths, back[split].model) == (s.paths, "abc")


def test_take_by_mask_and_by_index_agree() -> None:
    s = make()
    np.testing.assert_array_equal(s.take(s.camids == 1).features, s.take(np.array([1, 3])).features)
    assert s.take(np.array([3, 1])).paths == ("ä3.jpg", "ä1.jpg")


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 broken", b"not a zip"])
def test_a_damaged_store_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "f.npz").write_bytes(content)
    with pytest.raises(ArtifactError, match=r"nformer-edge embed"):
        load_features(tmp_path / "f.npz")


def test_pickles_in_a_store_are_never_run(tmp_path: Path) -> None:
    np.savez(tmp_path / "f.npz", format=np.array([object()], dtype=object))
    with pytest.raises(ArtifactError):
        load_features(tmp_path / "f.npz")


def test_another_npz_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "f.npz", a=np.zeros(3))
    with pytest.raises(ArtifactError, match=r"another kind of \.npz"):
        load_features(tmp_path / "f.npz")


def test_labels_must_match_the_rows() -> None:
    with pytest.raises(DataError, match="pids: got 2 entries, expected 3"):
        FeatureSet(np.zeros((3, 8), np.float32), np.zeros(2), np.zeros(3), ("a",) * 3)


@pytest.mark.parametrize(
    ("value", "said"),
    [(np.nan, "NaN or infinity in row 2"), (np.inf, "NaN or infinity in row 2"), (0.0, "all zeros in row 2")],
)
def test_the_door_names_the_first_bad_row(value: float, said: str) -> None:
    features = make().features
    features[2] = value
    with pytest.raises(DataError, match=said):
        check_features(features)


def test_the_door_knows_the_width() -> None:
    with pytest.raises(DataError, match=r"got shape \(4, 8\), expected \[N, 256\]"):
        check_features(make().features, dim=256)
