"""What this machine can do, and for each thing that is missing the next step."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import subprocess
from dataclasses import asdict
from pathlib import Path
from typing import Any

from nformer_edge import __version__
from nformer_edge.backends.tensorrt.build import tensorrt_package
from nformer_edge.backends.tensorrt.plugin.ahead import hint_ahead_of_time, lacking_ahead_of_time
from nformer_edge.backends.tensorrt.plugin.library import find_plugin, plugin_facts
from nformer_edge.backends.tensorrt_rtx.build import tensorrt_rtx_package
from nformer_edge.core.errors import Error
from nformer_edge.core.machine import conditions, instruction_sets, machine, nvidia_driver, package_version, version_key
from nformer_edge.targets.preflight import Mismatch, format_preflight, preflight
from nformer_edge.targets.recipe import Target, read_target


def doctor(target: str | None = None) -> dict[str, Any]:
    """Looks, and changes nothing. Each of ``checks`` has name, ok, found, and next (the next step, or "").

    Args:
        target: name or file of a recipe to compare this machine with.

    Returns:
        JSON of kind ``doctor``: version, python, system, cpu, checks; with `target`, also ``target``: name, summary,
        note and ``mismatches``, each with what, got, expected, hint, blocks.

    Raises:
        UsageError: if there is no such target.
    """
    compared = {} if target is None else {"target": _compared(read_target(target))}
    checks = [
        _check(
            "PyTorch", package_version("torch"), "to train, and to run checkpoints: pip install 'nformer-edge[train]'"
        ),
        _check(
            "ONNX", package_version("onnx"), "to export and to build INT8 engines: pip install 'nformer-edge[quant]'"
        ),
        _check(
            "onnxruntime", package_version("onnxruntime"), "to run bundles and engines: pip install 'nformer-edge[cpu]'"
        ),
        _native_kernels(),
        _gpus(),
        _jetpack(),
        _check("TensorRT", tensorrt_package(), "for a Jetson or a server GPU: pip install 'nformer-edge[tensorrt]'"),
        _check("TensorRT-RTX", tensorrt_rtx_package(), "for a GeForce RTX: pip install 'nformer-edge[tensorrt-rtx]'"),
        _plugin_library(),
    ]
    return {
        "kind": "doctor",
        "version": __version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "cpu": {
            "architecture": platform.machine(),
            "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "instruction_sets": list(instruction_sets()),
            "int8": int8_note(),
        },
        "checks": checks,
        **compared,
    }


def _compared(target: Target) -> dict[str, Any]:
    found = preflight(target, machine(), conditions())
    return {
        "name": target.name,
        "summary": target.summary,
        "note": target.note,
        "mismatches": [asdict(m) for m in found],
    }


def int8_note() -> str:
    """What INT8 can gain on this CPU."""
    found = set(instruction_sets())
    if found & {"avx512_vnni", "avx_vnni", "amx_int8", "asimddp", "i8mm"}:
        return "has instructions for INT8 products: INT8 engines should be faster than FP32"
    return "no instructions for INT8 products (VNNI, dot product): INT8 engines are smaller, but may not be faster"


def _check(name: str, found: str, step: str) -> dict[str, Any]:
    return {"name": name, "ok": bool(found), "found": found, "next": "" if found else step}


def _native_kernels() -> dict[str, Any]:
    there = importlib.util.find_spec("nformer_edge.ops._native") is not None
    return _check("native CPU kernels", "built" if there else "", "install with a C++ compiler: pip install .")


def _gpus() -> dict[str, Any]:
    """By nvidia-smi where there is one, else by the driver's own files (Jetson)."""
    tool = shutil.which("nvidia-smi")
    if tool:
        command = [tool, "--query-gpu=name,compute_cap,memory.total,driver_version", "--format=csv,noheader"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
        except (OSError, subprocess.TimeoutExpired):
            done = None
        if done is not None and done.returncode == 0 and done.stdout.strip():
            return _check("NVIDIA GPU", "; ".join(done.stdout.strip().splitlines()), "")
    driver = nvidia_driver()
    return _check("NVIDIA GPU", driver, "none needed for onnxruntime; for TensorRT, install the NVIDIA driver")


def _jetpack() -> dict[str, Any]:
    try:
        found = Path("/etc/nv_tegra_release").read_text().splitlines()[0].lstrip("# ")
    except (OSError, IndexError):
        found = ""
    return _check("JetPack", found, "none needed here; on a Jetson, flash it with NVIDIA's SDK Manager")


def _plugin_library() -> dict[str, Any]:
    name, library, here = "TensorRT plugin library", find_plugin(), version_key(tensorrt_package())
    if library is None and not lacking_ahead_of_time(here):
        return _check(name, f"none, and none needed: TensorRT {tensorrt_package()} puts the kernels into the plan", "")
    if library is None:
        step = f"nformer-edge build-plugin; without TensorRT's headers: {hint_ahead_of_time(here)}"
        return _check(name, "", f"not needed by onnxruntime; for TensorRT: {step}")
    try:
        facts = plugin_facts(library)
    except Error as e:
        return _check(name, "", f"{e} Build it again: nformer-edge build-plugin")
    codes = ", ".join(f"sm_{a}" for a in facts.get("architectures", ()))
    return _check(name, f"{library} (TensorRT {facts['tensorrt']}, {codes})" if facts else str(library), "")


def format_doctor(found: dict[str, Any]) -> str:
    """The report as text: one line a check, then the next steps."""
    cpu = found["cpu"]
    extensions = " ".join(cpu["instruction_sets"]) or "unknown extensions"
    lines = [
        f"nformer-edge {found['version']}, Python {found['python']}, {found['system']}",
        f"CPU: {cpu['cores']} cores, {cpu['architecture']}, {extensions}",
        f"     {cpu['int8']}",
        "",
    ]
    width = max(len(c["name"]) for c in found["checks"])
    for check in found["checks"]:
        lines.append(f"{'yes' if check['ok'] else ' no'}  {check['name']:<{width}}  {check['found'] or check['next']}")
    if "target" in found:
        target = found["target"]
        mismatches = [Mismatch(**m) for m in target["mismatches"]]
        lines += ["", format_preflight(target["name"], target["summary"], target["note"], mismatches)]
    return "\n".join(lines)
