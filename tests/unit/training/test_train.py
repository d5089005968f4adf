from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nformer_edge.core.errors import ArtifactError, DataError, UsageError
from nformer_edge.core.spec import BackboneSpec, HeadSpec, ModelSpec, NeighborRule, PreprocessSpec
from nformer_edge.data.generate import GenerateSpec, generate_dataset
from nformer_edge.data.holdout import split_holdout
from nformer_edge.data.loaders import AugmentSpec, TrainImages
from nformer_edge.data.records import Dataset, ImageRecord
from nformer_edge.model.backbone import Backbone
from nformer_edge.model.checkpoint import load_checkpoint
from nformer_edge.training import stages
from nformer_edge.training.backbone import extract, extract_view, train_backbone
from nformer_edge.training.config import BackboneConfig, HeadConfig, TrainConfig
from nformer_edge.training.history import History
from nformer_edge.training.train import train

PREPROCESS = PreprocessSpec(32, 16)


def tiny(rule: NeighborRule = "features", **changes: Any) -> TrainConfig:
    head = HeadSpec(16, layers=1, heads=2, k=4, landmarks=4, rule=rule)
    config = TrainConfig(
        ModelSpec(BackboneSpec("osnet_x0_25", 16), head, PREPROCESS),
        BackboneConfig(epochs=2, p=4, k=2, lr=1e-3, warmup=0, augment=AugmentSpec(pad=2)),
        HeadConfig(epochs=2, sets=2, views=2),
        holdout=0.34,
    )
    return replace(config, **changes)


@pytest.fixture(scope="module", name="dataset")
def _dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return generate_dataset(tmp_path_factory.mktemp("data") / "tiny", GenerateSpec.tiny())


@pytest.fixture(scope="module", name="run")
def _run(dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, History]:
    out = tmp_path_factory.mktemp("run") / "model.safetensors"
    return out, train(dataset, out, tiny())


def test_training_lowers_the_loss(dataset: Dataset) -> None:
    images = TrainImages(dataset.train, PREPROCESS)
    torch.manual_seed(0)
    plain = AugmentSpec(flip=0, pad=0, erase=0)
    config = BackboneConfig(epochs=8, p=6, k=3, lr=3e-3, warmup=0, schedule="cosine", augment=plain)
    rows = train_backbone(images, Backbone(BackboneSpec("osnet_x0_25", 16)), config)
    assert rows[-1].loss <= 0.9 * rows[0].loss
    assert rows[-1].accuracy > rows[0].accuracy


def test_both_stages_end_in_a_checkpoint_and_its_history(run: tuple[Path, History]) -> None:
    out, history = run
    checkpoint = load_checkpoint(out)
    assert checkpoint.spec == tiny().model
    assert checkpoint.backbone is not None
    assert checkpoint.head is not None
    assert history.sha256 == checkpoint.sha256
    assert History.kind == "training"
    assert History.from_json(json.loads(out.with_suffix(".training.json").read_text())) == history
    assert [row.epoch for row in history.stages["backbone"].epochs] == [1, 2]
    assert [row.epoch for row in history.stages["head"].epochs] == [0, 1, 2]
    for row in history.stages["backbone"].epochs:
        assert row.seconds is not None
        assert row.held_out_map is not None
        assert row.seconds > 0
        assert 0 <= row.held_out_map <= 1
    assert load_checkpoint(out.with_name("model.backbone.safetensors")).head is None


def test_same_seed_gives_the_same_checkpoint(dataset: Dataset, run: tuple[Path, History], tmp_path: Path) -> None:
    again = train(dataset, tmp_path / "again.safetensors", tiny())
    assert again.sha256 == run[1].sha256
    other = train(dataset, tmp_path / "other.safetensors", tiny(seed=1))
    assert other.sha256 != run[1].sha256


def test_training_leaves_the_global_random_state_alone(dataset: Dataset, tmp_path: Path) -> None:
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    stages = {"backbone": replace(tiny().backbone, epochs=1), "head": replace(tiny().head, epochs=1)}
    train(dataset, tmp_path / "m.safetensors", tiny(**stages))
    assert torch.equal(torch.rand(1), expected)


def test_head_alone_is_trained_from_a_checkpoint(dataset: Dataset, run: tuple[Path, History], tmp_path: Path) -> None:
    config = tiny("affinity", backbone=replace(tiny().backbone, epochs=0))
    train(dataset, tmp_path / "m.safetensors", config, initial=run[0])
    was, now = load_checkpoint(run[0]), load_checkpoint(tmp_path / "m.safetensors")
    assert was.backbone is not None
    assert now.backbone is not None
    assert all(torch.equal(t, now.backbone.state_dict()[k]) for k, t in was.backbone.state_dict().items())
    assert now.head is not None
    assert now.head.spec.rule == "affinity"


def test_another_backbone_cannot_be_the_start(dataset: Dataset, run: tuple[Path, History]) -> None:
    config = replace(tiny(), model=replace(tiny().model, backbone=BackboneSpec("osnet_x0_5", 16)))
    with pytest.raises(ArtifactError, match="osnet_x0_25"):
        train(dataset, run[0].with_name("x.safetensors"), config, initial=run[0])


def test_an_interrupted_run_leaves_what_stood_there(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "m.safetensors"
    out.write_bytes(b"yesterday's")

    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(stages, "train_head", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(dataset, out, tiny(backbone=replace(tiny().backbone, epochs=1)), force=True)
    assert out.read_bytes() == b"yesterday's"
    work = tmp_path / "m.unfinished"
    beside = ("backbone.safetensors", "backbone.best.safetensors", "training.csv")
    assert {p.name for p in tmp_path.iterdir()} == {out.name, work.name}
    assert {p.name for p in work.iterdir()} == {"state", *(f"m.{name}" for name in beside)}
    assert {p.name for p in (work / "state").iterdir()} == {"backbone.safetensors", "views.npz"}
    assert load_checkpoint(work / "m.backbone.safetensors").backbone is not None


def test_a_loss_that_is_not_a_number_stops_the_training(dataset: Dataset) -> None:
    backbone = Backbone(BackboneSpec("osnet_x0_25", 16))
    with torch.no_grad():
        backbone.neck.get_parameter("projection.weight").fill_(float("nan"))
    with pytest.raises(DataError, match="got a loss of nan"):
        train_backbone(TrainImages(dataset.train, PREPROCESS), backbone, tiny().backbone)


def test_one_identity_cannot_be_trained_on(dataset: Dataset, tmp_path: Path) -> None:
    first = dataset.train[0].pid
    alone = replace(dataset, train=tuple(r for r in dataset.train if r.pid == first))
    with pytest.raises(DataError, match="expected at least two"):
        train(alone, tmp_path / "m.safetensors", tiny())
    with pytest.raises(UsageError, match=r"ends in \.safetensors"):
        train(alone, tmp_path / "m.pth", tiny())


def test_views_differ_and_repeat(dataset: Dataset) -> None:
    torch.manual_seed(0)
    backbone, images = Backbone(BackboneSpec("osnet_x0_25", 16)).eval(), TrainImages(dataset.train, PREPROCESS)
    spec = ModelSpec(backbone.spec, None, PREPROCESS)
    views = [extract_view(backbone, images, spec, AugmentSpec(pad=2), seed=s).features for s in (1, 1, 2)]
    assert np.array_equal(views[0], views[1])
    assert not np.array_equal(views[0], views[2])
    still = extract_view(backbone, images, spec, AugmentSpec(flip=0, pad=0, erase=0), seed=0)
    plain = extract(backbone, dataset.train, spec)
    assert np.abs(still.features - plain.features).max() <= 1e-5 * np.abs(plain.features).max()
    assert still.paths == plain.paths


def test_holdout_shares_nobody_with_training_and_asks_from_every_camera() -> None:
    records = tuple(ImageRecord(f"{p}-{c}-{i}", p, c) for p in range(1, 11) for c in (1, 2) for i in range(2))
    rest, held = split_holdout(records, 0.3, seed=0)
    assert held is not None
    assert {r.pid for r in rest}.isdisjoint({r.pid for r in held.query})
    assert len({r.pid for r in held.query}) == 3
    assert {r.pid for r in held.gallery} == {r.pid for r in held.query}
    assert {(r.pid, r.camid) for r in held.query} == {(r.pid, c) for r in held.query for c in (1, 2)}
    assert sorted(rest + held.query + held.gallery, key=lambda r: r.path) == sorted(records, key=lambda r: r.path)


def test_holdout_never_takes_people_of_one_camera_or_the_last_two() -> None:
    records = tuple(ImageRecord(f"{p}", p, 1) for p in range(1, 11))
    assert split_holdout(records, 0.5, seed=0) == (records, None)
    two = tuple(ImageRecord(f"{p}-{c}", p, c) for p in (1, 2) for c in (1, 2))
    assert split_holdout(two, 0.9, seed=0) == (two, None)
