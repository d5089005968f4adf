"""Training images as augmented torch batches: flip, pad and crop, random erasing (Luo et al., CVPRW 2019)."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from tqdm import tqdm

from nformer_edge.core.errors import DataError, UsageError
from nformer_edge.core.preprocess import normalize
from nformer_edge.core.spec import PreprocessSpec, check_at_least
from nformer_edge.core.terminal import PROGRESS
from nformer_edge.data.batches import decode, iter_batches
from nformer_edge.data.records import ImageRecord
from nformer_edge.data.sampler import PKSampler

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")


@dataclass(frozen=True)
class AugmentSpec:
    """The published recipe. Probabilities in 0..1, `pad` in pixels; erasing's area is a share of the image."""

    flip: float = 0.5
    pad: int = 10
    erase: float = 0.5
    erase_area: tuple[float, float] = (0.02, 0.4)
    erase_aspect: float = 0.3

    def __post_init__(self) -> None:
        for name in ("flip", "pad", "erase"):
            check_at_least(name, getattr(self, name), 0)


def augment(
    pixels: np.ndarray,
    spec: PreprocessSpec,
    recipe: AugmentSpec,
    rng: np.random.Generator,
    *,
    first: int = 0,
    whole: int | None = None,
) -> np.ndarray:
    """Normalizes and augments a batch, or one rank's share of it.

    Padding is black before normalization, as in the published recipe (torchvision's Pad); an erased rectangle
    becomes the mean color, 0 after normalization.

    Args:
        pixels: uint8 [B, H, W, 3], RGB, of the spec's size; left as it is.
        rng: decides everything.
        first: the place of these images in their batch.
        whole: images in the batch; all that `pixels` holds if None. What happens to an image follows from its place in
            the batch, so it does not depend on how the batch is shared out.

    Returns:
        float32 [B, 3, H, W].
    """
    rows, height, width = pixels.shape[:3]
    whole = rows if whole is None else whole
    mine = slice(first, first + rows)
    flips = (rng.random((whole,)) < recipe.flip)[mine].tolist()
    tops, lefts = rng.integers(0, 2 * recipe.pad + 1, (2, whole))[:, mine].tolist()
    padded = np.pad(pixels, ((0, 0), (recipe.pad,) * 2, (recipe.pad,) * 2, (0, 0)))
    moved = np.empty_like(pixels)
    for i, (flip, top, left) in enumerate(zip(flips, tops, lefts, strict=True)):
        crop = padded[i, top : top + height, left : left + width]
        moved[i] = crop[:, ::-1] if flip else crop
    images = normalize(moved, spec)
    for hit in np.flatnonzero(rng.random((whole,)) < recipe.erase):
        top, left, h, w = _erased(height, width, recipe, rng)
        if first <= hit < first + rows:
            images[hit - first, :, top : top + h, left : left + w] = 0
    return images


def _erased(height: int, width: int, recipe: AugmentSpec, rng: np.random.Generator) -> tuple[int, int, int, int]:
    """A rectangle of random area and aspect that fits (Zhong et al., AAAI 2020): top, left, height, width."""
    for _ in range(100):
        area = rng.uniform(*recipe.erase_area) * height * width
        aspect = rng.uniform(recipe.erase_aspect, 1 / recipe.erase_aspect)
        h, w = int((area * aspect) ** 0.5 + 0.5), int((area / aspect) ** 0.5 + 0.5)
        if 0 < h < height and 0 < w < width:
            return int(rng.integers(0, height - h)), int(rng.integers(0, width - w)), h, w
    return 0, 0, 0, 0


def draw_view(
    pixels: np.ndarray, hashes: Sequence[str], view: int, spec: PreprocessSpec, recipe: AugmentSpec, seed: int
) -> np.ndarray:
    """A view of each image that can be drawn again: it follows from the image file's contents, `view` and `seed`.

    Args:
        pixels: uint8 [B, H, W, 3], RGB, of the spec's size.
        hashes: sha256 of each image file.
        view: 0 is the plain image.

    Returns:
        float32 [B, 3, H, W].
    """
    if view == 0:
        return normalize(pixels, spec)
    rngs = (np.random.default_rng([seed, view, int(digest[:16], 16)]) for digest in hashes)
    images = [augment(image[None], spec, recipe, rng) for image, rng in zip(pixels, rngs, strict=True)]
    return np.concatenate(images)


class TrainImages:
    """Training images with labels 0..C-1, kept decoded in memory when they fit.

    Args:
        records: training images; every pid >= 1.
        spec: size and normalization.
        cache_mib: keep the decoded uint8 images when they take at most this many MiB; otherwise every batch is
            decoded anew.
    """

    def __init__(self, records: Sequence[ImageRecord], spec: PreprocessSpec, cache_mib: int = 2048) -> None:
        if not records:
            raise DataError("training images", "none", "at least two people", "Check the dataset.")
        self.records = tuple(records)
        self.spec = spec
        self.pids = np.array([r.pid for r in self.records], dtype=np.int64)
        self.camids = np.array([r.camid for r in self.records], dtype=np.int64)
        classes, labels = np.unique(self.pids, return_inverse=True)
        self.labels = labels.astype(np.int64)
        self.num_classes = len(classes)
        self._threads = min(8, os.cpu_count() or 1)
        size_mib = len(self.records) * spec.height * spec.width * 3 / 2**20
        self._pixels = self._decode(range(len(self.records)), show=True) if size_mib <= cache_mib else None

    def __len__(self) -> int:
        return len(self.records)

    def pixels(self, rows: np.ndarray) -> np.ndarray:
        """The images at `rows`, uint8 [B, H, W, 3], RGB."""
        return self._pixels[rows] if self._pixels is not None else self._decode(rows)

    def _decode(self, rows: Sequence[int] | np.ndarray | range, show: bool = False) -> np.ndarray:
        out = np.empty((len(rows), self.spec.height, self.spec.width, 3), dtype=np.uint8)
        with ThreadPoolExecutor(self._threads, thread_name_prefix="decode") as pool:
            images = pool.map(lambda row: decode(self.records[row].path, self.spec), rows)
            bar = PROGRESS if show else {"disable": True}
            for i, image in enumerate(tqdm(images, total=len(rows), desc="decode", unit="image", **bar)):
                out[i] = image
        return out


def one_ahead(sampler: PKSampler, prepare: Callable[[int, np.ndarray], T], start: int = 0) -> Iterator[T]:
    """`prepare` of each step and its rows from step `start` on, by a thread that works one batch ahead."""
    with ThreadPoolExecutor(1, thread_name_prefix="augment") as pool:
        ahead = None
        for step, rows in enumerate(sampler):
            if step < start:
                continue
            ready, ahead = ahead, pool.submit(prepare, step, rows)
            if ready is not None:
                yield ready.result()
        if ahead is not None:
            yield ahead.result()


class TrainLoader:
    """Batches of one epoch, prepared by a thread while the model works on the one before.

    Args:
        images: what to draw from.
        sampler: yields rows; `PKSampler` over ``images.pids``.
        recipe: the augmentation.
        seed: with `set_epoch`, decides every flip, crop and rectangle.
        rank, ranks: which share of each batch is prepared: one of `ranks` parts of equally many identities, in order.
            All ranks draw the same batches and the same augmentations.

    Raises:
        UsageError: if a batch's identities cannot be shared out evenly.
    """

    def __init__(
        self,
        images: TrainImages,
        sampler: PKSampler,
        recipe: AugmentSpec | None = None,
        seed: int = 0,
        rank: int = 0,
        ranks: int = 1,
    ) -> None:
        self.images, self.sampler, self.recipe, self.seed = images, sampler, recipe or AugmentSpec(), seed
        self.rank, self.ranks = rank, ranks
        self.epoch = self.start = 0
        if sampler.p % ranks:
            raise UsageError(
                "p",
                f"{sampler.p} identities a batch for {ranks} ranks",
                f"a multiple of {ranks}",
                "Change p in the configuration, or the number of processes.",
            )

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """The next iteration draws what belongs to `epoch`, without its first `start` batches."""
        self.epoch, self.start = epoch, start
        self.sampler.set_epoch(epoch)

    def __len__(self) -> int:
        """Batches in a whole epoch."""
        return len(self.sampler)

    def _prepare(self, step: int, rows: np.ndarray) -> tuple[Tensor, Tensor]:
        import torch

        rng = np.random.default_rng([self.seed, self.epoch, step])
        count = len(rows) // self.ranks
        first = self.rank * count
        mine = rows[first : first + count]
        images = augment(self.images.pixels(mine), self.images.spec, self.recipe, rng, first=first, whole=len(rows))
        return torch.from_numpy(images), torch.from_numpy(self.images.labels[mine])

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields images float32 [B / ranks, 3, H, W] and their labels int64 in 0..num_classes-1."""
        return one_ahead(self.sampler, self._prepare, self.start)


def evaluation_batches(records: Sequence[ImageRecord], spec: PreprocessSpec, batch: int = 64) -> Iterator[Tensor]:
    """Images float32 [B, 3, H, W] in the order of `records`, preprocessed exactly as at runtime."""
    import torch

    for images in iter_batches([r.path for r in records], spec, batch):
        yield torch.from_numpy(images)
