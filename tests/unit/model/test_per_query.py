"""A query alone with the gallery: against one whole pass a query."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nformer_edge.core.ops import draw_landmarks
from nformer_edge.core.spec import HeadSpec
from nformer_edge.model.nformer import NFormer
from nformer_edge.model.operators import operators
from nformer_edge.model.per_query import GalleryPass


def make_head(rule: str = "features", layers: int = 3, k: int = 5) -> NFormer:
    torch.manual_seed(0)
    head = NFormer(HeadSpec(16, layers, 2, k, 4, rule)).double().eval()  # type: ignore[arg-type]
    for name, parameter in head.named_parameters():
        if name.endswith(".w"):
            torch.nn.init.normal_(parameter, std=0.3)  # a change must not fade on its way through the layers
    return head


def crowd(people: int, shots: int, noise: float = 0.6) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    centres = torch.randn(people, 1, 16, generator=generator, dtype=torch.float64)
    offsets = noise * torch.randn(people, shots, 16, generator=generator, dtype=torch.float64)
    return (centres + offsets).flatten(0, 1)


def landmarks_of(head: NFormer, images: int) -> Tensor:
    return torch.from_numpy(draw_landmarks(images, head.spec.layers, head.spec.landmarks, 3))


@torch.no_grad()
def whole_pass(head: NFormer, gallery: Tensor, query: Tensor, landmarks: Tensor, frozen: bool = False) -> Tensor:
    """The head over [gallery; query], layer by layer, landmarks projected as in the gallery's own pass: [N + 1, D].

    `frozen` puts the gallery's rows of its own pass back after every layer.
    """
    every = torch.cat([gallery, query[None]])
    unit = every / every.norm(dim=1, keepdim=True)
    x, alone = head.scaled(every), head.scaled(gallery)
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


def joined(passed: GalleryPass, query: Tensor, exact: bool) -> Tensor:
    changed = passed.ask(query[None], exact)
    rows = torch.cat([passed.embeddings, changed.x[:1]])
    rows[changed.image] = changed.x
    return rows


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("k", [1, 5, 80])
@torch.no_grad()
def test_a_query_alone_equals_a_whole_pass(exact: bool, k: int) -> None:
    head, images = make_head(k=k), crowd(12, 6)
    gallery, queries = images[6:], torch.cat([images[:2], images[6:8] + 0.01, images[20:22] + 0.1])  # far, close, near
    landmarks = landmarks_of(head, len(gallery))
    passed = GalleryPass(head, gallery, landmarks)
    for query in queries:
        expected = whole_pass(head, gallery, query, landmarks, frozen=not exact)
        torch.testing.assert_close(joined(passed, query, exact), expected, rtol=1e-9, atol=1e-9)


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
def test_under_the_affinity_rule_the_gallery_stays_as_it_was() -> None:
    head, images = make_head("affinity"), crowd(12, 6)
    landmarks = landmarks_of(head, 66)
    passed = GalleryPass(head, images[6:], landmarks)
    for query in images[:4]:
        changed = passed.ask(query[None])
        assert changed.image.tolist() == [66]
        expected = whole_pass(head, images[6:], query, landmarks, frozen=True)[-1:]
        torch.testing.assert_close(changed.x, expected, rtol=1e-9, atol=1e-9)


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
