"""One plan to build, as data, and the process that builds it: a builder can abort, and takes nobody with it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from nformer_edge.backends.engine import BuiltFor, KernelInPlan, Profile
from nformer_edge.backends.tensorrt.audit import Layer
from nformer_edge.core.errors import BackendError
from nformer_edge.core.values import dumps, from_json, to_json

#: How many of the log's last lines an error shows.
TAIL = 8


@dataclass(frozen=True)
class PlanJob:
    """Everything that a builder must know; it sees no other file of ours."""

    package: str  # the Python module of TensorRT or TensorRT-RTX
    part: str = ""  # "backbone" or "head", for messages
    graph: str = ""  # the prepared ONNX file
    plan: str = ""  # where the plan goes
    log: str = ""  # file to which every line of the builder is appended
    profile: Profile = field(default_factory=dict)
    workspace: int | None = None  # bytes that the builder may use; None leaves that to TensorRT
    timing_cache: str = ""  # file with measured kernels, read if it is there and written afterwards; "" for none
    hardware_compat: str = "none"  # or "same_compute_capability" or "ampere_plus"
    version_compat: bool = False  # the plan carries a runtime that later versions of TensorRT can open
    dla: int | None = None  # core of the deep learning accelerator, or None for the GPU
    capabilities: tuple[str, ...] = ()  # for TensorRT-RTX, such as 8.9, to compile for; empty for the GPU here
    plugin: str = ""  # the plugin library, or "" where the graph needs none
    plugin_sha256: str = ""  # what that file must be
    ahead_of_time: bool = False  # the graph's custom nodes are plugins in Python, whose kernels go into the plan
    flags: tuple[str, ...] = ()  # for TensorRT 8, builder flags such as FP16
    float32: tuple[str, ...] = ()  # for TensorRT 8, layers that must not lose FP32
    device: int = 0  # ordinal of the GPU
    verbose: bool = False  # keep the builder's verbose lines in the log too


@dataclass(frozen=True)
class BuiltPlan:
    """What a builder tells of its plan."""

    version: str  # of the package
    layers: tuple[Layer, ...]
    built_for: BuiltFor
    kernels: tuple[KernelInPlan, ...] = ()  # those of ours in the plan


@dataclass(frozen=True)
class Refusal:
    """An error of the builder's process, field by field as in `core.errors.Error`."""

    subject: str
    got: str | None
    expected: str | None
    hint: str


@dataclass(frozen=True)
class Answer:
    """What the builder's process hands back: one of the two."""

    plan: BuiltPlan | None = None
    refusal: Refusal | None = None


def run_job(job: PlanJob) -> BuiltPlan:
    """Builds in a process of its own.

    Raises:
        BackendError: as the builder said it; or, if the process died, with how and its log's last lines.
    """
    with tempfile.TemporaryDirectory() as folder:
        request, answer = Path(folder) / "job.json", Path(folder) / "answer.json"
        request.write_text(dumps(to_json(job)))
        command = [sys.executable, "-m", "nformer_edge.backends.tensorrt.network", str(request), str(answer)]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
        if done.stdout or done.stderr:
            with open(job.log, "a") as log:
                log.write(done.stdout + done.stderr)
        found = from_json(Answer, json.loads(answer.read_text())) if answer.is_file() else Answer()
    if found.refusal is not None:
        raise BackendError(found.refusal.subject, found.refusal.got, found.refusal.expected, found.refusal.hint)
    if done.returncode or found.plan is None:
        got = f"{_death(done.returncode)}. Its last words: {tail(job.log)}"
        hint = "The builder itself died: try another version of it, and report the build log."
        raise BackendError(f"{job.package}: building the {job.part}", got, "a plan", hint)
    return found.plan


def _death(code: int) -> str:
    if code >= 0:
        return f"a process that ended with exit code {code}"
    return f"a process killed by {next((s.name for s in signal.Signals if s == -code), f'signal {-code}')}"


def tail(log: str | os.PathLike[str], lines: int = TAIL) -> str:
    """The last lines of a build log that say something, as one line."""
    try:
        text = Path(log).read_text(errors="replace")
    except OSError:
        return "none"
    said = [line.strip()[:300] for line in text.splitlines() if line.strip() and not line.startswith("verbose:")]
    return " | ".join(said[-lines:]) or "none"
