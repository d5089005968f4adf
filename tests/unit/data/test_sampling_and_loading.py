from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from nformer_edge.core.errors import DataError, UsageError
from nformer_edge.core.preprocess import normalize, preprocess_files
from nformer_edge.core.spec import PreprocessSpec
from nformer_edge.data.batches import iter_batches
from nformer_edge.data.generate import GenerateSpec, generate_dataset
from nformer_edge.data.records import Dataset, ImageRecord
from nformer_edge.data.sampler import PKSampler

torch = pytest.importorskip("torch", reason="the loaders are torch's")
from nformer_edge.data.loaders import AugmentSpec, TrainImages, TrainLoader, augment, evaluation_batches  # noqa: E402

SPEC = PreprocessSpec(48, 24)
OFF = AugmentSpec(flip=0, pad=0, erase=0)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return generate_dataset(tmp_path_factory.mktemp("generated") / "tiny", GenerateSpec.tiny())


PIDS = [5] * 9 + [7] * 2 + [3] * 4 + [11] * 1 + [2] * 6 + [8] * 4 + [9] * 5


def test_a_batch_is_p_identities_with_k_images_each() -> None:
    for batch in PKSampler(PIDS, p=3, k=4, seed=1):
        pids = np.array(PIDS)[batch].reshape(3, 4)
        assert (pids == pids[:, :1]).all()
        assert len(set(pids[:, 0])) == 3


@pytest.mark.parametrize("p", [2, 3, 5, 7, 50])
def test_every_identity_comes_in_every_epoch(p: int) -> None:
    sampler = PKSampler(PIDS, p=p, k=4)
    for epoch in range(20):
        sampler.set_epoch(epoch)
        batches = list(sampler)
        assert len(batches) == len(sampler)
        assert {PIDS[i] for b in batches for i in b} == set(PIDS)


def test_an_identity_repeats_an_image_only_where_it_has_fewer_than_k() -> None:
    for batch in PKSampler(PIDS, p=3, k=4):
        for group in batch.reshape(3, 4):
            assert len(set(group.tolist())) == min(4, PIDS.count(PIDS[group[0]]))


def test_seed_and_epoch_decide_the_order() -> None:
    def drawn(seed: int, epoch: int) -> list[list[int]]:
        sampler = PKSampler(PIDS, 3, 4, seed)
        sampler.set_epoch(epoch)
        return [b.tolist() for b in sampler]

    assert drawn(1, 2) == drawn(1, 2)
    assert drawn(1, 2) != drawn(1, 3)
    assert drawn(1, 2) != drawn(2, 2)


def test_one_identity_cannot_be_sampled() -> None:
    with pytest.raises(DataError, match="at least two"):
        PKSampler([4, 4, 4])


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("batch", [1, 4, 64])
def test_batches_are_the_one_preprocessing_in_order(tiny: Dataset, batch: int, threads: int) -> None:
    paths = [r.path for r in tiny.train[:9]]
    batches = list(iter_batches(paths, SPEC, batch, threads))
    assert [len(b) for b in batches] == [min(batch, 9 - i) for i in range(0, 9, batch)]
    assert np.array_equal(np.concatenate(batches), preprocess_files(paths, SPEC))
    assert batches[0].dtype == np.float32


def test_no_paths_give_no_batches() -> None:
    assert list(iter_batches([], SPEC)) == []


def test_a_file_that_cannot_be_decoded_is_named_after_the_batches_before_it(tiny: Dataset, tmp_path: Path) -> None:
    (tmp_path / "bad.png").write_bytes(b"")
    batches = iter_batches([*(r.path for r in tiny.train[:4]), str(tmp_path / "bad.png")], SPEC, 2)
    assert len(next(batches)) == 2
    assert len(next(batches)) == 2
    with pytest.raises(DataError, match=r"bad\.png: got an empty file"):
        next(batches)


def test_a_batch_of_none_is_refused() -> None:
    with pytest.raises(UsageError, match="batch"):
        next(iter_batches(["a.png"], SPEC, 0))


def test_evaluation_batches_are_torch_tensors_of_the_same_numbers(tiny: Dataset) -> None:
    images = torch.cat(list(evaluation_batches(tiny.query, SPEC, batch=5)))
    assert np.array_equal(images.numpy(), preprocess_files([r.path for r in tiny.query], SPEC))


def test_labels_are_classes_in_order_of_pid(tiny: Dataset) -> None:
    images = TrainImages(tiny.train, SPEC)
    assert images.num_classes == 6
    assert [sorted(set(images.pids.tolist()))[label] for label in images.labels] == images.pids.tolist()


def test_cached_and_freshly_decoded_images_are_the_same(tiny: Dataset) -> None:
    rows = np.array([5, 0, 17])
    assert np.array_equal(TrainImages(tiny.train, SPEC).pixels(rows), TrainImages(tiny.train, SPEC, 0).pixels(rows))


def test_no_training_images_are_refused() -> None:
    with pytest.raises(DataError, match="none"):
        TrainImages([], SPEC)


def _pixels(rows: int = 40) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (rows, 48, 24, 3), dtype=np.uint8)


def test_without_augmentation_images_are_the_one_preprocessing() -> None:
    pixels = _pixels()
    assert np.array_equal(augment(pixels, SPEC, OFF, np.random.default_rng(1)), normalize(pixels, SPEC))


def test_a_certain_flip_mirrors_every_image() -> None:
    pixels = _pixels()
    flipped = augment(pixels, SPEC, AugmentSpec(flip=1, pad=0, erase=0), np.random.default_rng(1))
    assert np.array_equal(flipped, normalize(pixels, SPEC)[..., ::-1])


def test_padding_shifts_by_at_most_the_pad_in_all_directions() -> None:
    pixels = np.full((300, 48, 24, 3), 255, dtype=np.uint8)
    moved = augment(pixels, SPEC, AugmentSpec(flip=0, pad=4, erase=0), np.random.default_rng(1))
    white = (moved == normalize(pixels, SPEC)).all(axis=1)
    rows, columns = white.any(axis=2), white.any(axis=1)
    assert set(rows.sum(axis=1).tolist()) == set(range(44, 49))
    assert set(columns.sum(axis=1).tolist()) == set(range(20, 25))
    for edge in (rows[:, 0], rows[:, -1], columns[:, 0], columns[:, -1]):
        assert edge.any()
        assert not edge.all()


def test_erasing_takes_a_rectangle_of_the_area_asked_for() -> None:
    pixels = np.full((400, 48, 24, 3), 255, dtype=np.uint8)
    erased = augment(pixels, SPEC, AugmentSpec(flip=0, pad=0, erase=0.5), np.random.default_rng(1)) == 0
    shares = erased.all(axis=1).mean(axis=(1, 2))
    hit = shares[shares > 0]
    assert 0.4 < len(hit) / 400 < 0.6
    assert hit.min() >= 0.02 - 0.01, "whole pixels"
    assert hit.max() <= 0.4 + 0.01


def test_augmentation_leaves_its_input_alone_and_repeats_with_its_seed() -> None:
    pixels = _pixels()
    before = pixels.copy()
    first = augment(pixels, SPEC, AugmentSpec(), np.random.default_rng(3))
    assert np.array_equal(pixels, before)
    assert np.array_equal(first, augment(pixels, SPEC, AugmentSpec(), np.random.default_rng(3)))


def test_the_loader_repeats_an_epoch_and_changes_the_next(tiny: Dataset) -> None:
    images = TrainImages(tiny.train, SPEC)
    loader = TrainLoader(images, PKSampler(images.pids, 3, 4, seed=5), seed=5)

    def epoch(number: int) -> list[tuple[np.ndarray, list[int]]]:
        loader.set_epoch(number)
        return [(images.numpy(), labels.tolist()) for images, labels in loader]

    first, again, other = epoch(0), epoch(0), epoch(1)
    assert len(first) == len(loader)
    assert first[0][0].shape == (12, 3, 48, 24)
    assert all(np.array_equal(a[0], b[0]) and a[1] == b[1] for a, b in zip(first, again, strict=True))
    assert not np.array_equal(first[0][0], other[0][0])


def test_an_unreadable_training_image_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"x\.png"):
        TrainImages([ImageRecord(str(tmp_path / "x.png"), 1, 1)], SPEC)
