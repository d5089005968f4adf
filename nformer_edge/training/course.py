"""How far a stage has come: its rows, its best model, and all that decides the numbers still to come."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from nformer_edge.core.terminal import PROGRESS
from nformer_edge.training.compute import Compute
from nformer_edge.training.losses import Criterion
from nformer_edge.training.optimize import Optimizer
from nformer_edge.training.state import StateFile

Row = dict[str, Any]


class Course:
    """Counts batches and epochs, watches, keeps the best model, and saves and restores all of it.

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
        on_row: Callable[[list[Row]], None] | None = None,
        on_best: Callable[[dict[str, Tensor], int], None] | None = None,
    ) -> None:
        self.model, self.criterion, self.optimizer, self.rng = model, criterion, optimizer, rng
        self.watch, self.state, self.on_row, self.on_best = watch, state, on_row, on_best
        self.epoch, self.step, self.seconds = 0, 0, 0.0
        self.losses: list[float] = []
        self.accuracies: list[float] = []
        self.rows: list[Row] = []
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
        if found is None:
            return False
        tensors, counters = found
        parts: dict[str, dict[str, Tensor]] = {"model": {}, "criterion": {}, "adam": {}, "best": {}}
        for name, tensor in tensors.items():
            part, _, key = name.partition("/")
            parts[part][key] = tensor
        with torch.no_grad():  # copied in place: the memory layout stays
            self.model.load_state_dict(parts["model"])
            self.criterion.load_state_dict(parts["criterion"])
        self.optimizer.load_tensors(parts["adam"])
        self.best = parts["best"] or None
        for name in _COUNTERS:
            setattr(self, name, counters[name])
        self.optimizer.lr = counters["lr"]
        self.compute.load_state(counters["compute"])
        if self.rng is not None:
            self.rng.bit_generator.state = counters["rng"]
        self._since = time.perf_counter()
        return True

    def save(self) -> None:
        """Writes the state, and tells of the best epoch. Only after an optimization step, never between its parts."""
        if self.state is None or not self.compute.leads:
            return
        self._tell_best()
        tensors = {f"model/{k}": v for k, v in self.model.state_dict().items()}
        tensors |= {f"criterion/{k}": v for k, v in self.criterion.state_dict().items()}
        tensors |= {f"adam/{k}": v for k, v in self.optimizer.tensors().items()}
        tensors |= {f"best/{k}": v for k, v in (self.best or {}).items()}
        counters = {name: getattr(self, name) for name in _COUNTERS}
        counters["seconds"] = self.seconds + time.perf_counter() - self._since
        counters["lr"] = self.optimizer.lr
        counters["compute"] = self.compute.state()
        counters["rng"] = self.rng.bit_generator.state if self.rng is not None else None
        self.state.write(tensors, counters)

    def took(self, loss: float, accuracy: float, part: tuple[int, int] = (0, 1)) -> None:
        """A batch is done."""
        self.losses.append(loss)
        self.accuracies.append(accuracy)
        self.step += 1
        if self.state is not None and part[0] == part[1] - 1 and self.state.due():
            self.save()

    def note(self, row: Row) -> None:
        """Adds a row, with the held-out mAP if something is watched."""
        if self.watch is not None:
            held_out = self.watch(self.model.eval()) if self.compute.leads else 0.0
            row["held_out_map"] = self.compute.agree(held_out)
            if row["held_out_map"] > self.highest:
                self.highest, self.best_epoch = row["held_out_map"], row["epoch"]
                self.best = {k: v.detach().clone() for k, v in self.model.state_dict().items()}
        self.rows.append(row)
        if self.on_row is not None and self.compute.leads:
            self.on_row(self.rows)

    def close_epoch(self) -> Row:
        """An epoch's batches are done: its row, and the next epoch begins."""
        row = {
            "epoch": self.epoch + 1,
            "loss": float(np.mean(self.losses)),
            "accuracy": float(np.mean(self.accuracies)),
            "lr": self.optimizer.lr,
            "seconds": self.seconds + time.perf_counter() - self._since,
        }
        self.note(row)
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


_COUNTERS = ("epoch", "step", "seconds", "losses", "accuracies", "rows", "best_epoch", "highest")
