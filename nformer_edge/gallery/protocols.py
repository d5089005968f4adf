"""The query protocols: what the head sees when a query is ranked.

- ``joint``: all queries and the gallery in one set, as the published code evaluates (`relate_sets`). A
  query may have other queries among its neighbors, which no camera in service would have.
- ``per-query``: each query alone with the gallery, as the paper says it evaluates. The query stands last in its set;
  landmarks are drawn from the gallery alone, the same for all queries, and projected as in the gallery's own pass. The
  query is ranked against the gallery's embeddings of that very run: by entering lists it changes some of them.

Under the affinity rule every layer chooses neighbors anew, and a row that changed could enter or leave any list. There
each list keeps its members but for the query itself, and ``exact`` is False.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, cast

import numpy as np
from tqdm import tqdm

from nformer_edge.backends.runner import Runner, require_head
from nformer_edge.core.errors import BackendError, DataError
from nformer_edge.core.features import Features, check_features
from nformer_edge.core.terminal import PROGRESS
from nformer_edge.metrics.distance import cosine_distances, unit_rows
from nformer_edge.ops.contract import draw_landmarks, relate_jointly

if TYPE_CHECKING:
    from nformer_edge.model.gated import Head

JOINT: Final = "joint"
PER_QUERY: Final = "per-query"

#: Queries taken at once: together they change some thousand rows, enough to keep the cores in matrix products.
_BATCH = 32


@dataclass(frozen=True)
class PerQuery:
    """Each query alone with the gallery.

    Args:
        query: the queries with their embeddings.
        gallery: the gallery with its embeddings of a pass without any query.
        distances: float32 [Q, G], cosine distances of each query's own run: what `evaluate` and `rank` take.
        changed: gallery rows that a query changes, on average.
        exact: whether a whole pass for each query, with the landmarks projected as here, would give these distances.
    """

    query: Features
    gallery: Features
    distances: np.ndarray
    changed: float
    exact: bool


def relate_sets(
    runner: Runner, query: Features, gallery: Features, seed: int | None = None
) -> tuple[Features, Features]:
    """Query and gallery through the head together, as the authors evaluate: every image sees every other.

    Args:
        runner: an open model with a head.
        query: features as the backbone gave them.
        gallery: likewise.
        seed: for the landmarks; the model's own if None.

    Raises:
        UsageError: if the model has no head.
        DataError: for a feature that is not finite or is all zeros.
    """
    head = require_head(runner.spec)
    return relate_jointly(runner.relate, head, query, gallery, runner.landmark_seed if seed is None else seed)


def relate_per_query(runner: Runner, query: Features, gallery: Features, seed: int | None = None) -> PerQuery:
    """The per-query protocol with an open model (`per_query`).

    Raises:
        BackendError: for a bundle or an engine, whose head is one graph.
        UsageError: if the model has no head.
        DataError: for a feature that is not finite or is all zeros, or an empty gallery.
    """
    require_head(runner.spec)
    with_head = getattr(runner, "with_head", None)
    if with_head is None:
        got, hint = f"a head that {runner.backend} runs as one graph", "Evaluate the checkpoint that it was made from."
        raise BackendError(PER_QUERY, got, "a checkpoint", hint)
    chosen = runner.landmark_seed if seed is None else seed
    return cast(PerQuery, with_head(lambda head: per_query(head, query, gallery, chosen)))


def relate_each(
    runner: Runner, query: Features, gallery: Features, seed: int | None = None
) -> Iterator[tuple[Features, Features]]:
    """Each query alone with the gallery by a whole pass of the head: any backend, both neighbor rules, few queries.

    The set is the gallery and, last, the query. Landmarks are drawn from the gallery alone and projected as they are in
    that set, so no answer depends on what else was asked.

    Yields:
        Of each query, itself [1, D] and the gallery [G, D] as they see each other.

    Raises:
        UsageError: if the model has no head.
        DataError: for a feature that is not finite or is all zeros, or an empty gallery.
    """
    head = require_head(runner.spec)
    if not len(gallery):
        raise DataError("gallery", "zero images", "at least one", "Check the path.")
    chosen = runner.landmark_seed if seed is None else seed
    landmarks = draw_landmarks(len(gallery), head.layers, head.landmarks, chosen)
    for i in tqdm(range(len(query)), desc="queries", unit="query", **PROGRESS):
        asked = query.take(np.array([i]))
        related = runner.relate(np.concatenate([gallery.features, asked.features]), landmarks)
        yield asked.with_features(related[-1:]), gallery.with_features(related[:-1])


def per_query(head: Head, query: Features, gallery: Features, seed: int = 0, follow: bool = True) -> PerQuery:
    """The per-query protocol with a head of PyTorch, in evaluation mode.

    Args:
        seed: of the landmarks.
        follow: False is quicker, and not what the protocol says: the gallery stays as it is without the query, but,
            under the gated rule, for the neighbors that hold the query for one.

    Raises:
        DataError: for a feature that is not finite or is all zeros, or an empty gallery.
    """
    import torch

    from nformer_edge.model.per_query import gallery_pass

    if not len(gallery):
        raise DataError("gallery", "zero images", "at least one", "Check the path.")
    for name, s in (("query features", query), ("gallery features", gallery)):
        check_features(s.features, name, head.spec.features)
    device = next(head.parameters()).device
    drawn = draw_landmarks(len(gallery), head.spec.layers, head.spec.landmarks, seed)
    with torch.inference_mode():
        theirs, asked, landmarks = (
            torch.from_numpy(np.ascontiguousarray(a)).to(device) for a in (gallery.features, query.features, drawn)
        )
        passed = gallery_pass(head, theirs, landmarks)
        alone = passed.embeddings.cpu().numpy()
        unit = unit_rows(alone, "gallery embeddings")
        embeddings = np.empty((len(query), alone.shape[1]), np.float32)
        distances = np.empty((len(query), len(gallery)), np.float32)
        changed = 0
        for rows, answer in passed.ask_all(asked, follow, _BATCH):
            count = rows.stop - rows.start
            which, image, x = (t.cpu().numpy() for t in (answer.query, answer.image, answer.x))
            embeddings[rows] = x[:count]
            mine, other = unit_rows(x[:count], "query embeddings"), unit_rows(x[count:], "gallery embeddings")
            distances[rows] = cosine_distances(mine, unit)
            cosines = (mine[which[count:]].astype(np.float64) * other.astype(np.float64)).sum(axis=1)
            distances[rows.start + which[count:], image[count:]] = 1.0 - cosines
            changed += len(other)
    asked_as, seen_as = query.with_features(embeddings), gallery.with_features(alone)
    exact = follow and head.spec.rule != "affinity"
    return PerQuery(asked_as, seen_as, distances, changed / max(len(query), 1), exact)
