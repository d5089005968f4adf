"""What every backend's file has, and what the engines are that they write.

An engine is a folder: for TensorRT and TensorRT-RTX the plain plans `backbone.engine` and `nformer.engine` (trtexec
opens them as they are), `golden.npz`, `build.log` with every line of the builder, for INT8 `calibration.json` (the
ranges that were measured; a later build may take them up), and `manifest.json` with these fields:

- ``backend``, ``why``, ``spec`` (what was asked: `EngineSpec`), ``bundle_sha256``, ``files`` with their hashes, and
  what the bundle says of the model.
- ``versions``: ``{"tensorrt": "10.3.0"}`` or ``{"tensorrt_rtx": "1.7.1.116"}``, of the module that built.
- ``built_for``: ``gpu``, ``compute_capability`` such as ``8.7`` and ``multiprocessors`` of the GPU that it was built
  on, with ``hardware_compat`` where it is wider; for TensorRT-RTX ``compute_capabilities``, those it is compiled for.
- ``precision``: of each stage, as built: the narrowest type that any of its products has.
- ``audit``: of each stage the number of layers by type, of products asked and built by type, and those that came out
  otherwise: `backends.tensorrt.audit`.
- ``profiles``: of each stage's inputs the least, best and largest shape.
- ``operators``: for TensorRT, who computes the head's operators: ``library``, ``ahead-of-time``, or null without one.
- ``fp16``: for FP16 and INT8, on how many images overflow was searched, or null, and of each stage the nodes that are
  FP32 beyond the policy, with the reason: `quantize.overflow_search`.
- ``plugin_sha256``: of the plugin library that the head needs to run, or null where it needs none.
- ``kernels``: of ours in the plan itself, with the hash of their PTX, the CUDA that made it and its target.
- ``calibration``: method, number, seed and hash of the images, for INT8; under ``auto`` what the method was chosen by.
- ``float_nodes``: for INT8, nodes of the backbone that were left in float on purpose. `budget.json` beside the manifest
  says what was measured, where that was searched for.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from nformer_edge.quantize.calibrate import Calibration
from nformer_edge.quantize.spec import EngineSpec, OpenBundle


class BackendModule(Protocol):
    """What each backend's file has."""

    NAME: str
    PRECISIONS: tuple[str, ...]

    @staticmethod
    def lacking() -> tuple[str, ...]:
        """What this machine lacks for it, in words that follow "got"; empty if it can build."""
        ...

    @staticmethod
    def lacking_to_run() -> tuple[str, ...]:
        """What this machine lacks besides, to run what it could build."""
        ...

    @staticmethod
    def build(bundle: OpenBundle, folder: Path, spec: EngineSpec, calibration: Calibration | None) -> dict[str, Any]:
        """Writes the engine's files into `folder`. Returns the manifest's fields that only the backend knows."""
        ...
