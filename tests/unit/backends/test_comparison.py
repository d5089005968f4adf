"""The script that compares TensorRT with onnxruntime layer by layer, run by the real Polygraphy.

Its half for onnxruntime runs here. Its half for TensorRT needs a GPU: Polygraphy is asked for the Python program that
it would run, which it writes only for arguments that it understands.
"""

from __future__ import annotations

import ast
import json
import os
import shlex
import subprocess
import sysconfig
from pathlib import Path

import numpy as np
import pytest

from nformer_edge.backends.spec import EngineSpec
from nformer_edge.backends.tensorrt.comparison import write_comparison
from nformer_edge.backends.tensorrt.graphs import prepare_backbone, prepare_head
from nformer_edge.backends.tensorrt.plans import profiles
from nformer_edge.exporting.bundle import open_bundle

POLYGRAPHY = Path(sysconfig.get_path("scripts")) / "polygraphy"

pytestmark = pytest.mark.skipif(not POLYGRAPHY.is_file(), reason="no polygraphy: pip install '.[dev]'")


def prepared(bundle_path, folder, *, typed=True, operators="library"):
    bundle = open_bundle(bundle_path)
    bundle.files.copy("golden.npz", folder)
    graphs = {
        "backbone": prepare_backbone(bundle, folder, "fp16", typed=typed),
        "head": prepare_head(bundle, folder, "fp16", typed=typed, operators=operators),
    }
    sizes = profiles(bundle, EngineSpec(batch=(1, 2, 4), gallery_size=(20, 96, 200)))
    write_comparison(folder, bundle, graphs, sizes, rtx=operators == "inlined", typed=typed)
    return folder


def run(folder, *arguments):
    """Runs the script. What Polygraphy would run on a GPU is written to ``gpu-N.py`` instead."""
    shim = folder / "bin" / "polygraphy"
    shim.parent.mkdir()
    real = shlex.quote(str(POLYGRAPHY))
    shim.write_text(
        f'#!/bin/sh\nset -e\ncase "$*" in\n*--trt*) exec {real} "$@" --gen-script "gpu-$(ls | wc -l).py" ;;\n'
        f'*) exec {real} "$@" ;;\nesac\n'
    )
    shim.chmod(0o755)
    environment = {**os.environ, "PATH": f"{shim.parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [str(folder / "compare.sh"), *arguments], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return [path.read_text() for path in sorted(folder.glob("gpu-*.py"))]


def test_every_tensor_of_the_head_is_computed_by_onnxruntime_and_asked_of_tensorrt(tiny_bundle, tmp_path):
    (program,) = run(prepared(tiny_bundle, tmp_path), "head")
    computed = json.loads((tmp_path / "onnxruntime-head.json").read_text())
    told = json.dumps(computed)
    assert "/head/h.0/ln_1/LayerNormalization_output_0" in told  # every tensor, and not the output alone
    ast.parse(program)
    assert "prepared-nformer.onnx" in program
    assert "strongly_typed=True" in program
    assert "ModifyNetworkOutputs(parse_network_from_onnx, outputs=constants.MARK_ALL)" in program
    assert "LoadPlugins(plugins=['./libnformer_plugins.so']" in program
    assert "min=[20, 32], opt=[96, 32], max=[200, 32]" in program
    assert "onnxruntime-head.json" in program


def test_the_backbone_needs_no_plugin_and_is_compared_within_fp16s_tolerance(tiny_bundle, tmp_path):
    (program,) = run(prepared(tiny_bundle, tmp_path), "backbone")
    ast.parse(program)
    assert "LoadPlugins" not in program
    assert "SimpleCompareFunc(rtol={'': 0.001}, atol={'': 0.0025}, check_error_stat={'': 'median'})" in program


def test_tensorrt_8_is_told_flags_and_layers(tiny_bundle, tmp_path):
    (program,) = run(prepared(tiny_bundle, tmp_path, typed=False), "head")
    ast.parse(program)
    assert "fp16=True" in program
    assert "precision_constraints='obey'" in program
    assert "'/head/h.0/ln_1/LayerNormalization/Sqrt_6': trt.float32" in program
    assert "strongly_typed" not in program


def test_an_inlined_head_is_one_graph_for_both_and_tensorrt_rtx_is_asked(tiny_bundle, tmp_path):
    (program,) = run(prepared(tiny_bundle, tmp_path, operators="inlined"), "head")
    assert "POLYGRAPHY_USE_TENSORRT_RTX=1" in (tmp_path / "compare.sh").read_text()
    assert "LoadPlugins" not in program
    assert not (tmp_path / "onnxruntime-nformer.onnx").exists()


def test_inputs_are_the_self_tests_own_and_as_many_as_the_profile_asks(tiny_bundle, tmp_path):
    prepared(tiny_bundle, tmp_path)
    names: dict = {"__file__": str(tmp_path / "compare_inputs.py")}
    exec((tmp_path / "compare_inputs.py").read_text(), names)
    ((backbone,), (head,)) = (list(names[stage]()) for stage in ("backbone", "head"))
    with np.load(tmp_path / "golden.npz") as z:
        np.testing.assert_array_equal(backbone["images"], z["images"])
        np.testing.assert_array_equal(head["features"], z["head_input"])
    assert (head["landmarks"].dtype, head["landmarks"].shape) == (np.int32, (2, 3))
    assert len(names["_rows"]("images", 5, (3, 64, 32))) == 5
    assert names["_rows"]("absent", 7, (4,)).shape == (7, 4)
