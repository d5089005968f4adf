"""Sets of mixed composition, and the ranking loss over them: what the gated head learns from.

A head that is trained on sets with twenty images a person learns to trust every neighbor. Here each set has another
number of images a person, strangers whom nobody asks for, and one query a person, as galleries in use have.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

#: Gallery images a person, by turns; the last keeps all.
IMAGES = (1, 2, 4, 8, 1 << 30)

#: Share of the people who are strangers in a set: they are in the gallery with an image or two, and never asked for.
STRANGERS = 0.5

#: Queries that a step ranks, and matches of each that it ranks.
QUERIES, MATCHES = 128, 8

#: Softness of a rank: the difference of two cosines that counts as half a place.
SOFTNESS = 0.015


class MixedSet(NamedTuple):
    """Images seen together: `rows` of the training images; the first `queries` ask, the others are the gallery."""

    rows: np.ndarray  # int64 [N]
    queries: int


def draw_mixed(labels: np.ndarray, cameras: np.ndarray, images: int, size: int, rng: np.random.Generator) -> MixedSet:
    """One set: of each person drawn a query, and up to `images` others, the first of another camera if there is one.

    Args:
        labels: int64 [M], people.
        cameras: int64 [M]; -1 where unknown.
        images: gallery images a person.
        size: most images in a set.
    """
    order = rng.permutation(len(labels))
    people = rng.permutation(np.unique(labels))
    strangers = set(people[: int(STRANGERS * len(people))].tolist())
    by_person: dict[int, list[int]] = {}
    for row in order.tolist():
        by_person.setdefault(int(labels[row]), []).append(row)
    asking, gallery = [], []
    for person in people[::-1].tolist():
        query, *others = by_person[person]
        if person in strangers or not others:
            gallery += by_person[person][:2]
        else:
            first = next((row for row in others if cameras[row] != cameras[query] or cameras[query] < 0), others[0])
            asking.append(query)
            gallery += [first, *(row for row in others if row != first)][:images]
        if len(asking) + len(gallery) >= size:
            break
    return MixedSet(np.array(asking + gallery), len(asking))


def ranking_loss(
    scores: Tensor,  # [Q, G], cosines
    query: tuple[Tensor, Tensor],  # int64 [Q], people and cameras
    gallery: tuple[Tensor, Tensor],  # int64 [G]
    rng: np.random.Generator,
) -> tuple[Tensor, Tensor]:  # loss, share of queries with a right first match
    """1 - smooth average precision (Brown et al., ECCV 2020), by Market-1501's protocol.

    Gallery images of the query's person and camera are left out. A query without a match counts nothing.
    """
    same = query[0][:, None] == gallery[0][None]
    left_out = same & (query[1][:, None] == gallery[1][None]) & (query[1][:, None] >= 0)
    losses, first = [], []
    for row, mine, hidden in zip(scores, same & ~left_out, left_out, strict=True):
        matches = mine.nonzero()[:, 0]
        if not len(matches):
            continue
        ranked = matches[torch.from_numpy(rng.permutation(len(matches))[:MATCHES])]
        ahead = torch.sigmoid((row[None] - row[ranked, None]) / SOFTNESS)
        place = ahead[:, ~hidden].sum(dim=1) + 0.5  # itself counts a half above
        among = ahead[:, mine].sum(dim=1) + 0.5
        losses.append(1 - (among / place).mean())
        first.append(mine[row.detach().masked_fill(hidden, -torch.inf).argmax()].float())
    if not losses:
        return scores.sum() * 0, scores.new_zeros(())
    return torch.stack(losses).mean(), torch.stack(first).mean()
