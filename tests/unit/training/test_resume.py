"""Killed at any moment, a training goes on to the numbers of one that was never interrupted."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nformer_edge.core.errors import ArtifactError, UsageError
from nformer_edge.core.features import Features
from nformer_edge.core.spec import BackboneSpec, HeadSpec, ModelSpec, PreprocessSpec, to_dict
from nformer_edge.data.generate import GenerateSpec, generate_dataset
from nformer_edge.data.loaders import AugmentSpec
from nformer_edge.model.checkpoint import load_checkpoint
from nformer_edge.training.config import BackboneConfig, HeadConfig, TrainConfig
from nformer_edge.training.head import train_head
from nformer_edge.training.history import Epoch, History
from nformer_edge.training.state import StateFile
from nformer_edge.training.train import train

CONFIG = TrainConfig(
    ModelSpec(BackboneSpec("osnet_x0_25", 16), HeadSpec(16, layers=1, k=4, landmarks=4), PreprocessSpec(64, 32)),
    BackboneConfig(epochs=3, p=4, k=2, lr=1e-3, warmup=1, augment=AugmentSpec(pad=2)),
    HeadConfig(epochs=3, sets=3, set_size=20, views=2),
    holdout=0.25,
)
SAVING = replace(CONFIG, save_minutes=0)  # after every batch

Whole = tuple[Path, History]


@pytest.fixture(scope="module", name="data")
def _data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data") / "eight"
    generate_dataset(root, replace(GenerateSpec.tiny(), train_ids=8, seen_by=2, images=2))
    return root


@pytest.fixture(scope="module", name="whole")
def _whole(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    """The same training, never interrupted."""
    out = tmp_path_factory.mktemp("whole") / "m.safetensors"
    return out, train(data, out, CONFIG)


def rows(history: History) -> dict[str, list[Epoch]]:
    """All that was measured but the time it took."""
    return {name: [replace(epoch, seconds=None) for epoch in stage.epochs] for name, stage in history.stages.items()}


def agrees(history: History, out: Path, whole: Whole) -> None:
    assert history.sha256 == whole[1].sha256
    assert rows(history) == rows(whole[1])
    for name in ("backbone", "backbone.best", "head.best", "head.last"):
        was, now = (p.with_name(f"m.{name}.safetensors").read_bytes() for p in (whole[0], out))
        assert was == now, name


class Killed(BaseException):
    """Stands for the signal: nothing in the program catches it."""


@pytest.fixture(name="kill_after")
def _kill_after(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes the n-th write of a state the last thing that happens."""
    original = StateFile.write

    def arm(writes: int) -> None:
        left = [writes]

        def write(self: StateFile, tensors: Any, counters: Any) -> None:
            original(self, tensors, counters)
            left[0] -= 1
            if left[0] == 0:
                raise Killed

        monkeypatch.setattr(StateFile, "write", write)

    return arm


# three batches and the epoch's end, three times; the stage's end; then the same for the head
@pytest.mark.parametrize("writes", [1, 3, 13, 15])
def test_killed_after_a_batch_it_goes_on_to_the_same_numbers(
    data: Path, whole: Whole, tmp_path: Path, kill_after: Any, writes: int
) -> None:
    out = tmp_path / "m.safetensors"
    kill_after(writes)
    with pytest.raises(Killed):
        train(data, out, SAVING)
    assert not out.exists()
    kill_after(-1)
    agrees(train(data, out, CONFIG, resume=True), out, whole)
    beside = ("training.json", "training.csv", *(f"{n}.safetensors" for n in
              ("backbone", "backbone.best", "head.best", "head.last")))  # fmt: skip
    assert {p.name for p in tmp_path.iterdir()} == {"m.safetensors", *(f"m.{name}" for name in beside)}


@pytest.mark.parametrize("seed", [0, 1])
def test_sigkill_at_a_random_moment_changes_no_number(data: Path, whole: Whole, tmp_path: Path, seed: int) -> None:
    out = tmp_path / "m.safetensors"
    script = Path(__file__).parents[2] / "helpers" / "killed.py"
    command = [sys.executable, str(script), str(data), str(out), json.dumps(to_dict(SAVING))]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "begin\n"
        time.sleep(random.Random(seed).uniform(0.1, 0.9) * whole[1].seconds)
        process.kill()
        finished = "end" in process.stdout.read()
    assert finished or not out.with_suffix(".training.json").exists()
    agrees(train(data, out, CONFIG, resume=True), out, whole)


def test_killed_again_and_again_it_still_ends_alike(data: Path, whole: Whole, tmp_path: Path, kill_after: Any) -> None:
    for writes in (3, 4, 2, 5, 4):
        kill_after(writes)
        with pytest.raises(Killed):
            train(data, tmp_path / "m.safetensors", SAVING, resume=True)
    kill_after(-1)
    agrees(train(data, tmp_path / "m.safetensors", CONFIG, resume=True), tmp_path / "m.safetensors", whole)


def test_a_finished_training_is_not_done_again(data: Path, whole: Whole) -> None:
    before = whole[0].stat().st_mtime_ns
    assert train(data, whole[0], CONFIG, resume=True) == whole[1]
    assert whole[0].stat().st_mtime_ns == before


def test_an_earlier_checkpoint_is_replaced_by_force_alone(data: Path, tmp_path: Path, kill_after: Any) -> None:
    out, other = tmp_path / "m.safetensors", replace(CONFIG, seed=1)
    head_alone = replace(CONFIG, backbone=replace(CONFIG.backbone, epochs=0), head=replace(CONFIG.head, epochs=0))
    train(data, out, head_alone)
    before = out.read_bytes()
    for resume in (False, True):
        with pytest.raises(ArtifactError, match=r"m\.safetensors: got an earlier file there.*--force"):
            train(data, out, other, resume=resume)
    assert out.read_bytes() == before
    kill_after(2)
    with pytest.raises(Killed):
        train(data, out, replace(SAVING, seed=1), force=True)
    kill_after(-1)
    train(data, out, other, resume=True)
    assert out.read_bytes() != before


def test_resuming_where_nothing_was_begun_trains_from_the_start(data: Path, whole: Whole, tmp_path: Path) -> None:
    history = train(data, tmp_path / "m.safetensors", CONFIG, resume=True)
    agrees(history, tmp_path / "m.safetensors", whole)


def test_another_configuration_is_not_resumed_and_is_named(data: Path, tmp_path: Path, kill_after: Any) -> None:
    kill_after(2)
    with pytest.raises(Killed):
        train(data, tmp_path / "m.safetensors", SAVING)
    other = replace(CONFIG, backbone=replace(CONFIG.backbone, lr=2e-3))
    with pytest.raises(UsageError, match=r"config\.backbone\.lr: got 0\.002, expected 0\.001"):
        train(data, tmp_path / "m.safetensors", other, resume=True)


def test_the_second_stage_may_change_while_the_first_waits(data: Path, tmp_path: Path, kill_after: Any) -> None:
    kill_after(2)
    with pytest.raises(Killed):
        train(data, tmp_path / "m.safetensors", SAVING)
    kill_after(-1)
    history = train(data, tmp_path / "m.safetensors", replace(CONFIG, head=replace(CONFIG.head, epochs=1)), resume=True)
    assert len(history.stages["head"].epochs) == 2


def test_a_damaged_state_is_refused(data: Path, tmp_path: Path, kill_after: Any) -> None:
    kill_after(2)
    with pytest.raises(Killed):
        train(data, tmp_path / "m.safetensors", SAVING)
    state = tmp_path / "m.unfinished" / "state" / "backbone.safetensors"
    content = bytearray(state.read_bytes())
    content[-1] ^= 1
    state.write_bytes(content)
    with pytest.raises(ArtifactError, match="sha256"):
        train(data, tmp_path / "m.safetensors", CONFIG, resume=True)


def test_without_resume_a_training_begins_anew(data: Path, whole: Whole, tmp_path: Path, kill_after: Any) -> None:
    kill_after(2)
    with pytest.raises(Killed):
        train(data, tmp_path / "m.safetensors", replace(SAVING, seed=1))
    kill_after(-1)
    agrees(train(data, tmp_path / "m.safetensors", CONFIG), tmp_path / "m.safetensors", whole)


@pytest.mark.parametrize("accumulate", [2, 3])
def test_a_state_never_falls_between_the_parts_of_a_step(tmp_path: Path, kill_after: Any, accumulate: int) -> None:
    rng = np.random.default_rng(0)
    pids = np.repeat(np.arange(1, 9), 6)
    views = [Features(rng.normal(size=(48, 16)).astype(np.float32), pids, pids % 2, ("",) * 48)]
    config, spec = HeadConfig(epochs=2, sets=5, set_size=30, accumulate=accumulate), HeadSpec(16, layers=1, k=4)
    want, want_rows = train_head(views, spec, config)
    for writes in (1, 2, 3):
        path = tmp_path / f"{writes}.safetensors"
        kill_after(writes)
        with pytest.raises(Killed):
            train_head(views, spec, config, state=StateFile(path, {}, 0))
        kill_after(-1)
        got, got_rows = train_head(views, spec, config, state=StateFile(path, {}, 0, resume=True))
        assert [r.loss for r in got_rows] == [r.loss for r in want_rows]
        assert all(torch.equal(t, want.state_dict()[k]) for k, t in got.state_dict().items())


def test_the_best_epoch_is_kept_and_named(whole: Whole) -> None:
    out, history = whole
    watched = history.stages["backbone"].epochs
    best = max(watched, key=lambda row: row.held_out_map)
    assert load_checkpoint(out.with_name("m.backbone.best.safetensors")).extra["epoch"] == best.epoch
    head = load_checkpoint(out.with_name("m.head.last.safetensors"))
    assert head.backbone is None
    assert head.extra["epoch"] == 3
