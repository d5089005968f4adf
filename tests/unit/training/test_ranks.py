"""Several ranks, other precisions, accumulation: the same training, computed elsewhere."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from nformer_edge.cli import main
from nformer_edge.core.errors import BackendError, UsageError
from nformer_edge.core.features import Features
from nformer_edge.core.spec import BackboneSpec, HeadSpec, ModelSpec, PreprocessSpec
from nformer_edge.data.generate import GenerateSpec, generate_dataset
from nformer_edge.data.loaders import AugmentSpec, TrainImages, TrainLoader, augment
from nformer_edge.data.readers import read_dataset
from nformer_edge.data.sampler import PKSampler
from nformer_edge.model.checkpoint import load_checkpoint
from nformer_edge.training.backbone import train_backbone
from nformer_edge.training.compute import Compute, FabricCompute, SharedBatchNorm, open_compute, share_batch_norm
from nformer_edge.training.config import BackboneConfig, HeadConfig, TrainConfig
from nformer_edge.training.head import train_head
from nformer_edge.training.run import determinism
from nformer_edge.training.stages import start_backbone
from nformer_edge.training.train import train

pytest.importorskip("lightning_fabric", reason="several ranks and mixed precision need lightning-fabric")

CONFIG = TrainConfig(
    ModelSpec(BackboneSpec("osnet_x0_25", 16), HeadSpec(16, layers=1, k=4, landmarks=4), PreprocessSpec(64, 32)),
    BackboneConfig(epochs=2, p=4, k=2, lr=1e-3, warmup=1, augment=AugmentSpec(pad=2)),
    HeadConfig(epochs=2, sets=2, set_size=30, batch=2, lr=1e-3),
    precision="fp64",
)


@pytest.fixture(scope="module", name="data")
def _data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data") / "eight"
    generate_dataset(root, replace(GenerateSpec.tiny(), train_ids=8, seen_by=2, images=2))
    return root


def people(ids: int = 12, each: int = 6, size: int = 16) -> Features:
    rng = np.random.default_rng(0)
    pids = np.repeat(np.arange(1, ids + 1), each)
    features = rng.normal(size=(ids, size))[pids - 1] + rng.normal(size=(ids * each, size))
    return Features(features.astype(np.float32), pids, pids % 2, ("",) * len(pids))


def both_stages(data: str, config: TrainConfig, compute: Compute) -> tuple[dict[str, Any], list[Any]]:
    """Parameters and rows of both stages."""
    assert config.model.head is not None
    images = TrainImages(read_dataset(data).train, config.model.preprocess)
    backbone = start_backbone(config, None)
    rows = train_backbone(images, backbone, config.backbone, compute=compute)
    head, more = train_head([people()], config.model.head, config.head, compute=compute)
    tensors = {f"{part}.{k}": v for part, m in (("b", backbone), ("h", head)) for k, v in m.state_dict().items()}
    return tensors, [replace(row, seconds=None) for row in (*rows, *more)]


def worst(was: dict[str, torch.Tensor], now: dict[str, torch.Tensor]) -> float:
    """The largest difference of two models' tensors, each beside its own largest element."""
    assert was.keys() == now.keys()
    return max(float((now[k] - t).abs().max() / t.abs().max().clamp_min(1e-3)) for k, t in was.items() if t.numel())


def test_two_ranks_equal_one_rank_of_the_same_batch(data: Path, tmp_path: Path) -> None:
    """Both stages by the command line, in float64 so that nothing hides behind rounding; batch norm and hard examples
    over the whole batch; steps of two batches and, at an epoch's end, of one. One of the ranks writes."""
    (tmp_path / "c.toml").write_text(
        "precision = 'fp64'\nholdout = 0.25\n[model.preprocess]\nheight = 64\nwidth = 32\n"
        "[model.backbone]\narch = 'osnet_x0_25'\nfeatures = 16\n[model.head]\nlayers = 1\nk = 4\n"
        "[backbone]\nepochs = 1\np = 4\nk = 2\nlr = 1e-3\nwarmup = 1\naugment.pad = 2\n"
        "[head]\nepochs = 2\nsets = 3\nbatch = 2\nset_size = 20\nviews = 1\nlr = 1e-3\n"
    )
    flags = ["train", "--data", str(data), "--config", str(tmp_path / "c.toml"), "--accumulate", "2", "-o"]
    ranks = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*ranks, "-m", "nformer_edge.cli", *flags, str(tmp_path / "two.safetensors")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    assert main([*flags, str(tmp_path / "one.safetensors")]) == 0
    was, now = (load_checkpoint(tmp_path / f"{n}.safetensors") for n in ("one", "two"))
    for part in ("backbone", "head"):
        assert worst(getattr(was, part).state_dict(), getattr(now, part).state_dict()) <= 1e-6  # kept in float32
    one, two = (json.loads((tmp_path / f"{n}.training.json").read_text()) for n in ("one", "two"))
    assert (one["ranks"], two["ranks"]) == (1, 2)
    for stage in ("backbone", "head"):
        for a, b in zip(one["stages"][stage]["epochs"], two["stages"][stage]["epochs"], strict=True):
            assert b | {"seconds": 0} == {k: v and pytest.approx(v, rel=1e-9) for k, v in a.items()} | {"seconds": 0}
    assert done.stdout.count("wrote") == 1


def test_the_comparison_of_two_models_sees_a_small_difference(data: Path) -> None:
    was = start_backbone(CONFIG, None).state_dict()
    now = {k: t.clone() for k, t in was.items()}
    assert worst(was, now) == 0
    now["neck.projection.weight"][3, 4] += 1e-5
    assert worst(was, now) > 1e-6


def test_fabric_alone_in_fp32_gives_the_same_bits_as_plain_torch(data: Path) -> None:
    config = replace(CONFIG, precision="fp32")
    plain, rows = both_stages(str(data), config, Compute())
    through, more = both_stages(str(data), config, FabricCompute("cpu", "fp32"))
    assert all(torch.equal(t, through[k]) for k, t in plain.items())
    assert rows == more


def test_bf16_learns_about_as_fp32_does_and_keeps_float32_weights(data: Path) -> None:
    full, rows = both_stages(str(data), replace(CONFIG, precision="fp32"), Compute())
    half, more = both_stages(str(data), replace(CONFIG, precision="bf16"), open_compute("cpu", "bf16"))
    assert all(t.dtype == full[k].dtype for k, t in half.items())
    assert [r.loss for r in more] != [r.loss for r in rows]
    assert [r.loss for r in more] == [pytest.approx(r.loss, rel=0.1) for r in rows]


def test_fp16_needs_a_gpu() -> None:
    with pytest.raises(UsageError, match="Use bf16 on a CPU"):
        open_compute("cpu", "fp16")


def test_without_fabric_the_message_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lightning_fabric", None)
    with pytest.raises(BackendError, match=r"nformer-edge\[scale\]"):
        open_compute("cpu", "bf16")


def test_one_process_in_fp32_loads_no_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lightning_fabric", None)
    assert type(open_compute("cpu", "fp32")) is Compute


def test_accumulated_batches_are_one_step() -> None:
    config = replace(CONFIG.head, sets=4, accumulate=2, epochs=1, set_size=1000, batch=1)
    _, rows = train_head([people()], HeadSpec(16, layers=1, k=4, landmarks=4), config)
    _, single = train_head([people()], HeadSpec(16, layers=1, k=4, landmarks=4), replace(config, accumulate=1))
    assert rows[0].lr != single[0].lr  # the rate belongs to the step, not to its parts
    assert rows[0].loss == pytest.approx(single[0].loss, rel=0.05)


def test_shares_of_a_batch_are_the_batch(data: Path) -> None:
    images = TrainImages(read_dataset(data).train, PreprocessSpec(64, 32))

    def batches(rank: int, ranks: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        loader = TrainLoader(images, PKSampler(images.pids, 4, 2, 3), AugmentSpec(pad=4, erase=0.9), 3, rank, ranks)
        loader.set_epoch(5)
        return list(loader)

    for whole, first, second in zip(batches(0, 1), batches(0, 2), batches(1, 2), strict=True):
        for a, b, c in zip(whole, first, second, strict=True):
            assert torch.equal(a, torch.cat([b, c]))
        assert set(first[1].tolist()).isdisjoint(second[1].tolist())


def test_an_epoch_goes_on_at_any_batch(data: Path) -> None:
    images = TrainImages(read_dataset(data).train, PreprocessSpec(64, 32))
    loader = TrainLoader(images, PKSampler(images.pids, 4, 2, 3), AugmentSpec(pad=4), 3)
    loader.set_epoch(2)
    whole = list(loader)
    for start in range(len(whole) + 1):
        loader.set_epoch(2, start)
        rest = list(loader)
        assert len(rest) == len(whole) - start
        assert all(torch.equal(a[0], b[0]) for a, b in zip(rest, whole[start:], strict=True))


def test_a_batch_that_cannot_be_shared_out_is_refused(data: Path) -> None:
    images = TrainImages(read_dataset(data).train, PreprocessSpec(64, 32))
    with pytest.raises(UsageError, match="4 identities a batch for 3 ranks"):
        TrainLoader(images, PKSampler(images.pids, 4, 2), ranks=3)
    compute = Compute()
    compute.world = 2
    with pytest.raises(UsageError, match="batch: got 1 for 2 ranks"):
        train_head([people()], HeadSpec(16), HeadConfig(), compute=compute)


def test_a_share_is_augmented_as_in_its_batch() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (12, 64, 32, 3), dtype=np.uint8)
    recipe, spec = AugmentSpec(pad=3, erase=0.7), PreprocessSpec(64, 32)
    whole = augment(pixels, spec, recipe, np.random.default_rng(1))
    for first in (0, 4, 8):
        share = augment(pixels[first : first + 4], spec, recipe, np.random.default_rng(1), first=first, whole=12)
        assert np.array_equal(share, whole[first : first + 4])


def test_shared_batch_norm_of_one_rank_is_batch_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 1)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda x: x)
    torch.manual_seed(0)
    for plain, shape in ((nn.BatchNorm2d(5), (6, 5, 3, 2)), (nn.BatchNorm1d(5), (6, 5))):
        plain = plain.double()
        nn.init.normal_(plain.weight)
        shared = SharedBatchNorm(nn.BatchNorm1d(5).double())
        shared.load_state_dict(plain.state_dict())
        x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
        target = torch.randn(shape, dtype=torch.float64)
        for mode in (True, False):
            plain.train(mode)
            shared.train(mode)
            a, b = plain(x), shared(x)
            assert (a - b).abs().max() <= 1e-12
            ga, gb = (torch.autograd.grad((y * target).sum(), x)[0] for y in (a, b))
            assert (ga - gb).abs().max() <= 1e-12
        for name, value in plain.state_dict().items():
            assert (shared.state_dict()[name] - value).abs().max() <= 1e-12


def test_deterministic_mode_trains_and_is_left_again(data: Path, tmp_path: Path) -> None:
    config = replace(CONFIG, precision="fp32", deterministic=True, head=replace(CONFIG.head, epochs=1, views=1))
    histories = [train(data, tmp_path / f"{i}.safetensors", config) for i in (0, 1)]
    assert histories[0].sha256 == histories[1].sha256
    assert not torch.are_deterministic_algorithms_enabled()


def test_deterministic_mode_is_left_also_after_an_error() -> None:
    with pytest.raises(RuntimeError, match="boom"), determinism(True, "cpu"):
        assert torch.are_deterministic_algorithms_enabled()
        raise RuntimeError("boom")
    assert not torch.are_deterministic_algorithms_enabled()


def test_shared_batch_norms_keep_the_names_and_leave_the_model_alone() -> None:
    backbone = start_backbone(CONFIG, None)
    shared = share_batch_norm(backbone, torch.device("cpu"))
    assert list(shared.state_dict()) == list(backbone.state_dict())
    assert any(isinstance(m, SharedBatchNorm) for m in shared.modules())
    assert not any(isinstance(m, SharedBatchNorm) for m in backbone.modules())
