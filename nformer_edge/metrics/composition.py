"""Composition: how many images a person has in the gallery. A head that relates images to each other depends on it.

A gallery is thinned to n images a person, and one query a person asks, by one seeded draw:

- of each person's queries that have a match in the gallery, one asks; people without one ask nothing;
- of each person's gallery images n stay: first one that the query may find (of another camera), then any others;
  whoever has fewer keeps them all;
- distractors (pid 0) and junk (pid -1) all stay.

The same queries ask for every n, and the gallery for a smaller n is part of that for a larger one. With one query a
person, bounds over queries are bounds over people.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from nformer_edge.core.errors import ArtifactError, DataError
from nformer_edge.core.features import Features
from nformer_edge.core.spec import check_at_least
from nformer_edge.core.values import JSON, from_json
from nformer_edge.metrics.bootstrap import Interval, mean_interval, paired_difference
from nformer_edge.metrics.distance import ROW_BLOCK, row_blocks
from nformer_edge.metrics.ranking import DISTRACTOR, UNKNOWN_CAMERA, Pair, evaluate, valid

#: Images a person of the table's rows; None is all.
SIZES: tuple[int | None, ...] = (1, 2, 4, 8, None)

#: Query and gallery through a head together, with a landmark seed (`gallery.protocols.relate_sets`).
Relate = Callable[[Features, Features, int], Pair]

#: Cosine distances [Q, G] of each query alone with the gallery, with a landmark seed: of the head as it is, and of the
#: head that is told how many images a person has, None where it cannot be (`gallery.protocols.ask_each`).
Ask = Callable[[Features, Features, int, float], tuple[np.ndarray, np.ndarray | None]]


@dataclass(frozen=True)
class Scores:
    """mAP and Rank-1, or what they differ by, with two-sided 95 % bounds by the bootstrap over people.

    Args:
        mAP: mean average precision.
        rank1: share of people whose first match is correct.
    """

    mAP: Interval
    rank1: Interval


@dataclass(frozen=True)
class CompositionRow:
    """The figures for one number of images a person.

    Args:
        images: gallery images a person, n; null for all.
        people: who ask, each with one query.
        gallery: images in the thinned gallery; the first draw's.
        backbone: scores of the backbone's features.
        head: scores after the head, all queries and the gallery in one set; null where there is no head.
        gain: head less backbone, person by person; null likewise.
        alone: scores after the head, each query alone with the gallery, as in a search; null where not measured.
        alone_gain: the same less backbone; null likewise.
        told: as `alone`, of a head that is told how many images a person has (`typical_images`); null where it cannot
            be.
        told_gain: the same less backbone; null likewise.
    """

    images: int | None
    people: int
    gallery: int
    backbone: Scores
    head: Scores | None
    gain: Scores | None
    alone: Scores | None
    alone_gain: Scores | None
    told: Scores | None = None
    told_gain: Scores | None = None

    @property
    def title(self) -> str:
        """``4``, or ``all``."""
        return "all" if self.images is None else str(self.images)


@dataclass(frozen=True)
class Composition:
    """How a model ranks, by the number of images a person.

    Args:
        measured_on: whose images.
        draws: of queries and gallery images; each person's scores are means over them.
        rows: one for each n, fewest images first.
    """

    measured_on: str
    draws: int
    rows: tuple[CompositionRow, ...]

    @classmethod
    def of(cls, extra: Mapping[str, JSON]) -> Composition | None:
        """What a checkpoint's `extra` says under ``accuracy``; None where it says nothing.

        Raises:
            ArtifactError: if it says something else.
        """
        said = extra.get("accuracy")
        return None if said is None else from_json(cls, said, "accuracy", error=ArtifactError)

    def expected_gain(self, counts: Sequence[int] | np.ndarray, told: bool = False) -> tuple[float, float] | None:
        """What the head gains in mAP and Rank-1, on average over people of whom a gallery has `counts` images.

        With each query alone, as in a search, where that was measured; else with all in one set. A person counts by
        the row of as many images or, where there is none, of the next fewer. None without a head.

        Args:
            told: the head is told how many images a person has, where it can be.
        """
        gains = [(r.images, (told and r.told_gain) or r.alone_gain or r.gain) for r in self.rows]
        rows = [(images, gain.mAP.value, gain.rank1.value) for images, gain in gains if images and gain]
        if not rows or not len(counts):
            return None
        table = np.array(rows, np.float64)
        place = np.searchsorted(table[:, 0], np.asarray(counts, np.float64), side="right") - 1
        mAP, rank1 = table[place.clip(min=0), 1:].mean(axis=0)
        return float(mAP), float(rank1)

    @property
    def searched(self) -> bool:
        """Whether `expected_gain` is from queries that were each alone with the gallery."""
        return all(r.alone_gain for r in self.rows)


def typical_images(counts: np.ndarray) -> float:
    """Of `counts` images of each person the harmonic mean: those with few decide, whom a head harms most."""
    return float(1 / (1 / np.asarray(counts)).mean())


def thin(query: Features, gallery: Features, images: int | None, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Which queries ask and which gallery images stay. Labels alone decide it.

    Args:
        images: that a person keeps in the gallery; all if None.
        seed: of the draw.

    Returns:
        Rows of `query`, int64, one a person, by person; and rows of `gallery`, ascending.

    Raises:
        DataError: if no query has a match in the gallery.
    """
    check_at_least("images", 1 if images is None else images, 1)
    rng = np.random.default_rng(seed)
    luck, order = rng.random(len(query)), rng.random(len(gallery))
    able = _with_match(query, gallery)
    able = able[np.lexsort((luck[able], query.pids[able]))]
    people, first = np.unique(query.pids[able], return_index=True)
    asks = able[first]
    place = np.searchsorted(people, gallery.pids).clip(max=len(people) - 1)
    camids = query.camids[asks][place]
    findable = (people[place] == gallery.pids) & ((camids != gallery.camids) | (camids == UNKNOWN_CAMERA))
    found = np.flatnonzero(findable)
    found = found[np.lexsort((order[found], gallery.pids[found]))]
    order[found[np.unique(gallery.pids[found], return_index=True)[1]]] = -1.0
    rows = np.lexsort((order, gallery.pids))
    _, start, count = np.unique(gallery.pids[rows], return_index=True, return_counts=True)
    number = np.empty(len(rows), np.int64)
    number[rows] = np.arange(len(rows)) - np.repeat(start, count)
    stays = (number < (len(gallery) if images is None else images)) | (gallery.pids <= DISTRACTOR)
    return asks, np.flatnonzero(stays)


def _with_match(query: Features, gallery: Features) -> np.ndarray:
    """Rows of the queries that have a match in the gallery."""
    matched = np.zeros(len(query), bool)
    for rows in row_blocks(len(query), ROW_BLOCK):
        same = query.pids[rows, None] == gallery.pids[None]
        matched[rows] = (valid(query, gallery, rows) & same).any(axis=1)
    matched &= query.pids > DISTRACTOR
    if not matched.any():
        got = f"{len(query)} queries, none with a match in the gallery from another camera"
        hint = "Count matches of the same camera: --same-camera (of `embed`, for a feature store), or check the labels."
        raise DataError("query", got, "at least one", hint)
    return np.flatnonzero(matched)


def composition(
    query: Features,
    gallery: Features,
    relate: Relate | None = None,
    ask: Ask | None = None,
    *,
    landmark_seeds: Sequence[int] = (0,),
    draws: int = 1,
    measured_on: str = "",
) -> Composition:
    """Scores the backbone's features, and what the head makes of them, for each of `SIZES`.

    Args:
        query: features as the backbone gave them.
        gallery: likewise.
        relate: the head, all in one set; None for the backbone alone. It sees the thinned sets alone.
        ask: the head, each query alone with the thinned gallery, and told what that has of each person who asks; None
            if that is not measured.
        landmark_seeds: of the head; a person's scores are means over them.
        draws: of queries and gallery images.
        measured_on: whose images these are, in words.

    Raises:
        DataError: if no query has a match in the gallery.
    """
    check_at_least("draws", draws, 1)
    rows = []
    for images in SIZES:
        plain, related, kept = [], [], []
        asked, told = list[np.ndarray](), list[np.ndarray]()
        for draw in range(draws):
            asks, stays = thin(query, gallery, images, draw)
            pair = query.take(asks), gallery.take(stays)
            kept.append(len(stays))
            plain.append(_scored(pair))
            related += [_scored(relate(*pair, seed)) for seed in landmark_seeds] if relate else []
            there = np.isin(pair[1].pids, pair[0].pids)
            typical = typical_images(np.unique(pair[1].pids[there], return_counts=True)[1])
            for answers in (ask(*pair, seed, typical) for seed in landmark_seeds if ask):
                for way, distances in zip((asked, told), answers, strict=True):
                    way += [] if distances is None else [_scored(pair, distances)]
        backbone = np.mean(plain, axis=0)
        of_parts = [scores for way in (related, asked, told) for scores in _against(backbone, way)]
        rows.append(CompositionRow(images, backbone.shape[1], kept[0], _scores(mean_interval, backbone), *of_parts))
    return Composition(measured_on, draws, tuple(rows))


def _against(backbone: np.ndarray, found: list[np.ndarray]) -> tuple[Scores, Scores] | tuple[None, None]:
    """Scores of one way, and what it gains."""
    if not found:
        return None, None
    scores = np.mean(found, axis=0)
    return _scores(mean_interval, scores), _scores(paired_difference, scores, backbone)


def _scored(pair: Pair, distances: np.ndarray | None = None) -> np.ndarray:
    """Of each person the average precision, and whether the first match is correct: float64 [2, P]."""
    result = evaluate(*pair, distances=distances)
    return np.stack([result.ap, result.hits(1)])


def _scores(bounded: Callable[..., Interval], *found: np.ndarray) -> Scores:
    return Scores(*(bounded(*(scores[i] for scores in found)) for i in range(2)))
