from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from nformer_edge.core.errors import UsageError
from nformer_edge.core.spec import BackboneSpec, HeadSpec, ModelSpec, PreprocessSpec, from_dict, to_dict
from nformer_edge.model.backbone import Backbone
from nformer_edge.model.checkpoint import save_checkpoint
from nformer_edge.training.config import HeadConfig, TrainConfig, configure, read_config
from nformer_edge.training.optimize import rate


def test_defaults_are_the_published_recipe() -> None:
    config = TrainConfig()
    assert (config.model.preprocess.height, config.model.preprocess.width) == (256, 128)
    assert config.model.head == HeadSpec(256, layers=4, heads=2, k=20, landmarks=5)
    one = config.backbone
    assert (one.p, one.k, one.lr, one.warmup, one.steps, one.epochs) == (16, 4, 3.5e-4, 10, (40, 70), 120)
    assert (one.warmup_factor, one.schedule, one.weight_decay, one.accumulate) == (0.01, "steps", 5e-4, 1)
    augment = one.augment
    assert (augment.flip, augment.pad, augment.erase) == (0.5, 10, 0.5)
    assert (config.head.set_size, config.head.epochs) == (7000, 20)
    assert (one.loss.label_smoothing, one.loss.margin, one.loss.center_weight) == (0.1, 0.3, 5e-4)


@pytest.mark.parametrize("config", [TrainConfig(), TrainConfig.demo(3, "affinity")])
def test_configuration_survives_json(config: TrainConfig) -> None:
    assert from_dict(TrainConfig, to_dict(config)) == config


def test_toml_sets_what_it_names_and_leaves_the_rest(tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text(
        'seed = 7\n[model.backbone]\narch = "osnet_x0_5"\n[backbone]\nsteps = [5, 9]\n[backbone.loss]\nmargin = 0.5\n'
    )
    config = read_config(tmp_path / "c.toml")
    assert (config.seed, config.model.backbone.arch) == (7, "osnet_x0_5")
    assert (config.backbone.steps, config.backbone.loss.margin, config.backbone.lr) == ((5, 9), 0.5, 3.5e-4)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("epoch = 3", "TrainConfig key|c.toml key"),
        ("[backbone]\nepoch = 3", "Did you mean 'epochs'"),
        ("seed = 'x'", "expected int"),
        ("seed = ", "expected a TOML file"),
        ("holdout = 1.0", "holdout"),
    ],
)
def test_a_configuration_that_cannot_be_used_says_why(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "c.toml").write_text(text)
    with pytest.raises(UsageError, match=message):
        read_config(tmp_path / "c.toml")


def test_flags_win_over_the_file_and_leave_what_they_do_not_name(tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text("seed = 7\nprecision = 'bf16'\n[backbone]\nepochs = 9\n[head]\naccumulate = 3\n")
    assert configure(tmp_path / "c.toml") == read_config(tmp_path / "c.toml")
    changed = configure(tmp_path / "c.toml", epochs=2, accumulate=4, holdout=0.2, deterministic=True, k=5)
    assert (changed.seed, changed.precision, changed.backbone.epochs, changed.holdout) == (7, "bf16", 2, 0.2)
    assert (changed.backbone.accumulate, changed.head.accumulate, changed.deterministic) == (4, 4, True)
    assert changed.model.head is not None
    assert changed.model.head.k == 5


def test_a_file_that_names_another_backbone_keeps_the_head_and_fits_it(tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text("[model.backbone]\nfeatures = 512\n")
    assert read_config(tmp_path / "c.toml").model.head == HeadSpec(512)
    (tmp_path / "c.toml").write_text("[model]\nhead = false\n")
    assert read_config(tmp_path / "c.toml").model.head is None
    (tmp_path / "c.toml").write_text("[model.head]\nk = 7\n")
    assert read_config(tmp_path / "c.toml").model.head == HeadSpec(k=7)


def test_an_initial_checkpoint_says_what_is_trained(tmp_path: Path) -> None:
    made = ModelSpec(BackboneSpec("osnet_x0_25", 24, neck="fc"), None, PreprocessSpec(64, 32))
    save_checkpoint(tmp_path / "m.safetensors", made, Backbone(made.backbone))
    config = configure("published", initial=tmp_path / "m.safetensors", imgsz=(96, 48), k=5)
    assert config.model == ModelSpec(made.backbone, HeadSpec(24, k=5), PreprocessSpec(96, 48))


def test_a_precision_that_does_not_exist_is_named() -> None:
    with pytest.raises(UsageError, match=r"precision: got 'fp8', expected fp32 \| bf16 \| fp16 \| fp64"):
        configure(precision="fp8")


def test_a_missing_configuration_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"none\.toml"):
        read_config(tmp_path / "none.toml")


def test_numbers_out_of_range_are_refused() -> None:
    with pytest.raises(UsageError, match="views: got 0"):
        HeadConfig(views=0)


def test_warm_up_begins_at_the_share_that_it_is_given() -> None:
    assert [rate(1.0, "steps", e, 120, 10, (40, 70), 0.01) for e in (0, 5, 10)] == pytest.approx([0.01, 0.505, 1.0])


def test_steps_schedule_warms_up_then_falls_tenfold() -> None:
    rates = [rate(1.0, "steps", e, 120, 10, (40, 70)) for e in (0, 5, 10, 39.9, 40, 70, 119)]
    assert rates == pytest.approx([0.1, 0.55, 1.0, 1.0, 0.1, 0.01, 0.01])


def test_cosine_schedule_falls_to_a_hundredth() -> None:
    rates = [rate(2.0, "cosine", e, 10, 2) for e in (0, 2, 6, 10)]
    assert rates == pytest.approx([0.2, 2.0, 1.01, 0.02])


def test_schedule_without_warm_up_starts_at_the_full_rate() -> None:
    assert rate(1.0, "cosine", 0.0, 5, 0) == 1.0


def test_a_rule_brings_its_head_and_how_it_is_trained() -> None:
    assert configure().model.head == HeadSpec.gated()
    assert configure().head.epochs == 0
    paper = configure(rule="features", k=7)
    assert paper.model.head == HeadSpec(k=7)
    assert paper.head == HeadConfig()
    gated = configure("published", rule="gated", layers=1)
    assert gated.model.head == replace(HeadSpec.gated(), layers=1)
    assert gated.head == configure().head
