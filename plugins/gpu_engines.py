"""The part of gpu_check.py that needs TensorRT: plugin library, engines in every precision, parity gates, times.

Each step is a command of nformer-edge in a process of its own, as a user would type it; what a machine lacks is named.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]

#: Packages that the steps need, and what brings them.
PACKAGES = {
    "tensorrt": "nformer-edge[tensorrt]", "pycuda": "nformer-edge[tensorrt]", "onnx": "nformer-edge[train]",
    "onnxruntime": "nformer-edge[cpu]", "safetensors": "nformer-edge[train]",
}  # fmt: skip

PRECISIONS = {"fp32": [], "fp16": ["--fp16"], "int8": ["--int8"]}

Command = Callable[..., dict[str, Any]]


def missing() -> list[str]:
    """Packages that are not here, each with what brings it."""
    return [f"{name} (pip install '{extra}')" for name, extra in PACKAGES.items() if not importlib.util.find_spec(name)]


def carries_kernels() -> bool:
    """Whether TensorRT and a compiler here can put the kernels into a plan, without a library."""
    sys.path.append(str(ROOT))  # from a checkout that is not installed
    from nformer_edge.backends.tensorrt.build import installed_version
    from nformer_edge.backends.tensorrt.plugin.ahead import missing_ahead_of_time

    return not missing_ahead_of_time(installed_version())


def command(*words: str) -> dict[str, Any]:
    """Runs ``nformer-edge WORDS``. Returns step, ok, code and the last line that it said."""
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-m", "nformer_edge.cli", *words], capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": paths},
    )  # fmt: skip
    said = (done.stderr if done.returncode else done.stdout).strip().splitlines()
    return {"step": " ".join(words[:2]), "ok": done.returncode == 0, "code": done.returncode, "said": said[-1:]}


def check_engines(folder: Path, backend: str = "tensorrt", run: Command = command) -> dict[str, Any]:
    """Trains a tiny model, builds its engines and judges them against PyTorch. `folder` takes all that is made.

    Returns:
        ``skipped``, or ``steps`` with what each command said and ``gates`` with each parity's JSON by precision, with
        ``-ahead-of-time`` behind it for the plans that carry their kernels.
    """
    absent = missing() if backend == "tensorrt" else []
    if absent:
        return {"skipped": f"no {', no '.join(absent)}"}
    demo, steps, gates = folder / "demo", [], {}
    steps.append(run("demo", "--tiny", "-o", str(demo)))
    libraries = [""]
    if backend == "tensorrt":
        steps.append(run("build-plugin", "-o", str(folder / "plugins")))
        libraries = [str(folder / "plugins")] if steps[-1]["ok"] else []
        libraries += ["none"] if carries_kernels() else []
    if not steps[0]["ok"]:
        return {"steps": steps, "gates": {}}
    for library, precision in itertools.product(libraries, PRECISIONS):
        if backend == "onnxruntime" and precision == "fp16":
            continue  # it has no FP16 on a CPU
        name, flags = precision, PRECISIONS[precision]
        if backend == "tensorrt":
            os.environ["NFORMER_EDGE_PLUGINS"] = library
            name += "-ahead-of-time" if library == "none" else ""
        engine, result = folder / f"engine-{name}", folder / f"parity-{name}.json"
        words = ["build-engine", str(demo / "bundle"), "--backend", backend, *flags, "-o", str(engine)]
        words += ["--calib-data", str(demo / "data")] if precision == "int8" else []
        words += ["--gallery-size", "16:96:2000"] if backend == "tensorrt" else []
        steps.append(run(*words))
        if not steps[-1]["ok"]:
            continue
        compared = [str(demo / "model.safetensors"), str(engine), "--data", str(demo / "data"), "-o", str(result)]
        # A model of a few seconds' training ranks by hairs: what INT8 does to it is told, and fails nothing.
        steps.append({**run("parity", *compared), "required": precision != "int8"})
        if result.is_file():
            gates[name] = json.loads(result.read_text())
        steps.append(run("benchmark", str(engine), "--data", str(demo / "data"), "-o", f"{engine}.json"))
    return {"steps": steps, "gates": gates}


def failures(result: dict[str, Any]) -> list[str]:
    """The steps that failed, with what they said."""
    failed = [
        step for step in result.get("steps", ()) if not step["ok"] and (step.get("required", True) or step["code"] != 1)
    ]
    return [f"{step['step']}: {' '.join(step['said'])}" for step in failed]


def show(result: dict[str, Any]) -> None:
    """Prints a line a step."""
    if "skipped" in result:
        print(f"engines: skipped: {result['skipped']}")
    for step in result.get("steps", ()):
        word = "ok" if step["ok"] else "FAILED" if failures({"steps": [step]}) else "told"
        print(f"  {word:<6} {step['step']}: {' '.join(step['said'])}")
