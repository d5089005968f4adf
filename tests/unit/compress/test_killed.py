"""SIGKILL at any moment of any step, and the run that goes on comes to the same bits."""

from __future__ import annotations

import hashlib
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from nformer_edge.core.spec import BackboneSpec, ModelSpec, PreprocessSpec
from nformer_edge.data.generate import GenerateSpec, generate_dataset
from nformer_edge.model.backbone import Backbone
from nformer_edge.model.checkpoint import save_checkpoint

KILLS = 6

RECIPE = """
views = 2
holdout = 0.25
save_minutes = 0
[[steps]]
kind = "prune"
gmacs = 0.8
importance = "bn_scale"
"""
TRAINED = """
[[steps]]
kind = "{kind}"
[steps.{table}]
epochs = 2
p = 4
k = 2
warmup = 0
"""


def _run(root: Path, out: Path, *more: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "nformer_edge.cli", "compress", str(root / "teacher.safetensors")]
    command += ["--data", str(root / "data"), "--recipe", str(root / "recipe.toml"), "-o", str(out), *more]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def _digests(folder: Path) -> dict[str, str]:
    names = ("student.safetensors", "student.calibration.json")
    return {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names}


@pytest.mark.optional
def test_a_whole_recipe_killed_in_every_step_comes_to_the_same_bits(tmp_path: Path) -> None:
    pytest.importorskip("torch_pruning")
    steps = [("distil", "train"), ("sparsify", "distil.train"), ("qat", "distil.train")]
    (tmp_path / "recipe.toml").write_text(RECIPE + "".join(TRAINED.format(kind=k, table=t) for k, t in steps))
    generate_dataset(tmp_path / "data", GenerateSpec.tiny())
    spec = ModelSpec(BackboneSpec("osnet_x0_25", 32), None, PreprocessSpec(64, 32))
    torch.manual_seed(0)
    save_checkpoint(tmp_path / "teacher.safetensors", spec, Backbone(spec.backbone))
    (tmp_path / "whole").mkdir()
    since = time.monotonic()
    assert _run(tmp_path, tmp_path / "whole" / "student.safetensors").wait() == 0
    seconds = time.monotonic() - since
    killed = 0
    for kill in range(KILLS):
        folder = tmp_path / f"killed-{kill}"
        folder.mkdir()
        out = folder / "student.safetensors"
        process = _run(tmp_path, out)
        time.sleep(seconds * (kill + 1) / (KILLS + 1))
        process.send_signal(signal.SIGKILL)
        killed += process.wait() == -signal.SIGKILL
        begun = list(folder.iterdir())
        assert not out.exists() or process.returncode == 0
        process = _run(tmp_path, out, "--resume" if begun else "--force")
        assert process.wait() == 0
        assert _digests(folder) == _digests(tmp_path / "whole")
    assert killed >= KILLS - 1
