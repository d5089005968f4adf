"""What an INT8 backbone loses on training people that calibrated nothing: the test set judges once, at the end.

Images are decoded once. Two scopes are scored from one run in onnxruntime on this CPU, against FP32 on the same images:
the backbone's features, and, where the bundle has a head, what the head makes of them, all images seen together.
"""

from __future__ import annotations

import hashlib
import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from nformer_edge.core.artifact import sha256_file
from nformer_edge.core.errors import DataError
from nformer_edge.core.features import Features
from nformer_edge.core.machine import instruction_sets
from nformer_edge.core.values import Table
from nformer_edge.data.batches import iter_batches
from nformer_edge.data.holdout import split_holdout
from nformer_edge.data.records import DISTRACTOR, Dataset, ImageRecord
from nformer_edge.data.spread import over_people
from nformer_edge.exporting.bundle import BACKBONE, HEAD, Bundle
from nformer_edge.exporting.session import ONNXRUNTIME, open_session
from nformer_edge.metrics.agreement import rank_agreement
from nformer_edge.metrics.bootstrap import ONE_SIDED, paired_difference
from nformer_edge.metrics.ranking import RankingResult, evaluate
from nformer_edge.ops import native, onnx_ops
from nformer_edge.ops.contract import draw_landmarks
from nformer_edge.quantize.spec import SCOPES
from nformer_edge.quantize.values import HeldOutFacts, Score

if TYPE_CHECKING:
    from onnx import ModelProto

#: Share of the training identities that is held out, unless fewer are enough.
SHARE = 0.2

#: Images a person that the number of identities is computed by.
_IMAGES_A_PERSON = 4

#: Images that overlap@10 compares.
_NEAREST = 10

#: What is known of images that nobody labeled, before they are compared: no mAP.
_UNKNOWN = Score(math.nan, math.nan, math.nan, math.nan, 1.0)

#: Images a run: more gain nothing on a CPU and cost memory.
_BATCH = 16

#: Pairs of single images that a latency is the median of, after so many that do not count.
_ROUNDS, _WARMUP = 31, 3


@dataclass(frozen=True)
class HeldOut:
    """Images of held-out identities, or of nobody known. Each asks for all the others: query and gallery at once."""

    records: tuple[ImageRecord, ...]

    @property
    def labeled(self) -> bool:
        """Whether it is known who is who; if not, there is no mAP, and overlap@10 alone counts."""
        return any(r.pid > DISTRACTOR for r in self.records)

    @cached_property
    def facts(self) -> HeldOutFacts:
        """How many there are, and their hash."""
        digest = hashlib.sha256()
        for record in self.records:
            digest.update(f"{sha256_file(record.path)} {record.pid} {record.camid}\n".encode())
        count = len(self.records)
        return HeldOutFacts(len({r.pid for r in self.records if r.pid > DISTRACTOR}), count, count, digest.hexdigest())

    def label(self, features: np.ndarray) -> Features:
        """Features [N, D] of the images with their identities and cameras.

        Of nobody known each image is a person of its own: the protocol then leaves out the image itself alone.
        """
        if not self.labeled:
            rows = np.arange(len(self.records))
            return Features(features, rows + 1, np.zeros(len(rows), np.int64), tuple(r.path for r in self.records))
        pids, camids = (np.array([getattr(r, name) for r in self.records], np.int64) for name in ("pid", "camid"))
        return Features(features, pids, camids, tuple(r.path for r in self.records))


def hold_out(dataset: Dataset, images: int, seed: int) -> tuple[Dataset, HeldOut]:
    """A dataset without some training identities, and images of these; of images that nobody labeled, half of them.

    Args:
        dataset: with training images.
        images: at most so many; a person has about four, of as many cameras as there are.
        seed: of the choice of people and images.

    Raises:
        DataError: if fewer than two people can be held out, each seen by two cameras, or too few unlabeled images.
    """
    if dataset.train and not any(r.pid > DISTRACTOR for r in dataset.train):
        order = np.random.default_rng(seed).permutation(len(dataset.train))
        count = min(images, len(order) // 2)
        if count <= _NEAREST:
            got, expected = f"{len(order)} images", f"at least {2 * _NEAREST + 2}"
            hint = "Give more images: half of them calibrate, half compare INT8 with FP32."
            raise DataError(f"{dataset.root}: train", got, expected, hint)
        chosen, rest_of = (tuple(dataset.train[i] for i in sorted(part)) for part in (order[:count], order[count:]))
        return replace(dataset, train=rest_of), HeldOut(tuple(sorted(chosen, key=lambda r: r.path)))
    people = len({r.pid for r in dataset.train})
    wanted = min(SHARE, images / _IMAGES_A_PERSON / people) if people else 0.0
    rest, held = split_holdout(dataset.train, wanted, seed)
    chosen = () if held is None else over_people(tuple(dict.fromkeys(held.query + held.gallery)), images, seed)
    if len({r.pid for r in chosen}) < 2:
        raise DataError(
            f"{dataset.root}: train",
            f"{people} people, too few to hold two of them out",
            "training images of more people, seen by several cameras",
            "Name a dataset with more people. Without labels, --layout unlabeled compares by overlap@10 alone.",
        )
    return replace(dataset, train=rest), HeldOut(tuple(sorted(chosen, key=lambda r: r.path)))


class Evaluator:
    """FP32's features of held-out images, and what another backbone's lose against them.

    Args:
        bundle: the FP32 model.
        held_out: images that calibrated nothing.
        intra_op_threads: of onnxruntime; one a CPU that this process may use if None.
    """

    def __init__(self, bundle: Bundle, held_out: HeldOut, intra_op_threads: int | None = None) -> None:
        self._bundle, self.held_out = bundle, held_out
        self._threads = intra_op_threads or native.default_threads()
        self.scopes = SCOPES if bundle.has_head else SCOPES[:1]

    def facts(self) -> Table:
        """Everything but the backbone that a score depends on, as plain data."""
        import onnxruntime

        return {
            "files": {name: self._bundle.files.digest(name) for name in self._bundle.files.files if "onnx" in name},
            "held_out": self.held_out.facts.sha256,
            "landmark_seed": self._bundle.manifest.landmark_seed,
            ONNXRUNTIME: onnxruntime.__version__,
            "cpu": list(instruction_sets()),
            "native": onnx_ops.available(),
        }

    def score(self, model: ModelProto | None = None) -> dict[str, Score]:
        """What a backbone is worth, by scope; FP32 itself if None. One that gives an image no feature, nothing."""
        if model is None:
            found_by = {scope: ranked for scope, (_, ranked) in self._reference.items()}
            return {s: _UNKNOWN if r is None else Score(r.mAP, r.rank(1), 0.0, 0.0, 1.0) for s, r in found_by.items()}
        return self.engine_score(self._session(model.SerializeToString()))

    def engine_score(self, embed: Callable[[np.ndarray], np.ndarray]) -> dict[str, Score]:
        """What an engine's backbone is worth, by scope; the head's features are FP32's head's."""
        found = self._scoped(embed)
        return {scope: self._compared(found[scope], *self._reference[scope]) for scope in self.scopes}

    def latency(self, model: ModelProto) -> tuple[float, float]:
        """One image through the backbone, in turn with FP32: FP32's median in milliseconds, and the median ratio."""
        image = self._images[:1]
        runs = [self._session(graph) for graph in (self._bundle.backbone, model.SerializeToString())]
        seconds = np.empty((2, _WARMUP + _ROUNDS))
        for i in range(seconds.shape[1]):
            for which in (i % 2, 1 - i % 2):  # now one begins, now the other: neither always finds a warm cache
                start = time.perf_counter()
                runs[which](image)
                seconds[which, i] = time.perf_counter() - start
        plain, found = 1000 * seconds[:, _WARMUP:]
        return statistics.median(plain.tolist()), statistics.median((found / plain).tolist())

    def size_mb(self, model: ModelProto | None = None) -> float:
        """The engine's graphs, the head's among them, in megabytes; FP32's if no backbone is given."""
        backbone = len(self._bundle.backbone) if model is None else model.ByteSize()
        return (backbone + (len(self._bundle.head) if self._bundle.has_head else 0)) / 1e6

    @cached_property
    def _images(self) -> np.ndarray:
        paths = [r.path for r in self.held_out.records]
        return np.concatenate(list(iter_batches(paths, self._bundle.spec.preprocess)))

    @cached_property
    def _reference(self) -> Mapping[str, tuple[np.ndarray, RankingResult | None]]:
        found = self._scoped(self._session(self._bundle.backbone))
        return {scope: (rows, self._ranked(rows)) for scope, rows in found.items()}

    def _ranked(self, rows: np.ndarray) -> RankingResult | None:
        if not self.held_out.labeled:
            return None
        labeled = self.held_out.label(rows)
        return evaluate(labeled, labeled)

    def _compared(self, rows: np.ndarray, reference: np.ndarray, expected: RankingResult | None) -> Score:
        if not (np.isfinite(rows).all() and rows.any(axis=1).all()):
            return Score(0.0, 0.0, 0.0 if expected is None else expected.mAP, 1.0, 0.0)
        ranked, theirs, ours = self._ranked(rows), self.held_out.label(reference), self.held_out.label(rows)
        overlap = rank_agreement((theirs, theirs), (ours, ours)).overlap
        if ranked is None or expected is None:
            return replace(_UNKNOWN, overlap_at_10=overlap)
        gain = paired_difference(ranked.ap[ranked.valid], expected.ap[expected.valid], quantiles=ONE_SIDED)
        return Score(ranked.mAP, ranked.rank(1), expected.mAP - ranked.mAP, 0.0 - gain.lower, overlap)

    def _scoped(self, run: Callable[[np.ndarray], np.ndarray]) -> dict[str, np.ndarray]:
        parts = [run(self._images[i : i + _BATCH]) for i in range(0, len(self._images), _BATCH)]
        found = {SCOPES[0]: np.concatenate(parts)}
        if self._bundle.has_head:
            found[SCOPES[1]] = self._head(found[SCOPES[0]])
        return found

    @cached_property
    def _head(self) -> Callable[[np.ndarray], np.ndarray]:
        spec = self._bundle.spec.head
        assert spec is not None, "asked for with a head alone"
        count, seed = len(self.held_out.records), self._bundle.manifest.landmark_seed
        landmarks = draw_landmarks(count, spec.layers, spec.landmarks, seed)
        session = open_session(self._bundle.head, HEAD, self._threads, native=onnx_ops.available())
        return lambda features: session.run(["embeddings"], {"features": features, "landmarks": landmarks})[0]

    def _session(self, backbone: bytes) -> Callable[[np.ndarray], np.ndarray]:
        session = open_session(backbone, BACKBONE, self._threads)
        return lambda images: session.run(["features"], {"images": images})[0]
