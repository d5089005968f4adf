from __future__ import annotations

import pickle
from collections import OrderedDict
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor

from nformer_edge.core.artifact import sha256_file
from nformer_edge.core.errors import ArtifactError, UsageError
from nformer_edge.core.spec import BackboneSpec
from nformer_edge.model.backbone import Backbone
from nformer_edge.model.checkpoint import load_checkpoint
from nformer_edge.model.importers.plan import Wanted
from nformer_edge.model.weights import Import, import_checkpoint, import_weights, read_weights


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
    _, match = import_weights(tmp_path / "w.pth", Wanted(features=256), partial=True)
    assert all(name.startswith("backbone.neck.") for name in match.missing)
    assert {"fc.0.weight", "classifier.weight"} <= set(match.left)


def test_import_of_an_unknown_layout_is_refused(tmp_path: Path) -> None:
    torch.save({"something": torch.zeros(3)}, tmp_path / "w.pth")
    for spec in (None, BackboneSpec("resnet18")):
        with pytest.raises(ArtifactError, match=r"unknown layout \(1 tensors: something \.\.\.\)"):
            import_weights(tmp_path / "w.pth", Wanted(spec), partial=True)


def test_import_of_nothing_that_fits_is_refused(tmp_path: Path) -> None:
    torch.save({"conv1.weight": torch.zeros(3), "layer1.0.conv1.weight": torch.zeros(3)}, tmp_path / "w.pth")
    with pytest.raises(ArtifactError, match="no tensor that fits"):
        import_weights(tmp_path / "w.pth", Wanted(BackboneSpec("resnet18")), partial=True)


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
        read_weights(path)


def test_import_writes_a_checkpoint_and_says_what_matched(tmp_path: Path, published: dict[str, Tensor]) -> None:
    torch.save(published, tmp_path / "w.pth")
    result = import_checkpoint(tmp_path / "w.pth", tmp_path / "m.safetensors", arch="osnet_x0_25", imgsz=(128, 64))
    checkpoint = load_checkpoint(tmp_path / "m.safetensors")
    assert (checkpoint.spec.preprocess.height, checkpoint.spec.preprocess.width) == (128, 64)
    assert result.sha256 == checkpoint.sha256
    assert result.match.left == ("classifier.bias", "classifier.weight")
    assert Import.from_json(result.to_json()) == result


def test_import_under_another_name_is_refused(tmp_path: Path, published: dict[str, Tensor]) -> None:
    torch.save(published, tmp_path / "w.pth")
    with pytest.raises(ArtifactError, match="got osnet_x0_25, expected osnet_x1_0"):
        import_checkpoint(tmp_path / "w.pth", tmp_path / "m.safetensors", arch="osnet_x1_0")
    assert not (tmp_path / "m.safetensors").exists()


PREFIXES = ("module.", "_orig_mod.", "module._orig_mod.", "module.module.", "model.", "backbone.", "net.encoder.")


@pytest.mark.parametrize("prefix", PREFIXES)
def test_a_prefix_that_all_names_share_is_taken_off(tmp_path: Path, published: dict[str, Tensor], prefix: str) -> None:
    torch.save({"state_dict": {prefix + k: v for k, v in published.items()}}, tmp_path / "w.pth")
    assert import_weights(tmp_path / "w.pth")[1].whole


@pytest.mark.parametrize("place", ["net_dict", "weights", "model.state_dict", "a.b.c", "checkpoint.0.model"])
def test_the_one_mapping_of_tensors_is_found_at_any_depth(
    tmp_path: Path, published: dict[str, Tensor], place: str
) -> None:
    data: object = published
    for key in reversed(place.split(".")):
        data = [data] if key == "0" else {key: data, "epoch": 3, "criterion": {"centers.weight": torch.ones(2)}}
    torch.save(data, tmp_path / "w.pth")
    _, match = import_weights(tmp_path / "w.pth")
    assert match.whole
    assert match.source == f"entry {place}"


@pytest.mark.parametrize("key", ["ema", "model_ema", "state_dict_ema", "teacher", "swa_model"])
def test_averaged_weights_are_taken_where_they_are_asked_for_or_alone(
    tmp_path: Path, published: dict[str, Tensor], key: str
) -> None:
    path, averaged = tmp_path / "w.pth", {name: t + 1 for name, t in published.items()}

    def first(ema: bool) -> tuple[float, tuple[str, ...]]:
        checkpoint, match = import_weights(path, ema=ema)
        assert checkpoint.backbone is not None
        return checkpoint.backbone.state_dict()["neck.fc.0.bias"][0].item(), match.notes

    plain = published["fc.0.bias"][0].item()
    torch.save({key: averaged, "model": published}, path)
    assert first(ema=True)[0] == pytest.approx(plain + 1)
    value, notes = first(ema=False)
    assert value == pytest.approx(plain)
    assert notes[-1] == f"The file also holds averaged weights (entry {key}): --ema takes those."
    torch.save({key: averaged}, path)
    assert first(ema=False)[0] == pytest.approx(plain + 1)
    torch.save({"model": published}, path)
    with pytest.raises(ArtifactError, match=r"no averaged weights.*Leave --ema out"):
        first(ema=True)


def test_two_models_in_a_file_are_named_and_refused(tmp_path: Path, published: dict[str, Tensor]) -> None:
    torch.save({"student": published, "other": published | {"x": torch.ones(1)}}, tmp_path / "w.pth")
    with pytest.raises(ArtifactError, match=r"2 models \(entry student; entry other\)"):
        import_weights(tmp_path / "w.pth")


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_number_that_is_none_is_refused_by_name(tmp_path: Path, published: dict[str, Tensor], bad: float) -> None:
    published["conv5.conv.weight"][0, 0] = bad
    torch.save(published, tmp_path / "w.pth")
    with pytest.raises(ArtifactError, match=r"NaN or Inf in 1 tensors, first conv5\.conv\.weight"):
        import_weights(tmp_path / "w.pth", partial=True)


def test_another_sha256_is_refused_before_anything_is_read(tmp_path: Path, published: dict[str, Tensor]) -> None:
    torch.save(published, tmp_path / "w.pth")
    digest = sha256_file(tmp_path / "w.pth")
    checkpoint, _ = import_weights(tmp_path / "w.pth", sha256=digest.upper())
    assert checkpoint.extra["imported_sha256"] == digest
    (tmp_path / "w.pth").write_bytes(b"<html>")
    with pytest.raises(ArtifactError, match=rf"got sha256 \w+, expected {digest}\. Download it again"):
        import_weights(tmp_path / "w.pth", sha256=digest)
    with pytest.raises(UsageError, match="sha256: got 'abc', expected 64 hexadecimal digits"):
        import_weights(tmp_path / "w.pth", sha256="abc")


def test_safetensors_of_others_are_read(tmp_path: Path, published: dict[str, Tensor]) -> None:
    safetensors.torch.save_file(dict(published), tmp_path / "w.safetensors", {"format": "pt"})
    assert import_weights(tmp_path / "w.safetensors")[1].whole


def test_an_import_is_named_as_a_checkpoint_and_no_checkpoint_is_imported(
    tmp_path: Path, published: dict[str, Tensor]
) -> None:
    torch.save(published, tmp_path / "w.pth")
    with pytest.raises(UsageError, match=r"ends in \.safetensors\. Name it .*m\.safetensors"):
        import_checkpoint(tmp_path / "w.pth", tmp_path / "m.pth")
    import_checkpoint(tmp_path / "w.pth", tmp_path / "m.safetensors")
    with pytest.raises(ArtifactError, match=r"m\.safetensors: got an earlier file there.*--force"):
        import_checkpoint(tmp_path / "w.pth", tmp_path / "m.safetensors")
    import_checkpoint(tmp_path / "w.pth", tmp_path / "m.safetensors", force=True)
    with pytest.raises(ArtifactError, match=r"a checkpoint of nformer-edge.*nformer-edge export"):
        import_weights(tmp_path / "m.safetensors")
    with pytest.raises(ArtifactError, match=r"got PyTorch weights.*nformer-edge import .*w\.pth -o"):
        load_checkpoint(tmp_path / "w.pth")


@pytest.mark.parametrize(
    "content", [b"", b"<!DOCTYPE html>", b"\x80\x02}q\x00.", b"\x80\x02cos\nsystem\nq\x00.", b"PK\x03\x04"]
)
def test_no_message_repeats_advice_to_lower_the_guard(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "w.pth").write_bytes(content)
    with pytest.raises(ArtifactError) as caught:
        read_weights(tmp_path / "w.pth")
    assert "weights_only" not in str(caught.value)
    assert "\x1b" not in str(caught.value)
    assert caught.value.hint
