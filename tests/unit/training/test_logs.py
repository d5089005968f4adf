from __future__ import annotations

import csv
import sys
from pathlib import Path

import pytest

from nformer_edge.core.errors import BackendError
from nformer_edge.training.history import Epoch
from nformer_edge.training.run import COLUMNS, Logs

ROWS = [Epoch(0, held_out_map=0.25), Epoch(1, loss=2.5, accuracy=0.125, lr=1e-3, seconds=2.0, held_out_map=0.5)]


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_the_csv_file_holds_every_row_of_both_stages_after_each_epoch(tmp_path: Path) -> None:
    logs = Logs(tmp_path / "m.csv")
    logs.note("backbone", ROWS[1:])
    assert len(read(tmp_path / "m.csv")) == 1
    logs.note("head", ROWS[:1])
    logs.note("head", ROWS)
    rows = read(tmp_path / "m.csv")
    assert tuple(rows[0]) == COLUMNS
    assert [(r["stage"], r["epoch"], r["loss"]) for r in rows] == [
        ("backbone", "1", "2.5"), ("head", "0", ""), ("head", "1", "2.5"),
    ]  # fmt: skip


def test_tensorboard_is_named_where_it_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    Logs(tmp_path / "m.csv")
    with pytest.raises(BackendError, match=r"nformer-edge\[logs\]"):
        Logs(tmp_path / "m.csv", tmp_path / "events")


def test_tensorboard_gets_what_was_measured_and_a_resumed_run_draws_no_epoch_twice(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="event files need tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for upto in (2, 3):  # the second run repeats the second epoch and goes on
        logs = Logs(tmp_path / "m.csv", tmp_path / "events")
        rows = [Epoch(e, loss=1.0 / e) for e in (1, 2, 3)]
        for last in range(upto - 1, upto + 1):
            logs.note("head", rows[:last])
        logs.close()
    events = EventAccumulator(str(tmp_path / "events" / "head")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(1, 1.0), (2, 0.5), (3, pytest.approx(1 / 3))]
    assert events.Tags()["scalars"] == ["loss"]
