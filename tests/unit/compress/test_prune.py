"""Channels and weights that go: what is left is a plain model, and zeros stay zeros."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from nformer_edge.compress import prune
from nformer_edge.compress.compress import compress
from nformer_edge.compress.cost import Cost, cost_of
from nformer_edge.compress.distil import Distil
from nformer_edge.compress.prune import Prune
from nformer_edge.compress.recipe import Recipe
from nformer_edge.compress.sparsify import Sparsify, masks_of, two_of_four
from nformer_edge.core.errors import UsageError
from nformer_edge.core.spec import BackboneSpec, ModelSpec, PreprocessSpec, from_dict, to_dict
from nformer_edge.core.terminal import PROGRESS
from nformer_edge.data.generate import GenerateSpec, generate_dataset
from nformer_edge.exporting.trace import trace_backbone
from nformer_edge.model.backbone import Backbone
from nformer_edge.model.checkpoint import load_checkpoint, save_checkpoint
from nformer_edge.model.osnet import OSBlock
from nformer_edge.model.resnet import IBN
from nformer_edge.training.config import BackboneConfig

TRAIN = BackboneConfig(epochs=1, p=4, k=2, lr=1e-3, warmup=0)
SPEC = ModelSpec(BackboneSpec("osnet_x0_25", 32), None, PreprocessSpec(64, 32))


@pytest.fixture(scope="module", name="data")
def _data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data") / "eight"
    generate_dataset(root, replace(GenerateSpec.tiny(), train_ids=8, seen_by=2, images=2))
    return root


def teacher_at(folder: Path, spec: ModelSpec = SPEC) -> Path:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        save_checkpoint(folder / "teacher.safetensors", spec, Backbone(spec.backbone))
    return folder / "teacher.safetensors"


def test_a_pruned_model_loads_by_its_spec_within_the_budget_and_with_round_widths(data: Path, tmp_path: Path) -> None:
    pytest.importorskip("torch_pruning", reason="torch-pruning is missing")
    teacher, out = teacher_at(tmp_path), tmp_path / "student.safetensors"
    recipe = Recipe((Prune(gmacs=0.7, batches=2), Distil(maps=0.5, train=TRAIN)), views=1, holdout=0.25)
    record = compress(teacher, data, recipe, out)
    pruned = load_checkpoint(out)
    assert pruned.backbone is not None
    assert cost_of(pruned.backbone, (64, 32)).gmacs <= 0.7 * record.teacher.gmacs
    assert from_dict(ModelSpec, to_dict(pruned.spec)) == pruned.spec
    assert pruned.spec.backbone.widths
    convolutions = {n: w for n, w in pruned.spec.backbone.widths.items() if n.endswith(".conv") and "stem" not in n}
    assert all(outputs % 16 == 0 for _, outputs in convolutions.values())


def test_a_time_budget_is_asked_of_the_clock_with_the_model_as_its_bundle_runs(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("torch_pruning", reason="torch-pruning is missing")
    monkeypatch.setitem(PROGRESS, "disable", False)
    monkeypatch.setitem(PROGRESS, "delay", 0.0)
    shapes, narrow = [], []

    def clock(runs: list[Any], _: Any) -> np.ndarray:
        shapes.extend(run().shape for run in runs)
        return np.array([[1.0], [0.5]])

    monkeypatch.setattr(prune, "take_turns", clock)
    teacher = teacher_at(tmp_path)
    for time in (0.6, 0.4):
        out = tmp_path / f"{time}.safetensors"
        recipe = Recipe((Prune(time=time, importance="bn_scale"),), views=1, holdout=0)
        if time < 0.5:
            with pytest.raises(UsageError, match=r"time = 0\.4"):
                compress(teacher, data, recipe, out)
        else:
            compress(teacher, data, recipe, out)
            narrow.append(load_checkpoint(out).spec.backbone.widths)
    assert shapes == [(8, 32)] * 4
    assert all(narrow)
    said = [line for line in capsys.readouterr().err.split("\r") if "pruning" in line and "try" in line]
    assert any("gmacs=" in line and "time=0.5" in line for line in said)


def test_streams_go_until_the_budget_holds_and_the_rest_learns_the_teachers_maps(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted: list[str] = []

    def counting(backbone: Backbone, size: tuple[int, int]) -> Cost:
        counted.append(str([m.streams for m in backbone.modules() if isinstance(m, OSBlock)]))
        return cost_of(backbone, size)

    monkeypatch.setattr(prune, "cost_of", counting)
    teacher, out = teacher_at(tmp_path), tmp_path / "student.safetensors"
    recipe = Recipe((Prune("streams", 0.9, batches=1), Distil(maps=1.0, train=TRAIN)), views=1, holdout=0.25)
    record = compress(teacher, data, recipe, out)
    thin = load_checkpoint(out)
    assert thin.backbone is not None
    assert cost_of(thin.backbone, (64, 32)).gmacs <= 0.9 * record.teacher.gmacs
    gone = {name for name, width in (thin.spec.backbone.widths or {}).items() if width == (0, 0)}
    candidates = [streams for streams in counted if streams != counted[0]]
    assert len(candidates) == len(set(candidates))
    assert 0 < len(gone) == 24 - sum(len(m.streams) for m in thin.backbone.modules() if isinstance(m, OSBlock))
    images = torch.rand(2, 3, 64, 32)
    model = trace_backbone(thin.backbone, (64, 32), 18)
    found = np.asarray(onnxruntime.InferenceSession(model.SerializeToString()).run(None, {"images": images.numpy()})[0])
    with torch.inference_mode():
        np.testing.assert_allclose(found, thin.backbone(images).numpy(), atol=1e-4)


def test_streams_of_a_backbone_without_any_are_refused(data: Path, tmp_path: Path) -> None:
    teacher = teacher_at(tmp_path, replace(SPEC, backbone=BackboneSpec("resnet18", 32)))
    with pytest.raises(UsageError, match="streams of resnet18"):
        compress(teacher, data, Recipe((Prune("streams", 0.7),), views=1), tmp_path / "s.safetensors")


def test_pruning_without_a_budget_is_refused() -> None:
    with pytest.raises(UsageError, match="one of them below 1"):
        Prune()


@pytest.mark.parametrize(
    ("what", "importance", "multiple", "batches", "name"),
    [
        ("streams", "taylor", None, None, "importance"),
        ("streams", None, 8, None, "multiple"),
        ("channels", "bn_scale", None, 4, "batches"),
    ],
)
def test_a_key_that_would_change_nothing_is_refused(
    what: Any, importance: Any, multiple: int | None, batches: int | None, name: str
) -> None:
    with pytest.raises(UsageError, match=rf"^{name}: got .*, expected nothing where .*Leave it out"):
        Prune(what, 0.7, importance=importance, multiple=multiple, batches=batches)


def test_a_plain_student_is_refused(data: Path, tmp_path: Path) -> None:
    pytest.importorskip("torch_pruning", reason="torch-pruning is missing")
    teacher = teacher_at(tmp_path, replace(SPEC, backbone=BackboneSpec("plain_s", 32)))
    with pytest.raises(UsageError, match="adds the identity"):
        compress(teacher, data, Recipe((Prune(gmacs=0.7, importance="bn_scale"),), views=1), tmp_path / "s.safetensors")


@pytest.mark.parametrize(
    ("arch", "neck"), [("resnet50_ibn_a", "bn"), ("osnet_ibn_x1_0", "none"), ("osnet_ain_x0_5", "fc")]
)
def test_channels_that_say_nothing_go_and_the_outputs_stay_in_pytorch_and_in_onnx(
    arch: str, neck: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("torch_pruning", reason="torch-pruning is missing")
    features = {"bn": 2048, "none": 512, "fc": 32}[neck]
    spec = ModelSpec(BackboneSpec(arch, features, neck=neck), None, PreprocessSpec(64, 32))
    torch.manual_seed(0)
    whole, images = Backbone(spec.backbone).eval(), torch.randn(2, 3, 64, 32)
    for norm in whole.modules():
        if isinstance(norm, (torch.nn.BatchNorm2d, torch.nn.InstanceNorm2d)):
            torch.nn.init.normal_(norm.bias)
    for name, layer in whole.named_modules():
        parts = [layer.IN, layer.BN] if isinstance(layer, IBN) else [layer]
        if isinstance(layer, (IBN, torch.nn.BatchNorm2d, torch.nn.InstanceNorm2d)) and not name.endswith(
            (".IN", ".BN")
        ):
            for values in (parts[0].weight, parts[0].bias):
                values.data[:8] = 0
            for values in (parts[-1].weight, parts[-1].bias):
                values.data[-8:] = 0
    pruned, _ = Prune(gmacs=0.999, importance="bn_scale").run(whole, SimpleNamespace(spec=spec))  # type: ignore[arg-type]
    assert cost_of(pruned, (64, 32)).gmacs < 0.9 * cost_of(whole, (64, 32)).gmacs
    save_checkpoint(tmp_path / "m.safetensors", replace(spec, backbone=pruned.spec), pruned)
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    loaded = load_checkpoint(tmp_path / "m.safetensors").backbone
    assert loaded is not None
    with torch.inference_mode():
        said, wanted = loaded.eval()(images), whole(images)
        assert torch.equal(said, pruned(images))
    torch.testing.assert_close(said, wanted, rtol=1e-4, atol=1e-4)
    graph = trace_backbone(loaded, (64, 32), 18).SerializeToString()
    session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    np.testing.assert_allclose(found, said.numpy(), rtol=1e-4, atol=1e-4)


def test_a_spec_with_widths_that_no_layer_has_is_refused() -> None:
    every = {f"trunk.conv2.0.conv2{stream}": (0, 0) for stream in "abcd"}
    for widths in ({"trunk.nothing": (1, 1)}, {"trunk.conv5.conv": (4096, 128)}, {"trunk.conv2d": (0, 0)}, every):
        with pytest.raises(UsageError, match=r"widths\.trunk"):
            Backbone(BackboneSpec("osnet_x0_25", 32, widths=widths))


def test_two_of_four_keeps_the_larger_two_the_earlier_of_equals() -> None:
    weight = torch.tensor([[3.0, -1.0, 2.0, 0.5, 1.0, 1.0, 1.0, 1.0]])
    assert two_of_four(weight).tolist() == [[1, 0, 1, 0, 1, 1, 0, 0]]


@pytest.fixture(scope="module", name="graphs")
def _graphs(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A teacher's and its sparse student's exported files."""
    folder = tmp_path_factory.mktemp("sparse")
    teacher, student = teacher_at(folder), folder / "student.safetensors"
    compress(teacher, data, Recipe((Sparsify(Distil(train=TRAIN)),), views=1, holdout=0), student)
    files = []
    for path in (teacher, student):
        backbone = load_checkpoint(path).backbone
        assert backbone is not None
        files.append(path.with_suffix(".onnx"))
        onnx.save(trace_backbone(backbone, (64, 32), 18), files[-1])
    return files[0], files[1]


def test_sparse_weights_stay_sparse_through_training_and_in_the_exported_file(graphs: tuple[Path, Path]) -> None:
    model = onnx.load(graphs[1])
    weights = {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}
    names = {n.input[1] for n in model.graph.node if n.op_type in ("Conv", "Gemm")}  # a gate serves four streams
    sparse = [weights[name] for name in names if weights[name].shape[1] % 4 == 0]
    assert len(sparse) == len(masks_of(Backbone(SPEC.backbone)))
    for kernel in sparse:
        fours = np.moveaxis(kernel, 1, -1).reshape(-1, 4)
        assert ((fours != 0).sum(axis=1) <= 2).all()


def test_polygraphy_finds_each_layer_of_the_exported_file_sparse_and_the_teachers_not(
    graphs: tuple[Path, Path],
) -> None:
    sparse = pytest.importorskip("polygraphy.tools.sparse", reason="no polygraphy: pip install '.[dev]'")
    layers = len(masks_of(Backbone(SPEC.backbone)))
    found = []
    for path in graphs:
        checked = sparse.SparsityPruner(onnx.load(path))  # `polygraphy inspect sparsity`
        checked.check()
        found.append(len(checked.sparse_tensors))
    assert found == [0, layers]
