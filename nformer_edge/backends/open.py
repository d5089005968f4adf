"""One door for whatever was handed on: a checkpoint, a bundle or an engine."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from contextlib import ExitStack, suppress
from pathlib import Path

from nformer_edge.backends.base import PYTORCH, get
from nformer_edge.backends.engine import KIND as ENGINE
from nformer_edge.backends.engine import Engine, open_engine
from nformer_edge.backends.runner import Runner
from nformer_edge.backends.spec import AUTO
from nformer_edge.core.artifact import kind_of
from nformer_edge.core.errors import ArtifactError, BackendError, UsageError
from nformer_edge.core.filekind import FileKind, file_kind
from nformer_edge.core.machine import instruction_sets, nvidia_driver, user_cache, versions
from nformer_edge.core.signature import refuse_unsigned
from nformer_edge.exporting.bundle import KIND as BUNDLE
from nformer_edge.exporting.bundle import Bundle, open_bundle
from nformer_edge.exporting.session import ONNXRUNTIME
from nformer_edge.metrics.agreement import row_errors

#: How far a row may be off what it was when the model was made, of its norm, by precision as built. FP32 on other CPUs
#: was 3e-6 off, and in FP16 it would be 1e-3; INT8 that is computed plainly was 0.05 off onnxruntime's kernels.
_SELF_TEST_ERROR = {"fp32": 1e-4, "fp16": 0.03, "bf16": 0.14, "int8": 0.14}


def open_model(
    path: str | os.PathLike[str],
    *,
    backend: str = "auto",
    device: str | None = None,
    intra_op_threads: int | None = None,
    contexts: int | None = None,
    reference: bool = False,
    native: bool = True,
) -> Runner:
    """Opens a model by what lies at `path`: a `.safetensors` checkpoint, a bundle's folder or an engine's folder.

    The first time that a machine opens a bundle or an engine, it runs the golden vectors (`self_test`).

    Args:
        path: the model.
        backend: ``auto``, or the one that must run it, such as ``onnxruntime``.
        device: ``cpu``, or a GPU such as ``cuda:0``; of an OpenVINO engine ``gpu`` or ``npu``. None: the CPU, for a
            TensorRT engine the first GPU, for an OpenVINO engine what it was built for.
        intra_op_threads: CPU threads of one forward pass; the backend's own choice if None.
        contexts: of a TensorRT engine, threads of the caller that compute at once: each takes the memory of one
            execution context. Two if None.
        reference: a checkpoint runs layer by layer, nothing folded, to judge engines by.
        native: the head's two operators run in the native kernels where they are compiled; otherwise as plain torch
            or as the standard operators of the file's own bodies.

    Raises:
        ArtifactError: if it is damaged, or none of these, or its golden vectors give something else here.
        BackendError: if its backend is not installed here, or is not the one asked for, or would compute something else
            on this CPU (`backends.onnxruntime.run.refuse_saturation`).
        UsageError: for a device, threads or contexts that this kind of model does not have.
    """
    path = Path(path)
    if not path.is_dir() and path.suffix != ".safetensors":
        found = FileKind("no such file or folder", "Make one with `nformer-edge train`, `export` or `build-engine`.")
        found = file_kind(path) if path.exists() else found
        raise ArtifactError(str(path), found.name, "a checkpoint (.safetensors), a bundle or an engine", found.hint)
    if not path.is_dir():
        _refuse_other(path, "checkpoint", PYTORCH, backend)
        if contexts is not None:
            hint = "Set intra_op_threads: CPU threads of one forward pass."
            raise UsageError("contexts", contexts, "nothing for a checkpoint", hint)
        refuse_unsigned(path, "a checkpoint")
        return _open_checkpoint(path, intra_op_threads, device, reference, native)
    model = open_files(path)
    runs_on = model.manifest.backend if isinstance(model, Engine) else ONNXRUNTIME
    _refuse_other(path, model.files.kind, runs_on, backend)
    how = {"intra_op_threads": intra_op_threads, "contexts": contexts}
    runner = get(runs_on).run(model, device=device, native=native, **how)
    _test_once(model, runner, device)
    return runner


def _refuse_other(path: Path, kind: str, runs_on: str, backend: str) -> None:
    if backend not in (AUTO, runs_on):
        hint = f"Build one: nformer-edge build-engine --backend {backend}"
        raise BackendError(str(path), f"a {kind} that {runs_on} runs", f"one for {backend}", hint)


def _open_checkpoint(
    path: Path, intra_op_threads: int | None, device: str | None, reference: bool, native: bool
) -> Runner:
    try:
        from nformer_edge.backends.torch import TorchRunner
    except ImportError as e:
        hint = "pip install 'nformer-edge[train]', or pass a bundle or an engine."
        expected = "PyTorch and safetensors, to run a checkpoint"
        raise BackendError(str(path), f"no {e.name} here", expected, hint) from e
    return TorchRunner(path, device=device, intra_op_threads=intra_op_threads, reference=reference, native=native)


def open_files(path: str | os.PathLike[str]) -> Bundle | Engine:
    """A bundle or an engine, by what its manifest says, verified.

    Raises:
        ArtifactError: if it is damaged, or neither.
    """
    return open_bundle(path) if kind_of(path, BUNDLE, ENGINE) == BUNDLE else open_engine(path)


def self_test(runner: Runner) -> dict[str, float]:
    """Runs the golden inputs that travel with the model and compares with what it gave when it was made.

    Returns:
        For each part the largest error of a row, of the row's norm; empty for a checkpoint: it has no golden vectors.

    Raises:
        ArtifactError: if a part's output is not what it was.
    """
    golden = runner.golden()
    outputs = {}
    if "images" in golden:
        outputs["backbone"] = (runner.embed(golden["images"]), golden["features"])
    if "head_input" in golden:
        outputs["head"] = (runner.relate(golden["head_input"], golden["landmarks"]), golden["embeddings"])
    largest = {}
    for part, (found, expected) in outputs.items():
        largest[part] = float(row_errors(found, expected).max())
        limit = _SELF_TEST_ERROR[runner.precision[part]]
        if not largest[part] <= limit:
            got = f"a golden vector {largest[part]:.2g} of its norm off what it was when made"
            hint = "This machine computes otherwise, or the model was changed: build the engine here."
            raise ArtifactError(f"{runner.name}: {part}", got, f"at most {limit:g}", hint)
    return largest


def _test_once(model: Bundle | Engine, runner: Runner, device: str | None) -> None:
    """`self_test`, unless this very model has passed it on this machine: the runner is loaded then.

    A passed test is an empty file in the user's cache folder, named by a hash of all that could change the outcome.
    Where it is gone, or there is no such folder, the test runs again.
    """
    package = get(runner.backend).NAME
    facts = {
        "model": model.sha256,
        "versions": versions(package),
        "cpu": [platform.machine(), *instruction_sets()],
        "gpu": [nvidia_driver(), device],
        "native": runner.native,
    }
    name = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    passed = user_cache() / "passed-self-tests" / name
    if passed.exists():
        return
    with ExitStack() as stack:
        stack.enter_context(runner)
        self_test(runner)
        stack.pop_all()  # what was loaded for the test stays loaded
    with suppress(OSError):
        passed.parent.mkdir(parents=True, exist_ok=True)
        passed.touch()
