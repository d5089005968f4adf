"""A recipe's steps: what a student learns, and that a killed run goes on to the same bits."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from nformer_edge.backends.build import build_engine
from nformer_edge.backends.open import open_model
from nformer_edge.backends.spec import EngineSpec
from nformer_edge.compress import distil
from nformer_edge.compress.compress import Compression, compress
from nformer_edge.compress.distil import Distil, DistilCriterion
from nformer_edge.compress.qat import Qat
from nformer_edge.compress.recipe import Recipe, read_recipe
from nformer_edge.compress.step import Lessons
from nformer_edge.compress.teacher import keep_related
from nformer_edge.core.errors import ArtifactError, UsageError
from nformer_edge.core.spec import BackboneSpec, HeadSpec, ModelSpec, PreprocessSpec
from nformer_edge.data.generate import GenerateSpec, generate_dataset
from nformer_edge.exporting.export import export_bundle
from nformer_edge.gallery.embed import embed_files
from nformer_edge.model.backbone import Backbone, for_inference
from nformer_edge.model.checkpoint import load_checkpoint, save_checkpoint
from nformer_edge.model.gated import make_head
from nformer_edge.model.plain import DiracConv
from nformer_edge.ops.contract import draw_landmarks
from nformer_edge.quantize.values import read_ranges
from nformer_edge.training.config import BackboneConfig
from nformer_edge.training.state import StateFile

TRAIN = BackboneConfig(epochs=2, p=4, k=2, lr=1e-3, warmup=0)
RECIPE = Recipe(
    (
        Distil(relation=0.1, logits=0.1, identity=0.1, maps=1.0, related=1.0, half_epochs=1, train=TRAIN),
        Distil(train=replace(TRAIN, epochs=1)),
    ),
    BackboneSpec("plain_s", 16, "fc"),
    views=2,
    holdout=0.25,
    save_minutes=0,  # after every batch
)

Teacher = tuple[Path, Path]


@pytest.fixture(scope="module", name="teacher")
def _teacher(tmp_path_factory: pytest.TempPathFactory) -> Teacher:
    """A checkpoint, and the dataset."""
    root = tmp_path_factory.mktemp("teacher")
    generate_dataset(root / "data", replace(GenerateSpec.tiny(), train_ids=8, seen_by=2, images=2))
    head = HeadSpec.gated(32)
    spec = ModelSpec(BackboneSpec("osnet_x0_25", 32), head, PreprocessSpec(64, 32))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        save_checkpoint(root / "teacher.safetensors", spec, Backbone(spec.backbone), make_head(head))
    return root / "teacher.safetensors", root / "data"


@pytest.fixture(scope="module", name="whole")
def _whole(teacher: Teacher, tmp_path_factory: pytest.TempPathFactory) -> Compression:
    """The recipe, never interrupted."""
    return compress(*teacher, RECIPE, tmp_path_factory.mktemp("whole") / "student.safetensors")


def test_a_student_comes_out_with_its_own_spec_and_a_figure_of_held_out_people_for_each_step(
    whole: Compression,
) -> None:
    made = load_checkpoint(whole.checkpoint)
    assert made.spec.backbone == RECIPE.student
    assert [done.step for done in whole.steps] == ["distil", "distil"]
    assert all(done.held_out_map is not None for done in whole.steps)
    assert "teacher" in str(whole)


class Killed(BaseException):
    """Stands for the signal: nothing in the program catches it."""


@pytest.mark.parametrize("writes", [1, 5])
def test_killed_and_resumed_it_comes_to_the_same_bits(
    teacher: Teacher, whole: Compression, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writes: int
) -> None:
    left, original = [writes], StateFile.write

    def write(self: StateFile, *what: Any) -> None:
        original(self, *what)
        left[0] -= 1
        if not left[0]:
            raise Killed

    out = tmp_path / "student.safetensors"
    with monkeypatch.context() as patch:
        patch.setattr(StateFile, "write", write)
        with pytest.raises(Killed):
            compress(*teacher, RECIPE, out)
    assert compress(*teacher, RECIPE, out, resume=True).sha256 == whole.sha256


def test_views_that_are_kept_and_views_that_are_drawn_anew_teach_the_same(
    teacher: Teacher, whole: Compression, tmp_path: Path
) -> None:
    anew = replace(RECIPE, steps=(replace(RECIPE.steps[0], keep_mib=0), RECIPE.steps[1]))
    assert compress(*teacher, anew, tmp_path / "student.safetensors").sha256 == whole.sha256


def test_a_store_of_the_teacher_teaches_what_the_teacher_teaches(
    teacher: Teacher, whole: Compression, tmp_path: Path
) -> None:
    store = tmp_path / "teacher.npz"
    embed_files(*teacher, store, splits=("train",), views=2)
    once = replace(RECIPE, steps=RECIPE.steps[1:])
    found = [compress(*teacher, once, tmp_path / f"{i}.safetensors", teacher=s) for i, s in enumerate((None, store))]
    weights = [load_checkpoint(f.checkpoint).backbone.state_dict() for f in found]  # type: ignore[union-attr]
    apart = [(weights[0][k].double() - weights[1][k].double()).abs().max() for k in weights[0]]
    assert max(apart) <= 1e-2  # views are the same; the teacher's features differ by rounding, which Adam enlarges


def test_related_features_are_what_the_told_head_makes_of_all_plain_training_images(
    teacher: Teacher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []

    def watched(path: Path, lessons: Lessons, device: torch.device) -> None:
        keep_related(path, lessons, device)
        found.append((lessons.teacher.features, lessons.images.num_classes, np.load(path)))

    monkeypatch.setattr(distil, "keep_related", watched)
    recipe = Recipe((Distil(feature=0, related=1.0, train=replace(TRAIN, epochs=1)),), views=2, holdout=0)
    compress(*teacher, recipe, tmp_path / "s.safetensors")
    ((plain, people, related),) = found
    with open_model(teacher[0]) as runner:
        runner.tell(len(plain) / people)
        wanted = runner.relate(plain, draw_landmarks(len(plain), 2, 1024, 0))
    np.testing.assert_allclose(related, wanted, atol=1e-5)
    assert not np.allclose(F.normalize(torch.from_numpy(plain)), related, atol=1e-2)


def test_a_teacher_without_a_head_is_refused_where_related_features_are_asked_for(
    teacher: Teacher, tmp_path: Path
) -> None:
    made = load_checkpoint(teacher[0])
    save_checkpoint(tmp_path / "alone.safetensors", replace(made.spec, head=None), made.backbone)
    with pytest.raises(ArtifactError, match="a backbone alone, expected a teacher with a head"):
        compress(tmp_path / "alone.safetensors", teacher[1], RECIPE, tmp_path / "s.safetensors")


def test_a_loss_of_related_features_alone_is_their_squared_distance_at_length_1() -> None:
    images = SimpleNamespace(num_classes=2, labels=np.array([0, 1]))
    lessons = SimpleNamespace(images=images, teacher=SimpleNamespace(features=np.eye(2, dtype=np.float32)))
    criterion = DistilCriterion(Distil(feature=0, similarity=0, related=2.0), lessons, 2)  # type: ignore[arg-type]
    mine, labels = torch.tensor([[3.0, 0.0], [0.0, 5.0]]), torch.tensor([0, 1])
    related = torch.tensor([[7.0, 0.0], [1.0, 0.0]])
    assert criterion(mine, mine, labels, mine, related)[0].item() == pytest.approx(2.0)  # 2 x the mean of 0 and 2


def test_a_store_of_another_model_is_refused(teacher: Teacher, tmp_path: Path) -> None:
    other = load_checkpoint(teacher[0])
    save_checkpoint(tmp_path / "other.safetensors", other.spec, other.backbone, other.head, {"other": 1})
    embed_files(tmp_path / "other.safetensors", teacher[1], tmp_path / "other.npz", splits=("train",))
    with pytest.raises(ArtifactError, match="Embed with that model"):
        compress(*teacher, RECIPE, tmp_path / "s.safetensors", teacher=tmp_path / "other.npz")
    with pytest.raises(ArtifactError, match="no such file"):
        compress(*teacher, RECIPE, tmp_path / "s.safetensors", teacher=tmp_path / "none.npz")


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("seed = 1", "at least one table"),
        ("[[steps]]\nkind = 'distill'", "Did you mean 'distil'"),
        ("[[steps]]\nkind = 'distil'\nfeatures = 1", "Did you mean 'feature'"),
        ("[[steps]]\nkind = 'distil'\n[steps.train.augment]\npad = 2", "recipe's own augment"),
    ],
)
def test_a_recipe_that_does_not_fit_is_refused(text: str, named: str, tmp_path: Path) -> None:
    path = tmp_path / "r.toml"
    path.write_text(text)
    with pytest.raises(UsageError, match=named):
        read_recipe(path)


def test_the_identity_in_a_kernel_is_a_shortcut_and_folds_away() -> None:
    conv, x = DiracConv(16, 16), torch.randn(2, 16, 8, 8)
    assert torch.allclose(conv(x), x + F.conv2d(x, conv.weight, padding=1), atol=1e-5)
    backbone = Backbone(BackboneSpec("plain_s", 16, "fc")).eval()
    images = torch.randn(2, 3, 64, 32)
    folded = for_inference(backbone)
    assert not any(isinstance(m, DiracConv) for m in folded.modules())
    assert torch.allclose(folded(images), backbone(images), atol=1e-5)


def test_trained_quantized_it_leaves_ranges_that_its_bundle_is_built_with(teacher: Teacher, tmp_path: Path) -> None:
    recipe = replace(RECIPE, steps=(Qat(calib_num=4, distil=Distil(train=replace(TRAIN, epochs=1))),), student=None)
    done = compress(*teacher, recipe, tmp_path / "student.safetensors")
    assert [step.step for step in done.steps] == ["qat"]
    bundle = export_bundle(tmp_path / "student.safetensors", tmp_path / "bundle")
    spec = EngineSpec("onnxruntime", "int8")
    engine = build_engine(bundle, tmp_path / "engine", spec, tmp_path / "student.calibration.json")
    assert read_ranges(engine / "calibration.json") == read_ranges(tmp_path / "student.calibration.json")
