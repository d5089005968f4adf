"""Stage two from a feature store alone, through the command line as its users call it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nformer_edge.cli import main
from nformer_edge.core.features import Features, load_features, save_features
from nformer_edge.core.spec import BackboneSpec, HeadSpec, ModelSpec, PreprocessSpec
from nformer_edge.data.generate import GenerateSpec, generate_dataset
from nformer_edge.metrics.composition import Composition
from nformer_edge.model.backbone import Backbone
from nformer_edge.model.checkpoint import load_checkpoint, save_checkpoint
from nformer_edge.training.config import HeadConfig, TrainConfig
from nformer_edge.training.history import History
from nformer_edge.training.state import StateFile
from nformer_edge.training.train import train

SPEC = ModelSpec(BackboneSpec("osnet_x0_25", 16), None, PreprocessSpec(32, 16))
CONFIG = TrainConfig(
    replace(SPEC, head=HeadSpec(16, layers=1, k=4, landmarks=4)), head=HeadConfig(epochs=2, sets=3, set_size=20),
    holdout=0.25,
)  # fmt: skip
FLAGS = ("--head-epochs", "1", "--layers", "1", "--k", "4", "--holdout", "0.3")


@pytest.fixture(scope="module", name="folder")
def _folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset, a backbone, and the store that `embed` makes of them."""
    folder = tmp_path_factory.mktemp("stored")
    generate_dataset(folder / "data", replace(GenerateSpec.tiny(), train_ids=8, images=2))
    torch.manual_seed(0)
    save_checkpoint(folder / "backbone.safetensors", SPEC, Backbone(SPEC.backbone))
    assert run("embed", folder / "backbone.safetensors", "--data", folder / "data", "-o", folder / "store.npz",
               "--splits", "train", "--views", 3) == 0  # fmt: skip
    return folder


def run(*words: Any) -> int:
    return main([str(w) for w in words])


def test_a_store_becomes_a_head_and_with_its_backbone_a_whole_model(folder: Path, tmp_path: Path) -> None:
    store = ("--features", folder / "store.npz")
    assert run("train", *store, "-o", tmp_path / "head.safetensors", *FLAGS) == 0
    assert run("train", *store, "-o", tmp_path / "whole.safetensors", *FLAGS,
               "--backbone", folder / "backbone.safetensors") == 0  # fmt: skip
    head, whole = (load_checkpoint(tmp_path / f"{n}.safetensors") for n in ("head", "whole"))
    assert head.backbone is None
    assert whole.backbone is not None
    assert head.spec == whole.spec
    assert (head.spec.backbone, head.spec.preprocess) == (SPEC.backbone, SPEC.preprocess)
    assert head.head is not None
    assert whole.head is not None
    assert all(torch.equal(t, whole.head.state_dict()[k]) for k, t in head.head.state_dict().items())
    history = History.from_json(json.loads((tmp_path / "head.training.json").read_text()))
    assert [row.epoch for row in history.stages["head"].epochs] == [0, 1]
    assert history.config.head.views == 3
    assert run("evaluate", tmp_path / "whole.safetensors", "--data", folder / "data") == 0


def test_the_checkpoint_that_a_bundle_came_from_goes_with_the_bundle_s_features(folder: Path, tmp_path: Path) -> None:
    made = load_features(folder / "store.npz")["train"]
    by_bundle = replace(made, model="f" * 64, checkpoint=made.model)
    by_bundle.save(tmp_path / "store.npz", "train")
    words = ("--features", tmp_path / "store.npz", "--backbone", folder / "backbone.safetensors")
    assert run("train", *words, "-o", tmp_path / "whole.safetensors", *FLAGS) == 0
    assert load_checkpoint(tmp_path / "whole.safetensors").backbone is not None
    replace(by_bundle, precision="int8").save(tmp_path / "store.npz", "train")
    assert run("train", *words, "-o", tmp_path / "other.safetensors", *FLAGS) == 2


def test_another_backbone_than_that_of_the_features_is_refused(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_checkpoint(tmp_path / "other.safetensors", SPEC, Backbone(SPEC.backbone))
    assert run("train", "--features", folder / "store.npz", "-o", tmp_path / "m.safetensors", *FLAGS,
               "--backbone", tmp_path / "other.safetensors") == 2  # fmt: skip
    assert "the model that made" in capsys.readouterr().err


def test_a_store_without_training_images_is_refused(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_features(tmp_path / "s.npz", {"query": load_features(folder / "store.npz")["train"]})
    assert run("train", "--features", tmp_path / "s.npz", "-o", tmp_path / "m.safetensors", *FLAGS) == 2
    assert "expected a split 'train'" in capsys.readouterr().err


def test_features_that_do_not_say_what_made_them_need_the_backbone(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    features = load_features(folder / "store.npz")["train"]
    save_features(tmp_path / "s.npz", {"train": replace(features, spec="")})
    command = ("train", "--features", tmp_path / "s.npz", "-o", tmp_path / "m.safetensors", *FLAGS)
    assert run(*command) == 2
    assert "pass --backbone" in capsys.readouterr().err
    assert run(*command, "--backbone", folder / "backbone.safetensors") == 0


@pytest.mark.parametrize("words", [(), ("--data", "d", "--features", "s.npz")])
def test_either_images_or_features_are_trained_on(tmp_path: Path, words: tuple[str, ...]) -> None:
    with pytest.raises(SystemExit, match="2"):
        run("train", *words, "-o", tmp_path / "m.safetensors")


def test_distractors_and_junk_are_nobody_to_learn(folder: Path, tmp_path: Path) -> None:
    features = load_features(folder / "store.npz")["train"]
    rows = np.arange(len(features))
    pids = np.where(rows % 7 == 0, 0, np.where(rows % 11 == 0, -1, features.pids))
    save_features(tmp_path / "s.npz", {"train": replace(features, pids=pids)})
    history = train(None, tmp_path / "m.safetensors", replace(CONFIG, holdout=0), features=tmp_path / "s.npz")
    assert history.images == int((pids > 0).sum())


def test_held_out_people_are_not_trained_on_and_are_watched(folder: Path, tmp_path: Path) -> None:
    history = train(None, tmp_path / "m.safetensors", CONFIG, features=folder / "store.npz")
    assert history.identities == 6
    assert all(0 <= row.held_out_map <= 1 for row in history.stages["head"].epochs)
    accuracy = Composition.of(load_checkpoint(tmp_path / "m.safetensors").extra)
    assert accuracy.measured_on == "2 people held out of this training"
    assert [(row.title, row.people, row.gain is None) for row in accuracy.rows[:2]] == [
        ("1", 2, False),
        ("2", 2, False),
    ]


def test_without_held_out_people_the_checkpoint_claims_nothing(folder: Path, tmp_path: Path) -> None:
    train(None, tmp_path / "m.safetensors", replace(CONFIG, holdout=0), features=folder / "store.npz")
    assert Composition.of(load_checkpoint(tmp_path / "m.safetensors").extra) is None


def test_a_killed_head_goes_on_to_the_same_bits(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = train(None, tmp_path / "whole.safetensors", CONFIG, features=folder / "store.npz")
    original, left = StateFile.write, [4]

    def write(self: StateFile, tensors: Any, counters: Any) -> None:
        original(self, tensors, counters)
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt

    monkeypatch.setattr(StateFile, "write", write)
    saving = replace(CONFIG, save_minutes=0)
    with pytest.raises(KeyboardInterrupt):
        train(None, tmp_path / "m.safetensors", saving, features=folder / "store.npz")
    again = train(None, tmp_path / "m.safetensors", CONFIG, features=folder / "store.npz", resume=True)
    assert again.sha256 == whole.sha256


def test_features_of_another_length_choose_the_heads_size(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    spec = json.dumps({"backbone": {"arch": "osnet_x0_25", "features": 12}})
    pids = np.repeat(np.arange(1, 7), 4)
    features = Features(rng.normal(size=(24, 12)).astype(np.float32), pids, pids % 2, ("",) * 24, spec=spec)
    save_features(tmp_path / "s.npz", {"train": features})
    train(None, tmp_path / "m.safetensors", replace(CONFIG, holdout=0), features=tmp_path / "s.npz")
    assert load_checkpoint(tmp_path / "m.safetensors").spec.head == HeadSpec(12, layers=1, k=4, landmarks=4)
