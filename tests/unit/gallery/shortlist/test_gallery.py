"""A gallery in a vector store: what the head makes of a shortlist, what is kept beside, what is said of erasing."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from helpers.galleries import SIZE, rows, stub

from nformer_edge.core.errors import ArtifactError, BackendError, DataError, UsageError
from nformer_edge.core.features import Features
from nformer_edge.core.spec import HeadSpec
from nformer_edge.gallery.live import LiveHead
from nformer_edge.gallery.shortlist.base import NumpyShortlist, Rows
from nformer_edge.gallery.shortlist.gallery import ShortlistGallery
from nformer_edge.gallery.shortlist.milvus import MilvusShortlist
from nformer_edge.gallery.shortlist.qdrant import QdrantShortlist
from nformer_edge.model.gated import head_numbers, make_head
from nformer_edge.ops import native

needs_kernels = pytest.mark.skipif(not native.available(), reason="the kernels are not compiled in this tree")


def headed(rule: str) -> Any:
    torch.manual_seed(0)
    head = make_head(HeadSpec(SIZE, layers=2, heads=1, k=8, landmarks=40, rule=rule)).eval()
    runner = stub()
    runner.spec = SimpleNamespace(**{**vars(runner.spec), "head": head.spec})
    return SimpleNamespace(
        **{**vars(runner), "has_head": True, "landmark_seed": 3, "head_numbers": lambda: head_numbers(head)}
    )


@needs_kernels
@pytest.mark.parametrize("rule", ["gated", "features", "affinity"])
def test_the_head_relates_a_shortlist_as_the_live_gallery_does(rule: str, tmp_path: Path) -> None:
    runner, known, queries, store = headed(rule), rows(0, 300), rows(1, 4), NumpyShortlist(SIZE)
    names = [f"{i:03}" for i in range(300)]
    ShortlistGallery(runner, store, tmp_path / "landmarks.npz", head=True).add(known, names)
    found = ShortlistGallery(runner, store, tmp_path / "landmarks.npz", head=True).search(queries, 10, shortlist=50)
    live = LiveHead.open(runner)
    live.build(known.features)
    for i, row in enumerate(queries.features):
        scores = live.ask(row[None], among=50)[0]
        best = np.argsort(-scores)[:10]
        np.testing.assert_allclose(found.scores[i], scores[best], atol=2e-5)
        assert {names[j] for j in best} == {*found.ids[i]}
    assert found.protocol == "quick"


@needs_kernels
def test_rows_without_their_landmarks_are_refused_and_so_are_other_landmarks(tmp_path: Path) -> None:
    runner, store = headed("gated"), NumpyShortlist(SIZE)
    ShortlistGallery(runner, store, tmp_path / "a.npz", head=True).add(rows(0, 60), "p")
    with pytest.raises(ArtifactError, match="rows without landmarks"):
        ShortlistGallery(runner, store, tmp_path / "b.npz", head=True)
    (tmp_path / "b.npz").write_bytes((tmp_path / "a.npz").read_bytes()[:-30])
    with pytest.raises(ArtifactError, match="damaged"):
        ShortlistGallery(runner, store, tmp_path / "b.npz", head=True)
    other = ShortlistGallery(runner, NumpyShortlist(SIZE), tmp_path / "c.npz", head=True)
    other.add(rows(9, 60), "p")
    mixed = ShortlistGallery(runner, store, tmp_path / "c.npz", head=True)
    with pytest.raises(Exception, match="other landmarks"):
        mixed.search(rows(1))


def test_an_interrupted_addition_is_run_again_and_gives_the_same_rows() -> None:
    class Killed(NumpyShortlist):
        calls = 0

        def put(self, rows: Rows) -> None:
            self.calls += 1
            if self.calls == 2:
                raise ConnectionError("refused")
            super().put(rows)

    store, known, names = Killed(SIZE), rows(0, 2500), [str(i) for i in range(2500)]
    gallery = ShortlistGallery(stub(), store)
    with pytest.raises(BackendError, match="numpy: got ConnectionError: refused"):
        gallery.add(known, names)
    assert len(gallery) == 1000
    done = gallery.add(known, names)
    assert (done.images, done.known, done.total) == (1500, 1000, 2500)
    once = ShortlistGallery(stub(), NumpyShortlist(SIZE))
    once.add(known, names)
    asked = rows(1, 3)
    assert once.search(asked).keys.tolist() == gallery.search(asked).keys.tolist()


@pytest.mark.parametrize(("keeps", "erased"), [(True, False), (False, True), (None, None)])
def test_what_is_removed_is_looked_for_in_the_stores_files(
    keeps: bool | None, erased: bool | None, tmp_path: Path
) -> None:
    class Filed(NumpyShortlist):
        def put(self, rows: Rows) -> None:
            super().put(rows)
            (tmp_path / "rows").write_bytes(rows.unit.tobytes())

        def erase(self) -> None:
            if not keeps:
                (tmp_path / "rows").write_bytes(b"")

        def traces(self, row: np.ndarray) -> tuple[list[Path], bytes]:
            return [] if keeps is None else [tmp_path / "rows"], row.tobytes()

    gallery = ShortlistGallery(stub(), Filed(SIZE))
    gallery.add(rows(0, 3), ["a", "b", "c"])
    with pytest.raises(UsageError, match="no id"):
        gallery.remove([])
    with pytest.raises(DataError, match="text or a whole number"):
        gallery.remove(5.0)
    done = gallery.remove("b")
    assert (done.images, done.total, done.erased) == (1, 2, erased)
    assert str(done).endswith(
        {
            None: "cannot be seen from here",
            True: "holds their vectors",
            False: "still in rows: write the gallery to a new collection to erase them",
        }[erased]
    )


@pytest.mark.parametrize(
    ("store", "module", "extra"),
    [(MilvusShortlist, "pymilvus", "milvus"), (QdrantShortlist, "qdrant_client", "qdrant")],
)
def test_a_client_that_is_not_installed_is_named_with_the_line_that_installs_it(
    store: Any, module: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(BackendError, match=rf"no {module} here.*pip install 'nformer-edge\[{extra}\]'"):
        store("folder", SIZE)


def test_a_shortlist_shorter_than_the_answer_or_too_long_is_refused() -> None:
    gallery = ShortlistGallery(stub(), NumpyShortlist(SIZE))
    gallery.add(rows(0, 3), ["a", "b", "c"])
    for length in (5, 5000):
        with pytest.raises(UsageError, match=r"shortlist: got .* expected top \(10\) to 4096"):
            gallery.search(rows(1), 10, shortlist=length)
    assert gallery.search(rows(1), 10).ids[0].__len__() == 3
    assert isinstance(gallery.search(Features(rows(1).features)).to_json(), dict)
