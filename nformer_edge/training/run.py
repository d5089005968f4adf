"""A training's files: where each lies, whose training it is, what of it is already done, and its rows as they come."""

from __future__ import annotations

import csv
import hashlib
import io
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from nformer_edge.core.artifact import atomic_write, put_together, read_json, recover, require_new_file, sha256_file
from nformer_edge.core.errors import ArtifactError, BackendError
from nformer_edge.data.records import ImageRecord
from nformer_edge.training.compute import Compute
from nformer_edge.training.history import Epoch, Identity, Trained
from nformer_edge.training.state import StateFile

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

R = TypeVar("R", bound=Trained)

COLUMNS = ("stage", *(field.name for field in fields(Epoch)))


class Logs:
    """Writes the rows of both stages.

    Args:
        csv_file: replaced after each epoch, whole or not at all.
        tensorboard: folder for TensorBoard's event files, one below it for each stage; None for none.

    Raises:
        BackendError: if TensorBoard is asked for and missing.
    """

    def __init__(self, csv_file: str | os.PathLike[str], tensorboard: str | os.PathLike[str] | None = None) -> None:
        self.csv_file, self.tensorboard = csv_file, tensorboard
        self.rows: dict[str, Sequence[Epoch]] = {}
        self._writers: dict[str, SummaryWriter] = {}
        self._writer_type: Any = None if tensorboard is None else _summary_writer()

    def note(self, stage: str, rows: Sequence[Epoch]) -> None:
        """All rows of a stage so far; the last one is new."""
        self.rows[stage] = rows
        text = io.StringIO()
        writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
        writer.writeheader()
        for name, known in self.rows.items():
            writer.writerows({"stage": name, **asdict(row)} for row in known)
        with atomic_write(self.csv_file) as file:
            file.write(text.getvalue().encode())
        if self._writer_type is not None and rows:
            self._draw(stage, rows[-1])

    def _draw(self, stage: str, row: Epoch) -> None:
        if stage not in self._writers:
            # what an interrupted run drew from this epoch on is drawn again
            folder = os.path.join(os.fspath(self.tensorboard or ""), stage)
            self._writers[stage] = self._writer_type(folder, purge_step=row.epoch)
        for name in COLUMNS[2:]:
            if getattr(row, name) is not None:
                self._writers[stage].add_scalar(name, getattr(row, name), row.epoch)
        self._writers[stage].flush()

    def close(self) -> None:
        for writer in self._writers.values():
            writer.close()


def _summary_writer() -> type[SummaryWriter]:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as e:
        hint = "pip install 'nformer-edge[logs]', or read the CSV file."
        raise BackendError("tensorboard", "not installed", "it for --tensorboard", hint) from e
    return SummaryWriter


class Run:
    """One training that ends in the checkpoint `out`.

    It works in a folder of its own, ``<stem>.unfinished``. At its end all files take their names at once.

    Args:
        out: the checkpoint; every other file then lies beside it and begins with its stem.
        identity: only the same training is resumed.
        compute: only its leading rank writes.
        minutes: between two writes of a stage's state, at least.
        resume: go on from what an interrupted run of the same training left; without it, begin anew.
        tensorboard: folder for TensorBoard's event files.
    """

    def __init__(
        self,
        out: str | os.PathLike[str],
        identity: Identity,
        compute: Compute,
        minutes: float,
        *,
        resume: bool = False,
        tensorboard: str | os.PathLike[str] | None = None,
    ) -> None:
        self.out, self.identity, self.compute, self.minutes, self.resume = Path(out), identity, compute, minutes, resume
        self.folder = self.out.with_name(f"{self.out.stem}.unfinished")
        self.checkpoint = self.folder / self.out.name
        self.logs = Logs(self.beside("training.csv"), tensorboard if compute.leads else None)
        recover(self.out)

    def beside(self, name: str) -> Path:
        """Where the file waits that will be ``<stem>.<name>``."""
        return self.folder / f"{self.out.stem}.{name}"

    def kept(self, name: str) -> Path:
        """Where the run keeps what only it needs."""
        return self.folder / "state" / name

    def state(self, stage: str, identity: Identity) -> StateFile:
        """The state of one stage, of which `identity` says what decides its numbers."""
        path = self.kept(f"{stage}.safetensors")
        return StateFile(path, identity, self.minutes, self.resume, writes=self.compute.leads)

    def finished(self, kind: type[R]) -> R | None:
        """The record of this training if it came to its end and `resume` asks for no more than that."""
        path = self.out.with_name(self.beside(f"{kind.kind}.json").name)
        if not (self.resume and path.is_file() and self.out.is_file()):
            return None
        try:
            record = kind.from_json(read_json(path, "a history", "Train again."))
        except ArtifactError:
            return None
        same = record.identity == self.identity and record.sha256 == sha256_file(self.out)
        return record if same else None

    def begin(self, force: bool) -> None:
        """Raises ArtifactError where an earlier checkpoint would be replaced; else the folder is ready.

        Not with `force`, and not where `resume` goes on with what an interrupted run left.
        """
        require_new_file(self.out, "a checkpoint", force or (self.resume and self.folder.is_dir()))
        if self.compute.leads and not self.resume:
            shutil.rmtree(self.folder, ignore_errors=True)

    def without(self, name: str) -> None:
        """This run has no such file; at its end an earlier run's goes."""
        if self.compute.leads:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.beside(name).write_bytes(b"")

    def finish(self, record: Trained) -> None:
        """All files take their names; the record stands beside the checkpoint, as ``<stem>.<kind>.json``."""
        self.compute.wait()  # until every rank has read what it needs
        if self.compute.leads:
            record.save(self.beside(f"{record.kind}.json"))
            put_together(self.folder, self.out)
        self.compute.wait()
        self.logs.close()


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
