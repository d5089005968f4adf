from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from nformer_edge.core.errors import DataError
from nformer_edge.core.features import Features
from nformer_edge.core.spec import HeadSpec, NeighborRule
from nformer_edge.metrics.ranking import evaluate
from nformer_edge.model.nformer import NFormer
from nformer_edge.model.start import start_as_reciprocal_mean
from nformer_edge.ops.reference import row_top_k
from nformer_edge.training.config import HeadConfig, Start
from nformer_edge.training.head import spread, train_head
from nformer_edge.training.relate import relate


def people(ids: int, each: int, noise: float, seed: int, size: int = 32) -> Features:
    """Images of people as noisy copies of one direction each, two cameras."""
    rng = np.random.default_rng(seed)
    pids = np.repeat(np.arange(1, ids + 1), each)
    features = rng.normal(size=(ids, size))[pids - 1] + noise * rng.normal(size=(ids * each, size))
    camids = np.tile(np.arange(each) % 2, ids)
    return Features(features.astype(np.float32), pids, camids, tuple(f"{i}" for i in range(len(pids))))


def split(images: Features) -> tuple[Features, Features]:
    first = np.arange(len(images)) % 8 < 2
    return images.take(first), images.take(~first)


def spec(rule: NeighborRule, landmarks: int = 48) -> HeadSpec:
    return HeadSpec(32, layers=2, heads=2, k=8, landmarks=landmarks, rule=rule)


@pytest.mark.parametrize("rule", ["features", "affinity"])
def test_untrained_head_already_ranks_better_than_its_features(rule: NeighborRule) -> None:
    test = people(40, 8, 1.0, seed=1)
    before = evaluate(*split(test)).mAP
    one_head = HeadSpec(32, layers=2, heads=1, k=8, landmarks=200, rule=rule)
    head, rows = train_head([people(30, 8, 1.0, seed=0)], one_head, HeadConfig(epochs=0))
    assert rows == []
    assert evaluate(*relate(head, *split(test))).mAP >= before + 0.03


def test_start_is_the_mean_over_reciprocal_neighbors() -> None:
    features = torch.from_numpy(people(10, 6, 0.8, seed=0).features)
    one = HeadSpec(32, layers=1, heads=2, k=5, landmarks=3, rule="features")
    torch.manual_seed(0)
    head = NFormer(one)
    start_as_reciprocal_mean(head, features, strength=0.7)
    for block in head.h:
        block.attn.c_attn.w.data[:, :64] = 0  # all neighbors weigh alike
    unit = torch.nn.functional.normalize(features, dim=1)
    chosen = row_top_k(unit[None], unit[None], 5)[0].long()
    mask = torch.zeros(60, 60).scatter_(1, chosen, 1.0)
    mask = mask * mask.T
    want = unit + 0.7 * (mask @ unit) / mask.sum(dim=1, keepdim=True)
    want = (want - want.mean(dim=1, keepdim=True)) / (want.var(dim=1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    with torch.no_grad():
        got = head.encode(features, torch.zeros(1, 3, dtype=torch.int32))
    assert (got - want).abs().max() <= 1e-3


@pytest.mark.parametrize("rule", ["features", "affinity"])
def test_head_training_lowers_the_loss(rule: NeighborRule) -> None:
    views = [people(20, 8, 1.0, seed=0)]
    config = HeadConfig(epochs=6, sets=5, lr=2e-3, warmup=0)
    _, rows = train_head(views, spec(rule), config)
    assert rows[-1].loss <= 0.9 * rows[0].loss


def test_gates_learn_from_sets_of_mixed_composition_and_repeat_bit_for_bit() -> None:
    one = HeadSpec(32, layers=2, heads=1, k=8, landmarks=64, rule="gated")
    config = HeadConfig(epochs=4, sets=5, lr=0.02, warmup=0, start="random", weight_decay=0)
    first, again = (train_head([people(40, 8, 1.0, seed=0)], one, config, seed=3) for _ in range(2))
    assert first[1][-1].loss < first[1][0].loss
    for name, tensor in first[0].state_dict().items():
        assert torch.equal(tensor, again[0].state_dict()[name]), name
    assert torch.equal(first[0].map.linear.w, torch.eye(32))


def test_head_of_the_best_epoch_is_kept() -> None:
    given = iter([0.2, 0.9, 0.1])
    seen = []

    def watch(head: NFormer) -> float:
        seen.append(head.h[0].attn.c_attn.w.detach().clone())
        return next(given)

    head, rows = train_head([people(6, 4, 0.5, seed=0)], spec("features"), HeadConfig(epochs=2, sets=1), watch=watch)
    assert torch.equal(head.h[0].attn.c_attn.w, seen[1])
    assert [row.held_out_map for row in rows] == [0.2, 0.9, 0.1]


def test_head_training_repeats_by_its_seed() -> None:
    views = [people(6, 4, 0.5, seed=s) for s in (0, 0)]
    runs = [train_head(views, spec("affinity"), HeadConfig(epochs=1, sets=3, set_size=16), seed=s) for s in (1, 1, 2)]
    weights = [head.h[0].attn.c_attn.w for head, _ in runs]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_small_sets_are_drawn_around_a_center() -> None:
    head, rows = train_head([people(30, 8, 0.5, seed=0)], spec("features"), HeadConfig(epochs=1, sets=4, set_size=40))
    assert len(rows) == 1
    assert not head.training


def test_head_refuses_features_of_another_length_and_one_identity() -> None:
    with pytest.raises(DataError, match=r"expected \[N, 32\]"):
        train_head([people(5, 4, 0.5, seed=0, size=16)], spec("features"), HeadConfig())
    with pytest.raises(DataError, match="1 identities"):
        train_head([people(1, 4, 0.5, seed=0)], spec("features"), HeadConfig())


def test_head_refuses_views_of_other_images() -> None:
    with pytest.raises(DataError, match="views of other images"):
        train_head([people(5, 4, 0.5, seed=0), people(4, 5, 0.5, seed=0)], spec("features"), HeadConfig())


def disturbed(ids: int, each: int, seed: int) -> Features:
    """People under a disturbance that is strong in a quarter of the directions, as a new camera site is."""
    images = people(ids, each, 0.3, seed)
    images.features[:, :8] += 3 * np.random.default_rng(seed + 100).normal(size=(len(images), 8)).astype(np.float32)
    return images


@pytest.mark.parametrize("rule", ["features", "affinity"])
def test_discriminant_start_ranks_disturbed_features_better_than_the_reciprocal_mean(rule: NeighborRule) -> None:
    test, learnt = disturbed(40, 8, seed=1), disturbed(60, 8, seed=0)
    one_head = HeadSpec(32, layers=2, heads=1, k=8, landmarks=200, rule=rule)
    starts: tuple[Start, ...] = ("reciprocal_mean", "discriminant")
    heads = [train_head([learnt], one_head, HeadConfig(epochs=0, start=start, strength=1.0))[0] for start in starts]
    mean, discriminant = (evaluate(*relate(head, *split(test))).mAP for head in heads)
    assert discriminant >= mean + 0.05


def test_camera_discriminant_start_maps_by_the_cameras_and_the_plain_one_does_not() -> None:
    learnt = people(60, 8, 1.0, seed=0)
    learnt.features[:, :3] += 2.0 * (2 * learnt.camids - 1)[:, None]
    moved = replace(learnt, camids=np.random.default_rng(1).integers(2, size=len(learnt)))
    one_head = HeadSpec(32, layers=2, heads=1, k=8, landmarks=200, rule="affinity")

    def mapped(features: Features, start: Start) -> torch.Tensor:
        head, _ = train_head([features], one_head, HeadConfig(epochs=0, start=start, strength=1.0))
        return head.h[0].mlp.c_proj.w.detach()

    assert torch.equal(mapped(learnt, "discriminant"), mapped(moved, "discriminant"))
    assert not torch.allclose(mapped(learnt, "camera_discriminant"), mapped(moved, "camera_discriminant"), atol=0.01)


def test_held_choice_leaves_queries_and_keys_and_trains_the_rest() -> None:
    config = HeadConfig(epochs=1, sets=2, start="discriminant", hold_choice=True)
    start, _ = train_head([people(20, 6, 1.0, seed=0)], spec("affinity"), replace(config, epochs=0))
    head, _ = train_head([people(20, 6, 1.0, seed=0)], spec("affinity"), config)
    for before, after in zip(start.h, head.h, strict=True):
        assert torch.equal(before.attn.c_attn.w[:, :64], after.attn.c_attn.w[:, :64])
        assert torch.equal(before.attn.c_attn.b[:64], after.attn.c_attn.b[:64])
        assert not torch.equal(before.attn.c_attn.w[:, 64:], after.attn.c_attn.w[:, 64:])


def test_spread_moves_images_away_from_their_person_and_keeps_its_mean() -> None:
    images = people(5, 6, 0.5, seed=0)
    moved = spread(images.features, images.pids, 2.0)
    for pid in range(1, 6):
        mine, theirs = images.features[images.pids == pid], moved[images.pids == pid]
        assert np.allclose(theirs - theirs.mean(axis=0), 2 * (mine - mine.mean(axis=0)), atol=1e-5)
        assert np.allclose(theirs.mean(axis=0), mine.mean(axis=0), atol=1e-5)


def test_spread_keeps_features_that_a_relu_gave_from_going_below_zero() -> None:
    images = people(5, 6, 0.5, seed=0)
    assert spread(np.maximum(images.features, 0), images.pids, 3.0).min() == 0
