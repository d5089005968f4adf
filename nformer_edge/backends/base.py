"""What every backend has, and the one table of them."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, cast

import numpy as np

from nformer_edge.core.spec import Precision, check_choice

if TYPE_CHECKING:
    from nformer_edge.backends.engine import Built
    from nformer_edge.backends.runner import Runner
    from nformer_edge.backends.spec import BuildSpec
    from nformer_edge.exporting.bundle import Bundle, ModelFiles
    from nformer_edge.quantize.values import LowPrecision

#: One line a backend, in the order in which ``auto`` tries them: a GPU's come first, among the CPU's the clock decides
#: (`backends.choice`). It is the backend's package, which has a module `build` that is a `Backend`; the package's own
#: name, with hyphens, is the backend's.
PACKAGES = [
    "nformer_edge.backends.tensorrt",
    "nformer_edge.backends.tensorrt_rtx",
    "nformer_edge.backends.onnxruntime",
    "nformer_edge.backends.openvino",
]

#: What runs a checkpoint. It builds nothing, so it is no `Backend`.
PYTORCH = "pytorch"


class Backend(Protocol):
    """What a backend's module `build` has: two words, build and run, and what this machine is missing for them.

    `NAME` is also the package that it needs, `EXTRA` the extra of ours that installs it, `USE` what it is for. `ON_CPU`
    backends build in seconds and run here: `backends.choice` times them against each other. `INT8_HEAD` backends take
    `BuildSpec.head_precision` ``int8``.
    """

    NAME: str
    EXTRA: str
    USE: str
    PRECISIONS: tuple[Precision, ...]
    ON_CPU: bool
    INT8_HEAD: bool

    @staticmethod
    def missing() -> tuple[str, ...]:
        """What this machine is missing to build, in words that follow "got"; empty if it can build."""
        ...

    @staticmethod
    def missing_to_run() -> tuple[str, ...]:
        """What this machine is missing to run what was built."""
        ...

    @staticmethod
    def build(bundle: Bundle, folder: Path, spec: BuildSpec, low: LowPrecision) -> Built:
        """Writes the engine's files into `folder`. Returns what only the backend knows of them."""
        ...

    @staticmethod
    def run(
        model: ModelFiles,
        *,
        device: str | None = None,
        intra_op_threads: int | None = None,
        contexts: int | None = None,
        native: bool = True,
    ) -> Runner:
        """A runner of an engine that it built; None leaves a number to the backend.

        Raises:
            UsageError: for a device or a number that this backend does not have.
        """
        ...

    @staticmethod
    def node_ms(graph: bytes, precision: Precision, images: np.ndarray) -> Mapping[str, float]:
        """What each node of a backbone takes on this CPU, in milliseconds, by its name; those that were fused into
        another one are left out. Of `ON_CPU` backends that build INT8."""
        ...


def names() -> tuple[str, ...]:
    """Of every backend, in the order of the table."""
    return tuple(_name(package) for package in PACKAGES)


def get(name: str) -> Backend:
    """The backend `name`.

    Raises:
        UsageError: if there is none, with the nearest spelling.
    """
    check_choice("backend", name, names())
    package = next(p for p in PACKAGES if _name(p) == name)
    return cast(Backend, importlib.import_module(f"{package}.build"))


def _name(package: str) -> str:
    return package.rpartition(".")[2].replace("_", "-")
