"""A query alone with the gallery: against one whole pass a query."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from nformer_edge.core.spec import HeadSpec
from nformer_edge.model.gated import LISTED, RANKS, GatedHead, profile, start_as_gates
from nformer_edge.model.nformer import NFormer, scaled, unit
from nformer_edge.model.per_query import GalleryPass, GatedPass, gallery_pass
from nformer_edge.ops.contract import draw_landmarks
from nformer_edge.ops.operators import operators


def make_head(rule: str = "features", layers: int = 3, k: int = 5) -> NFormer:
    torch.manual_seed(0)
    head = NFormer(HeadSpec(16, layers, 2, k, 4, rule)).double().eval()  # type: ignore[arg-type]
    for name, parameter in head.named_parameters():
        if name.endswith(".w"):
            torch.nn.init.normal_(parameter, std=0.3)  # a change must not fade on its way through the layers
    return head


def crowd(people: int, shots: int, noise: float = 0.6) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    centers = torch.randn(people, 1, 16, generator=generator, dtype=torch.float64)
    offsets = noise * torch.randn(people, shots, 16, generator=generator, dtype=torch.float64)
    return (centers + offsets).flatten(0, 1)


def landmarks_of(head: NFormer, images: int) -> Tensor:
    return torch.from_numpy(draw_landmarks(images, head.spec.layers, head.spec.landmarks, 3))


@torch.no_grad()
def whole_pass(head: NFormer, gallery: Tensor, query: Tensor, landmarks: Tensor, frozen: bool = False) -> Tensor:
    """The head over [gallery; query], layer by layer, landmarks projected as in the gallery's own pass: [N + 1, D].

    `frozen` puts the gallery's rows of its own pass back after every layer.
    """
    every = torch.cat([gallery, query[None]])
    unit = every / every.norm(dim=1, keepdim=True)
    x, alone = scaled(every, head.spec), scaled(gallery, head.spec)
    shared = operators().row_top_k(unit[None], unit[None], head.spec.k)
    mine = operators().row_top_k(unit[None, :-1], unit[None, :-1], head.spec.k)
    for block, drawn in zip(head.h, landmarks, strict=True):
        a, b, v = block.attn.factors(torch.cat([x, alone[drawn]]), torch.arange(len(x), len(x) + len(drawn)))
        a, b, v = a[:, : len(x)], b[:, : len(x)], v[:, : len(x)]
        lists = shared if head.spec.rule == "features" else operators().row_top_k(a, b, head.spec.k)
        y = operators().reciprocal_neighbor_attention(a, b, v, lists)
        x = block.rows(x, y.transpose(0, 1).flatten(1))
        alone = block(alone, drawn, mine if head.spec.rule == "features" else None)
        if frozen:
            x[:-1] = alone
    return head.bottleneck(x)


def joined(passed: GalleryPass, query: Tensor, follow: bool) -> Tensor:
    changed = passed.ask(query[None], follow)
    rows = torch.cat([passed.embeddings, changed.x[:1]])
    rows[changed.image] = changed.x
    return rows


@pytest.mark.parametrize("follow", [True, False])
@pytest.mark.parametrize("k", [1, 5, 80])
@torch.no_grad()
def test_a_query_alone_equals_a_whole_pass(follow: bool, k: int) -> None:
    head, images = make_head(k=k), crowd(12, 6)
    gallery, queries = images[6:], torch.cat([images[:2], images[6:8] + 0.01, images[20:22] + 0.1])  # far, close, near
    landmarks = landmarks_of(head, len(gallery))
    passed = GalleryPass(head, gallery, landmarks)
    for query in queries:
        expected = whole_pass(head, gallery, query, landmarks, frozen=not follow)
        torch.testing.assert_close(joined(passed, query, follow), expected, rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_a_copy_of_a_gallery_image_ties_as_the_kernels_tie() -> None:
    """Equal scores stand lower column first, and a query stands last: in float32 as in the kernels that choose."""
    head, images = make_head(k=2).float(), crowd(12, 6).float()
    gallery = torch.cat([images[6:], images[6:30:2]])
    landmarks = landmarks_of(head, len(gallery))
    passed = GalleryPass(head, gallery, landmarks)
    for query in images[6:12]:
        expected = whole_pass(head, gallery, query, landmarks)
        torch.testing.assert_close(joined(passed, query, True), expected, rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_with_one_layer_it_is_the_head_itself() -> None:
    """No landmark can have changed before the first layer."""
    head, images = make_head(layers=1), crowd(12, 6)
    landmarks = landmarks_of(head, 66)
    passed = GalleryPass(head, images[6:], landmarks)
    for query in images[:4]:
        expected = head(torch.cat([images[6:], query[None]]), landmarks)
        torch.testing.assert_close(joined(passed, query, True), expected, rtol=1e-9, atol=1e-9)


@torch.no_grad()
def kept_lists(head: NFormer, gallery: Tensor, query: Tensor, landmarks: Tensor) -> Tensor:
    """The head over [gallery; query], layer by layer; the gallery's lists are those of its own pass, with the query in
    the last place of those that it enters: [N + 1, D]."""
    x, alone, size = scaled(torch.cat([gallery, query[None]]), head.spec), scaled(gallery, head.spec), len(gallery)
    for block, drawn in zip(head.h, landmarks, strict=True):
        base = block.attn.factors(alone, drawn)
        a, b, v = block.attn.factors(torch.cat([x, alone[drawn]]), torch.arange(size + 1, size + 1 + len(drawn)))
        a, b, v = a[:, : size + 1], b[:, : size + 1], v[:, : size + 1]
        theirs = operators().row_top_k(base[0], base[1], head.spec.k)
        own = operators().row_top_k(a[:, -1:], torch.cat([base[1], b[:, -1:]], dim=1), head.spec.k)
        last = (base[0] * torch.stack([f[i] for f, i in zip(base[1], theirs[:, :, -1].long(), strict=True)])).sum(dim=2)
        entered = (base[0] * b[:, -1:]).sum(dim=2) > last
        theirs[:, :, -1] = torch.where(entered, size, theirs[:, :, -1])
        y = operators().reciprocal_neighbor_attention(a, b, v, torch.cat([theirs, own], dim=1))
        x = block.rows(x, y.transpose(0, 1).flatten(1))
        alone = block(alone, drawn, None)
    return head.bottleneck(x)


@pytest.mark.parametrize("follow", [True, False])
@torch.no_grad()
def test_under_the_affinity_rule_lists_keep_their_members_but_for_the_query(follow: bool) -> None:
    head, images = make_head("affinity"), crowd(12, 6)
    landmarks = landmarks_of(head, 66)
    passed = GalleryPass(head, images[6:], landmarks)
    reference = kept_lists if follow else partial(whole_pass, frozen=True)
    for query in torch.cat([images[:3], images[6:8] + 0.01]):
        expected = reference(head, images[6:], query, landmarks)
        torch.testing.assert_close(joined(passed, query, follow), expected, rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_the_gallerys_own_pass_is_the_head() -> None:
    for rule in ("features", "affinity"):
        head, gallery = make_head(rule), crowd(12, 6)
        landmarks = landmarks_of(head, len(gallery))
        passed = GalleryPass(head, gallery, landmarks)
        torch.testing.assert_close(passed.embeddings, head(gallery, landmarks), rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_queries_of_a_batch_do_not_see_each_other() -> None:
    head, images = make_head(), crowd(12, 6)
    passed = GalleryPass(head, images[6:], landmarks_of(head, 66))
    queries = torch.cat([images[:3], images[:1], images[6:9]])
    together = {}
    for rows, changed in passed.ask_all(queries, batch=4):
        for q, image, x in zip(changed.query.tolist(), changed.image.tolist(), changed.x, strict=True):
            together[rows.start + q, image] = x
    alone = [passed.ask(query[None]) for query in queries]
    pairs = {(q, image): x for q, c in enumerate(alone) for image, x in zip(c.image.tolist(), c.x, strict=True)}
    assert together.keys() == pairs.keys()
    for pair, x in pairs.items():
        torch.testing.assert_close(together[pair], x, rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_a_gallery_of_one_image_has_room_for_a_query() -> None:
    head, images = make_head(), crowd(2, 1)
    landmarks = torch.zeros(3, 4, dtype=torch.int32)
    passed = GalleryPass(head, images[:1], landmarks)
    expected = whole_pass(head, images[:1], images[1], landmarks)
    torch.testing.assert_close(joined(passed, images[1], True), expected, rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_what_no_query_reaches_is_not_computed() -> None:
    """Two crowds on opposite sides: a query among one leaves the other alone."""
    head, images = make_head(), crowd(8, 10)
    far = -100 * torch.ones(40, 16, dtype=torch.float64) + images[:40]
    passed = GalleryPass(head, torch.cat([images[41:] + 50, far]), landmarks_of(head, 79))
    assert int(passed.ask(images[40:41] + 50).image[1:].max()) < 39


@torch.no_grad()
def _gated() -> GatedHead:
    torch.manual_seed(0)
    head = GatedHead(HeadSpec(16, 2, 1, 5, 40, "gated"))
    start_as_gates(head, torch.zeros(1, 16), None)
    return head.double().eval()


@torch.no_grad()
@pytest.mark.parametrize(("people", "shots"), [(60, 4), (200, 1), (7, 3)])
@pytest.mark.parametrize("copied", [False, True])
def test_a_query_alone_equals_a_whole_pass_of_the_gated_head(people: int, shots: int, copied: bool) -> None:
    head, every = _gated(), crowd(people, shots)
    gallery, queries = every[3:], torch.cat([every[:3], every[4:5]]) if copied else every[:3]
    landmarks = torch.from_numpy(draw_landmarks(len(gallery), 2, 40, 3))
    passed = gallery_pass(head, gallery, landmarks)
    assert isinstance(passed, GatedPass)
    assert torch.allclose(passed.embeddings, head(gallery, landmarks), atol=1e-12)
    for query in queries:
        rows = torch.cat([gallery, query[None]])
        own = head.map(scaled(rows, head.spec))
        own = unit(own - own[:-1].index_select(0, landmarks[0]).mean(dim=0))
        lists = operators().row_top_k(own[None], own[None], LISTED)
        x = own
        for gate in head.h:
            x = gate(x, profile(x, lists[0]), lists)
        exact = head.output(x, own)
        answer = passed.ask(query[None])
        assert torch.allclose(answer.x, exact[answer.image], atol=1e-12)
        nearby = passed.ask_nearby(query[None]).x[:1]
        assert torch.nn.functional.cosine_similarity(nearby, exact[-1:]) > 0.9


@torch.no_grad()
def test_nearby_the_query_moves_itself_and_the_neighbors_that_hold_it_for_one() -> None:
    head, every = _gated(), crowd(50, 3)
    gallery, queries = every[8:], every[:8]
    landmarks = torch.from_numpy(draw_landmarks(len(gallery), 2, 40, 3))
    passed = gallery_pass(head, gallery, landmarks)
    assert isinstance(passed, GatedPass)
    shares = [_nearby_by_hand(head, passed, query[None]) for query in queries]
    assert min(shares) < 1
    assert max(shares) > 0


def _nearby_by_hand(head: GatedHead, passed: GatedPass, query: Tensor) -> float:
    """Checks `ask_nearby`; the share of the query's neighbors that hold it for one."""
    size, k = len(passed), head.spec.k
    own = unit(head.map(scaled(query, head.spec)) - passed.center)
    both = torch.cat([passed.own, own])
    lists = operators().row_top_k(both[None], both[None], LISTED)[0].long()
    ranked = lists[-1]
    near = [int(j) for j in ranked[: k + 1] if j != size]
    holds = [j for j in near if size in lists[j, : k + 1]]
    rows, alone, moved = passed.own.clone(), passed.own, own
    for gate, thresholds in zip(head.h, passed.thresholds, strict=False):
        t = gate.thresholds((torch.cat([alone, moved])[ranked[list(RANKS)]] @ moved[0])[None])
        weights = torch.sigmoid(gate.log_slope.exp() * (rows[near] @ moved[0] - (t + thresholds[near]) / 2))
        sums = gate.sums(alone, thresholds, passed.lists[None])
        alone = gate.joined(alone, sums)
        after = alone.clone()
        for j, weight in zip(near, weights, strict=True):
            if j in holds:
                after[j] = gate.joined(rows[j : j + 1], sums[j : j + 1] + weight * moved)[0]
        moved, rows = gate.joined(moved, (weights[:, None] * rows[near]).sum(dim=0)[None]), after
    answer = passed.ask_nearby(query)
    assert sorted(answer.image[1:].tolist()) == sorted(holds)
    assert torch.allclose(answer.x[:1], head.output(moved, own), atol=1e-12)
    expected = head.output(rows, passed.own)[answer.image[1:]]
    assert torch.allclose(answer.x[1:], expected, atol=1e-12)
    return len(holds) / len(near)
