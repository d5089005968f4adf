"""`nformer-edge gallery`: from a folder to an answer, and to a person forgotten."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from nformer_edge.cli import main
from nformer_edge.gallery.gallery import Gallery
from nformer_edge.gallery.search import Matches


@pytest.fixture
def crops(tmp_path):
    """Two people, a folder each, two images a folder."""
    draw = np.random.default_rng(0)
    for name in ("ann", "ben"):
        (tmp_path / "crops" / name).mkdir(parents=True)
        pixels = draw.integers(0, 256, (64, 32, 3))
        for i in range(2):
            image = np.clip(pixels + draw.integers(-9, 10, pixels.shape), 0, 255).astype(np.uint8)
            Image.fromarray(image).save(tmp_path / "crops" / name / f"{i}.png")
    return tmp_path / "crops"


def run(capsys, *command):
    code = main([*map(str, command)])
    said = capsys.readouterr()
    return code, said.out, said.err


def test_from_a_folder_to_an_answer_and_to_a_person_forgotten(tiny_bundle, crops, tmp_path, capsys):
    people = tmp_path / "people"
    add = (
        "gallery",
        "add",
        tiny_bundle,
        people,
        "--data",
        crops,
        "--ids-from",
        "folder",
        "--time",
        "2026-11-28",
        "--threads",
        1,
    )
    code, out, err = run(capsys, *add, "--camera", 3, "--thumbnails", "--audit")
    assert (code, out) == (0, "add: 4 images of 2 ids, 4 images in the gallery now\n"), err
    query = crops / "ben" / "0.png"
    search = ("gallery", "search", tiny_bundle, people, "--head", "no", "--threads", 1, "--query", query)
    code, out, _ = run(capsys, *search, "--top", 2, "--note", "case 7", "-o", tmp_path / "found.json")
    assert code == 0
    assert "   1  1.0000  ben" in out
    found = Matches.from_json(json.loads((tmp_path / "found.json").read_text()))
    assert found.ids == (("ben", "ben"),)
    assert found.cameras.tolist() == [[3, 3]]
    code, out, _ = run(capsys, *search, "--camera", 4, "--json")
    assert json.loads(out)["searched"] == 0
    code, out, _ = run(capsys, *search, crops / "ben" / "1.png", "--one-person", "--since", "2026-11-28T00:00Z")
    assert "1 query, 4 gallery images searched" in out
    assert run(capsys, "gallery", "stats", people)[1].startswith("4 images of 2 ids, 1 cameras, seen 2026-11-28")
    assert run(capsys, "gallery", "backup", people, "-o", tmp_path / "copy")[0] == 0
    code, out, _ = run(capsys, "gallery", "remove", people, "ben")
    assert out.splitlines()[0] == "remove: 2 images of 1 ids, 2 images in the gallery now"
    code, out, err = run(capsys, "gallery", "remove", people, "anne")
    assert (code, "The most similar id is 'ann'" in err) == (2, True)
    code, out, _ = run(capsys, "gallery", "compact", people, "--code", "int8")
    assert out.startswith("2 images as int8, 40 bytes each in memory; files ")
    assert b"ben" not in b"".join(path.read_bytes() for path in people.iterdir())
    assert run(capsys, *search, "--json")[0] == 0
    merged = run(capsys, "gallery", "merge", people, tmp_path / "copy")[1]
    assert merged == "merge: 2 images of 1 ids, 4 images in the gallery now; 2 were there before\n"
    code, out, _ = run(capsys, "gallery", "audit", people, "--json")
    actions = [e["action"] for e in json.loads(out)["entries"]]
    assert actions == ["add", "search", "search", "search", "remove", "compact", "search", "merge"]
    code, out, _ = run(capsys, "gallery", "remove", people, "--keep-days", 0)
    assert out.startswith("remove: 4 images")


def test_thumbnails_are_embedded_with_another_model(tiny_bundle, tiny_checkpoint, crops, tmp_path, capsys):
    people, other = tmp_path / "people", tmp_path / "other"
    add = ("gallery", "add", tiny_bundle, people, "--data", crops, "--ids-from", "file", "--threads", 1)
    assert run(capsys, *add, "--thumbnails")[0] == 0
    shutil.copytree(people, other)
    code, out, err = run(capsys, "gallery", "migrate", tiny_checkpoint, people)
    assert out == "migrate: 4 images of 2 ids, 4 images in the gallery now\n", err
    assert json.loads(run(capsys, "gallery", "stats", people, "--json")[1])["model"] == "osnet_x0_25_64x32"
    assert run(capsys, *add[:6], "--threads", 1, "--id", "eve")[1].startswith("add: 4 images of 1 ids, 8 images")
    add = ("gallery", "add", tiny_bundle, tmp_path / "bare", "--data", crops, "--threads", 1)
    assert run(capsys, *add)[0] == 0
    code, _, err = run(capsys, "gallery", "migrate", tiny_bundle, tmp_path / "bare")
    assert (code, "no thumbnail, expected one of each image" in err) == (2, True)


def test_a_folder_a_person_gives_its_name_and_only_add_makes_a_gallery(tiny_bundle, crops, tmp_path, capsys):
    place = tmp_path / "people"
    code, _, said = run(capsys, "gallery", "search", tiny_bundle, place, "--query", crops / "ann" / "0.png")
    assert (code, place.exists()) == (2, False)
    assert "no gallery there" in said
    assert run(capsys, "gallery", "add", tiny_bundle, place, "--data", crops)[0] == 0
    with Gallery(None, place) as gallery:
        assert gallery.people() == {"ann": 2, "ben": 2}
    for wrong in (("--id", ""), ("--id", "eve", "--ids-from", "folder"), ("--audit",), ("--code", "int8")):
        code, _, err = run(capsys, "gallery", "add", tiny_bundle, place, "--data", crops, *wrong)
        assert code == 2, (wrong, err)
