"""A gallery in a folder: what was acknowledged stays, what was removed is gone, and nothing else is taken in."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import shutil
import sqlite3
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest

from nformer_edge.core.errors import ArtifactError, BackendError, DataError, UsageError
from nformer_edge.core.features import Features
from nformer_edge.gallery import store
from nformer_edge.gallery.gallery import Gallery
from nformer_edge.gallery.results import Audit, Changed, GalleryStats
from nformer_edge.gallery.upkeep import upgrade
from tests.helpers.galleries import SIZE, rows, stub

ODD = [
    "",
    "a b",
    "Ünïcode 名前",
    "q'uote\"",
    "new\nline",
    "null\0byte",
    "../../etc",
    "-rf",
    "\udcff",
    "a" * 512,
    "1",
    "01",
]


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "people"


def same(one, other, keys=True):
    np.testing.assert_array_equal(one.features.features, other.features.features)
    assert one.features.ids == other.features.ids
    for column in ("cameras", "times", "meta", *(("key",) if keys else ())):
        np.testing.assert_array_equal(one._kept.held()[column], other._kept.held()[column])


def test_what_was_added_is_there_when_the_folder_is_opened_again(folder):
    with Gallery(stub(), folder) as gallery:
        done = gallery.add(
            rows(0, 3), ids=["ann", "ben", "ann"], cameras=[1, 2, 3], times=[5, "1970-01-01", 7.5], meta={"a": [1]}
        )
        assert (done.images, done.ids, done.total, done.path) == (3, 2, 3, str(folder))
        gallery.add(rows(1, 300), meta=[*range(300)])
        with Gallery(stub(), folder) as again:
            same(again, gallery)
            found, want = again.search(rows(0), top=5), gallery.search(rows(0), top=5)
            assert found.to_json() == want.to_json()
            assert found[0][0].time == 5
            assert found[0][0].meta == {"a": [1]}
    assert Changed.from_json(done.to_json()) == done
    assert (folder / store.FILE).stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("code", ["fp32", "fp16", "int8"])
def test_every_code_is_read_as_it_was_written(folder, code):
    with Gallery(stub(), folder, code=code) as gallery, Gallery(stub(), code=code) as memory:
        for made in (gallery, memory):
            made.add(rows(0, 20), times=0)
            made.remove("3")
        with Gallery(None, folder) as again:
            same(again, memory, keys=False)
            assert again.stats().bytes_per_image == {"fp32": 4, "fp16": 2, "int8": 1}[code] * SIZE + 8
    with pytest.raises(UsageError, match=r"Add images first; `compact` then learns this code"):
        Gallery(stub(), code="pca64-int8")


def test_random_additions_removals_and_searches_are_those_of_plain_lists(folder):
    draw = random.Random(0)
    held: list[tuple[str, np.ndarray, int, float]] = []
    gallery = Gallery(stub(), folder)
    for turn in range(150):
        what = draw.choice(["add", "add", "add", "remove", "search", "search", "compact", "reopen", "old"])
        if what == "add":
            new, names = rows(turn, draw.randrange(1, 5)), [f"p{draw.randrange(12)}" for _ in range(4)]
            cameras, times = [draw.randrange(3) for _ in range(4)], [float(draw.randrange(9)) for _ in range(4)]
            count = len(new)
            gallery.add(new, ids=names[:count], cameras=cameras[:count], times=times[:count])
            held += zip(names, new.features, cameras, times)  # noqa: B905
        elif what == "remove" and held:
            gone = {draw.choice(held)[0]}
            assert gallery.remove([*gone]).images == sum(row[0] in gone for row in held)
            held = [row for row in held if row[0] not in gone]
        elif what == "compact":
            gallery.compact()
        elif what == "reopen":
            gallery.close()
            gallery = Gallery(stub(), folder)
        elif what == "search" and held:
            query, cameras, since = rows(10_000 + turn).features, [draw.randrange(3), 1], draw.randrange(9)
            found = gallery.search(Features(query), top=4, cameras=cameras, since=since)
            unit = np.array([row[1] for row in held], float)
            scores = (unit / np.linalg.norm(unit, axis=1, keepdims=True)) @ (query[0] / np.linalg.norm(query[0]))
            kept = [i for i, row in enumerate(held) if row[2] in cameras and row[3] >= since]
            best = sorted(kept, key=lambda i: -scores[i])[:4]
            assert found.indices.tolist() == [best]
            np.testing.assert_allclose(found.scores[0], scores[best], atol=1e-6)
            assert found.searched == len(kept)
        assert len(gallery) == len(held)
        assert gallery.features.ids == tuple(row[0] for row in held)
    assert len({row[0] for row in held}) > 3


def test_a_killed_writer_leaves_every_acknowledged_change_and_no_torn_one(folder):
    draw, turn = random.Random(0), 0
    want = Gallery(stub())
    for _ in range(2):
        command = [sys.executable, "-m", "tests.helpers.galleries", str(folder), str(turn)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[3]) as writer:
            first = writer.stdout.readline()
            time.sleep(draw.random() * 0.2)
            writer.kill()
            said = [*map(int, (first + writer.stdout.read()).split())]
        with Gallery(stub(), folder) as gallery:  # also verifies every batch
            found = gallery.features
        for number in said:
            expected(want, number, turn)
        complete = [want.features.ids]
        for step in range(2):  # what was under way: the addition, and perhaps the removal
            expected(want, said[-1] + 1, turn, step)
            complete.append(want.features.ids)
        assert found.ids in complete
        turn, want = said[-1] + 2, Gallery(stub())
        if found.ids:
            want.add(found, ids=found.ids)
            numbers = [int(name.split()[1]) for name in found.ids]
            np.testing.assert_array_equal(found.features[::3], np.concatenate([rows(n).features for n in numbers[::3]]))


def expected(gallery, turn, start, step=None):
    if step in (None, 0):
        gallery.add(rows(turn, 3), ids=f"person {turn}")
    if step in (None, 1) and turn % 3 == 2 and turn > start:
        gallery.remove(f"person {turn - 1}")


def files(folder):
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_no_byte_of_a_removed_person_is_left_in_any_file(folder):
    names = [f"name-{i:04d}-of-a-person" for i in range(600)]
    image = np.random.default_rng(0).integers(0, 256, (64, 32, 3), dtype=np.uint8)
    with Gallery(stub(), folder, thumbnails=True) as gallery:
        gallery.add(rows(0, 600), ids=names, meta=[{"note": f"meta-{name}"} for name in names])
        gallery._kept.store.put_thumbnails({int(gallery._kept.here["key"][7]): b"picture-of-" + image.tobytes()})
        vectors = gallery.features.features
        whole = [names[7].encode(), f"meta-{names[7]}".encode(), vectors[7].tobytes(), image.tobytes()[:640]]
        # a page may end within one of them: pieces of 8 bytes
        secret = [[text[i : i + 8] for i in range(len(text) - 7)] for text in whole[2:]] + [
            [text] for text in whole[:2]
        ]
        found = [sum(piece in data for data in files(folder).values() for piece in pieces) for pieces in secret]
        assert all(found[:2])
        assert any(found[2:])
        with Gallery(stub(), folder) as reader:
            assert len(reader) == 600
            assert gallery.remove(names[7]).images == 1
            gallery.compact()
            assert len(reader) == 599
            left = files(folder)
            assert store.FILE in left
            assert f"{store.FILE}-wal" in left
            assert not [piece for pieces in secret for piece in pieces if any(piece in data for data in left.values())]
            assert any(names[8].encode() in data for data in left.values())


def test_a_file_cut_to_no_bytes_is_no_new_gallery(folder):
    with Gallery(stub(), folder) as gallery:
        gallery.add(rows(0))
    os.truncate(folder / store.FILE, 0)
    with pytest.raises(ArtifactError, match=r"an empty file, expected a gallery that is whole\. It was cut off"):
        Gallery(stub(), folder)
    (folder / store.FILE).unlink()
    (left := folder / "gallery.left.part").write_bytes(b"")  # of a process that was killed here, long ago
    os.utime(left, (0, 0))
    with Gallery(stub(), folder) as gallery:
        assert len(gallery) == 0
    assert os.listdir(folder) == [store.FILE]


def test_two_who_make_one_gallery_at_the_same_time_share_it(folder, monkeypatch):
    link, others = os.link, []

    def late(*paths):
        monkeypatch.setattr(os, "link", link)
        with Gallery(stub(), folder) as other:
            others.append(other.add(rows(0), ids="ann"))
        link(*paths)

    monkeypatch.setattr(os, "link", late)
    with Gallery(stub(), folder) as gallery:
        gallery.add(rows(1), ids="ben")
        assert gallery.features.ids == ("ann", "ben")
    assert os.listdir(folder) == [store.FILE]


@pytest.mark.parametrize("code", [errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_gallery_is_made_where_files_have_no_links(code, folder, monkeypatch):
    monkeypatch.setattr(os, "link", Mock(side_effect=OSError(code, os.strerror(code))))
    with Gallery(stub(), folder) as gallery:
        gallery.add(rows(0))
        assert os.stat(folder / store.FILE).st_mode & 0o777 == 0o600
    assert os.listdir(folder) == [store.FILE]


def test_a_backup_beside_the_log_of_a_killed_gallery_is_refused_and_left_as_it_is(folder, tmp_path):
    with Gallery(stub(), folder) as gallery:
        gallery.add(rows(0), ids="ann")
        gallery.backup(tmp_path / "backup")
        gallery.add(rows(1), ids="ben")
        shutil.copytree(folder, tmp_path / "killed")
    with Gallery(stub(), shutil.copytree(tmp_path / "killed", tmp_path / "again")) as gallery:
        assert gallery.features.ids == ("ann", "ben")
    file = shutil.copy(tmp_path / "backup" / store.FILE, tmp_path / "killed" / store.FILE)
    whole = Path(file).read_bytes()
    for _ in range(2):
        with pytest.raises(ArtifactError, match=rf"the log of another file, .* Move {store.FILE}-wal and"):
            Gallery(stub(), tmp_path / "killed")
    assert Path(file).read_bytes() == whole
    for end in ("-wal", "-shm"):
        Path(f"{file}{end}").unlink()
    with Gallery(stub(), tmp_path / "killed") as gallery:
        assert gallery.features.ids == ("ann",)


def test_labels_are_refused_before_images_are_embedded(folder, monkeypatch):
    monkeypatch.setattr("nformer_edge.gallery.gallery.embed_images", Mock(side_effect=AssertionError))
    image = np.zeros((8, 4, 3), np.uint8)
    with Gallery(stub(), folder) as gallery:
        for given in ({"cameras": -3}, {"times": "noon"}, {"times": True}, {"ids": [True]}, {"ids": ["a", "b"]}):
            with pytest.raises((DataError, UsageError)):
                gallery.add([image], **given)


def test_an_empty_path_is_no_gallery_in_this_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="an empty path"):
        Gallery(stub(), "")
    assert not list(tmp_path.iterdir())


def test_pictures_that_are_not_one_a_row_are_refused(folder):
    pictures = np.zeros((3, 64, 32, 3), np.uint8)
    with Gallery(stub(), folder, thumbnails=True) as gallery:
        for count in (2, 4):
            with pytest.raises(DataError, match=f"pictures: got 3, expected {count}"):
                gallery.add(rows(0, count), pictures=pictures)
        assert len(gallery) == 0


def test_a_number_that_is_none_or_not_whole_is_refused(folder):
    with Gallery(stub(), folder) as gallery:
        gallery.add(rows(0), ids=5)
        for given in (
            {"top": 2.5}, {"top": True}, {"shortlist": 1.5}, {"threshold": True}, {"since": True}, {"cameras": True},
            {"images_per_person": True},
        ):  # fmt: skip
            with pytest.raises((DataError, UsageError), match=next(iter(given))):
                gallery.search(rows(0), **given)
        with pytest.raises(UsageError, match="keep_days"):
            gallery.remove(keep_days=True)
        for given in (None, 5.0, [True]):
            with pytest.raises(DataError, match="text or a whole number"):
                gallery.remove(given)
        assert gallery.remove(5).images == 1


def test_pictures_of_one_person_are_all_named(folder):
    with Gallery(stub(), folder) as gallery:
        gallery.add(rows(0, 2))
        query = replace(rows(0, 3), paths=("a.jpg", "b.jpg", "a.jpg"))
        assert gallery.search(query, one_person=True).queries == ("a.jpg, b.jpg",)


def test_a_second_writer_waits_or_is_refused_while_readers_go_on(folder, monkeypatch):
    monkeypatch.setattr(store, "WAIT", 0.1)
    with Gallery(stub(), folder) as one, Gallery(stub(), folder) as two:
        one.add(rows(0, 2), ids=["ann", "ben"])
        assert [len(two), *two.features.ids] == [2, "ann", "ben"]
        with one._kept.store.writing():
            assert two.search(rows(0)).ids == (("ann", "ben"),)
            with pytest.raises(BackendError, match=r"another process that writes, expected one writer at a time"):
                two.add(rows(1))
            assert len(two) == 2
        two.add(rows(1), ids="eve")
        assert one.search(rows(1), top=1).ids == (("eve",),)
        two.remove("ann")
        one.add(rows(2), ids="joe")
        assert two.features.ids == one.features.ids == ("ben", "eve", "joe")
        one.compact()
        same(one, two)


def test_writers_in_two_processes_lose_nothing(folder):
    command = [sys.executable, "-m", "tests.helpers.galleries", str(folder), "1000"]
    with Gallery(stub(), folder) as gallery:
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[3]) as writer:
            writer.stdout.readline()
            for turn in range(10):
                gallery.add(rows(turn), ids=f"mine {turn}")
            writer.kill()
        assert {f"mine {turn}" for turn in range(10)} <= set(gallery.features.ids)
        with Gallery(None, folder) as again:
            same(again, gallery)


def test_threads_search_while_images_come_and_go(folder):
    from concurrent.futures import ThreadPoolExecutor

    with Gallery(stub(), folder) as gallery, ThreadPoolExecutor(4) as pool:
        gallery.add(rows(0, 50), ids="base")

        def ask(_):
            found = gallery.search(rows(0), top=60)
            assert all(np.diff(found.scores[0]) <= 0)
            assert found.ids[0].count("base") == 50
            return found.searched

        asked = [pool.submit(ask, i) for i in range(40)]
        for turn in range(20):
            gallery.add(rows(turn + 1), ids=f"p{turn}")
            if turn % 2:
                gallery.remove(f"p{turn}")
        assert {future.result() for future in asked} <= {*range(50, 80)}


@pytest.mark.parametrize(
    ("row", "told"),
    [([np.nan] * SIZE, "NaN or infinity in row 0"), ([np.inf] * SIZE, "NaN or infinity"), ([0] * SIZE, "all zeros"),
     ([1] * (SIZE - 1), r"shape \(1, 15\)"), ([1e30] * SIZE, "largest number of 1e\\+30"), ([1e-30] * SIZE, "1e-30")],
)  # fmt: skip
def test_rows_that_are_no_features_are_refused_and_nothing_is_added(folder, row, told):
    with Gallery(stub(), folder) as gallery:
        gallery.add(rows(0), ids="ann")
        with pytest.raises(DataError, match=told):
            gallery.add(Features(np.array([row], np.float32)))
        with pytest.raises(DataError, match="features of another model"):
            gallery.add(Features(rows(0).features, model="b" * 64))
        same(Gallery(None, folder), gallery)


def test_labels_that_do_not_fit_are_refused(folder):
    with Gallery(stub(), folder) as gallery:
        for given, told in (
            ({"ids": ["a"]}, "ids: got 1 for 2"),
            ({"ids": ""}, "ids: got an empty name"),
            ({"times": [0]}, "times: got 1"),
            ({"cameras": [0.5, 1]}, "cameras"),
            ({"meta": [1]}, "meta: got 1"),
            ({"meta": {"x": object()}}, "meta: got object has no JSON form here, expected text, numbers"),
        ):
            with pytest.raises(DataError, match=told):
                gallery.add(rows(0, 2), **given)
        for when in ("yesterday", [0, None], [0, "x"], float("nan")):
            with pytest.raises(UsageError, match=r"times: .* Write it like 2026-11-28T12:00Z"):
                gallery.add(rows(0, 2), times=when)
        assert len(gallery) == 0
        assert gallery.audit().entries == ()


def test_names_of_any_characters_are_found_and_removed(folder):
    names = ODD[1:]
    with Gallery(stub(), folder) as gallery:
        gallery.add(rows(0, len(names)), ids=names)
        for i, name in enumerate(names):
            with Gallery(stub(), folder) as again:
                assert again.search(Features(rows(0, len(names)).features[i : i + 1]), top=1).ids == ((name,),)
                assert str(again.search(rows(0), top=1))
            gallery.remove(name)
        assert len(gallery) == 0


def test_filters_come_before_ranking(folder):
    with Gallery(stub(), folder) as gallery:
        gallery.add(rows(0, 6), ids=list("abcdef"), cameras=[1, 1, 2, 2, 3, -1], times=["2026-01-01", *range(5)])
        query = rows(0)
        ask = (
            {"cameras": [1, 3]},
            {"exclude_camera": 1},
            {"since": 3},
            {"until": 1},
            {"since": "2025-12-31T23:00-02:00"},
        )
        want = "abe", "cdef", "aef", "bc", ""
        for filters, names in zip(ask, want, strict=True):
            found = gallery.search(query, top=10, **filters)
            assert (sorted(found.ids[0]), found.searched) == ([*names], len(names))
        assert len(gallery.search(query, top=2, exclude_camera=1).ids[0]) == 2
        assert str(gallery.search(query, cameras=9))
        with pytest.raises(UsageError, match="since: got 'noon'"):
            gallery.search(query, since="noon")


def test_several_pictures_of_one_person_are_one_query(folder):
    with Gallery(stub(), folder) as gallery:
        gallery.add(rows(0, 6), ids=list("abcdef"))
        two = Features(rows(0, 6).features[[1, 4]] * [[1], [1000]])
        found = gallery.search(two, top=2, one_person=True)
        assert (len(found), sorted(found.ids[0])) == (1, ["b", "e"])
        assert len(gallery.search(two, top=2)) == 2


def test_old_images_are_removed_by_keep_days(folder):
    now, day = time.time(), 86400
    with Gallery(stub(), folder) as gallery:
        gallery.add(rows(0, 3), ids=["old", "new", "new"], times=[now - 31 * day, now - 29 * day, now])
        assert gallery.remove(keep_days=30).images == 1
        assert gallery.features.ids == ("new", "new")
        assert gallery.remove(keep_days=30).images == 0
        with pytest.raises(UsageError, match="keep_days: got -1"):
            gallery.remove(keep_days=-1)


def test_a_backup_is_a_gallery_and_stays_as_it_was(folder, tmp_path):
    with Gallery(stub(), folder) as gallery:
        gallery.add(rows(0, 300), ids="ann")
        done = gallery.backup(tmp_path / "copy")
        assert (done.images, done.path) == (300, str(tmp_path / "copy"))
        gallery.add(rows(1), ids="eve")
        with Gallery(stub(), tmp_path / "copy") as copy:
            assert len(copy) == 300
            copy.remove("ann")
        assert len(gallery) == 301
        with pytest.raises(ArtifactError, match="a gallery there"):
            gallery.backup(tmp_path / "copy")
    with pytest.raises(UsageError, match="a gallery in memory to backup"):
        Gallery(stub()).backup(tmp_path / "other")


def test_two_galleries_are_merged(folder, tmp_path):
    with Gallery(stub(), folder) as gallery, Gallery(stub(), tmp_path / "other", code="int8") as other:
        gallery.add(rows(0, 2), ids=["ann", "ben"], times=1)
        other.add(rows(1, 2), ids=["ann", "eve"], times=2, cameras=[4, 5])
        done = gallery.merge(tmp_path / "other")
        assert (done.images, done.ids, done.total) == (2, 2, 4)
        with Gallery(stub(), folder) as again:
            same(again, gallery)
            assert again.features.ids == ("ann", "ben", "ann", "eve")
            assert again.features.camids.tolist() == [-1, -1, 4, 5]
        assert gallery.merge(tmp_path / "other").already == 2
        assert len(gallery) == 4
        with pytest.raises(DataError, match="another model"):
            gallery.merge(Gallery(stub(sha256="b" * 64)))


def as_version_1(folder):
    """What the first format had: images counted from 0, and no state."""
    with sqlite3.connect(folder / store.FILE) as sql:
        numbers = {}
        for batch, vectors, labels in sql.execute("SELECT batch, vectors, labels FROM batches").fetchall():
            told = json.loads(labels)
            numbers |= {key: len(numbers) + i for i, key in enumerate(told["key"])}
            told["key"] = [numbers[key] for key in told["key"]]
            text = json.dumps(told)
            digest = hashlib.sha256(vectors + text.encode()).hexdigest()
            sql.execute("UPDATE batches SET labels = ?, sha256 = ? WHERE batch = ?", (text, digest, batch))
        sql.executemany("UPDATE thumbnails SET key = ? WHERE key = ?", ((n, key) for key, n in numbers.items()))
        sql.execute("UPDATE about SET value = 1 WHERE key = 'format_version'")
        sql.execute("DROP TABLE state")
    sql.close()


@pytest.mark.parametrize("code", ["fp32", "int8"])
def test_a_gallery_of_the_first_format_is_upgraded_and_its_backup_still_fits(folder, tmp_path, code):
    with Gallery(stub(), folder, code=code, thumbnails=True) as gallery:
        gallery.add(rows(0, 300), cameras=[*range(300)])
        keys = gallery._kept.here["key"].tolist()
        gallery._kept.store.put_thumbnails({key: b"%d" % i for i, key in enumerate(keys)})
        found = gallery.search(rows(1, 2))
    as_version_1(folder)
    shutil.copytree(folder, tmp_path / "backup")
    with pytest.raises(ArtifactError, match=r"version 1, expected 2. nformer-edge gallery upgrade"):
        Gallery(stub(), folder)
    for place in (folder, tmp_path / "backup"):
        done = upgrade(place)
        assert (done.action, done.images, done.total, done.path) == ("upgrade", 300, 300, str(place))
    with Gallery(stub(), folder) as gallery:
        same(gallery, Gallery(stub(), tmp_path / "backup"))
        again = gallery.search(rows(1, 2))
        assert again.ids == found.ids
        assert [gallery.thumbnail(match.key) for match in again[0]] == [b"%d" % match.index for match in again[0]]
        gallery.remove("7")
        done = gallery.merge(tmp_path / "backup")
        assert (done.images, done.already, done.total) == (1, 299, 300)
        assert gallery.thumbnail(int(gallery._kept.here["key"][-1])) == b"7"
    with pytest.raises(ArtifactError, match=r"version 2, expected 1. It needs no upgrade"):
        upgrade(folder)


def test_a_damaged_gallery_of_the_first_format_stays_as_it_is(folder):
    with Gallery(stub(), folder) as gallery:
        gallery.add(rows(0, 300))
    as_version_1(folder)
    with sqlite3.connect(folder / store.FILE) as sql:
        sql.execute("UPDATE batches SET vectors = zeroblob(length(vectors)) WHERE batch = 2")
    sql.close()
    before = (folder / store.FILE).read_bytes()
    with pytest.raises(ArtifactError, match="batch 2: other bytes than were written"):
        upgrade(folder)
    assert (folder / store.FILE).read_bytes() == before


def test_the_log_counts_and_names_nobody(folder):
    with Gallery(stub(), folder, audit=True) as gallery:
        gallery.add(rows(0, 3), ids=["ann", "ann", "ben"])
        gallery.search(rows(0, 2), note="case 7")
        gallery.remove("ann")
        audit = gallery.audit()
        assert [(e.action, e.images, e.ids, e.note) for e in audit.entries] == [
            ("add", 3, 2, ""), ("search", 2, 0, "case 7"), ("remove", 2, 1, "")
        ]  # fmt: skip
        assert "ann" not in str(audit)
        assert Audit.from_json(audit.to_json()) == audit
    with Gallery(stub()) as memory:
        memory.add(rows(0))
        memory.search(rows(0))
        assert [e.action for e in memory.audit().entries] == ["add"]


def test_a_gallery_of_another_model_or_preprocessing_is_refused(folder):
    Gallery(stub(), folder).close()
    with pytest.raises(DataError, match="gallery: got features of another model"):
        Gallery(stub(sha256="b" * 64), folder)
    with pytest.raises(DataError, match="gallery: got images brought to the model in another way"):
        Gallery(stub(height=128), folder)
    with Gallery(None, folder) as gallery:
        assert GalleryStats.from_json(gallery.to_json()) == gallery.stats()
        with pytest.raises(UsageError, match="no model to add with"):
            gallery.add(rows(0))


def test_a_damaged_or_foreign_file_is_refused_by_name(folder, tmp_path):
    with Gallery(stub(), folder) as gallery:
        gallery.add(rows(0, 5), ids="ann")
    with pytest.raises(ArtifactError, match="no gallery there"):
        Gallery(None, tmp_path / "none")
    assert not (tmp_path / "none").exists()

    def broken(name: str, statement: str) -> Path:
        shutil.copytree(folder, tmp_path / name)
        with sqlite3.connect(tmp_path / name / store.FILE) as sql:
            sql.execute(statement)
        sql.close()
        return tmp_path / name

    for statement, told in (
        ("UPDATE batches SET labels = replace(labels, 'ann', 'eve')", "batch 1: other bytes than were written"),
        ("UPDATE batches SET vectors = zeroblob(length(vectors))", "batch 1: other bytes than were written"),
        ("UPDATE about SET value = 9 WHERE key = 'format_version'", "version 9, expected 2. Update nformer-edge"),
        (
            "UPDATE about SET value = 0 WHERE key = 'format_version'",
            "version 0, expected 2. nformer-edge gallery upgrade",
        ),
        ("CREATE TRIGGER t AFTER INSERT ON log BEGIN DELETE FROM batches; END", "other tables"),
        ("DROP TABLE log", "other tables"),
        ("UPDATE about SET value = 'x' WHERE key = 'next'", "next 'x', expected a whole number"),
        ("DELETE FROM about WHERE key = 'code'", "code"),
        ("UPDATE about SET value = 'q' WHERE key = 'features'", "features"),
    ):
        with pytest.raises(ArtifactError, match=told):
            Gallery(stub(), broken(f"b{abs(hash(statement))}", statement))
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / store.FILE).write_text("hello" * 1000)
    with pytest.raises(ArtifactError, match="not a database"):
        Gallery(stub(), tmp_path / "text")
    (tmp_path / "link").mkdir()
    os.symlink(folder / store.FILE, tmp_path / "link" / store.FILE)
    with pytest.raises(ArtifactError, match="a link"):
        Gallery(stub(), tmp_path / "link")


def test_a_failed_change_leaves_memory_and_file_as_they_were(folder, monkeypatch):
    with Gallery(stub(), folder) as gallery:
        gallery.add(rows(0, 3), ids=list("abc"))

        def fail(*args):
            raise sqlite3.OperationalError("database or disk is full")

        for method in ("append", "log"):
            with monkeypatch.context() as patched:
                patched.setattr(store.Store, method, fail)
                with pytest.raises(ArtifactError, match="what was acknowledged is kept"):
                    gallery.add(rows(1), ids="d")
                with pytest.raises(ArtifactError, match="full"):
                    gallery.compact() if method == "append" else gallery.remove("a")
        assert gallery.features.ids == ("a", "b", "c")
        gallery.add(rows(1), ids="d")
        with Gallery(None, folder) as again:
            same(again, gallery)
