from __future__ import annotations

import json
import struct
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch

from nformer_edge.core.errors import ArtifactError
from nformer_edge.core.spec import BackboneSpec, HeadSpec, ModelSpec, PreprocessSpec
from nformer_edge.model.backbone import Backbone
from nformer_edge.model.checkpoint import load_checkpoint, save_checkpoint
from nformer_edge.model.nformer import NFormer

SPEC = ModelSpec(
    BackboneSpec("osnet_x0_25", 32), HeadSpec(32, layers=1, k=3, rule="affinity"), PreprocessSpec(64, 32)
)  # fmt: skip


@pytest.fixture(name="parts")
def _parts() -> tuple[Backbone, NFormer]:
    torch.manual_seed(0)
    assert SPEC.head is not None
    return Backbone(SPEC.backbone), NFormer(SPEC.head)


@pytest.fixture(name="file")
def _file(tmp_path: Path, parts: tuple[Backbone, NFormer]) -> Path:
    save_checkpoint(tmp_path / "model.safetensors", SPEC, *parts, {"epochs": 3})
    return tmp_path / "model.safetensors"


def rewrite_header(file: Path, change: dict[str, str]) -> None:
    """Other metadata around the same tensors, as someone with a text editor would leave it."""
    data = file.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + size])
    header["__metadata__"] |= change
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + size :])


def test_checkpoint_comes_back_as_it_was_written(file: Path, parts: tuple[Backbone, NFormer]) -> None:
    back = load_checkpoint(file)
    assert back.spec == SPEC
    assert back.extra == {"epochs": 3}
    for was, now in zip(parts, (back.backbone, back.head), strict=True):
        assert now is not None
        assert not now.training
        assert was.state_dict().keys() == now.state_dict().keys()
        assert all(torch.equal(t, now.state_dict()[name]) for name, t in was.state_dict().items())


def test_writing_twice_gives_the_same_hash(tmp_path: Path, file: Path, parts: tuple[Backbone, NFormer]) -> None:
    again = save_checkpoint(tmp_path / "again.safetensors", SPEC, *parts, {"epochs": 3})
    assert again == load_checkpoint(file).sha256


def test_checkpoint_may_hold_one_part_only(tmp_path: Path, parts: tuple[Backbone, NFormer]) -> None:
    save_checkpoint(tmp_path / "b", replace(SPEC, head=None), parts[0])
    save_checkpoint(tmp_path / "h", SPEC, None, parts[1])
    alone, head = load_checkpoint(tmp_path / "b"), load_checkpoint(tmp_path / "h")
    assert alone.backbone is not None
    assert alone.head is None
    assert head.backbone is None
    assert head.head is not None


@pytest.mark.parametrize("place", [0.3, 0.6, 0.999])
def test_one_changed_byte_is_refused(file: Path, place: float) -> None:
    data = bytearray(file.read_bytes())
    data[int(place * len(data))] ^= 1
    file.write_bytes(data)
    with pytest.raises(ArtifactError, match="sha256"):
        load_checkpoint(file)


@pytest.mark.parametrize("size", [0, 4, 100, 20_000])
def test_a_truncated_file_is_refused(file: Path, size: int) -> None:
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(ArtifactError, match=r"truncated|an empty file|unknown kind"):
        load_checkpoint(file)


def test_a_changed_spec_is_refused(file: Path) -> None:
    rewrite_header(file, {"spec": json.dumps({"backbone": {"arch": "resnet18"}})})
    with pytest.raises(ArtifactError, match="sha256"):
        load_checkpoint(file)


def test_another_version_is_refused(file: Path) -> None:
    rewrite_header(file, {"version": "9"})
    with pytest.raises(ArtifactError, match="got version 9, expected version 1"):
        load_checkpoint(file)


def test_a_missing_tensor_is_named(tmp_path: Path, parts: tuple[Backbone, NFormer]) -> None:
    """A file whose hash holds but whose tensors are not those that its spec needs."""
    del parts[0].trunk.conv5
    save_checkpoint(tmp_path / "m", SPEC, *parts)
    with pytest.raises(ArtifactError, match=r"no tensor backbone\.trunk\.conv5"):
        load_checkpoint(tmp_path / "m")


def test_a_tensor_of_another_shape_is_named(tmp_path: Path, parts: tuple[Backbone, NFormer]) -> None:
    parts[1].h[0].ln_1.g = torch.nn.Parameter(torch.ones(31))
    save_checkpoint(tmp_path / "m", SPEC, *parts)
    with pytest.raises(ArtifactError, match=r"another shape for head\.h\.0\.ln_1\.g"):
        load_checkpoint(tmp_path / "m")


def test_a_spec_that_does_not_match_its_parts_is_not_written(tmp_path: Path, parts: tuple[Backbone, NFormer]) -> None:
    with pytest.raises(ArtifactError, match="the spec does not name"):
        save_checkpoint(tmp_path / "m", replace(SPEC, head=None), *parts)
    with pytest.raises(ArtifactError, match="a backbone"):
        save_checkpoint(tmp_path / "m", SPEC, Backbone(BackboneSpec("osnet_x0_5", 32)), parts[1])
    assert list(tmp_path.iterdir()) == []


def test_other_files_are_refused(tmp_path: Path) -> None:
    safetensors.torch.save_file({"x": torch.zeros(3)}, tmp_path / "other.safetensors")
    for name, message in (
        ("other.safetensors", "safetensors of another project"),
        ("none", "no such file"),
        (".", "a folder"),
    ):
        with pytest.raises(ArtifactError, match=message):
            load_checkpoint(tmp_path / name)
