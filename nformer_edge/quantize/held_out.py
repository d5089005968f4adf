"""Training identities that calibrate nothing: what INT8 builds are judged by, so that the test set judges once."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from nformer_edge.core.artifact import sha256_file
from nformer_edge.core.errors import DataError
from nformer_edge.core.features import Features
from nformer_edge.data.holdout import split_holdout
from nformer_edge.data.records import Dataset, ImageRecord

#: Share of the training identities that is held out, unless `images` are enough for fewer.
SHARE = 0.2

#: Images a person that the number of identities is computed by.
_IMAGES_A_PERSON = 4


@dataclass(frozen=True)
class HeldOut:
    """Images of held-out identities. Each asks for all the others: it is query and gallery at once."""

    records: tuple[ImageRecord, ...]

    @cached_property
    def sha256(self) -> str:
        """Over every image's content, identity and camera, in order."""
        digest = hashlib.sha256()
        for record in self.records:
            digest.update(f"{sha256_file(record.path)} {record.pid} {record.camid}\n".encode())
        return digest.hexdigest()

    def label(self, features: np.ndarray) -> Features:
        """Features [N, D] of the images with their identities and cameras."""
        pids, camids = (np.array([getattr(r, name) for r in self.records], np.int64) for name in ("pid", "camid"))
        return Features(features, pids, camids, tuple(r.path for r in self.records))

    def describe(self) -> dict[str, Any]:
        """How many, for a manifest."""
        people = len({r.pid for r in self.records})
        return {"identities": people, "queries": len(self.records), "images": len(self.records), "sha256": self.sha256}


def hold_out(dataset: Dataset, images: int, seed: int, share: float = SHARE) -> tuple[Dataset, HeldOut]:
    """A dataset without some training identities, and images of these.

    Args:
        dataset: with training images.
        images: at most so many; a person has about four, of as many cameras as there are.
        seed: of the choice of people and images.
        share: of the identities at most.

    Raises:
        DataError: if fewer than two people can be held out, each seen by two cameras.
    """
    people = len({r.pid for r in dataset.train})
    wanted = min(share, images / _IMAGES_A_PERSON / people) if people else 0.0
    rest, held = split_holdout(dataset.train, wanted, seed)
    records = () if held is None else _some(tuple(dict.fromkeys(held.query + held.gallery)), images, seed)
    if len({r.pid for r in records}) < 2:
        raise DataError(
            f"{dataset.root}: train",
            f"{people} people, too few to hold two of them out",
            "training images of more people, seen by several cameras",
            "Name the dataset that the model was trained on, or build without a budget and --calib-method auto.",
        )
    return replace(dataset, train=rest), HeldOut(records)


def _some(records: Sequence[ImageRecord], count: int, seed: int) -> tuple[ImageRecord, ...]:
    """`count` of them: everybody once before anybody twice, and of each the camera that has been seen least."""
    rng = np.random.default_rng([seed, 2])
    left: dict[int, list[ImageRecord]] = defaultdict(list)
    for i in rng.permutation(len(records)):
        left[records[i].pid].append(records[i])
    seen: dict[tuple[int, int], int] = defaultdict(int)
    chosen: list[ImageRecord] = []
    while len(chosen) < count and any(left.values()):
        for pid in [pid for pid in left if left[pid]][: count - len(chosen)]:
            record = min(left[pid], key=lambda r: seen[r.pid, r.camid])
            left[pid].remove(record)
            seen[pid, record.camid] += 1
            chosen.append(record)
    return tuple(sorted(chosen, key=lambda r: r.path))
