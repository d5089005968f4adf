"""One plan to build, as data, and the process that builds it: a builder can abort, and takes nobody with it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from nformer_edge.core.errors import BackendError

#: How many of the log's last lines an error shows.
TAIL = 8


@dataclass(frozen=True)
class PlanJob:
    """Everything that a builder must know; it sees no other file of ours.

    Args:
        package: ``tensorrt`` or ``tensorrt_rtx``.
        stage: ``backbone`` or ``head``, for messages.
        graph: the prepared ONNX file.
        plan: where the plan goes.
        log: file to which every line of the builder is appended.
        profile: of each input with a free size, its least, best and largest shape.
        workspace: bytes that the builder may use; None leaves that to TensorRT.
        timing_cache: file with measured kernels, read if it is there and written afterwards; "" for none.
        hardware_compat: ``none``, ``same_compute_capability`` or ``ampere_plus``.
        version_compat: the plan carries a runtime that later versions of TensorRT can open.
        dla: core of the deep learning accelerator, or None for the GPU.
        capabilities: for TensorRT-RTX, compute capabilities to compile for, such as ``8.9``; empty for the GPU here.
        plugin: the plugin library, or "" where the graph needs none.
        plugin_sha256: what that file must be.
        ahead_of_time: the graph's custom nodes are plugins in Python, whose kernels go into the plan.
        flags: for TensorRT 8, builder flags such as ``FP16``.
        float32: for TensorRT 8, layers that must not lose FP32.
        device: ordinal of the GPU.
        verbose: keep the builder's chatter in the log too.
    """

    package: str
    stage: str
    graph: str
    plan: str
    log: str
    profile: dict[str, list[list[int]]]
    workspace: int | None = None
    timing_cache: str = ""
    hardware_compat: str = "none"
    version_compat: bool = False
    dla: int | None = None
    capabilities: Sequence[str] = ()
    plugin: str = ""
    plugin_sha256: str = ""
    ahead_of_time: bool = False
    flags: Sequence[str] = ()
    float32: Sequence[str] = ()
    device: int = 0
    verbose: bool = False


@dataclass(frozen=True)
class BuiltPlan:
    """What a builder tells of its plan.

    Args:
        version: of the package.
        layers: each with ``name``, ``kind``, ``inputs`` and ``outputs`` (types), ``nodes`` (of the ONNX graph).
        built_for: facts of the GPU, or the compute capabilities.
        kernels: those of ours in the plan: operator, entry, sha256 of the PTX, cuda, ptx (its target).
    """

    version: str
    layers: list[dict[str, Any]]
    built_for: dict[str, Any] = field(default_factory=dict)
    kernels: list[dict[str, Any]] = field(default_factory=list)


def run_job(job: PlanJob) -> BuiltPlan:
    """Builds in a process of its own.

    Raises:
        BackendError: as the builder said it; or, if the process died, with how and its log's last lines.
    """
    with tempfile.TemporaryDirectory() as folder:
        request, answer = Path(folder) / "job.json", Path(folder) / "answer.json"
        request.write_text(json.dumps(asdict(job)))
        command = [sys.executable, "-m", "nformer_edge.backends.tensorrt.worker", str(request), str(answer)]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
        if done.stdout or done.stderr:
            with open(job.log, "a") as log:
                log.write(done.stdout + done.stderr)
        found = json.loads(answer.read_text()) if answer.is_file() else {}
    if "error" in found:
        error = found["error"]
        raise BackendError(error["subject"], error["got"], error["expected"], error["hint"])
    if done.returncode or "layers" not in found:
        got = f"{_death(done.returncode)}. Its last words: {tail(job.log)}"
        raise BackendError(
            f"{job.package}: building the {job.stage}",
            got,
            "a plan",
            "The builder itself died: try another version of it, and report the build log.",
        )
    return BuiltPlan(**found)


def _death(code: int) -> str:
    if code >= 0:
        return f"a process that ended with exit code {code}"
    try:
        return f"a process killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"a process killed by signal {-code}"


def tail(log: str | os.PathLike[str], lines: int = TAIL) -> str:
    """The last lines of a build log that say something, as one line."""
    try:
        text = Path(log).read_text(errors="replace")
    except OSError:
        return "none"
    said = [line.strip()[:300] for line in text.splitlines() if line.strip() and not line.startswith("verbose:")]
    return " | ".join(said[-lines:]) or "none"
