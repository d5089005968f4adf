from __future__ import annotations

import typing

import pytest
import torch
from torch import nn

from nformer_edge.core.errors import UsageError
from nformer_edge.core.spec import TRUNKS, BackboneSpec, Stem
from nformer_edge.model.backbone import Backbone, for_inference
from nformer_edge.model.osnet import ChannelGate
from nformer_edge.model.resnet import IBN, resnet18, resnet50, resnet50_ibn_a


def parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_resnets_have_the_published_numbers_of_parameters() -> None:
    """torchvision's 11,689,512 and 25,557,032 without their classifiers of 1000."""
    assert parameters(resnet18()) == 11_689_512 - (512 + 1) * 1000
    assert parameters(resnet50()) == 25_557_032 - (2048 + 1) * 1000
    assert parameters(resnet50_ibn_a()) == parameters(resnet50())


def test_osnet_has_the_published_number_of_parameters() -> None:
    """torchreid prints 2,193,616: it counts the gate that four streams share once for each of them."""
    net = Backbone(BackboneSpec("osnet_x1_0", 512, "fc"))
    gates = sum(parameters(m) for m in net.modules() if isinstance(m, ChannelGate))
    assert parameters(net) + 3 * gates == 2_193_616


def test_resnet_keeps_torchvision_names() -> None:
    names = set(resnet50().state_dict())
    assert {"conv1.weight", "bn1.running_mean", "layer1.0.downsample.0.weight", "layer4.2.bn3.bias"} <= names
    assert len(names) == 318  # 320 in torchvision, of which fc.weight and fc.bias are its classifier


def test_ibn_a_normalizes_half_of_the_first_three_stages() -> None:
    net = resnet50_ibn_a()
    places = [name for name, m in net.named_modules() if isinstance(m, IBN)]
    assert len(places) == 3 + 4 + 6
    assert all(name.endswith(".bn1") and not name.startswith("layer4") for name in places)
    assert {"layer1.0.bn1.IN.weight", "layer1.0.bn1.BN.running_var"} <= set(net.state_dict())


def test_ibn_equals_its_two_halves() -> None:
    torch.manual_seed(0)
    ibn, x = IBN(6).eval(), torch.randn(2, 6, 5, 4)
    first = (x[:, :3] - x[:, :3].mean((2, 3), keepdim=True)) / (
        x[:, :3].var((2, 3), unbiased=False, keepdim=True) + 1e-5
    ).sqrt()
    want = torch.cat([first, x[:, 3:] / (1 + 1e-5) ** 0.5], dim=1)
    assert (ibn(x) - want).abs().max() <= 1e-5


@pytest.mark.parametrize("arch", TRUNKS)
def test_backbone_gives_one_feature_an_image(arch: str) -> None:
    net = Backbone(BackboneSpec(arch, 48)).eval()
    images = torch.randn(3, 3, 64, 32)
    with torch.no_grad():
        features = net(images)
        alone = net(images[1:2])
    assert features.shape == (3, 48)
    assert (features[1:2] - alone).abs().max() <= 1e-4 * features.abs().max()


@pytest.mark.parametrize("arch", ["resnet18", "osnet_x0_25"])
def test_last_stride_is_one(arch: str) -> None:
    with torch.no_grad():
        assert Backbone(BackboneSpec(arch)).trunk(torch.randn(1, 3, 256, 128)).shape[2:] == (16, 8)


def test_bn_neck_normalizes_without_a_learned_shift() -> None:
    net = Backbone(BackboneSpec("resnet18", 32)).train()
    before, after = net.both(torch.randn(4, 3, 64, 32))
    want = (before - before.mean(0)) / (before.var(0, unbiased=False) + 1e-5).sqrt()
    assert (after - want).abs().max() <= 1e-4
    frozen = {name for name, p in net.named_parameters() if not p.requires_grad}
    assert frozen == {"neck.bn.bias"}


def test_fc_neck_serves_every_loss_with_one_feature() -> None:
    before, after = Backbone(BackboneSpec("osnet_x0_25", 32, "fc")).both(torch.randn(4, 3, 64, 32))
    assert before is after
    assert (after >= 0).all()


@pytest.mark.parametrize("arch", ["resnet18", "resnet50_ibn_a", "osnet_x0_25"])
@torch.no_grad()
def test_folding_changes_rounding_alone_and_leaves_the_backbone_as_it_was(arch: str) -> None:
    torch.manual_seed(0)
    backbone = Backbone(BackboneSpec(arch, 32)).eval()
    for module in backbone.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None
            assert module.running_var is not None
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2)
    before = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    folded = for_inference(backbone)
    images = torch.randn(2, 3, 64, 32)
    assert sum(isinstance(m, nn.BatchNorm2d) for m in folded.modules()) < len(before) // 10
    torch.testing.assert_close(folded(images), backbone(images), rtol=1e-3, atol=1e-5)
    assert all(torch.equal(tensor, before[name]) for name, tensor in backbone.state_dict().items())


@torch.no_grad()
def test_a_resnets_stem_is_what_the_spec_says() -> None:
    torch.manual_seed(0)
    nets = {stem: resnet18(stem).eval() for stem in typing.get_args(Stem)}
    for net in nets.values():
        net.load_state_dict(nets["standard"].state_dict())
    images = torch.randn(1, 3, 64, 32)
    normed = nets["standard"].bn1(nets["standard"].conv1(images))
    pooled = {
        "standard": nn.functional.max_pool2d(normed.relu(), 3, 2, 1),
        "no_relu": nn.functional.max_pool2d(normed, 3, 2, 1),
        "ceil_pool": nn.functional.max_pool2d(nn.functional.pad(normed.relu(), (0, 1, 0, 1)), 3, 2),
    }
    for stem, net in nets.items():
        x = net.maxpool(net.relu(net.bn1(net.conv1(images))))
        torch.testing.assert_close(x, pooled[stem], rtol=0, atol=0)
        assert net(images).shape == (1, 512, 4, 2)


def test_batch_norm_alone_takes_the_trunks_own_features() -> None:
    before, after = Backbone(BackboneSpec("resnet18", 512, "bn")).eval().both(torch.randn(2, 3, 64, 32))
    torch.testing.assert_close(after, before / (1 + 1e-5) ** 0.5)
    with pytest.raises(UsageError, match="got 256 with neck bn, expected 512"):
        Backbone(BackboneSpec("resnet18", 256, "bn"))
    with pytest.raises(UsageError, match="no_relu with osnet_x0_25"):
        BackboneSpec("osnet_x0_25", 256, "bnneck", "no_relu")
