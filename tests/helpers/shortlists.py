"""What every store must do for a gallery, as one function; and a store with a fault, which it must catch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from helpers.galleries import SIZE, rows, stub
from nformer_edge.core.errors import DataError
from nformer_edge.core.features import Features
from nformer_edge.gallery.held import Where
from nformer_edge.gallery.shortlist.base import NumpyShortlist, Rows, Shortlist
from nformer_edge.gallery.shortlist.gallery import ShortlistGallery

#: People whose names could break a query's text.
NAMES = ("p", 'p"', "p'] or key in [1", "p\\", "ü ♥ 人", "p\n%_{x}")


def hold(open_store: Callable[[], Shortlist], reopens: bool = True) -> None:
    """The contract. `open_store` opens the same store at each call; `reopens`: what it holds outlives it.

    Raises:
        AssertionError, Error: where the store does not hold it.
    """
    model, known = stub(), rows(0, 60)
    with ShortlistGallery(model, open_store()) as gallery:
        with pytest.raises(DataError, match="zero images"):
            gallery.search(rows(1))
        ids, cameras = [NAMES[i % 6] for i in range(60)], np.arange(60) % 4
        times = [1e9 + i for i in range(60)]
        assert gallery.add(known, ids, cameras, times).images == 60
        again = gallery.add(known, ids, cameras, times)
        assert (again.images, again.known, len(gallery)) == (0, 60, 60)
        for bad in (np.full((1, SIZE), np.nan), np.zeros((1, SIZE)), np.full((1, SIZE), np.inf)):
            with pytest.raises(DataError):
                gallery.add(Features(bad), "bad")
            with pytest.raises(DataError):
                gallery.search(Features(bad))
        assert len(gallery) == 60
        _answers_exactly(gallery, known)
        _filters(gallery, known, cameras)
        _breaks_ties_by_id(gallery)
        _forgets(gallery, known, ids)
        if not reopens:
            _refuses_another_model(gallery._store)
    if reopens:
        with ShortlistGallery(model, open_store()) as gallery:
            assert len(gallery) == 50
            found = gallery.search(known.take(np.array([6])), top=1)
            assert found.ids == (("p",),) or found.scores[0, 0] < 0.999
            _refuses_another_model(gallery._store)


def _answers_exactly(gallery: ShortlistGallery, known: Features) -> None:
    queries = rows(1, 3)
    found = gallery.search(queries, top=60, shortlist=60)
    norm = np.linalg.norm
    cosines = queries.features @ known.features.T
    cosines /= norm(queries.features, axis=1)[:, None] * norm(known.features, axis=1)
    np.testing.assert_allclose(found.scores, -np.sort(-cosines, axis=1), atol=1e-5)
    best = [[NAMES[i % 6] for i in row] for row in np.argsort(-cosines, axis=1)]
    assert [list(names) for names in found.ids] == best
    np.testing.assert_array_equal(found.times, 1e9 + np.argsort(-cosines, axis=1))
    assert found.searched == 60
    assert len(np.unique(found.keys[0])) == 60
    assert found.keys.min() >= 0


def _filters(gallery: ShortlistGallery, known: Features, cameras: np.ndarray) -> None:
    query = known.take(np.array([5]))
    assert set(gallery.search(query, 50, cameras=[1, 2]).cameras[0].tolist()) == {1, 2}
    assert set(gallery.search(query, 50, exclude_camera=1).cameras[0].tolist()) == {0, 2, 3}
    bounded = gallery.search(query, 50, since=1e9 + 10, until=1e9 + 19)
    assert sorted(bounded.times[0].tolist()) == [1e9 + i for i in range(10, 20)]
    nobody = gallery.search(query, 50, cameras=77)
    assert (nobody.scores.shape, nobody.searched) == ((1, 0), 0)


def _breaks_ties_by_id(gallery: ShortlistGallery) -> None:
    same = rows(7).features.repeat(5, axis=0)
    gallery.add(Features(same), ["t4", "t2", "t5", "t1", "t3"])
    for top in (3, 5):
        assert gallery.search(Features(same[:1]), top, shortlist=top).ids[0] == ("t1", "t2", "t3", "t4", "t5")[:top]
    gallery.remove("t2")
    gallery.add(Features(same[:1]), "t2")
    assert gallery.search(Features(same[:1]), 3).ids[0] == ("t1", "t2", "t3")
    gallery.remove(["t1", "t2", "t3", "t4", "t5"])


def _forgets(gallery: ShortlistGallery, known: Features, ids: list[str]) -> None:
    with pytest.raises(DataError, match="nobody"):
        gallery.remove(["p", "nobody"])
    done = gallery.remove(NAMES[2])
    assert (done.images, done.total, len(gallery)) == (10, 50, 50)
    found = gallery.search(known, top=50)
    assert NAMES[2] not in {name for names in found.ids for name in names}
    assert sorted(set(found.ids[0])) == sorted({*NAMES} - {NAMES[2]})
    if done.erased is True:
        row = known.features[2] / np.linalg.norm(known.features[2])
        assert not gallery._seen(row.astype(np.float32))


def _refuses_another_model(store: Shortlist) -> None:
    other = ShortlistGallery(stub(sha256="b" * 64), store)
    with pytest.raises(DataError, match="another model"):
        other.search(rows(1))


class Faulty(NumpyShortlist):
    """Numpy's own with one fault."""

    name = "faulty"

    def __init__(self, fault: str) -> None:
        super().__init__(SIZE)
        self.fault = fault

    def put(self, rows: Rows) -> None:
        if self.fault == "loses a row":
            rows = rows.take(np.arange(len(rows) - 1)) if len(rows) == 60 else rows
        if self.fault == "rounds vectors":
            rows = replace(rows, unit=np.round(rows.unit, 1))
        if self.fault == "forgets the model":
            rows = replace(rows, models=("",) * len(rows))
        super().put(rows)

    def nearest(self, unit: np.ndarray, count: int, where: Where) -> list[Rows]:
        if self.fault == "ignores filters":
            where = Where()
        return [self._bent(found) for found in super().nearest(unit, count, where)]

    def _bent(self, found: Rows) -> Rows:
        if self.fault == "answers nothing":
            return found.take(np.arange(0))
        if self.fault == "answers short":
            return found.take(np.arange(max(len(found) - 1, 0)))
        if self.fault == "minus one" and len(found):
            return replace(found, keys=np.where(np.arange(len(found)) == 1, -1, found.keys))
        if self.fault == "NaN" and len(found):
            return replace(found, unit=np.where(np.arange(len(found))[:, None] == 1, np.nan, found.unit))
        if self.fault == "twice the same" and len(found):
            return found.take(np.r_[0, np.arange(len(found) - 1)])
        if self.fault == "zeros" and len(found):
            return replace(found, unit=np.zeros_like(found.unit))
        return found

    def drop(self, keys: np.ndarray) -> None:
        if self.fault != "keeps what is deleted":
            super().drop(keys[:-1] if self.fault == "keeps one" else keys)


FAULTS = (
    "loses a row", "rounds vectors", "forgets the model", "ignores filters", "answers nothing", "answers short",
    "minus one", "NaN", "twice the same", "zeros", "keeps what is deleted", "keeps one",
)  # fmt: skip
