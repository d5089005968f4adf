"""The live head follows a gallery, is renewed behind it, and is kept on the disk."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from nformer_edge.core.features import Features
from nformer_edge.gallery import following
from nformer_edge.gallery.gallery import Gallery
from nformer_edge.gallery.live import LiveHead
from nformer_edge.gallery.live_gated import GatedLive
from nformer_edge.ops import native
from tests.helpers.galleries import gated, rows

pytestmark = pytest.mark.skipif(not native.available(), reason="the kernels are not compiled in this tree")


@pytest.fixture
def built(monkeypatch):
    """How many images each whole build related."""
    counts = []
    build = LiveHead.build
    monkeypatch.setattr(LiveHead, "build", lambda live, x, *rest: counts.append(len(x)) or build(live, x, *rest))
    return counts


@pytest.fixture
def kept_always(monkeypatch):
    monkeypatch.setattr(following, "KEPT_FROM", 1)


def ask(gallery):
    return gallery.search(rows(99, 3), top=5, head=True, exact=False)


def near(found, other):
    assert found.ids == other.ids
    np.testing.assert_allclose(found.scores, other.scores, atol=1e-5)


def test_a_head_is_renewed_behind_searches_when_the_gallery_has_doubled(monkeypatch, built):
    go, building = threading.Event(), threading.Event()
    gallery = Gallery(gated())
    gallery.add(rows(0, 60))
    ask(gallery)
    first, build = gallery._head._live, LiveHead.build

    def slow(live, features, *rest):
        building.set()
        assert go.wait(60)
        build(live, features, *rest)

    monkeypatch.setattr(LiveHead, "build", slow)
    for seed in (1, 2):
        gallery.add(rows(seed, 35), ids=f"new {seed}")
        ask(gallery)
    assert building.wait(60)
    gallery.add(rows(3, 4), ids="while it is built")
    found = ask(gallery)
    assert gallery._head._live is first
    assert found.searched == len(first) == 134
    renewing = gallery._head._renewing
    go.set()
    renewing.join(60)
    monkeypatch.setattr(LiveHead, "build", build)
    assert gallery._head._live is not first
    assert len(gallery._head._live) == 130
    again = ask(gallery)
    assert len(gallery._head._live) == 134
    assert built == [60, 130]
    anew = gated_head(rows(0, 60), rows(1, 35), rows(2, 35))
    anew.add(rows(3, 4).features)
    np.testing.assert_allclose(again.scores, np.sort(anew.ask(rows(99, 3).features))[:, :-6:-1], atol=1e-5)


def gated_head(*parts):
    live = LiveHead.open(gated())
    live.build(np.concatenate([part.features for part in parts]))
    return live


def test_no_share_of_a_removed_image_stays_in_the_head(built):
    with Gallery(gated()) as gallery:
        gallery.add(rows(0, 60))
        ask(gallery)
        at = np.flatnonzero(gallery._head._live._rows["gave"])
        gallery.remove(gallery.features.ids[at[0]])
        ask(gallery)
        if renewing := gallery._head._renewing:
            renewing.join(60)
        left = np.delete(rows(0, 60).features, at[0], axis=0)
        near(ask(gallery), asked_of(left, gallery.features.ids))
    assert built[:2] == [60, 59]


def asked_of(features, ids):
    gallery = Gallery(gated())
    gallery.add(Features(features), ids=list(ids))
    return ask(gallery)


def test_the_state_is_taken_from_the_disk_and_followed_on(tmp_path, built, kept_always):
    with Gallery(gated(), tmp_path) as gallery:
        gallery.add(rows(0, 60))
        first = ask(gallery)
    with Gallery(gated(), tmp_path) as gallery:
        near(ask(gallery), first)
        gallery.add(rows(1, 5))
        second = ask(gallery)
    with Gallery(gated(), tmp_path) as gallery:
        near(ask(gallery), second)
    assert built == [60]
    with Gallery(gated(seed=4), tmp_path) as gallery:  # other landmarks
        ask(gallery)
    assert built == [60, 65]


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE state SET data = zeroblob(length(data)) WHERE name = 'names'",
        "UPDATE state SET data = x'7b7d' WHERE name = ''",
        "UPDATE state SET data = 'text' WHERE name = ''",
        "UPDATE state SET data = 7",
        "DELETE FROM state WHERE name = 'scores'",
        "INSERT INTO state VALUES ('more', 0, x'00')",
    ],
)
def test_a_state_that_is_not_what_was_written_is_built_anew(tmp_path, built, kept_always, statement):
    import sqlite3

    with Gallery(gated(), tmp_path) as gallery:
        gallery.add(rows(0, 60))
        first = ask(gallery)
    with sqlite3.connect(tmp_path / "gallery.sqlite") as sql:
        sql.execute(statement)
    sql.close()
    with Gallery(gated(), tmp_path) as gallery:
        near(ask(gallery), first)
    assert built == [60, 60]


def test_a_removal_takes_the_state_from_the_disk_and_an_older_head_does_not_bring_it_back(tmp_path, kept_always):
    with Gallery(gated(), tmp_path) as gallery:
        gallery.add(rows(0, 60))
        ask(gallery)
        with Gallery(gated(), tmp_path) as other:
            ask(other)
        store = gallery._kept.store
        assert store._sql.execute("SELECT count(*) FROM state").fetchone()[0]
        with Gallery(None, tmp_path) as other:
            other.remove("3")
        assert not store._sql.execute("SELECT count(*) FROM state").fetchone()[0]
        gallery._head.close()
        assert not store._sql.execute("SELECT count(*) FROM state").fetchone()[0]


def test_a_state_is_not_kept_while_another_process_writes(tmp_path, kept_always, monkeypatch):
    from nformer_edge.gallery import store

    monkeypatch.setattr(store, "WAIT", 0.05)
    one, two = Gallery(gated(), tmp_path), Gallery(gated(), tmp_path)
    one.add(rows(0, 60))
    ask(two)
    with one._kept.store.writing():
        two.close()
    with one:
        assert len(ask(one)) == 3


def test_a_head_that_fails_to_be_renewed_leaves_the_one_before_and_is_tried_again(monkeypatch):
    gallery = Gallery(gated())
    gallery.add(rows(0, 30))
    ask(gallery)
    said = []
    monkeypatch.setattr(threading, "excepthook", lambda told: said.append(told.exc_type))
    tried = []
    with monkeypatch.context() as broken:
        broken.setattr(GatedLive, "build", lambda *_: tried.append(1) or (_ for _ in ()).throw(MemoryError()))
        for seed in range(1, 4):
            gallery.add(rows(seed, 14))
            found = ask(gallery)
            gallery._head.close()
    assert len(tried) == 1, "a failure is not tried again at once"
    assert said == []
    assert gallery.stats().head_failure == "MemoryError"
    assert "landmarks are old: MemoryError" in str(gallery)
    assert found.searched == 72
    assert ask(gallery).ids == found.ids
    first = gallery._head._live
    gallery._head._retry_at = 0.0
    gallery.add(rows(5, 14))
    ask(gallery)
    gallery._head.close()
    assert gallery._head._live is not first
    assert gallery.stats().head_failure is None


def test_a_search_that_was_interrupted_leaves_nothing_of_its_query(monkeypatch, built):
    gallery = Gallery(gated())
    gallery.add(rows(0, 60))
    first = gallery.search(rows(99, 3), top=5, head=True, exact=True)
    swap = native.swap_rows

    def interrupted(array, *rest):
        moved = swap(array, *rest)
        if array.ndim == 2:  # exchanged, and not noted
            raise KeyboardInterrupt
        return moved

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(native, "swap_rows", interrupted)
        gallery.search(rows(98, 1), top=5, head=True, exact=True)
    near(gallery.search(rows(99, 3), top=5, head=True, exact=True), first)
    assert built == [60, 60]
