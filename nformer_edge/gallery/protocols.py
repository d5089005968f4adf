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
from typing import TYPE_CHECKING, Final, cast

import numpy as np
from tqdm import tqdm

from nformer_edge.backends.runner import Runner, require_head
from nformer_edge.core.errors import BackendError, DataError
from nformer_edge.core.features import Features
from nformer_edge.core.terminal import PROGRESS
from nformer_edge.gallery.live import LiveHead
from nformer_edge.ops.contract import draw_landmarks, gates_for, relate_jointly

if TYPE_CHECKING:
    from nformer_edge.gallery.live_gated import GatedLive
    from nformer_edge.training.relate import PerQuery

JOINT: Final = "joint"
PER_QUERY: Final = "per-query"

#: Each query alone, and the gallery as it is without it, or but for a shortlist (`live.LiveHead.ask`).
QUICK: Final = "quick"


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


def map_sets(
    runner: Runner, query: Features, gallery: Features, seed: int | None = None
) -> tuple[Features, Features] | None:
    """Query and gallery as a gated head compares them in one set: mapped, less their center, unit length.

    None where the head is not gated, or has no live form.
    """
    if runner.spec.head is None or runner.spec.head.rule != "gated" or not can_ask(runner):
        return None
    live = cast("GatedLive", LiveHead.open(runner, seed))
    return relate_jointly(live.compared, runner.spec.head, query, gallery, live.seed)


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
    from nformer_edge.training.relate import per_query

    return cast("PerQuery", with_head(lambda head: per_query(head, query, gallery, chosen)))


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


def can_ask(runner: Runner) -> bool:
    """Whether `ask_each` takes the model: its head has a live form."""
    return runner.has_head and bool(runner.head_numbers())


def ask_each(
    runner: Runner, query: Features, gallery: Features, seed: int | None = None, images: float | None = None
) -> tuple[np.ndarray, np.ndarray | None]:
    """Each query alone with the gallery, as a search asks (`LiveHead.ask`): quick, not exact.

    Args:
        images: a person, for the second answer.

    Returns:
        Cosine distances, float32 [Q, G], of the head as it was made; and those of the head that is told `images`, None
        where it cannot be.

    Raises:
        UsageError: if the model has no head, or one without a live form.
        DataError: for a feature that is not finite or is all zeros, or an empty gallery.
    """
    live = LiveHead.open(runner, seed)
    live.build(gallery.features)
    found: np.ndarray = 1 - live.ask(query.features)
    if images is None or not gates_for(live.numbers, images):
        return found, None
    live.tell(images)
    return found, 1 - live.ask(query.features)
