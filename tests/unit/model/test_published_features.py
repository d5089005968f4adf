"""Imported weights give the features that each project's own code gives: `golden/make.py` says how they were made."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.weights_of_others import drawn, images, shapes
from torch import Tensor

from nformer_edge.core.spec import BackboneSpec
from nformer_edge.model.importers.plan import Wanted
from nformer_edge.model.weights import import_weights

GOLDEN = Path(__file__).parent / "golden" / "features.npz"
MODELS = {
    "torchreid_osnet_x0_25": BackboneSpec("osnet_x0_25", 512, "fc"),
    "torchreid_osnet_ibn_x1_0": BackboneSpec("osnet_ibn_x1_0", 512, "fc"),
    "torchreid_osnet_ain_x0_25": BackboneSpec("osnet_ain_x0_25", 512, "fc"),
    "torchreid_resnet50": BackboneSpec("resnet50", 2048, "none", last_stride=2),
    "torchreid_resnet50_fc512": BackboneSpec("resnet50", 512, "fc"),
    "torchreid_resnet50_ibn_a": BackboneSpec("resnet50_ibn_a", 2048, "none", last_stride=2),
    "fastreid_bot_r50_ibn": BackboneSpec("resnet50_ibn_a", 2048, "bn", "ceil_pool"),
    "fastreid_sbs_r50": BackboneSpec("resnet50", 512, "bnneck", "ceil_pool", "gem", 1, True),
    "fastreid_sbs_r50_ibn": BackboneSpec("resnet50_ibn_a", 2048, "bn", "ceil_pool", "gem", 1, True),
    "fastreid_agw_r50": BackboneSpec("resnet50", 2048, "bn", "ceil_pool", "gem", 1, True),
    "fastreid_no_neck_r50": BackboneSpec("resnet50", 2048, "none", "ceil_pool"),
    "ft_net": BackboneSpec("resnet50", 512, "bnneck", last_stride=2),
    "ft_net_stride_1": BackboneSpec("resnet50", 2048, "bn"),
}


def state(name: str) -> dict[str, Tensor]:
    if name != "ft_net_stride_1":
        return drawn(shapes(name))
    layout = {key: shape for key, shape in shapes("ft_net").items() if "add_block" not in key}
    norm = {f"classifier.add_block.0.{key}": (2048,) for key in ("weight", "bias", "running_mean", "running_var")}
    return drawn(layout | norm)


def worst(found: np.ndarray, expected: np.ndarray) -> tuple[float, float]:
    """The least cosine; and the largest difference, of what tells the images apart."""
    norms = np.linalg.norm(found, axis=1) * np.linalg.norm(expected, axis=1)
    apart = np.linalg.norm(expected - expected.mean(0), axis=1)
    return float(((found * expected).sum(1) / norms).min()), float(
        (np.linalg.norm(found - expected, axis=1) / apart).max()
    )


@pytest.fixture(name="golden")
def _golden() -> dict[str, np.ndarray]:
    with np.load(GOLDEN) as file:
        return dict(file)


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_imported_weights_give_the_features_of_their_own_project(
    name: str, golden: dict[str, np.ndarray], tmp_path: Path
) -> None:
    torch.save(state(name), tmp_path / "w.pth")
    wanted = Wanted(last_stride=1) if name == "ft_net_stride_1" else None
    checkpoint, match = import_weights(tmp_path / "w.pth", wanted)
    assert match.whole, match.stray + match.missing
    assert checkpoint.spec.backbone == MODELS[name]
    assert checkpoint.backbone is not None
    cosine, error = worst(checkpoint.backbone(images()).numpy(), golden[name])
    assert cosine >= 0.9999
    assert error <= 1e-3


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("torchreid_resnet50", Wanted(last_stride=1)),
        ("fastreid_bot_r50_ibn", Wanted(stem="standard")),
        ("fastreid_bot_r50_ibn", Wanted(pooling="gem")),
        ("fastreid_agw_r50", Wanted(pooling="avg")),
    ],
)
@torch.no_grad()
def test_the_comparison_fails_where_a_model_differs_in_one_detail(
    name: str, wanted: Wanted, golden: dict[str, np.ndarray], tmp_path: Path
) -> None:
    torch.save(state(name), tmp_path / "w.pth")
    checkpoint, _ = import_weights(tmp_path / "w.pth", wanted, partial=True)
    assert checkpoint.backbone is not None
    cosine, error = worst(checkpoint.backbone(images()).numpy(), golden[name])
    assert cosine < 0.9999
    assert error > 1e-2
