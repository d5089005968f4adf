from __future__ import annotations

import pickle
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from torch import Tensor

from nformer_edge.core.errors import ArtifactError
from nformer_edge.core.spec import BackboneSpec
from nformer_edge.model.backbone import Backbone
from nformer_edge.model.checkpoint import load_checkpoint
from nformer_edge.model.weights import import_checkpoint, import_weights, read_state


@pytest.fixture(name="published")
def _published() -> dict[str, Tensor]:
    """A state dictionary named as torchreid names it, with its classifier."""
    torch.manual_seed(0)
    state = Backbone(BackboneSpec("osnet_x0_25", 512, "fc")).state_dict()
    renamed = {k.removeprefix("trunk.").removeprefix("neck."): torch.randn_like(v.float()) for k, v in state.items()}
    return OrderedDict(renamed | {"classifier.weight": torch.zeros(751, 512), "classifier.bias": torch.zeros(751)})


@pytest.mark.parametrize("wrap", ["plain", "module", "state_dict"])
def test_import_recognizes_an_osnet_and_loads_it_whole(tmp_path: Path, published: dict[str, Tensor], wrap: str) -> None:
    data: object = published
    if wrap == "module":
        data = {f"module.{k}": v for k, v in published.items()}
    if wrap == "state_dict":
        data = {"state_dict": published, "epoch": 150}
    torch.save(data, tmp_path / "w.pth")
    checkpoint, match = import_weights(tmp_path / "w.pth")
    assert checkpoint.spec.backbone == BackboneSpec("osnet_x0_25", 512, "fc")
    assert match.left == ("classifier.bias", "classifier.weight")
    assert match.missing == ()
    assert checkpoint.backbone is not None
    assert torch.equal(checkpoint.backbone.trunk.conv1.conv.weight, published["conv1.conv.weight"])
    assert torch.equal(checkpoint.backbone.neck.get_parameter("fc.0.weight"), published["fc.0.weight"])


def test_import_refuses_a_partial_match_unless_allowed(tmp_path: Path, published: dict[str, Tensor]) -> None:
    torch.save({k: v for k, v in published.items() if not k.startswith("conv5")}, tmp_path / "w.pth")
    with pytest.raises(ArtifactError, match=r"5 missing; the first missing is backbone\.trunk\.conv5"):
        import_weights(tmp_path / "w.pth")
    _, match = import_weights(tmp_path / "w.pth", partial=True)
    assert len(match.missing) == 5


def test_import_fills_the_trunk_of_a_backbone_with_another_neck(tmp_path: Path, published: dict[str, Tensor]) -> None:
    torch.save(published, tmp_path / "w.pth")
    _, match = import_weights(tmp_path / "w.pth", BackboneSpec("osnet_x0_25", 256, "bnneck"), partial=True)
    assert all(name.startswith("backbone.neck.") for name in match.missing)
    assert {"fc.0.weight", "classifier.weight"} <= set(match.left)


def test_import_of_an_unknown_layout_is_refused(tmp_path: Path) -> None:
    torch.save({"something": torch.zeros(3)}, tmp_path / "w.pth")
    for spec in (None, BackboneSpec("resnet18")):
        with pytest.raises(ArtifactError, match=r"unknown layout \(such as something\)"):
            import_weights(tmp_path / "w.pth", spec, partial=True)


def test_import_of_nothing_that_fits_is_refused(tmp_path: Path) -> None:
    torch.save({"conv1.weight": torch.zeros(3), "layer1.0.conv1.weight": torch.zeros(3)}, tmp_path / "w.pth")
    with pytest.raises(ArtifactError, match="no tensor that fits"):
        import_weights(tmp_path / "w.pth", BackboneSpec("resnet18"), partial=True)


class _Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (exec, ("raise SystemExit('a pickle ran code')",))


@pytest.mark.parametrize("kind", ["code", "garbage", "empty", "absent"])
def test_import_runs_no_code_and_names_a_bad_file(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "w.pth"
    if kind == "code":
        path.write_bytes(pickle.dumps(_Evil(), protocol=2))
    if kind in ("garbage", "empty"):
        path.write_bytes(b"" if kind == "empty" else b"no weights" * 50)
    with pytest.raises(ArtifactError, match=r"w\.pth: got"):
        read_state(path)


def test_import_writes_a_checkpoint_and_says_what_matched(tmp_path: Path, published: dict[str, Tensor]) -> None:
    torch.save(published, tmp_path / "w.pth")
    result = import_checkpoint(tmp_path / "w.pth", tmp_path / "m.safetensors", arch="osnet_x0_25", imgsz=(128, 64))
    checkpoint = load_checkpoint(tmp_path / "m.safetensors")
    assert (checkpoint.spec.preprocess.height, checkpoint.spec.preprocess.width) == (128, 64)
    assert result["sha256"] == checkpoint.sha256
    assert result["left_over"] == ["classifier.bias", "classifier.weight"]


def test_import_under_another_name_is_refused(tmp_path: Path, published: dict[str, Tensor]) -> None:
    torch.save(published, tmp_path / "w.pth")
    with pytest.raises(ArtifactError, match="got osnet_x0_25, expected osnet_x1_0"):
        import_checkpoint(tmp_path / "w.pth", tmp_path / "m.safetensors", arch="osnet_x1_0")
    assert not (tmp_path / "m.safetensors").exists()
