"""A training's rows as they come: a CSV file, and TensorBoard where it is asked for."""

from __future__ import annotations

import csv
import io
import os
from typing import Any

from nformer_edge.core.artifact import atomic_write
from nformer_edge.core.errors import BackendError

COLUMNS = ("stage", "epoch", "loss", "accuracy", "held_out_map", "lr", "seconds")


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
        self.rows: dict[str, list[dict[str, Any]]] = {}
        self._writers: dict[str, Any] = {}
        self._writer_type: Any = _summary_writer() if tensorboard is not None else None

    def note(self, stage: str, rows: list[dict[str, Any]]) -> None:
        """All rows of a stage so far; the last one is new."""
        self.rows[stage] = rows
        text = io.StringIO()
        writer = csv.DictWriter(text, COLUMNS, restval="", lineterminator="\n")
        writer.writeheader()
        for name, known in self.rows.items():
            writer.writerows({"stage": name, **row} for row in known)
        with atomic_write(self.csv_file) as file:
            file.write(text.getvalue().encode())
        if self._writer_type is not None and rows:
            self._draw(stage, rows[-1])

    def _draw(self, stage: str, row: dict[str, Any]) -> None:
        if stage not in self._writers:
            # what an interrupted run drew from this epoch on is drawn again
            folder = os.path.join(os.fspath(self.tensorboard or ""), stage)
            self._writers[stage] = self._writer_type(folder, purge_step=row["epoch"])
        for name in COLUMNS[2:]:
            if row.get(name) is not None:
                self._writers[stage].add_scalar(name, row[name], row["epoch"])
        self._writers[stage].flush()

    def close(self) -> None:
        for writer in self._writers.values():
            writer.close()


def _summary_writer() -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as e:
        raise BackendError(
            "tensorboard",
            "not installed",
            "it for --tensorboard",
            "pip install 'nformer-edge[logs]', or read the CSV file, which is always written.",
        ) from e
    return SummaryWriter
