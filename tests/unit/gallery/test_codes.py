"""The codes of a gallery: their size, their error, and the choice among them."""

from __future__ import annotations

import numpy as np
import pytest

from nformer_edge.core.errors import DataError, UsageError
from nformer_edge.core.features import Features
from nformer_edge.gallery import codes
from nformer_edge.gallery.codes import CODES, Code, measure_codes, nearest_rows
from nformer_edge.gallery.gallery import Gallery
from nformer_edge.gallery.results import Compacted
from nformer_edge.metrics.distance import unit_rows
from tests.helpers.galleries import stub

SIZE = 160


def people(count: int, shots: int, seed: int = 0, noise: float = 0.7) -> Features:
    """So many people with as many images each, alike for a person."""
    draw = np.random.default_rng(seed)
    centers = np.repeat(
        np.random.default_rng(9).standard_normal((count, SIZE)) * np.linspace(2, 0.1, SIZE), shots, axis=0
    )
    pids = np.repeat(np.arange(1, count + 1), shots)
    camids = np.tile(np.arange(shots), count) + 10 * seed
    return Features((centers + noise * draw.standard_normal(centers.shape)).astype(np.float32), pids, camids)


def coded(name, features):
    code = Code.fit(name, features)
    columns = code.encode(features)
    return code, columns | code.complete(columns)


def order(query, gallery, top):
    scores = unit_rows(query).astype(float) @ unit_rows(gallery).astype(float).T
    return np.argsort(-scores, axis=1, kind="stable")[:, :top], scores


@pytest.mark.parametrize(("name", "error"), [("fp32", 1e-6), ("fp16", 1e-3), ("int8", 2e-2), ("binary-int8", 2e-2)])
def test_a_code_ranks_by_what_it_keeps_of_the_features(name, error):
    gallery, query = people(60, 5).features * 7, people(60, 1, 1).features
    code, columns = coded(name, gallery)
    kept = code.decode(columns)
    assert np.linalg.norm(kept - gallery, axis=1).max() <= error * np.linalg.norm(gallery, axis=1).max()
    indices, scores = nearest_rows(code, columns, query, 10)
    want, cosines = order(query, kept, 10)
    np.testing.assert_allclose(scores, np.take_along_axis(cosines, indices, axis=1), atol=2e-6)
    np.testing.assert_allclose(scores, np.take_along_axis(cosines, want, axis=1), atol=2e-6)


def test_bits_leave_the_nearest_to_be_scored_again(monkeypatch):
    gallery, query = people(60, 5, noise=3).features, people(60, 1, 1, noise=3).features
    code, columns = coded("binary-int8", gallery)
    assert columns["bits"].shape == (300, 3)
    want, _ = order(query, code.decode(columns), 20)
    shares = []
    for count in (300, 60, 20):
        monkeypatch.setattr(codes, "RESCORED", count)
        indices, _ = nearest_rows(code, columns, query, 20)
        shares.append(np.mean([len({*a} & {*b}) / 20 for a, b in zip(indices, want, strict=True)]))
    assert shares[0] == 1
    assert shares[0] >= shares[1] > shares[2] > 0.2


def test_a_float32_product_leaves_the_order_of_exact_scores():
    draw = np.random.default_rng(0)
    base = draw.standard_normal((1, SIZE))
    gallery = (base + 1e-7 * draw.standard_normal((500, SIZE))).astype(
        np.float32
    )  # scores that float32 cannot tell apart
    gallery[300:] = gallery[:200]
    query = (base + 0.3 * draw.standard_normal((3, SIZE))).astype(np.float32)
    names = np.array([f"{i % 7}" for i in range(500)], object)
    indices, scores = nearest_rows(*coded("fp32", gallery), query, 20, None, names)
    for q, row, found in zip(unit_rows(query).astype(float), indices, scores, strict=True):
        exact = (1 - unit_rows(gallery).astype(float) @ q).astype(np.float32)
        assert row.tolist() == sorted(range(500), key=lambda i: (exact[i], names[i], i))[:20]
        assert found.tolist() == (np.float32(1) - exact[row]).tolist()


def test_what_is_measured_falls_with_the_bytes():
    query, gallery = people(60, 1, 1, noise=3), people(60, 5, noise=3)
    scores = measure_codes(query, gallery)
    assert [s.code for s in scores] == [*CODES]
    size = {s.code: s.bytes_per_image for s in scores}
    assert size == {"fp32": 648, "fp16": 328, "int8": 168, "binary-int8": 192, "pca128-int8": 136, "pca64-int8": 72}
    worth = {s.code: s.mAP for s in scores}
    assert worth["fp32"] == pytest.approx(worth["fp16"], abs=1e-3) == pytest.approx(worth["int8"], abs=0.01)
    assert 0.1 < worth["pca64-int8"] != worth["fp32"] < 0.99
    assert [s.code for s in measure_codes(query, gallery.take(np.arange(100)))] == ["fp32", "fp16", "int8"]


def test_compact_chooses_the_smallest_code_within_the_budget(tmp_path):
    with Gallery(stub(SIZE), tmp_path / "g") as gallery:
        gallery.add(people(60, 5), ids=[f"p{i // 5}" for i in range(300)])
        done = gallery.compact(max_map_drop=100)
        assert (done.code, done.bytes_per_image) == ("pca64-int8", 72)
        assert 0 < done.bytes_after < done.bytes_before
        assert "72 bytes an image  mAP" in str(done)
        assert Compacted.from_json(done.to_json()) == done
        gallery.add(people(60, 1, 1), ids="new")
        found = gallery.search(people(60, 1, 1), top=1)
        assert found.ids.count(("new",)) >= 55
        with Gallery(stub(SIZE), tmp_path / "g") as again:
            assert again.stats().code == "pca64-int8"
            assert again.search(people(60, 1, 1), top=3).to_json() == gallery.search(people(60, 1, 1), top=3).to_json()
    with Gallery(stub(SIZE)) as gallery:
        gallery.add(people(60, 5), ids=[f"p{i // 5}" for i in range(300)])
        exact = gallery.compact(max_map_drop=0)
        worth = {s.code: s.mAP for s in exact.scores}
        assert worth[exact.code] >= worth["fp32"]
        for name in CODES:
            assert gallery.compact(name).code == name
            assert gallery.search(people(60, 1, 1), top=1).ids[0] == ("p0",)


def test_people_who_were_held_out_are_measured_with_instead(tmp_path):
    from nformer_edge.core.features import save_features

    save_features(tmp_path / "held.npz", {"query": people(60, 1, 1), "gallery": people(60, 5)})
    with Gallery(stub(SIZE)) as gallery:
        gallery.add(people(60, 5))
        assert gallery.compact(max_map_drop=100, held_out=tmp_path / "held.npz").scores == measure_codes(
            people(60, 1, 1), people(60, 5)
        )
        with pytest.raises(UsageError, match="a code and a budget"):
            gallery.compact("int8", max_map_drop=1)
        with pytest.raises(UsageError, match="max_map_drop: got -1"):
            gallery.compact(max_map_drop=-1)
    with Gallery(stub(SIZE)) as gallery:
        gallery.add(people(10, 1), ids=[f"{i}" for i in range(10)])
        with pytest.raises(DataError, match="none with a match"):
            gallery.compact(max_map_drop=1)
        with pytest.raises(DataError, match=r"10 images for pca64-int8, expected 64 or more"):
            gallery.compact("pca64-int8")
        assert gallery.stats().code == "fp32"
