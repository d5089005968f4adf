"""The house rules hold: style, types, floors, and a command line that answers at once."""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
HEAVY = ("torch", "onnx", "onnxruntime", "tensorrt", "pycuda", "scipy", "matplotlib")


def tool(name: str) -> str:
    found = shutil.which(name, path=sysconfig.get_path("scripts")) or shutil.which(name)
    assert found, f"{name} is missing: pip install -e '.[dev]'"
    return found


@pytest.mark.parametrize(
    "command",
    [("ruff", "check", "."), ("ruff", "format", "--check", "."), ("mypy",), ("lint-imports",)],
    ids=lambda c: " ".join(c),
)
def test_the_house_rules_hold(command: tuple[str, ...]) -> None:
    done = subprocess.run([tool(command[0]), *command[1:]], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    "code", ["nformer_edge", "nformer_edge.cli", "nformer_edge.backends.open", "nformer_edge.report.html.page"]
)
def test_importing_loads_no_framework(code: str) -> None:
    script = f"import sys, {code}; print([m for m in {HEAVY!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_importing_every_module_changes_nothing_global() -> None:
    script = """
import importlib, logging, os, pkgutil, torch, numpy as np
def state():
    root = logging.getLogger()
    return (torch.get_num_threads(), torch.initial_seed(), torch.get_default_dtype(), torch.backends.cudnn.benchmark,
            len(root.handlers), root.level, dict(os.environ), np.random.get_state()[1].tolist())
before = state()
import nformer_edge
for m in pkgutil.walk_packages(nformer_edge.__path__, "nformer_edge."):
    if not m.name.rsplit(".", 1)[1].startswith(("_", "lib")):  # lib*.so is for onnxruntime to load, no module
        importlib.import_module(m.name)
assert state() == before
"""
    subprocess.run([sys.executable, "-c", script], check=True, cwd=ROOT)
