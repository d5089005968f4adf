"""Makes `features.npz` and the layouts of the projects below by running their own code; nothing of it is kept here.

    PYTHONPATH=tests python tests/unit/model/golden/make.py DEEP_PERSON_REID FAST_REID PERSON_REID_BASELINE

Arguments are checkouts. The file was made from KaiyangZhou/deep-person-reid f8cd150, JDAI-CV/fast-reid c9bc3ce and
layumi/Person_reID_baseline_pytorch 82ff40f with torch 2.13, torchvision 0.29 on a CPU. Each model gets the weights of
`helpers.weights_of_others.drawn` (every tensor, strictly) and its `images`; its feature in evaluation mode, the one
that its own test script ranks by, is what the file holds.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from unittest.mock import MagicMock

import numpy as np
import torch
from helpers.weights_of_others import LAYOUTS, drawn, images
from torch import nn


class Stub(ModuleType):
    """A package that their modules import and that no model here uses."""

    def __getattr__(self, name: str) -> object:
        return MagicMock()


def stub(*names: str) -> None:
    sys.modules.update({name: Stub(name) for name in names})


def bare(checkout: str, *names: str) -> None:
    """Packages whose modules are found and whose own ``__init__`` is not run."""
    for name in names:
        sys.modules[name] = ModuleType(name)
        sys.modules[name].__path__ = [str(Path(checkout, *name.split(".")))]


def torchreid(checkout: str) -> dict[str, nn.Module]:
    bare(checkout, "torchreid", "torchreid.models")
    from torchreid.models import osnet, osnet_ain, resnet, resnet_ibn_a  # type: ignore[import-not-found]

    return {
        "torchreid_osnet_x0_25": osnet.osnet_x0_25(751, pretrained=False),
        "torchreid_osnet_ibn_x1_0": osnet.osnet_ibn_x1_0(751, pretrained=False),
        "torchreid_osnet_ain_x0_25": osnet_ain.osnet_ain_x0_25(751, pretrained=False),
        "torchreid_resnet50": resnet.resnet50(751, "softmax", pretrained=False),
        "torchreid_resnet50_fc512": resnet.resnet50_fc512(751, "softmax", pretrained=False),
        "torchreid_resnet50_ibn_a": resnet_ibn_a.resnet50_ibn_a(751, pretrained=False),
    }


def fastreid(checkout: str) -> dict[str, nn.Module]:
    sys.path.insert(0, checkout)
    bare(checkout, "fastreid.modeling", "fastreid.modeling.backbones", "fastreid.modeling.heads")
    from fastreid.modeling.backbones import resnet  # type: ignore[import-not-found]
    from fastreid.modeling.heads.embedding_head import EmbeddingHead  # type: ignore[import-not-found]

    def model(pool: str, *, ibn: bool, non_local: bool, bnneck: bool = True, reduced: int = 0) -> nn.Module:
        backbone = resnet.ResNet(1, "BN", ibn, False, non_local, resnet.Bottleneck, [3, 4, 6, 3], [0, 2, 3, 0])
        head = EmbeddingHead(
            feat_dim=2048, embedding_dim=reduced, num_classes=751, neck_feat="after", pool_type=pool,
            cls_type="Linear", scale=1, margin=0, with_bnneck=bnneck, norm_type="BN",
        )  # fmt: skip
        return nn.ModuleDict({"backbone": backbone, "heads": head})

    return {
        "fastreid_bot_r50_ibn": model("GlobalAvgPool", ibn=True, non_local=False),
        "fastreid_sbs_r50": model("GeneralizedMeanPoolingP", ibn=False, non_local=True, reduced=512),
        "fastreid_sbs_r50_ibn": model("GeneralizedMeanPoolingP", ibn=True, non_local=True),
        "fastreid_agw_r50": model("GeneralizedMeanPooling", ibn=False, non_local=True),
        "fastreid_no_neck_r50": model("GlobalAvgPool", ibn=False, non_local=False, bnneck=False),
    }


def baseline(checkout: str) -> dict[str, nn.Module]:
    stub("timm", "pretrainedmodels")
    sys.path.insert(0, checkout)
    import torchvision  # type: ignore[import-not-found]

    plain = torchvision.models.resnet50
    torchvision.models.resnet50 = lambda pretrained: plain()
    from model import ft_net  # type: ignore[import-not-found]

    models = {"ft_net": ft_net(751, stride=2), "ft_net_stride_1": ft_net(751, stride=1, linear_num=0)}
    for net in models.values():
        net.classifier.classifier = nn.Sequential()  # as its test.py does
    return models


@torch.no_grad()
def main() -> None:
    models = torchreid(sys.argv[1]) | fastreid(sys.argv[2]) | baseline(sys.argv[3])
    features = {}
    for name, model in models.items():
        listed = {key: tuple(t.shape) for key, t in model.state_dict().items()}
        if name not in ("ft_net_stride_1",):
            lines = (f"{key} {'x'.join(map(str, shape)) or '-'}\n" for key, shape in listed.items())
            (LAYOUTS / f"{name}.txt").write_text("".join(lines))
        model.load_state_dict(drawn(listed), strict=True)
        model.eval()
        fast = isinstance(model, nn.ModuleDict)
        out = model["heads"](model["backbone"](images())) if fast else model(images())
        features[name] = out.flatten(1).numpy()
        print(name, features[name].shape, np.corrcoef(features[name])[0, 1], features[name].std())
    np.savez_compressed(Path(__file__).with_name("features.npz"), **features)


if __name__ == "__main__":
    main()
