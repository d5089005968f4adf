"""What an engine is built from: what was asked for, what a recipe says, and what holds where neither does."""

from __future__ import annotations

import dataclasses
import typing
from dataclasses import dataclass
from typing import Literal

from nformer_edge.backends.base import names
from nformer_edge.core.errors import UsageError
from nformer_edge.core.spec import CalibrationChoice, PrecisionChoice, check_at_least, check_choice
from nformer_edge.quantize.spec import QuantizeSpec

AUTO = "auto"

HardwareCompat = Literal["none", "same_compute_capability", "ampere_plus"]
HeadPrecision = Literal["fp32", "int8"]


@dataclass(frozen=True)
class EngineSpec:
    """What is asked for. None leaves a field to a target's recipe, then to the default.

    Args:
        backend: who runs the engine; ``auto``, the default, takes the best that this machine has: a GPU's, or the
            fastest of the CPU's by the clock (`backends.choice`).
        precision: of the backbone; FP32 by default. ``auto`` builds all, and takes the fastest within the accuracy
            budget.
        head_precision: ``int8`` for the linear layers of the paper's head in onnxruntime: no calibration. FP32 by
            default, and always for the gated head, whose time is in its lists. On a GPU the backbone's decides.
        calib_method: for INT8, how ranges follow from activations; ``auto`` takes the method that ranks held-out
            training people best. ``percentile`` by default.
        calib_num: for INT8, calibration images at most; 256 by default.
        batch: images the backbone sees at once: min, opt, max; 1, 8, 32 by default. On a CPU any number runs; opt is
            what engines are timed with, and what OpenVINO is compiled for.
        gallery_size: images the head sees together, likewise; queries count among them. 20, 2000, 50000 by default.
        workspace: GiB that a builder may use; its own choice by default.
        device: where the engine will run; the backend's own choice by default.
        seed: of the choice of calibration images; 0 by default.
        reduce_range: for INT8 on a CPU, 7-bit weights; this machine's CPU decides by default.
        timing_cache: for TensorRT, a file of measured kernels: read if it is there, written afterwards.
        hardware_compat: for TensorRT, ``none``, ``same_compute_capability`` or ``ampere_plus``: the plan runs on more
            GPUs, and slower.
        version_compat: for TensorRT, the plan carries a runtime that later versions open.
        dla: for TensorRT on Jetson, the core that runs the backbone.
        capabilities: for TensorRT-RTX, compute capabilities to compile for; those in common use by default.
        verbose: keep all that the builder says in `build.log`.
        keep_graphs: for TensorRT, leave the ONNX files that were parsed in the engine's folder, to look into.
        exclude_nodes: for INT8, names of the backbone's ONNX nodes that stay in float, beside those that always do.
    """

    backend: str | None = None
    precision: PrecisionChoice | None = None
    head_precision: HeadPrecision | None = None
    calib_method: CalibrationChoice | None = None
    calib_num: int | None = None
    batch: tuple[int, ...] | None = None
    gallery_size: tuple[int, ...] | None = None
    workspace: float | None = None
    device: str | None = None
    seed: int | None = None
    reduce_range: bool | None = None
    timing_cache: str | None = None
    hardware_compat: HardwareCompat | None = None
    version_compat: bool | None = None
    dla: int | None = None
    capabilities: tuple[str, ...] | None = None
    verbose: bool | None = None
    keep_graphs: bool | None = None
    exclude_nodes: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if self.backend is not None:
            check_choice("backend", self.backend, (AUTO, *names()))
        choices = {"precision": PrecisionChoice, "head_precision": HeadPrecision, "calib_method": CalibrationChoice}
        choices["hardware_compat"] = HardwareCompat
        for name, literal in choices.items():
            if getattr(self, name) is not None:
                check_choice(name, getattr(self, name), typing.get_args(literal))
        for name, least in {"calib_num": 1, "seed": 0, "workspace": 0.0, "dla": 0}.items():
            if getattr(self, name) is not None:
                check_at_least(name, getattr(self, name), least)
        for name in ("batch", "gallery_size"):
            if getattr(self, name) is not None:
                check_sizes(name, getattr(self, name))


@dataclass(frozen=True)
class BuildSpec(QuantizeSpec):
    """What is built: the fields of `EngineSpec`, each with its value. Here and in `QuantizeSpec` stand the defaults."""

    backend: str = AUTO
    head_precision: HeadPrecision = "fp32"
    batch: tuple[int, ...] = (1, 8, 32)
    gallery_size: tuple[int, ...] = (20, 2000, 50000)
    workspace: float | None = None
    device: str | None = None
    timing_cache: str | None = None
    hardware_compat: HardwareCompat = "none"
    version_compat: bool = False
    dla: int | None = None
    capabilities: tuple[str, ...] = ()
    verbose: bool = False
    keep_graphs: bool = False

    def __post_init__(self) -> None:
        if self.exclude_nodes and self.precision not in ("int8", AUTO):
            raise UsageError("exclude_nodes", f"names with {self.precision}", "int8", "Add --int8, or leave it out.")

    @property
    def workspace_bytes(self) -> int | None:
        """`workspace` in bytes."""
        return None if self.workspace is None else int(self.workspace * (1 << 30))


def resolve(*specs: EngineSpec | None) -> BuildSpec:
    """Each field from the first of `specs` that has it, such as flags before a recipe; then the default.

    Raises:
        UsageError: for nodes to exclude without INT8.
    """
    chosen = {}
    for field in dataclasses.fields(BuildSpec):
        given = (getattr(spec, field.name) for spec in specs if spec is not None)
        value = next((value for value in given if value is not None), None)
        if value is not None:
            chosen[field.name] = value
    return BuildSpec(**chosen)


def check_sizes(name: str, sizes: tuple[int, ...]) -> None:
    """Raises UsageError unless `sizes` are min, opt and max, in order."""
    if not (len(sizes) == 3 and 1 <= sizes[0] <= sizes[1] <= sizes[2]):
        hint = "Such as 1:8:32" if name == "sizes" else f"Such as --{name.replace('_', '-')} 1:8:32"
        raise UsageError(name, ":".join(map(str, sizes)), "min:opt:max, rising, each at least 1", hint)


def parse_sizes(text: str) -> tuple[int, ...]:
    """``1:8:32``, or ``32`` for min 1, opt 32, max 32.

    Raises:
        UsageError: for anything else.
    """
    try:
        sizes = tuple(int(part) for part in text.split(":"))
    except ValueError:
        raise UsageError("sizes", repr(text), "min:opt:max or one number", "Such as 1:8:32") from None
    sizes = (1, *sizes, *sizes) if len(sizes) == 1 else sizes
    check_sizes("sizes", sizes)
    return sizes
