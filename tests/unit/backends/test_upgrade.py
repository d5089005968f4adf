"""Folders of the first manifest format come in verified and run, or not at all."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

from nformer_edge.backends.open import open_model
from nformer_edge.backends.upgrade import upgrade
from nformer_edge.core.artifact import read_manifest, sha256_file
from nformer_edge.core.errors import ArtifactError


@pytest.fixture
def old(tiny_bundle, tmp_path):
    """The tiny bundle as the first format wrote it."""
    folder = tmp_path / "old"
    shutil.copytree(tiny_bundle, folder)
    manifest = json.loads((folder / "manifest.json").read_text()) | {"format_version": 1}
    (folder / "manifest.json").write_text(json.dumps({k: v for k, v in manifest.items() if k != "sha256"}))
    return folder


def test_a_bundle_of_the_first_format_is_refused_with_the_command_and_runs_after_it(old, tiny_bundle):
    with pytest.raises(ArtifactError, match=f"nformer-edge upgrade {old}"):
        open_model(old)
    assert str(upgrade(old)) == f"wrote {old}"
    assert read_manifest(old, "bundle")["format_version"] == 2
    with open_model(old) as new, open_model(tiny_bundle) as same:
        images = same.golden()["images"]
        assert np.array_equal(new.embed(images), same.embed(images))
    with pytest.raises(ArtifactError, match="format version 2"):
        upgrade(old)


def test_a_changed_file_or_other_golden_vectors_are_refused_and_nothing_changes(old):
    data = bytearray((old / "backbone.onnx").read_bytes())
    data[-1] ^= 1
    (old / "backbone.onnx").write_bytes(data)
    before = (old / "manifest.json").read_text()
    with pytest.raises(ArtifactError, match="sha256"):
        upgrade(old)
    data[-1] ^= 1
    (old / "backbone.onnx").write_bytes(data)
    with np.load(old / "golden.npz") as z:
        arrays = dict(z)
    arrays["features"] = -arrays["features"]
    np.savez(old / "golden.npz", **arrays)
    manifest = json.loads(before)
    entry = {"sha256": sha256_file(old / "golden.npz"), "bytes": (old / "golden.npz").stat().st_size}
    manifest["files"]["golden.npz"] = entry
    (old / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ArtifactError, match="a golden vector 2 of its norm off"):
        upgrade(old)
    assert json.loads((old / "manifest.json").read_text())["format_version"] == 1
