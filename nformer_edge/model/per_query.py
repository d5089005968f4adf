"""The per-query protocol: the head sees the gallery and one query at a time, as the paper says it evaluates.

For query q the set is the gallery's N images and, last, q. Run anew, that is one full pass a query. Here one pass over
the gallery alone keeps what every layer saw, projected and chose (`GalleryPass`); a query then costs what it changes:

- its own row, in every layer;
- the rows whose lists it enters, and those that it pushes out of a list: their reciprocal neighbors change;
- through the layers, the reciprocal neighbors of any row that changed before.

Landmarks are gallery images, the same for all queries, and their projections are those of the gallery's own pass.

Letters: N gallery images, B queries taken at once, H heads, K neighbors, l landmarks, D features, R = min(l, D / H),
P changed rows: pairs of a query of the batch and an image of its set, the B queries themselves first. Image N is the
query.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from nformer_edge.core.terminal import PROGRESS
from nformer_edge.model.gated import LISTED, GatedHead, Head, profile
from nformer_edge.model.nformer import Agents, Block, NFormer, scaled, unit
from nformer_edge.ops.operators import operators

#: Changed rows whose neighbors' values are gathered at once: 2048 x 21 x 512 floats take 84 MiB.
_ROWS = 2048


@dataclass(frozen=True)
class Lists:
    """The gallery's neighbor lists, and what it takes to say which of them a new image enters.

    Args:
        rows: [h, N, R] and `columns` [h, N, R], whose products are the scores; h is 1 under the features rule.
        chosen: int64 [h, N, K], -1 where there are fewer than K images.
        last: [h, N], the score in the last place; -infinity where the list is not full.
        mutual: bool [h, N, K], whether each neighbor chose back.
    """

    rows: Tensor
    columns: Tensor
    chosen: Tensor
    last: Tensor
    mutual: Tensor


@dataclass(frozen=True)
class Layer:
    """What one layer made of the gallery alone.

    Args:
        x: [N, D], what it saw.
        a, b, v: [H, N, R], [H, N, R] and [H, N, D / H], the affinity's factors and the values.
        agents: what the landmarks make of queries and keys.
        lists: whom its rows attend to.
    """

    x: Tensor
    a: Tensor
    b: Tensor
    v: Tensor
    agents: Agents
    lists: Lists


@dataclass(frozen=True)
class Changed:
    """What a batch of queries changes.

    Args:
        query: int64 [P], which query of the batch; the first B are 0..B-1.
        image: int64 [P], which image of its set; N, the query itself, for the first B.
        x: [P, D], its row.
    """

    query: Tensor
    image: Tensor
    x: Tensor


class GalleryPass:
    """The head over a gallery alone, kept layer by layer: 4 layers of 16,000 x 512 features take 0.3 GiB.

    Args:
        head: in evaluation mode, on the features' device.
        gallery: [N, D], N >= 1.
        landmarks: int32 [layers, l], gallery images.

    `embeddings` is the head's output for the gallery alone, [N, D].
    """

    def __init__(self, head: NFormer, gallery: Tensor, landmarks: Tensor) -> None:
        self.head = head
        self.layers: list[Layer] = []
        unit = torch.nn.functional.normalize(gallery, dim=1, eps=1e-12)
        shared = _lists(unit[None], unit[None], head.spec.k) if head.spec.rule == "features" else None
        x = scaled(gallery, head.spec)
        for block, drawn in zip(head.h, landmarks, strict=True):
            agents = block.attn.agents(x.index_select(0, drawn))
            a, b, v = block.attn.factors_by(agents, x)
            lists = shared or _lists(a, b, head.spec.k)
            self.layers.append(Layer(x, a, b, v, agents, lists))
            y = operators().reciprocal_neighbor_attention(a, b, v, lists.chosen.int())
            x = _rest(block, x, y)
        self.embeddings: Tensor = head.bottleneck(x)

    def __len__(self) -> int:
        return len(self.embeddings)

    def ask(self, queries: Tensor, follow: bool = True) -> Changed:
        """The head over the gallery and each of `queries` [B, D] alone.

        Args:
            follow: gallery rows change as the query changes them, layer by layer. Under the features rule, whose lists
                are chosen once, that is all there is. Under the affinity rule every layer chooses anew, and a row that
                changed could enter or leave any list: there each list keeps its members but for the query itself.
                False leaves the gallery as it is without the query, which alone is computed.

        Returns:
            The queries' embeddings, and those of the gallery rows that changed.
        """
        count, size = len(queries), len(self)
        index = torch.arange(count, device=queries.device)
        state = Changed(index, torch.full_like(index, size), scaled(queries, self.head.spec))
        if self.head.spec.rule == "features":
            unit = torch.nn.functional.normalize(queries, dim=1, eps=1e-12)
            meeting = Meeting.of(self.layers[0].lists, unit[None], unit[None])
        for layer, block in zip(self.layers, self.head.h, strict=True):
            a, b, v = block.attn.factors_by(layer.agents, state.x)
            if self.head.spec.rule == "affinity":
                meeting = Meeting.of(layer.lists, a[:, :count], b[:, :count])
            after = meeting.reached(state) if follow else state
            state = _advance(block, layer, meeting, state, after, (a, b, v))
        return Changed(state.query, state.image, self.head.bottleneck(state.x))

    def ask_all(self, queries: Tensor, follow: bool = True, batch: int = 32) -> Iterator[tuple[slice, Changed]]:
        """`ask` for [Q, D] in batches, with a progress bar."""
        for start in tqdm(range(0, len(queries), batch), desc="per query", unit="batch", **PROGRESS):
            rows = slice(start, min(start + batch, len(queries)))
            yield rows, self.ask(queries[rows], follow)


class GatedPass:
    """As `GalleryPass`, for the gated head. The center is the gallery's own.

    A query enters some hundred lists, and through thresholds and layers changes some hundred rows more: `ask` runs the
    layers over the whole set and chooses only the lists anew that the query enters (`gallery.live` follows what
    changes). `ask_nearby` moves the query
    and the images that it and they hold for neighbors, and nothing else: what the query pulls most.
    """

    def __init__(self, head: GatedHead, gallery: Tensor, landmarks: Tensor) -> None:
        self.head = head
        mapped = head.map(scaled(gallery, head.spec))
        self.center = mapped.index_select(0, landmarks[0]).mean(dim=0)
        self.own = unit(mapped - self.center)
        self.lists = operators().row_top_k(self.own[None], self.own[None], LISTED)[0]
        self.last = _last_scores(self.own[None], self.own[None], self.lists[None].long())[0]
        self.scores = profile(self.own, self.lists)
        nearest = self.lists[None, :, : head.spec.k + 1]
        self.outside = _last_scores(self.own[None], self.own[None], nearest.long())[0]
        self.layers = [self.own]
        self.thresholds: list[Tensor] = []
        self.sums: list[Tensor] = []
        for layer, gate in enumerate(head.h):
            x = self.layers[-1]
            self.thresholds.append(gate.thresholds(profile(x, self.lists) if layer else self.scores))
            self.sums.append(gate.sums(x, self.thresholds[-1], self.lists[None]))
            self.layers.append(gate.joined(x, self.sums[-1]))
        self.embeddings: Tensor = head.output(self.layers[-1], self.own)

    def __len__(self) -> int:
        return len(self.embeddings)

    def ask(self, query: Tensor) -> Changed:
        """The head over the gallery and `query` [1, D]."""
        mine = self._mapped(query)
        both, size = torch.cat([self.own, mine]), len(self)
        chosen = operators().row_top_k(mine[None], both[None], LISTED)[0]
        entered = _rounded((self.own.double() @ mine[0].double()), mine) > self.last
        lists = torch.cat([self.lists, chosen])
        if entered.any():
            lists[:size][entered] = operators().row_top_k(self.own[entered][None], both[None], LISTED)[0]
        image = torch.arange(size + 1, device=query.device).roll(1)
        x = self.head.through(both, profile(both, lists), lists[None])
        return Changed(torch.zeros_like(image), image, x[image])

    def ask_nearby(self, queries: Tensor) -> Changed:
        """Each of `queries` [B, D] alone: of the gallery's rows, only neighbors in whose lists the query stands change.

        They keep their thresholds, and what all others give them.
        """
        x = mine = self._mapped(queries)
        chosen = operators().row_top_k(mine[None], self.own[None], LISTED - 1)[0]
        lists = torch.cat([chosen[:, :1], chosen], dim=1)  # what stands at rank 0, the query itself, is not looked at
        near = chosen[:, : self.head.spec.k].long()
        counts, near = near >= 0, near.clamp_min(0)
        own = profile(x, lists, self.own)
        rows = self.own[near]  # [B, k, D], as this query changes them
        query, place = (counts & ((mine[:, None] * rows).sum(dim=2) > self.outside[near])).nonzero(as_tuple=True)
        image = near[query, place]
        for layer, (gate, before, thresholds) in enumerate(
            zip(self.head.h, self.layers, self.thresholds, strict=False)
        ):
            t = gate.thresholds(profile(x, lists, before) if layer else own)[:, None]
            scores = (x[:, None] * rows).sum(dim=2)
            weights = (gate.log_slope.exp() * (scores - (t + thresholds[near]) / 2)).sigmoid() * counts
            y = (weights[:, :, None] * rows).sum(dim=1)
            pulled = self.sums[layer][image] + weights[query, place, None] * x[query]
            joined = gate.joined(rows[query, place], pulled)
            rows = self.layers[layer + 1][near]
            rows[query, place] = joined
            x = gate.joined(x, y)
        index = torch.arange(len(x), device=x.device)
        out = self.head.output(x, mine)
        moved = self.head.output(rows[query, place], self.own[image])
        return Changed(
            torch.cat([index, query]), torch.cat([torch.full_like(index, len(self)), image]), torch.cat([out, moved])
        )

    def _mapped(self, queries: Tensor) -> Tensor:  # [B, D] -> [B, D]
        return unit(self.head.map(scaled(queries, self.head.spec)) - self.center)

    def ask_all(self, queries: Tensor, follow: bool = True, batch: int = 32) -> Iterator[tuple[slice, Changed]]:
        """`ask` for each of [Q, D], or `ask_nearby` in batches unless `follow`; with a progress bar."""
        batch = 1 if follow else batch
        for start in tqdm(range(0, len(queries), batch), desc="per query", unit="batch", **PROGRESS):
            rows = slice(start, min(start + batch, len(queries)))
            yield rows, self.ask(queries[rows]) if follow else self.ask_nearby(queries[rows])


def nearby_cosines(
    head: GatedHead,
    queries: Tensor,  # [Q, D]
    gallery: Tensor,  # [G, D]
    landmarks: Tensor,  # int32 [layers, l], of the gallery
) -> Tensor:  # [Q, G]
    """What `GatedPass.ask_nearby` ranks by; gradients flow."""
    passed = GatedPass(head, gallery, landmarks)
    answer = passed.ask_nearby(queries)
    count, x = len(queries), unit(answer.x)
    query, image = answer.query[count:], answer.image[count:]
    moved = (x[query] * x[count:]).sum(dim=1)
    return (x[:count] @ unit(passed.embeddings).T).index_put((query, image), moved)


def gallery_pass(head: Head, gallery: Tensor, landmarks: Tensor) -> GalleryPass | GatedPass:
    """The pass over `gallery` [N, D] alone that the head's rule takes."""
    return (GatedPass if isinstance(head, GatedHead) else GalleryPass)(head, gallery, landmarks)  # type: ignore[arg-type]


class Meeting:
    """Who chooses whom when each query of a batch joins the gallery, in h lists (see `Lists`).

    Args:
        own: int64 [h, B, K], the queries' lists; N is the query itself.
        entered: bool [h, B, N], whether the query enters each gallery row's list and pushes out its last.
        chosen: bool [h, B, N], whether the query chose each gallery row.
    """

    def __init__(self, lists: Lists, own: Tensor, entered: Tensor) -> None:
        self.lists, self.own, self.entered = lists, own, entered
        size = lists.chosen.shape[1]
        self.chosen = torch.zeros_like(entered)
        heads, queries, places = ((own >= 0) & (own < size)).nonzero(as_tuple=True)
        self.chosen[heads, queries, own[heads, queries, places]] = True

    @classmethod
    def of(cls, lists: Lists, a: Tensor, b: Tensor) -> Meeting:
        """From the queries' factors [h, B, R]. A score is a float64 sum rounded to float32, as in the native kernels;
        the query stands last in its set, so that a tie keeps it out."""
        size, k = lists.chosen.shape[1:]
        own = operators().row_top_k(a, lists.columns, k).long()
        last = _last_scores(a, lists.columns, own)
        itself = _rounded((a.double() * b.double()).sum(dim=2), a) > last
        own = torch.cat([own[:, :, :-1], torch.where(itself, size, own[:, :, -1])[:, :, None]], dim=2)
        scores = _rounded(b.double() @ lists.rows.double().transpose(1, 2), a)
        return cls(lists, own, scores > lists.last[:, None, :])

    def slots(self, query: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
        """Whom the pairs [P] may attend to: images int64 [h, P, K + 1], and whether the choice is mutual, bool.

        The last slot is the query, in a gallery row's list; N stands for it. What does not count is image 0.
        """
        size = self.lists.chosen.shape[1]
        is_query = image == size
        row = torch.where(is_query, 0, image)
        theirs, own = self.lists.chosen[:, row], self.own[:, query]
        entered = self.entered[:, query, row]  # [h, P]
        images = torch.where(is_query[:, None], own, theirs)
        other = images.clamp(0, size - 1)
        asked = query[:, None].expand_as(images[0])
        entered_theirs = torch.stack([self.entered[h, asked, other[h]] for h in range(len(own))])
        pushed_me = entered_theirs & (
            torch.stack([self.lists.chosen[h, other[h], -1] for h in range(len(own))]) == row[:, None]
        )
        mutual = self.lists.mutual[:, row] & ~pushed_me
        mutual[:, :, -1] &= ~entered
        mutual = torch.where(is_query[:, None], entered_theirs | (own == size), mutual) & (images >= 0)
        joined = entered & self.chosen[:, query, row] & ~is_query
        images = torch.cat([torch.where(mutual, images, 0), torch.where(joined, size, 0)[:, :, None]], dim=2)
        return images, torch.cat([mutual, joined[:, :, None]], dim=2)

    def reached(self, state: Changed) -> Changed:
        """The pairs that a layer must compute: those that changed before it, those whose mutual neighbors did, and
        those whose lists of mutual neighbors changed, in any head. `x` is left empty."""
        size = self.entered.shape[2]
        mask = (self.entered & self.chosen).any(dim=0)
        for entered, mutual, chosen in zip(self.entered, self.lists.mutual, self.lists.chosen, strict=True):
            query, row = entered.nonzero(as_tuple=True)
            lost = mutual[row, -1]
            mask[query[lost], row[lost]] = True
            mask[query[lost], chosen[row[lost], -1]] = True
        before = state.image < size
        mask[state.query[before], state.image[before]] = True
        images, counts = self.slots(state.query, state.image)
        counts = counts & (images < size)
        mask[state.query[None, :, None].expand_as(images)[counts], images[counts]] = True
        query, image = mask.nonzero(as_tuple=True)
        themselves = torch.arange(len(mask), device=mask.device)
        return Changed(
            torch.cat([themselves, query]), torch.cat([torch.full_like(themselves, size), image]), state.x[:0]
        )


def _advance(
    block: Block, layer: Layer, meeting: Meeting, before: Changed, after: Changed, patch: tuple[Tensor, Tensor, Tensor]
) -> Changed:
    """One layer: the rows `after` from those that changed `before`, with their factors `patch` [H, P, ...]."""
    queries, size = meeting.entered.shape[1:]
    place = torch.full((queries, size + 1), -1, dtype=torch.long, device=before.query.device)
    place[before.query, before.image] = torch.arange(len(before.query), device=before.query.device)
    out = []
    for start in range(0, len(after.query), _ROWS):
        query, image = after.query[start : start + _ROWS], after.image[start : start + _ROWS]
        images, mutual = meeting.slots(query, image)
        here = place[query, image]
        a = _pick(layer.a, patch[0], image, here)
        there = place[query[None, :, None], images]
        y = _attend(a, layer, patch, images, there, mutual)
        x = _pick(layer.x[None], before.x[None], image, here)[0]
        out.append(_rest(block, x, y))
    return Changed(after.query, after.image, torch.cat(out))


def _attend(
    a: Tensor, layer: Layer, patch: tuple[Tensor, Tensor, Tensor], images: Tensor, there: Tensor, mutual: Tensor
) -> Tensor:
    """Softmax over the mutual neighbors, then the weighted sum of their values: [H, P, D / H], zero without any."""
    heads = []
    for h in range(len(a)):
        one = h if len(images) > 1 else 0
        counts, place = mutual[one], (images[one], there[one])
        b = _pick(layer.b[h : h + 1], patch[1][h : h + 1], *place)[0]
        v = _pick(layer.v[h : h + 1], patch[2][h : h + 1], *place)[0]
        scores = (a[h][:, None, :] * b).sum(dim=2) / math.sqrt(v.shape[2])
        highest = scores.masked_fill(~counts, -math.inf).amax(dim=1, keepdim=True)
        weights = (scores - highest).masked_fill(~counts, -math.inf).exp().nan_to_num(0.0)
        weights = weights / weights.sum(dim=1, keepdim=True).clamp_min(torch.finfo(weights.dtype).tiny)
        heads.append((weights[:, None, :] @ v)[:, 0])
    return torch.stack(heads)


def _pick(base: Tensor, patch: Tensor, image: Tensor, here: Tensor) -> Tensor:
    """Rows of `patch` [H, P, ...] where `here` is one of them, of `base` [H, N, ...] at `image` elsewhere."""
    found = here >= 0
    picked = base[:, torch.where(found, 0, image)]
    picked[:, found] = patch[:, here[found]]
    return picked


def _rest(block: Block, x: Tensor, y: Tensor) -> Tensor:
    """What follows attention, for x [N, D] and y [H, N, D / H], in pieces that stay in cache."""
    rows = y.transpose(0, 1).flatten(1)
    pieces = range(0, len(x), _ROWS)
    return torch.cat([block.rows(x[i : i + _ROWS], rows[i : i + _ROWS]) for i in pieces]) if len(x) else x


def _lists(rows: Tensor, columns: Tensor, k: int) -> Lists:
    chosen = operators().row_top_k(rows, columns, k).long()
    index = torch.arange(chosen.shape[1], device=chosen.device)
    mutual = []
    for one in chosen:
        pieces = []
        for start in range(0, len(one), _ROWS):
            piece, i = one[start : start + _ROWS], index[start : start + _ROWS]
            pieces.append((one[piece.clamp_min(0)] == i[:, None, None]).any(dim=2) & (piece >= 0))
        mutual.append(torch.cat(pieces))
    return Lists(rows, columns, chosen, _last_scores(rows, columns, chosen), torch.stack(mutual))


def _last_scores(rows: Tensor, columns: Tensor, chosen: Tensor) -> Tensor:
    """The score in the last place of each list, [h, N]; -infinity where nobody stands there."""
    last = chosen[:, :, -1]
    theirs = torch.stack([columns[h, last[h].clamp_min(0)] for h in range(len(last))])
    scores = _rounded((rows.double() * theirs.double()).sum(dim=2), rows)
    return scores.masked_fill(last < 0, -math.inf)


def _rounded(scores: Tensor, like: Tensor) -> Tensor:
    """Float64 sums to the float32 that the kernels compare; float64 models keep theirs."""
    return scores if like.dtype == torch.float64 else scores.float()
