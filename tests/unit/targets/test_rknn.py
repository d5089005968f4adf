"""A backbone for Rockchip's NPU, by Rockchip's own tool: its simulator against onnxruntime."""

from __future__ import annotations

import os
import re
import subprocess

import pytest

from nformer_edge.data.generate import GenerateSpec, generate_dataset
from nformer_edge.targets import recipe


@pytest.mark.optional
def test_rknns_simulator_agrees_with_the_bundle(tiny_bundle, tmp_path):
    """Where ``RKNN_PYTHON`` names a Python that has rknn-toolkit2, which cannot live beside our PyTorch."""
    python = os.environ.get("RKNN_PYTHON")
    if not python:
        pytest.skip("lacks RKNN_PYTHON, a Python with rknn-toolkit2")
    data = generate_dataset(tmp_path / "data", GenerateSpec(train_ids=4, test_ids=3)).root
    root = recipe.recipes_folder().parents[1]
    command = [python, root / "export/rknn/convert.py", tiny_bundle, "--calib-data", data, "--compare", "4"]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    for flags, least in (([], 0.95), (["--fp16"], 0.999)):
        made = subprocess.run([*command, *flags], capture_output=True, text=True, env=environment, check=True)
        low, mean = re.search(r"min ([\d.]+), mean ([\d.]+)", made.stdout).groups()
        assert float(low) >= least, made.stdout[-200:]
        assert float(mean) >= float(low)
