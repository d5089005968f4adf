"""The head over a gallery that changes, against PyTorch's passes and against a gallery built anew."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from nformer_edge.backends.open import open_model
from nformer_edge.core.errors import ArtifactError, DataError, UsageError
from nformer_edge.core.features import Features
from nformer_edge.core.spec import BackboneSpec, HeadSpec, ModelSpec
from nformer_edge.gallery import live_affinity
from nformer_edge.gallery.live import LiveHead
from nformer_edge.gallery.search import search_related
from nformer_edge.model.gated import head_numbers, make_head, start_as_gates
from nformer_edge.model.nformer import unit as unit_rows
from nformer_edge.model.per_query import gallery_pass
from nformer_edge.ops import native, reference
from nformer_edge.ops.contract import draw_landmarks

FEATURES = 24

pytestmark = pytest.mark.skipif(not native.available(), reason="the kernels are not compiled in this tree")


def people(count: int, seed: int, shots: int = 6) -> np.ndarray:
    rng = np.random.default_rng(seed)
    centers = np.repeat(rng.standard_normal((-(-count // shots), FEATURES)), shots, axis=0)[:count]
    return (centers + 0.6 * rng.standard_normal((count, FEATURES))).astype(np.float32)


def opened(
    rule: str = "gated", landmarks: int = 40, seed: int = 0, kept: str = "fp32", **spec: object
) -> tuple[torch.nn.Module, LiveHead]:
    """A head with weights of some size, and its live form."""
    torch.manual_seed(seed)
    layers, heads = (2, 1) if rule == "gated" else (3, 2)
    size = HeadSpec(FEATURES, layers=layers, heads=heads, k=8, landmarks=landmarks, rule=rule, **spec)
    head = make_head(size).eval()
    if rule == "gated":
        start_as_gates(head, torch.from_numpy(people(200, 9)), None)
        for gate in head.h:  # so that every layer moves rows, whatever was learnt
            gate.log_strength.data.fill_(-1.0)
            gate.profile.data.copy_(torch.tensor([0.1, 0.1, 0.1, 0.1, 0.1, 0.1, *[0.05] * 8]))
            gate.offset.data.fill_(0.1)
        head.map.linear.w.data += 0.1 * torch.randn(FEATURES, FEATURES)
    else:
        for x in head.parameters():
            x.data += 0.1 * torch.randn_like(x) * (1 if x.ndim > 1 else 0.3)
    return head, LiveHead.open(runner_of(head), kept=kept)


def runner_of(head: torch.nn.Module) -> SimpleNamespace:
    model = ModelSpec(BackboneSpec("osnet_x0_25", features=FEATURES), head.spec)
    numbers = head_numbers(head)
    return SimpleNamespace(name="m", spec=model, landmark_seed=3, has_head=True, head_numbers=lambda: numbers)


@torch.inference_mode()
def whole(head: torch.nn.Module, gallery: np.ndarray, queries: np.ndarray, follow: bool) -> np.ndarray:
    """PyTorch's scores [B, N]: `follow` as the exact form, else the quick one."""
    landmarks = draw_landmarks(len(gallery), head.spec.layers, head.spec.landmarks, 3)
    passed = gallery_pass(head, torch.from_numpy(gallery), torch.from_numpy(landmarks))
    unit = torch.nn.functional.normalize
    found = []
    for query in torch.from_numpy(queries):
        if follow and head.spec.rule == "affinity":
            rows = unit(anew(head, passed, torch.cat([torch.from_numpy(gallery), query[None]])))
            found.append(rows[:-1] @ rows[-1])
            continue
        changed = passed.ask(query[None]) if follow else ask_quick(passed, query[None])
        rows = passed.embeddings.clone()
        rows[changed.image[1:]] = changed.x[1:]
        found.append(unit(rows) @ unit(changed.x[0], dim=0))
    return torch.stack(found).numpy()


def ask_quick(passed, query):
    return passed.ask_nearby(query) if hasattr(passed, "ask_nearby") else passed.ask(query, follow=False)


def anew(head, passed, x):
    """A whole pass whose landmarks are projected as in the gallery's own: lists chosen anew."""
    x = unit_rows(x)
    for layer, block in zip(passed.layers, head.h, strict=True):
        a, b, v = block.attn.factors_by(layer.agents, x)
        y = reference.reciprocal_neighbor_attention(a, b, v, reference.row_top_k(a, b, head.spec.k))
        x = block.rows(x, y.transpose(0, 1).flatten(1))
    return head.bottleneck(x)


def near(found: np.ndarray, expected: np.ndarray, tolerance: float = 2e-5) -> None:
    assert np.abs(found - expected).max() <= tolerance


#: Rules, with landmarks fewer and more than a head has features.
RULES = [("gated", 40), ("features", 5), ("features", 40), ("affinity", 5), ("affinity", 40)]


@pytest.mark.parametrize("size", [3, 60, 300])
@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize(("rule", "landmarks"), RULES)
def test_a_query_is_answered_as_by_a_pass_of_pytorch(size, exact, rule, landmarks):
    head, live = opened(rule, landmarks)
    gallery, queries = people(size, 1), people(5, 2)
    live.build(gallery)
    near(live.ask(queries, exact=exact), whole(head, gallery, queries, exact))


@pytest.mark.parametrize(("rule", "seed"), [("gated", 0), ("gated", 1), ("features", 2), ("affinity", 3)])
def test_a_gallery_after_additions_and_removals_is_the_gallery_built_anew(rule, seed):
    _, live = opened(rule)
    rows = people(260, 3)
    live.build(rows[:100])
    held, rng = list(range(100)), np.random.default_rng(seed)
    fresh = list(range(100, 260))
    while fresh:
        count = int(rng.integers(1, 30))
        if rng.random() < 0.6:
            taken, fresh = fresh[:count], fresh[count:]
            live.add(rows[taken])
            held += taken
        else:
            gone = rng.choice(len(held), min(count, len(held) - 1), replace=False)
            live.remove(gone)
            held = [name for at, name in enumerate(held) if at not in set(gone.tolist())]
        if rng.random() < 0.5:
            live.ask(people(1, 5), exact=rng.random() < 0.5)
    _, anew = opened(rule)
    anew.build(rows[held], live.landmarks)
    queries = people(4, 6)
    for exact in (False, True):
        near(live.ask(queries, exact=exact), anew.ask(queries, exact=exact))


@pytest.mark.parametrize("many", [0, 8])  # rows that changed are always followed; or not, where they are many
def test_lists_under_the_affinity_rule_stay_those_of_row_top_k(many, monkeypatch):
    monkeypatch.setattr(live_affinity, "_MANY", many)
    _, live = opened("affinity")
    rows, rng = np.repeat(people(90, 3), 2, axis=0), np.random.default_rng(many)  # each image twice: scores are equal
    live.build(rows[:60])
    for start in range(60, 180, 12):
        live.add(rows[start : start + 12])
        live.ask(rows[:1] + people(1, start), exact=True)
        live.remove(rng.choice(len(live), 11, replace=False))
        live.ask(rows[:1], exact=True)
    for layer, h in np.ndindex(3, 2):
        a, b = (live._rows[f"{name}{layer}.{h}"][None, :-1] for name in "ab")
        names, scores = (live._rows[f"{name}{layer}.{h}"][:-1, : live.spec.k] for name in ("names", "scores"))
        assert np.array_equal(names, native.row_top_k(a, b, live.spec.k)[0])
        assert np.array_equal(scores, native.pair_scores(a, b, names[None])[0])


def test_an_exact_query_under_the_affinity_rule_is_a_pass_over_everybody():
    _, live = opened("affinity")
    live.build(people(300, 1))
    before = {name: x.copy() for name, x in live._rows.items()}
    near(live.ask(people(3, 2), exact=True), live.ask(people(3, 2), among=300))
    assert all(np.array_equal(x, live._rows[name]) for name, x in before.items())


@torch.no_grad()
def test_a_gallery_that_is_told_how_many_images_a_person_has_answers_as_the_told_head():
    head, live = opened("gated", 40)
    gallery, queries = people(60, 1), people(5, 2)
    live.build(gallery)
    before = live.ask(queries)
    live.tell(12)
    head.tell(12)
    assert np.abs(live.ask(queries) - before).max() > 1e-3
    for exact in (False, True):
        near(live.ask(queries, exact=exact), whole(head, gallery, queries, exact))
    live.tell(None)
    near(live.ask(queries), before)


@torch.no_grad()
def test_a_search_of_all_queries_in_one_pass_is_told_too():
    head, _ = opened("gated", 40)
    runner, query, gallery = runner_of(head), Features(people(5, 2)), Features(people(60, 1))
    names, scores = search_related(runner, query, gallery, 60, together=True, images=12)
    head.tell(12)
    landmarks = draw_landmarks(65, head.spec.layers, head.spec.landmarks, 3)
    rows = torch.from_numpy(np.concatenate([query.features, gallery.features]))
    related = unit_rows(head(rows, torch.from_numpy(landmarks))).numpy()
    near(scores, np.take_along_axis(related[:5] @ related[5:].T, names, axis=1))


def test_a_published_head_cannot_be_told():
    _, live = opened("features", 5)
    live.build(people(60, 1))
    before = live.ask(people(5, 2))
    live.tell(12)
    assert np.array_equal(live.ask(people(5, 2)), before)


def test_a_shortlist_is_a_pass_over_it_with_the_gallery_s_landmarks():
    _, live = opened()
    live.build(people(300, 1))
    query, at = people(1, 2), np.array([4, 5, 90, 200, 201, 202])
    few = opened()[1]
    few.build(people(300, 1)[at], live.landmarks)
    found = live.ask(query, among=at)
    near(found[:, at], few.ask(query, exact=True))
    assert np.isneginf(np.delete(found, at, axis=1)).all()


def test_a_shortlist_by_number_has_the_nearest_rows():
    _, live = opened()
    live.build(people(300, 1))
    found, everybody = live.ask(people(2, 2), among=20), live.ask(people(2, 2), among=300)
    assert (np.isfinite(found).sum(axis=1) == 20).all()
    near(everybody, live.ask(people(2, 2), exact=True))


@pytest.mark.parametrize("kept", ["fp32", "int8"])
def test_an_exact_query_leaves_the_gallery_as_it_was(kept):
    _, live = opened(kept=kept)
    live.build(people(120, 1))
    live.settle()
    before = {name: x.copy() for name, x in live._rows.items()}
    live.ask(people(3, 2), exact=True)
    for name, x in before.items():
        known = x == x  # what was not computed yet may be kept now
        np.testing.assert_array_equal(live._rows[name][known], x[known], name)


@pytest.mark.parametrize("rule", ["gated", "features", "affinity"])
def test_a_state_is_taken_up_where_it_was_left(rule):
    _, live = opened(rule)
    live.build(people(150, 1))
    live.add(people(20, 4))
    _, other = opened(rule)
    other.restore(np.concatenate([people(150, 1), people(20, 4)]), live.state())
    assert len(other) == 170
    assert other.outdated == live.outdated
    near(other.ask(people(3, 2)), live.ask(people(3, 2)))


def test_a_state_that_does_not_fit_is_refused():
    _, live = opened()
    live.build(people(50, 1))
    state = live.state()
    far = np.where(state["names"] == 1, 50, state["names"])
    wrong = (
        {"names": state["names"][:-1]},
        {"scores": state["scores"][:, :-1]},
        {"names": far},
        {"other": state["gave"]},
    )
    for given in (*({**state, **one} for one in wrong), {k: v for k, v in state.items() if k != "center"}):
        with pytest.raises(DataError, match="state"):
            opened()[1].restore(people(50, 1), given)


def test_landmarks_are_outdated_where_the_gallery_doubled_or_halved():
    _, live = opened()
    live.build(people(40, 1))
    assert not live.outdated
    live.add(people(40, 2))
    assert live.outdated
    live.rebuild()
    assert not live.outdated
    live.remove(np.arange(40))
    assert live.outdated
    assert len(live) == 40


@pytest.mark.parametrize(("rule", "gave"), [("gated", 10), ("features", 100), ("affinity", 100)])
def test_landmarks_are_outdated_where_one_of_their_images_is_gone(rule, gave):
    _, live = opened(rule, landmarks=10)
    live.build(people(100, 1))
    at = np.flatnonzero(live._rows["gave"])
    assert len(at) == gave
    if rule == "gated":
        live.remove(np.setdiff1d(np.arange(20), at))
        assert not live.lost
        at = np.flatnonzero(live._rows["gave"])
    live.remove(at[:1])
    assert live.lost
    live.rebuild()
    assert not live.outdated


def test_images_added_one_by_one_do_not_copy_the_gallery():
    _, live = opened()
    live.build(people(400, 1))
    bases = set()
    for row in people(300, 2):
        live.add(row[None])
        bases.add(id(live._rows["unit"].base))
    assert len(bases) <= 4
    _, anew = opened()
    anew.build(np.concatenate([people(400, 1), people(300, 2)]), live.landmarks)
    near(live.ask(people(3, 5)), anew.ask(people(3, 5)))


def test_rebuilt_landmarks_are_those_of_a_new_gallery():
    _, live = opened()
    rows = people(90, 1)
    live.build(rows[:30])
    live.add(rows[30:])
    live.rebuild()
    _, anew = opened()
    anew.build(rows)
    near(live.ask(people(3, 2)), anew.ask(people(3, 2)))


def test_an_empty_gallery_says_so_and_takes_images_again():
    _, live = opened()
    live.build(people(10, 1))
    live.remove(np.arange(10))
    with pytest.raises(DataError, match="zero images"):
        live.ask(people(1, 2))
    live.add(people(10, 1))
    assert live.ask(people(1, 2)).shape == (1, 10)


def test_positions_that_are_not_there_are_refused():
    _, live = opened()
    live.build(people(10, 1))
    with pytest.raises(UsageError, match="positions"):
        live.remove(np.array([10]))


def test_a_model_without_the_head_s_numbers_is_refused_with_the_command():
    head, _ = opened()
    model = ModelSpec(BackboneSpec("osnet_x0_25", features=FEATURES), head.spec)
    runner = SimpleNamespace(name="m", spec=model, landmark_seed=0, head_numbers=dict)
    with pytest.raises(ArtifactError, match="nformer-edge export"):
        LiveHead.open(runner)


@pytest.mark.parametrize("scale", ["none", "sqrt_dim"])
@pytest.mark.parametrize("rule", ["gated", "features"])
def test_features_keep_the_length_that_the_head_reads(rule, scale):
    head, live = opened(rule, input_scale=scale)
    gallery, queries = people(80, 1) * np.linspace(0.5, 2, 80, dtype=np.float32)[:, None], people(3, 2)
    live.build(gallery)
    near(live.ask(queries, exact=True), whole(head, gallery, queries, True))
    live.rebuild()
    near(live.ask(queries), whole(head, gallery, queries, False))


def test_an_exact_answer_is_not_the_quick_one():
    _, live = opened()
    gallery = people(120, 1)
    live.build(gallery)
    queries = gallery[::40] + people(3, 2) / 4
    assert np.abs(live.ask(queries) - live.ask(queries, exact=True)).max() > 1e-4


def test_a_bundle_has_its_checkpoint_s_live_head(tiny_bundle, tiny_checkpoint):
    rows, found = people(30, 1).repeat(64, axis=1), []
    for path in (tiny_bundle, tiny_checkpoint):
        with open_model(path) as runner:
            live = LiveHead.open(runner)
        live.seed = 0  # a checkpoint has none of its own
        live.build(rows[:, : live.spec.features])
        found.append(live.ask(rows[:2, : live.spec.features]))
    assert np.array_equal(*found)


@pytest.mark.parametrize(("kept", "tolerance"), [("fp16", 2e-3), ("int8", 3e-2)])
@pytest.mark.parametrize("rule", ["gated", "features", "affinity"])
def test_a_smaller_state_answers_nearly_the_same_through_changes(rule, kept, tolerance):
    (_, whole), (_, small) = opened(rule), opened(rule, kept=kept)
    found, sizes = {}, {}
    for name, live in (("whole", whole), ("small", small)):
        live.build(people(150, 1))
        live.ask(people(2, 2), exact=True)
        live.add(people(30, 3))
        live.remove(np.arange(0, 60, 3))
        found[name] = [live.ask(people(4, 5), exact=exact) for exact in (False, True)]
        found[name].append(live.ask(people(2, 5), among=30))
        sizes[name] = sum(x.nbytes for x in live._rows.values())
    for one, other in zip(found["whole"], found["small"], strict=True):
        both = np.isfinite(one)
        assert (both == np.isfinite(other)).all()
        near(one[both], other[both], tolerance)
    assert np.abs(found["whole"][0] - found["small"][0]).max() > 1e-6
    assert sizes["small"] < sizes["whole"]


def test_a_state_of_another_kind_is_refused():
    with pytest.raises(UsageError, match="head_state"):
        opened(kept="bf16")
