"""Kits: written from a manifest, whole or not at all; nothing is left to fill in."""

from __future__ import annotations

import hashlib
import re

import pytest

from nformer_edge.core.errors import ArtifactError, UsageError
from nformer_edge.exporting.bundle import open_bundle
from nformer_edge.targets.kit import KITS, MODEL, write_kit


@pytest.mark.parametrize("name", KITS)
def test_a_kit_has_the_verified_model_and_no_placeholder_left(name, tiny_bundle, tmp_path):
    kit = write_kit(name, tiny_bundle, tmp_path / "kit").path
    assert open_bundle(kit / MODEL).sha256 == open_bundle(tiny_bundle).sha256
    texts = [p.read_text() for p in kit.rglob("*") if p.is_file() and p.parent.name != MODEL and p.suffix != ".onnx"]
    assert (kit / "README.md").is_file()
    assert not [found for text in texts for found in re.findall(r"@[A-Z][A-Z0-9_]*@", text)]
    assert "64" in "".join(texts)
    with pytest.raises(ArtifactError, match="an earlier kit"):
        write_kit(name, tiny_bundle, kit)
    write_kit(name, tiny_bundle, kit, force=True)


def test_a_misspelt_kit_is_refused_with_the_nearest_name(tiny_bundle, tmp_path):
    with pytest.raises(UsageError, match="triton"):
        write_kit("trition", tiny_bundle, tmp_path / "kit")


def test_a_damaged_model_makes_no_kit(tiny_bundle, tmp_path):
    kit = write_kit("triton", tiny_bundle, tmp_path / "kit").path
    graph = kit / MODEL / "backbone.onnx"
    graph.write_bytes(graph.read_bytes()[:-1] + b"!")
    with pytest.raises(ArtifactError, match="backbone"):
        write_kit("triton", kit / MODEL, tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_tritons_copy_of_the_graph_is_the_models_own(tiny_bundle, tmp_path):
    kit = write_kit("triton", tiny_bundle, tmp_path / "kit").path
    digest = hashlib.sha256((tiny_bundle / "backbone.onnx").read_bytes()).hexdigest()
    assert hashlib.sha256((kit / "models/backbone/1/model.onnx").read_bytes()).hexdigest() == digest
