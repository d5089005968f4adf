"""Published layouts, by the names and shapes that their projects give: `layouts/`."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from nformer_edge.core.errors import ArtifactError
from nformer_edge.core.spec import BackboneSpec, HeadSpec, PreprocessSpec
from nformer_edge.model.checkpoint import load_checkpoint
from nformer_edge.model.importers.plan import Wanted
from nformer_edge.model.weights import import_checkpoint, import_weights

LAYOUTS = Path(__file__).parent / "layouts"
State = dict[str, Tensor]
Write = Callable[[State], Path]


def values(shape: list[int], generator: torch.Generator) -> Tensor:
    return torch.rand(shape, generator=generator) * 0.04 + 0.01


def layout(name: str) -> State:
    """Random values, positive so that a variance may be among them, under the names and shapes of a project."""
    generator = torch.Generator().manual_seed(0)
    state = {}
    for line in (LAYOUTS / f"{name}.txt").read_text().splitlines():
        tensor, shape = line.split(" ")
        sizes = [] if shape == "-" else [int(n) for n in shape.split("x")]
        state[tensor] = values(sizes, generator) if sizes else torch.tensor(0)
    return state


def renamed(state: State, old: str, new: str) -> State:
    return {new + n.removeprefix(old) if n.startswith(old) else n: t for n, t in state.items()}


def strong_baseline() -> State:
    """The plain ResNet-50: torchvision's names behind ``base.``, then the neck's and the classifier's."""
    state = {f"base.{n}": t for n, t in layout("torchvision_resnet50").items() if not n.startswith("fc.")}
    neck = {n: t for n, t in layout("strong_baseline_resnet50_ibn_a").items() if not n.startswith("base.")}
    return state | neck


def fastreid(version: str) -> State:
    state = layout("fastreid_bot_r50_ibn")
    if version == "1.3":
        return state
    state = renamed(state, "heads.weight", "heads.classifier.weight")
    state |= {
        "pixel_mean": torch.tensor([123.675, 116.28, 103.53]).view(1, 3, 1, 1),
        "pixel_std": torch.tensor([58.395, 57.12, 57.375]).view(1, 3, 1, 1),
    }
    return state if version == "1.0" else renamed(state, "heads.bottleneck.0.", "heads.bnneck.")


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def save(state: State) -> Path:
        torch.save(state, tmp_path / "w.pth")
        return tmp_path / "w.pth"

    return save


BICUBIC = PreprocessSpec(interpolation="bicubic")
PLAIN = PreprocessSpec()


@pytest.mark.parametrize(
    ("state", "backbone", "preprocess", "needless", "matched"),
    [
        (lambda: layout("torchreid_osnet_x0_25"), BackboneSpec("osnet_x0_25", 512, "fc"), PLAIN, 2, 485),
        (lambda: layout("torchvision_resnet50"), BackboneSpec("resnet50", 256), PLAIN, 2, 265),
        (strong_baseline, BackboneSpec("resnet50", 2048, "bn", "no_relu"), PLAIN, 1, 269),
        (
            lambda: layout("strong_baseline_resnet50_ibn_a"), BackboneSpec("resnet50_ibn_a", 2048, "bn"),
            PLAIN, 3, 295,
        ),
        (lambda: fastreid("1.3"), BackboneSpec("resnet50_ibn_a", 2048, "bn", "ceil_pool"), BICUBIC, 1, 295),
        (lambda: fastreid("1.0"), BackboneSpec("resnet50_ibn_a", 2048, "bn", "ceil_pool"), BICUBIC, 1, 295),
        (lambda: fastreid("0.1"), BackboneSpec("resnet50_ibn_a", 2048, "bn", "standard"), BICUBIC, 1, 295),
    ],
    ids=["torchreid", "torchvision", "baseline", "baseline-ibn", "fastreid-1.3", "fastreid-1.0", "fastreid-0.1"],
)  # fmt: skip
def test_a_published_layout_is_recognized_and_matches_whole(
    write: Write,
    state: Callable[[], State],
    backbone: BackboneSpec,
    preprocess: PreprocessSpec,
    needless: int,
    matched: int,
) -> None:
    checkpoint, match = import_weights(write(state()))
    assert (checkpoint.spec.backbone, checkpoint.spec.preprocess) == (backbone, preprocess)
    assert match.whole
    assert (len(match.matched), len(match.needless)) == (matched, needless)
    assert match.left == match.needless
    assert checkpoint.head is None


def test_the_published_nformer_brings_backbone_and_head(write: Write, tmp_path: Path) -> None:
    state = layout("nformer_resnet50")
    result = import_checkpoint(write(state), tmp_path / "m.safetensors")
    checkpoint = load_checkpoint(tmp_path / "m.safetensors")
    assert checkpoint.spec.backbone == BackboneSpec("resnet50", 256, "bnneck", "no_relu")
    assert checkpoint.spec.head == HeadSpec(256, layers=4, heads=2, k=20, landmarks=5, rule="features")
    assert checkpoint.head is not None
    assert torch.equal(checkpoint.head.h[3].attn.c_attn.w, state["nformer.h.3.attn.c_attn.w"])
    assert torch.equal(checkpoint.head.bottleneck.running_var, state["nformer.bottleneck.running_var"])
    assert result.match.needless == ("backbone.classifier.weight", "nformer.classifier.weight") == result.match.left
    assert not result.match.missing
    text = str(result)
    assert "resnet50 from published NFormer" in text
    assert "no ReLU" in text
    assert "2, 20 and 5 are taken" in text


def test_what_the_nformer_file_cannot_say_is_taken_from_the_user(write: Write) -> None:
    checkpoint, _ = import_weights(write(layout("nformer_resnet50")), Wanted(heads=4, k=10))
    assert checkpoint.spec.head == HeadSpec(256, heads=4, k=10)


def test_nformers_first_stage_is_a_backbone_alone(write: Write) -> None:
    state = {n.removeprefix("backbone."): t for n, t in layout("nformer_resnet50").items() if n.startswith("backbone.")}
    checkpoint, match = import_weights(write(state))
    assert match.whole
    assert checkpoint.spec.head is None
    assert checkpoint.spec.backbone.neck == "bnneck"


@torch.no_grad()
def test_a_projections_bias_goes_into_the_batch_norm_that_follows(write: Write) -> None:
    state = layout("nformer_resnet50")
    checkpoint, _ = import_weights(write(state))
    backbone = checkpoint.backbone
    assert backbone is not None
    pooled = torch.rand(3, 2048)
    mean, variance = (state[f"backbone.bottleneck.running_{name}"] for name in ("mean", "var"))
    weight, bias = (state[f"backbone.bottleneck.{name}"] for name in ("weight", "bias"))
    projected = torch.addmm(state["backbone.projection.bias"], pooled, state["backbone.projection.weight"].T)
    expected = torch.nn.functional.batch_norm(projected, mean, variance, weight, bias, eps=1e-5)
    torch.testing.assert_close(backbone.neck(pooled)[1], expected, rtol=1e-4, atol=1e-5)


def test_a_fastreid_reduction_becomes_the_projection(write: Write) -> None:
    state = renamed(fastreid("1.3"), "heads.bottleneck.0.", "heads.bottleneck.1.")
    state = {n: t[:512] if n.startswith("heads.bottleneck.1.") and t.dim() else t for n, t in state.items()}
    state |= {"heads.bottleneck.0.weight": torch.rand(512, 2048, 1, 1), "heads.weight": torch.rand(751, 512)}
    checkpoint, match = import_weights(write(state))
    assert match.whole
    assert checkpoint.spec.backbone == BackboneSpec("resnet50_ibn_a", 512, "bnneck", "ceil_pool")
    assert checkpoint.backbone is not None
    projection = checkpoint.backbone.neck.get_parameter("projection.weight")
    assert torch.equal(projection, state["heads.bottleneck.0.weight"][:, :, 0, 0])


def test_parts_that_we_have_no_place_for_are_refused_unless_allowed(write: Write) -> None:
    """FastReID's squeeze-and-excitation is not built here."""
    state = fastreid("1.3") | {"backbone.layer1.0.se.fc.0.weight": torch.rand(16, 256)}
    with pytest.raises(ArtifactError, match=r"the first without a place is backbone\.layer1\.0\.se\.fc\.0\.weight"):
        import_weights(write(state))
    _, match = import_weights(write(state), partial=True)
    assert match.stray == ("backbone.layer1.0.se.fc.0.weight",)
    assert "1 without a place, so every feature differs from its own" in match.notes[-1]


def test_a_missing_neck_is_refused_unless_allowed(write: Write, tmp_path: Path) -> None:
    state = {n: t for n, t in strong_baseline().items() if not n.startswith("bottleneck.")}
    with pytest.raises(ArtifactError, match=r"4 missing; the first missing is backbone\.neck\.bn\.bias"):
        import_checkpoint(write(state), tmp_path / "m.safetensors")
    assert not (tmp_path / "m.safetensors").exists()
    _, match = import_weights(write(state), partial=True)
    assert len(match.missing) == 4


def test_a_tensor_of_another_shape_counts_as_left_over_and_missing(write: Write) -> None:
    state = strong_baseline() | {"base.conv1.weight": torch.rand(64, 4, 7, 7)}
    _, match = import_weights(write(state), partial=True)
    assert match.missing == ("backbone.trunk.conv1.weight",)
    assert match.stray == ("base.conv1.weight",)


def test_an_imagenet_trunk_starts_with_an_untrained_neck_that_is_always_the_same(write: Write) -> None:
    path = write(layout("torchvision_resnet50"))
    (first, match), (second, _) = (import_weights(path, Wanted(features=128)) for _ in range(2))
    assert first.spec.backbone == BackboneSpec("resnet50", 128)
    assert "backbone.neck.projection.weight" in match.anew
    assert match.whole
    assert first.backbone is not None
    assert second.backbone is not None
    for name, tensor in first.backbone.neck.state_dict().items():
        assert torch.equal(tensor, second.backbone.neck.state_dict()[name])


def test_what_is_missing_or_starts_untrained_is_told_by_name(write: Write, tmp_path: Path) -> None:
    state = {n: t for n, t in layout("torchreid_osnet_x0_25").items() if not n.startswith("conv5.bn.")}
    text = str(import_checkpoint(write(state), tmp_path / "m.safetensors", partial=True))
    assert "osnet_x0_25 from torchreid OSNet, 481 tensors matched, 2 unused, 4 missing" in text
    assert "missing: backbone.trunk.conv5.bn.bias, backbone.trunk.conv5.bn.running_mean" in text
    assert "unused, not needed: classifier.bias, classifier.weight" in text


def test_a_resnet_that_we_do_not_build_is_named(write: Write) -> None:
    state = layout("torchvision_resnet50")
    state |= {
        n.replace("layer3.5", f"layer3.{i}"): t for n, t in state.items() if "layer3.5" in n for i in range(6, 23)
    }
    with pytest.raises(ArtifactError, match=r"w\.pth: got a ResNet of bottlenecks, \(3, 4, 23, 3\) in its layers"):
        import_weights(write(state))


@pytest.mark.parametrize("name", ["torchreid_resnet50_fc512", "torchreid_osnet_x0_25", "ft_net", "fastreid_sbs_r50"])
def test_a_trained_neck_is_never_replaced_without_an_error(write: Write, name: str) -> None:
    path = write(layout(name))
    with pytest.raises(ArtifactError, match=r"missing; the first missing is backbone\.neck\.(projection|bn)"):
        import_weights(path, Wanted(features=64))
    _, match = import_weights(path, Wanted(features=64), partial=True)
    assert "every feature differs" in match.notes[-1]


def test_a_neck_under_an_unknown_name_is_refused(write: Write) -> None:
    state = layout("torchvision_resnet50") | {"embedding.weight": torch.rand(128, 2048)}
    with pytest.raises(ArtifactError, match=r"the first without a place is embedding\.weight"):
        import_weights(write(state))


def test_a_baseline_without_a_neck_has_a_classifier_with_a_bias(write: Write) -> None:
    state = {n: t for n, t in strong_baseline().items() if not n.startswith("bottleneck.")}
    checkpoint, match = import_weights(write(state | {"classifier.bias": torch.rand(751)}))
    assert match.whole
    assert checkpoint.spec.backbone == BackboneSpec("resnet50", 2048, "none", "no_relu")


@pytest.mark.parametrize(
    ("names", "model"),
    [
        (("base.cls_token", "base.pos_embed", "base.blocks.0.attn.qkv.weight", "bottleneck.weight"), "TransReID"),
        (("base.sie_embed", "b1.0.norm1.weight"), "TransReID"),
        (("image_encoder.conv1.weight", "prompt_learner.cls_ctx", "classifier_proj.weight"), "CLIP-ReID"),
        (("image_encoder.transformer.resblocks.0.attn.in_proj_weight", "cv_embed"), "CLIP-ReID"),
        (("base.semantic_embed_w.0.weight", "base.stages.0.blocks.0.attn.w_msa.qkv.weight"), "SOLIDER"),
        (("backbone.stages.0.blocks.0.attn.w_msa.qkv.weight",), "a Swin Transformer"),
        (("cls_token", "blocks.0.attn.qkv.weight"), "a vision transformer"),
        (("model.conv1.weight", "classifier0.add_block.0.weight"), "Person_reID_baseline_pytorch's PCB"),
        (("backbone.cls_token", "heads.bottleneck.0.weight"), "a vision transformer"),
        (("conv.0.weight", "layer1.0.conv1.weight"), "the network of Deep SORT"),
    ],
)
def test_models_that_are_not_built_here_are_named_and_refused(write: Write, names: tuple[str, ...], model: str) -> None:
    with pytest.raises(ArtifactError, match=rf"got weights of {re.escape(model)}.* export it with its own project"):
        import_weights(write({name: torch.ones(2, 2) for name in names}), partial=True)
