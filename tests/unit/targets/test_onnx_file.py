"""`doctor FILE.onnx` names what another tool did to a file."""

from __future__ import annotations

import json
import shutil

import onnx
import pytest
from helpers.manifests import reseal

from nformer_edge.core.errors import ArtifactError
from nformer_edge.exporting.bundle import BACKBONE, HEAD
from nformer_edge.targets.doctor import doctor


def looked_at(path):
    return {c.name: c for c in doctor(file=path).checks}


@pytest.mark.parametrize("name", [BACKBONE, HEAD])
def test_nothing_is_wrong_with_what_export_wrote(tiny_bundle, name):
    assert all(c.ok for c in looked_at(tiny_bundle / name).values())


def test_a_head_whose_functions_were_dropped_is_named(tiny_bundle, tmp_path):
    model = onnx.load(tiny_bundle / HEAD)
    del model.functions[:], model.metadata_props[:]
    onnx.save(model, tmp_path / "converted.onnx")
    found = looked_at(tmp_path / "converted.onnx")
    assert not found["operators"].ok
    assert "ReciprocalNeighborAttention and RowTopK without a body" in found["operators"].hint
    assert "metadata gone" in found["written by"].found
    assert not found["onnxruntime"].ok


def test_a_file_that_a_tool_wrote_over_is_named(tiny_bundle, tmp_path):
    bundle = shutil.copytree(tiny_bundle, tmp_path / "bundle")
    model = onnx.load(bundle / BACKBONE)
    model.producer_name = "a converter"
    onnx.save(model, bundle / BACKBONE)
    found = looked_at(bundle / BACKBONE)
    assert "a tool wrote over the file" in found["manifest"].hint
    assert found["onnxruntime"].ok


def test_a_backbone_that_lost_its_int8_is_named(tiny_bundle, tmp_path):
    bundle = shutil.copytree(tiny_bundle, tmp_path / "bundle")
    assert looked_at(bundle / BACKBONE)["INT8"].found == "none: FP32"
    reseal(bundle, precision={"backbone": "int8"})
    assert "gone" in looked_at(bundle / BACKBONE)["INT8"].hint


def test_a_damaged_manifest_beside_the_file_is_no_matter(tiny_bundle, tmp_path):
    shutil.copy(tiny_bundle / HEAD, tmp_path)
    for text in ("{", "[]", json.dumps({"files": [], "precision": 3})):
        (tmp_path / "manifest.json").write_text(text)
        assert all(c.ok for c in looked_at(tmp_path / HEAD).values())


def test_what_is_no_onnx_file_or_has_operators_of_others_is_refused(tiny_bundle, tmp_path):
    with pytest.raises(ArtifactError, match="got a JSON text, expected an ONNX file"):
        looked_at(tiny_bundle / "manifest.json")
    with pytest.raises(ArtifactError, match="no such file"):
        looked_at(tmp_path / "none.onnx")
    model = onnx.load(tiny_bundle / HEAD)
    model.graph.node[0].domain = "vendor"
    onnx.save(model, tmp_path / "h.onnx")
    with pytest.raises(ArtifactError, match="an operator of the domain 'vendor'"):
        looked_at(tmp_path / "h.onnx")
