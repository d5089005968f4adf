"""The feature store, and the door that features come through."""

from __future__ import annotations

import os
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from nformer_edge.core.errors import ArtifactError, DataError
from nformer_edge.core.features import Features, _digest, check_features, check_range, load_features, save_features


def make(rows: int = 4) -> Features:
    features = np.random.default_rng(0).standard_normal((rows, 8)).astype(np.float32)
    return Features(features, np.arange(rows), np.arange(rows) % 2, tuple(f"ä{i}.jpg" for i in range(rows)), "abc")


def test_a_feature_store_comes_back_as_it_was(tmp_path: Path) -> None:
    sets = {"query": make(3), "gallery": make(0)}
    save_features(tmp_path / "f.npz", sets)
    back = load_features(tmp_path / "f.npz")
    assert list(back) == ["query", "gallery"]
    for split, s in sets.items():
        np.testing.assert_array_equal(back[split].features, s.features)
        np.testing.assert_array_equal(back[split].pids, s.pids)
        assert (back[split].paths, back[split].model) == (s.paths, "abc")


def test_views_and_hashes_come_back_as_they_were(tmp_path: Path) -> None:
    views = np.random.default_rng(1).standard_normal((2, 4, 8)).astype(np.float32)
    hashes = tuple(f"{i:064x}" for i in range(4))
    s = replace(make(), hashes=hashes, augmented=views, augmentation='{"seed": 3}')
    save_features(tmp_path / "f.npz", {"train": s, "query": make(2)})
    back = load_features(tmp_path / "f.npz")
    assert (back["train"].views, back["query"].views, back["query"].hashes) == (3, 1, ())
    assert (back["train"].hashes, back["train"].augmentation) == (hashes, '{"seed": 3}')
    np.testing.assert_array_equal(back["train"].view(0).features, s.features)
    np.testing.assert_array_equal(back["train"].view(2).features, views[1])
    some = back["train"].take(np.array([3, 0]))
    np.testing.assert_array_equal(some.view(1).features, views[0, [3, 0]])
    assert some.hashes == (hashes[3], hashes[0])
    with pytest.raises(DataError, match=r"view: got 3, expected 0\.\.2"):
        s.view(3)


def arrays_of(store: Path) -> dict[str, np.ndarray]:
    with np.load(store) as z:
        return {name: z[name] for name in z.files}


def sealed(path: Path, arrays: dict[str, np.ndarray]) -> Path:
    """A store with these arrays and a digest that holds."""
    np.savez(path, **arrays | {"sha256": np.array(_digest(arrays))})
    return path


def test_a_store_of_an_earlier_version_is_refused_with_what_to_do(tmp_path: Path) -> None:
    np.savez(tmp_path / "f.npz", format=np.array("nformer-edge-features-1"), splits=np.array(["query"]))
    match = r"got nformer-edge-features-1, expected nformer-edge-features-2\. Make it again"
    with pytest.raises(ArtifactError, match=match):
        load_features(tmp_path / "f.npz")


def test_a_number_or_a_label_changed_in_a_store_is_refused(tmp_path: Path) -> None:
    save_features(tmp_path / "f.npz", {"query": make()})
    for name in ("query/features", "query/pids"):
        arrays = arrays_of(tmp_path / "f.npz")
        arrays[name].flat[2] += 1
        np.savez(tmp_path / "g.npz", **arrays)
        with pytest.raises(ArtifactError, match="contents that do not match their sha256"):
            load_features(tmp_path / "g.npz")
    assert load_features(sealed(tmp_path / "g.npz", arrays)), "what is sealed again is another store"


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"query/camids": None}, "no array query/camids"),
        ({"query/more": np.zeros(1)}, "an unknown array query/more"),
        ({"train/features": np.zeros(1)}, "an unknown array train/features"),
        ({"query/pids": np.array([1, 2, 3, -2])}, r"query/pids: got -2\.\.3, expected -1 \(unknown\) or more"),
        ({"query/pids": np.array([1.5, 2, 3, 4])}, "query/pids: got type float64, expected whole numbers"),
        ({"query/features": np.ones((4, 8), ">f4")}, "query/features: got type >f4, expected float32"),
        ({"query/precision": np.array("int4")}, "query/precision: got 'int4', expected fp32, fp16, int8"),
        ({"query/paths": np.array(["a"])}, "query/paths: got 1 entries, expected 4"),
    ],
)
def test_unknown_missing_and_impossible_fields_are_refused_by_name(tmp_path: Path, change, match: str) -> None:
    save_features(tmp_path / "f.npz", {"query": make()})
    arrays = {name: array for name, array in (arrays_of(tmp_path / "f.npz") | change).items() if array is not None}
    with pytest.raises(ArtifactError, match=match):
        load_features(sealed(tmp_path / "g.npz", arrays))


def test_a_compressed_store_is_refused_before_it_is_unpacked(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "f.npz", format=np.zeros(1 << 20))
    with pytest.raises(ArtifactError, match=r"format\.npy is compressed"):
        load_features(tmp_path / "f.npz")


def test_a_fifo_is_no_store(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "f.npz")
    with pytest.raises(ArtifactError, match="got a device or a FIFO, expected a feature store"):
        load_features(tmp_path / "f.npz")


@pytest.mark.parametrize("dtype", [complex, object, str, bool, ">f4"])
def test_features_are_real_numbers_of_this_machine(dtype: type) -> None:
    features = make().features.astype(dtype)
    for door in (Features, check_features):
        with pytest.raises(DataError, match=r"features: got type .*, expected float32"):
            door(features)


@pytest.mark.parametrize("factor", [1e-18, 3e19])
def test_a_row_whose_squares_leave_the_range_is_refused(factor: float) -> None:
    features = make().features
    features[2] *= np.float32(factor)
    with pytest.raises(DataError, match=r"a largest number of .* in row 2 \(1 such rows\)"):
        check_range(features)
    check_range(make().features)
    check_range(make(0).features)


@pytest.mark.parametrize("labels", [np.array([0.5] * 4), np.array([2**63] * 4, np.uint64), [10**30] * 4, [-2] * 4])
def test_people_and_cameras_are_whole_numbers(labels) -> None:
    with pytest.raises(DataError, match="camids: got"):
        replace(make(), camids=labels)


def test_views_and_hashes_must_fit_the_rows() -> None:
    with pytest.raises(DataError, match="hashes: got 1 entries, expected 4"):
        replace(make(), hashes=("a",))
    with pytest.raises(DataError, match=r"augmented: got shape \(1, 3, 8\), expected \[V - 1, 4, 8\]"):
        replace(make(), augmented=np.zeros((1, 3, 8), np.float32))


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


def test_a_file_that_is_no_archive_is_called_what_it_is_and_no_unsafe_way_is_advised(tmp_path: Path) -> None:
    (tmp_path / "s.npz").write_bytes(b"<!DOCTYPE html><html>")
    with pytest.raises(ArtifactError, match="got an HTML page") as refused:
        load_features(tmp_path / "s.npz")
    assert "pickle" not in str(refused.value)


def test_another_npz_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "f.npz", a=np.zeros(3))
    with pytest.raises(ArtifactError, match=r"another kind of \.npz"):
        load_features(tmp_path / "f.npz")


def test_labels_must_match_the_rows() -> None:
    with pytest.raises(DataError, match="pids: got 2 entries, expected 3"):
        Features(np.zeros((3, 8), np.float32), np.arange(2), np.arange(3), ("a",) * 3)


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


def test_labels_may_be_left_out() -> None:
    s = Features(make(3).features)
    assert (s.pids.tolist(), s.camids.tolist(), s.paths, s.names) == ([-1] * 3, [-1] * 3, ("",) * 3, ("",) * 3)
    assert len(s.take(np.array([2]))) == 1
    assert str(s) == "3 images, 8 numbers each"
    with pytest.raises(DataError, match="ids: got 1 entries, expected 3"):
        replace(s, ids=("alice",))


def test_an_image_is_called_by_its_id_then_by_its_person_then_by_its_path() -> None:
    s = Features(make(2).features, np.array([7, -1]), paths=("a.jpg", "b.jpg"))
    assert s.names == ("7", "b.jpg")
    assert replace(s, ids=("alice", "bob")).take(np.array([1, 1])).names == ("bob", "bob")


def test_features_become_json_and_a_store_and_come_back(tmp_path: Path) -> None:
    s = replace(make(), ids=("a", "b", "c", "d"), checkpoint="def", hashes=tuple("wxyz"), precision="int8")
    s.save(tmp_path / "f.npz")
    for back in (Features.from_json(s.to_json()), Features.load(tmp_path / "f.npz")):
        np.testing.assert_array_equal(back.features, s.features)
        assert back.features.dtype == np.float32
        assert (back.ids, back.names, back.paths) == (s.ids, s.ids, s.paths)
        assert (back.hashes, back.model, back.checkpoint, back.precision) == (s.hashes, "abc", "def", "int8")
        assert str(back) == str(s) == "4 images, 8 numbers each, 4 people, 2 cameras, model abc"
    with pytest.raises(ArtifactError, match="got splits gallery, expected a split query"):
        Features.load(tmp_path / "f.npz", "query")


def test_features_belong_to_a_model_or_to_another_of_the_same_checkpoint() -> None:
    s = replace(make(), model="bundle", checkpoint="checkpoint")
    assert s.shares_model("bundle")
    assert s.shares_model("checkpoint", "checkpoint")
    assert s.shares_model("engine", "checkpoint")
    assert not s.shares_model("engine", "another")
    assert not replace(s, checkpoint="").shares_model("engine")


def test_features_of_the_same_checkpoint_in_another_precision_are_not_those_of_the_model() -> None:
    s = replace(make(), model="engine", checkpoint="checkpoint", precision="int8")
    assert s.shares_model("another engine", "checkpoint", "int8")
    assert not s.shares_model("bundle", "checkpoint", "fp32")
    assert not s.shares_model("checkpoint", precision="fp32")
    assert s.shares_model("engine", "checkpoint", "int8")
    assert replace(s, precision="").shares_model("bundle", "checkpoint", "fp32"), "an older store does not say"


@pytest.mark.parametrize("pids", [np.array(-1), np.zeros((4, 2), int)])
def test_labels_that_are_no_row_of_numbers_are_refused(pids: np.ndarray) -> None:
    with pytest.raises(DataError, match="Pass one number an image"):
        Features(np.ones((4, 3), np.float32), pids=pids)


def test_a_store_whose_header_ends_in_the_middle_is_refused_by_name(tmp_path: Path) -> None:
    save_features(tmp_path / "f.npz", {"query": Features(np.ones((4, 3), np.float32))})
    out = tmp_path / "g.npz"
    with zipfile.ZipFile(tmp_path / "f.npz") as old, zipfile.ZipFile(out, "w") as new:
        for name in old.namelist():
            new.writestr(name, old.read(name)[:10] + b"{'descr': (" + b" " * 106 + b"\n")
    with pytest.raises(ArtifactError, match="a feature store"):
        load_features(out)
