"""A head of PyTorch over queries and a gallery: all in one set, or each query alone (`gallery.protocols`)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from nformer_edge.core.errors import DataError
from nformer_edge.core.features import Features, check_features
from nformer_edge.metrics.distance import cosine_distances, unit_rows
from nformer_edge.model.gated import Head
from nformer_edge.model.per_query import gallery_pass
from nformer_edge.ops.contract import draw_landmarks, relate_jointly

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


@torch.inference_mode()
def relate(head: Head, query: Features, gallery: Features, seed: int = 0) -> tuple[Features, Features]:
    """`relate_jointly` with a head of PyTorch: the held-out evaluation's way."""
    device, dtype = next(head.parameters()).device, next(head.parameters()).dtype

    def run(rows: np.ndarray, landmarks: np.ndarray) -> np.ndarray:
        features = torch.from_numpy(rows.astype(np.float32)).to(device, dtype)
        related: np.ndarray = head(features, torch.from_numpy(landmarks).to(device)).float().cpu().numpy()
        return related

    return relate_jointly(run, head.spec, query, gallery, seed)


def per_query(head: Head, query: Features, gallery: Features, seed: int = 0, follow: bool = True) -> PerQuery:
    """The per-query protocol with a head of PyTorch, in evaluation mode.

    Args:
        seed: of the landmarks.
        follow: False is quicker, and not what the protocol says: the gallery stays as it is without the query, but,
            under the gated rule, for the neighbors that hold the query for one.

    Raises:
        DataError: for a feature that is not finite or is all zeros, or an empty gallery.
    """
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
