"""A training's files: where each lies, whose training it is, and what of it is already done."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from nformer_edge.core.artifact import sha256_file
from nformer_edge.data.records import ImageRecord
from nformer_edge.training.compute import Compute
from nformer_edge.training.logs import Logs
from nformer_edge.training.state import StateFile


class Run:
    """One training that ends in the checkpoint `out`.

    Args:
        out: the checkpoint; every other file lies beside it and begins with its stem.
        identity: JSON that says what is trained, on what and how: only the same training is resumed.
        compute: only its leading rank writes.
        minutes: between two writes of a stage's state, at least.
        resume: go on from what an interrupted run of the same training left; without it, begin anew.
        tensorboard: folder for TensorBoard's event files.
    """

    def __init__(
        self,
        out: str | os.PathLike[str],
        identity: dict[str, Any],
        compute: Compute,
        minutes: float,
        *,
        resume: bool = False,
        tensorboard: str | os.PathLike[str] | None = None,
    ) -> None:
        self.out, self.identity, self.compute, self.minutes, self.resume = Path(out), identity, compute, minutes, resume
        self.history = self.out.with_suffix(".training.json")
        self.logs = Logs(self.beside("training.csv"), tensorboard if compute.leads else None)

    def beside(self, name: str) -> Path:
        """``model.safetensors`` and ``backbone.safetensors`` give ``model.backbone.safetensors``."""
        return self.out.with_name(f"{self.out.stem}.{name}")

    def state(self, stage: str, identity: dict[str, Any]) -> StateFile:
        """The state of one stage, of which `identity` says what decides its numbers."""
        path = self.beside(f"{stage}.state.safetensors")
        return StateFile(path, identity, self.minutes, self.resume, writes=self.compute.leads)

    def finished(self) -> dict[str, Any] | None:
        """The history of this training if it came to its end and `resume` asks for no more than that."""
        if not (self.resume and self.history.is_file() and self.out.is_file()):
            return None
        try:
            history = json.loads(self.history.read_text())
        except ValueError:
            return None
        same = history.get("identity") == self.identity and history.get("sha256") == sha256_file(self.out)
        return history if same else None

    def clean(self, *names: str) -> None:
        """Removes files of the run that nobody needs any more."""
        for name in names if self.compute.leads else ():
            self.beside(name).unlink(missing_ok=True)


def images_identity(records: Sequence[ImageRecord], root: str) -> str:
    """Sha256 over names, people and cameras of training images, wherever the dataset lies."""
    digest = hashlib.sha256()
    for r in records:
        digest.update(f"{os.path.relpath(r.path, root)}\0{r.pid}\0{r.camid}\n".encode())
    return digest.hexdigest()


@contextmanager
def determinism(on: bool, device: str) -> Iterator[None]:
    """Within the block torch refuses whatever could give other bits in another run, if `on`."""
    if not on:
        yield
        return
    if torch.device(device).type != "cpu":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it once, when it starts
    cudnn: Any = torch.backends.cudnn
    before = torch.are_deterministic_algorithms_enabled(), cudnn.deterministic, cudnn.benchmark
    torch.use_deterministic_algorithms(True)
    cudnn.deterministic, cudnn.benchmark = True, False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        cudnn.deterministic, cudnn.benchmark = before[1:]
