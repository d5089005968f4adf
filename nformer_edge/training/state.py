"""How far a stage has come, in memory and in the one file that an interrupted stage goes on from. No pickle."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from nformer_edge.core.errors import ArtifactError, Error, UsageError
from nformer_edge.core.terminal import PROGRESS
from nformer_edge.core.values import JSON, Table, from_json, to_json, to_table
from nformer_edge.model.tensorfile import TensorFile
from nformer_edge.training.compute import Compute
from nformer_edge.training.history import Epoch, Identity
from nformer_edge.training.losses import Criterion
from nformer_edge.training.optimize import Optimizer

_WHAT = "the state of an interrupted training"
_FILE = TensorFile("nformer-edge-training-state", _WHAT, "Train again without --resume.")


class StateFile:
    """The state of one stage on disk.

    Args:
        path: of the file.
        identity: another training's state is refused.
        minutes: between two writes, at least.
        resume: whether to read what lies there; otherwise it is overwritten by the first write.
        writes: False on ranks that only read.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        identity: Identity,
        minutes: float = 5.0,
        resume: bool = False,
        writes: bool = True,
    ) -> None:
        self.path, self.identity, self.resume, self.writes = Path(path), identity, resume, writes
        self.seconds = 60 * minutes
        self._last = time.monotonic()

    def due(self) -> bool:
        """Whether the last write is long enough ago."""
        return time.monotonic() - self._last >= self.seconds

    def write(self, tensors: dict[str, Tensor], counters: Table) -> None:
        """Replaces the state, atomically."""
        if self.writes:
            state = {"identity": to_json(self.identity), "counters": counters}
            _FILE.write(self.path, tensors, {"state": json.dumps(state, sort_keys=True, allow_nan=False)})
        self._last = time.monotonic()

    def finish(self, result: Table) -> None:
        """The stage is done: all that a resumed run needs of it is `result`, JSON."""
        self.write({}, {"finished": result})

    def finished(self) -> Table | None:
        """What `finish` was given, if the stage came to its end. Raises as `read` does."""
        found = self._read()
        done = found[1].get("finished") if found else None
        return done if isinstance(done, dict) else None

    def read(self) -> tuple[dict[str, Tensor], Table] | None:
        """Tensors and counters of the interrupted stage; None if there is none to go on with.

        Raises:
            ArtifactError: if the file is damaged.
            UsageError: if it belongs to another training, naming the first difference.
        """
        found = self._read()
        return None if found is None or "finished" in found[1] else found

    def _read(self) -> tuple[dict[str, Tensor], Table] | None:
        if not self.resume or not self.path.exists():
            return None
        tensors, texts = _FILE.read(self.path)
        try:
            state = json.loads(texts["state"])
            identity, counters = dict(state["identity"]), dict(state["counters"])
        except (ValueError, KeyError, TypeError, RecursionError) as e:
            raise self.damaged(e) from e
        for where, was, now in _differences(identity, to_json(self.identity)):
            hint = "Pass what that run was given, or leave out --resume."
            raise UsageError(f"--resume: {where}", now, f"{was}, as in {self.path}", hint)
        return tensors, counters

    def damaged(self, error: Exception) -> ArtifactError:
        """For a state whose hash holds and whose contents do not fit."""
        got = f"contents that do not fit ({type(error).__name__}: {error})"
        return ArtifactError(str(self.path), got, _WHAT, _FILE.hint)


def _differences(was: Any, now: Any, where: str = "") -> Iterator[tuple[str, Any, Any]]:
    if isinstance(was, dict) and isinstance(now, dict):
        for key in sorted(was.keys() | now.keys()):
            yield from _differences(was.get(key), now.get(key), f"{where}.{key}".lstrip("."))
    elif was != now:
        yield where, was, now


@dataclass(frozen=True)
class Counters:
    """What the state of a stage holds beside its tensors; `compute` is the loss scaler's state, `rng` numpy's."""

    epoch: int
    step: int
    seconds: float
    losses: list[float]
    accuracies: list[float]
    rows: list[Epoch]
    best_epoch: int
    highest: float
    lr: float
    compute: Mapping[str, JSON]
    rng: Mapping[str, JSON] | None


_COUNTED = ("epoch", "step", "losses", "accuracies", "rows", "best_epoch", "highest")


class TrainingState:
    """What a stage has done so far: counts batches and epochs, watches, keeps the best model, saves and restores all.

    What a batch holds must follow from (seed, epoch, step) or from `rng`: there is no other hidden state.

    Args:
        model: the one that is trained, as the compute took it over.
        watch: gives the held-out mAP (0..1) of the model in evaluation mode; called after each epoch.
        state: the file to save to and to restore from.
        rng: numpy's generator that the stage draws from, if it has one.
        on_row: called with all rows after each epoch.
        on_best: called now and then, and at the end, with the tensors of the best epoch so far.
    """

    def __init__(
        self,
        model: nn.Module,
        criterion: Criterion,
        optimizer: Optimizer,
        *,
        watch: Callable[[Any], float] | None = None,
        state: StateFile | None = None,
        rng: np.random.Generator | None = None,
        on_row: Callable[[list[Epoch]], None] | None = None,
        on_best: Callable[[dict[str, Tensor], int], None] | None = None,
    ) -> None:
        self.model, self.criterion, self.optimizer, self.rng = model, criterion, optimizer, rng
        self.watch, self.state, self.on_row, self.on_best = watch, state, on_row, on_best
        self.epoch, self.step, self.seconds = 0, 0, 0.0
        self.losses: list[float] = []
        self.accuracies: list[float] = []
        self.rows: list[Epoch] = []
        self.best: dict[str, Tensor] | None = None
        self.best_epoch, self.highest, self._told = 0, -1.0, 0
        self._since = time.perf_counter()

    @property
    def compute(self) -> Compute:
        return self.optimizer.compute

    def bar(self, stage: str, epochs: int) -> tqdm:
        """A progress bar over epochs; the leading rank's alone."""
        quiet = {} if self.compute.leads else {"disable": True}
        return tqdm(total=epochs, initial=self.epoch, desc=stage, unit="epoch", **{**PROGRESS, **quiet})

    def restore(self) -> bool:
        """Takes up the state on disk, if there is one. Returns whether there was."""
        found = self.state.read() if self.state else None
        if found is None or self.state is None:
            return False
        try:
            self._take(found[0], from_json(Counters, found[1]))
        except (KeyError, TypeError, ValueError, RuntimeError, AttributeError, OverflowError, Error) as e:
            raise self.state.damaged(e) from e
        self._since = time.perf_counter()
        return True

    def _take(self, tensors: Mapping[str, Tensor], counters: Counters) -> None:
        parts: dict[str, dict[str, Tensor]] = {"model": {}, "criterion": {}, "adam": {}, "best": {}}
        for name, tensor in tensors.items():
            part, _, key = name.partition("/")
            parts[part][key] = tensor
        with torch.no_grad():  # copied in place: the memory layout stays
            self.model.load_state_dict(parts["model"])
            self.criterion.load_state_dict(parts["criterion"])
        self.optimizer.load_tensors(parts["adam"])
        self.best = parts["best"] or None
        for name in (*_COUNTED, "seconds"):
            setattr(self, name, getattr(counters, name))
        self.optimizer.lr = counters.lr
        self.compute.load_state(counters.compute)
        if self.rng is not None and counters.rng is not None:
            self.rng.bit_generator.state = counters.rng

    def save(self) -> None:
        """Writes the state, and tells of the best epoch. Only after an optimization step, never between its parts."""
        if self.state is None or not self.compute.leads:
            return
        self._tell_best()
        tensors = {f"model/{k}": v for k, v in self.model.state_dict().items()}
        tensors |= {f"criterion/{k}": v for k, v in self.criterion.state_dict().items()}
        tensors |= {f"adam/{k}": v for k, v in self.optimizer.tensors().items()}
        tensors |= {f"best/{k}": v for k, v in (self.best or {}).items()}
        counters = Counters(
            **{name: getattr(self, name) for name in _COUNTED},
            seconds=self.seconds + time.perf_counter() - self._since,
            lr=self.optimizer.lr,
            compute=self.compute.state(),
            rng=to_table(self.rng.bit_generator.state) if self.rng is not None else None,
        )
        self.state.write(tensors, to_table(counters))

    def took(self, loss: float, accuracy: float, part: tuple[int, int] = (0, 1)) -> None:
        """A batch is done."""
        self.losses.append(loss)
        self.accuracies.append(accuracy)
        self.step += 1
        if self.state is not None and part[0] == part[1] - 1 and self.state.due():
            self.save()

    def note(self, row: Epoch) -> Epoch:
        """Adds a row, with the held-out mAP if something is watched."""
        if self.watch is not None:
            held_out = self.watch(self.model.eval()) if self.compute.leads else 0.0
            reached = self.compute.agree(held_out)
            row = replace(row, held_out_map=reached)
            if reached > self.highest:
                self.highest, self.best_epoch = reached, row.epoch
                self.best = {k: v.detach().clone() for k, v in self.model.state_dict().items()}
        self.rows.append(row)
        if self.on_row is not None and self.compute.leads:
            self.on_row(self.rows)
        return row

    def close_epoch(self) -> Epoch:
        """An epoch's batches are done: its row, and the next epoch begins."""
        row = self.note(
            Epoch(
                self.epoch + 1,
                loss=float(np.mean(self.losses)),
                accuracy=float(np.mean(self.accuracies)),
                lr=self.optimizer.lr,
                seconds=self.seconds + time.perf_counter() - self._since,
            )
        )
        self.epoch, self.step, self.seconds, self.losses, self.accuracies = self.epoch + 1, 0, 0.0, [], []
        self._since = time.perf_counter()
        if self.state is not None and self.state.due():
            self.save()
        return row

    def finish(self) -> None:
        """The last epoch is done."""
        self._tell_best()

    def _tell_best(self) -> None:
        if self.on_best is not None and self.best is not None and self._told != self.best_epoch + 1:
            if self.compute.leads:
                self.on_best(self.best, self.best_epoch)
            self._told = self.best_epoch + 1
