from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nformer_edge.core.artifact import read_manifest
from nformer_edge.core.errors import ArtifactError, UsageError
from nformer_edge.core.preprocess import load_image
from nformer_edge.data.drawing import Canvas, Draw, Stripes, blur, halve
from nformer_edge.data.generate import GenerateSpec, draw_images, generate_dataset
from nformer_edge.data.readers import read_dataset
from nformer_edge.data.records import Dataset, identities

#: Pixels of `GenerateSpec.tiny()` in order. Another number means another dataset: raise DRAWING_VERSION.
TINY_SHA256 = "bed6ed745cf35dd8d1760d13876b1567bfe74fcc6da5131890b508908a9b0530"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return generate_dataset(tmp_path_factory.mktemp("generated") / "tiny", GenerateSpec.tiny())


def _digest(spec: GenerateSpec) -> str:
    digest = hashlib.sha256()
    for path, pixels in draw_images(spec):
        digest.update(path.encode() + pixels.tobytes())
    return digest.hexdigest()


def test_the_tiny_dataset_has_the_same_pixels_everywhere(tiny: Dataset) -> None:
    assert _digest(GenerateSpec.tiny()) == TINY_SHA256
    assert read_manifest(tiny.root, "dataset")["pixels_sha256"] == TINY_SHA256


def test_the_files_hold_the_pixels_that_were_drawn(tiny: Dataset) -> None:
    digest = hashlib.sha256()
    for path, _ in draw_images(GenerateSpec.tiny()):
        digest.update(path.encode() + np.asarray(load_image(f"{tiny.root}/{path}")).tobytes())
    assert digest.hexdigest() == TINY_SHA256


def test_another_seed_draws_another_dataset() -> None:
    assert _digest(GenerateSpec.tiny(1)) != TINY_SHA256


def test_one_image_does_not_depend_on_those_before_it() -> None:
    few = dict(draw_images(GenerateSpec(train_ids=2, test_ids=2, distractors=0, junk=0, alike=2, height=64, width=32)))
    more = dict(draw_images(GenerateSpec(train_ids=2, test_ids=2, distractors=3, junk=1, alike=2, height=64, width=32)))
    assert few.keys() < more.keys()
    assert all(np.array_equal(pixels, more[path]) for path, pixels in few.items())


def test_names_parse_back_to_the_spec(tiny: Dataset) -> None:
    spec = GenerateSpec.tiny()
    assert tiny == read_dataset(tiny.root)
    assert tiny.name == "generated", "no table may call it Market-1501"
    assert len(tiny.train) == spec.train_ids * spec.seen_by * spec.images
    assert len(tiny.query) == spec.test_ids * spec.seen_by
    assert len(tiny.gallery) == spec.test_ids * spec.seen_by * (spec.images - 1) + spec.distractors
    assert len(tiny.junk) == spec.junk
    assert len(identities(tiny.train)) == spec.train_ids
    assert not set(identities(tiny.train)) & set(identities(tiny.query))
    assert identities(tiny.query) == identities(tiny.gallery)


def test_gallery_images_a_person_follow_the_mix_and_the_open_set_is_never_asked_for(tmp_path: Path) -> None:
    mix = (1, 2, 5)
    spec = replace(GenerateSpec.tiny(), test_ids=7, gallery_images=mix, open_set=4)
    made = generate_dataset(tmp_path / "mixed", spec)
    counts = Counter(r.pid for r in made.gallery if r.pid > 0)
    first = spec.train_ids + 1
    assert [counts[first + i] for i in range(7)] == [mix[i % 3] for i in range(7)]
    assert [counts[first + 7 + i] for i in range(4)] == [1, 2, 5, 1]
    assert {r.pid for r in made.query} == {first + i for i in range(7)}
    for query in made.query:
        assert any(g.pid == query.pid and g.camid != query.camid for g in made.gallery)
    plain = {r.path.rpartition("/")[2] for r in generate_dataset(tmp_path / "plain", GenerateSpec.tiny()).train}
    assert plain == {r.path.rpartition("/")[2] for r in made.train}
    with pytest.raises(UsageError, match="gallery_images"):
        GenerateSpec(gallery_images=(0,))


def test_every_query_has_a_match_under_another_camera(tiny: Dataset) -> None:
    for query in tiny.query:
        assert any(g.pid == query.pid and g.camid != query.camid for g in tiny.gallery)


def test_cameras_differ_more_than_images_of_one_camera() -> None:
    spec = GenerateSpec(
        train_ids=12, test_ids=1, cameras=6, seen_by=5, images=3, alike=4, distractors=0, junk=0, height=64, width=32
    )
    colors: dict[str, list[np.ndarray]] = {}
    for path, pixels in draw_images(spec):
        colors.setdefault(path.split("_c")[1][0], []).append(pixels.mean(axis=(0, 1)))
    means = np.array([np.mean(c, axis=0) for c in colors.values()])
    assert len(means) == 6
    within = np.mean([np.std(c, axis=0).mean() for c in colors.values()])
    apart = [np.abs(a - b).max() for i, a in enumerate(means) for b in means[:i]]
    assert min(apart) > within


def test_an_unfinished_run_leaves_the_earlier_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "data"
    generate_dataset(out, GenerateSpec.tiny())

    def interrupted(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Image.Image, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        generate_dataset(out, GenerateSpec.tiny(1), force=True)
    assert read_manifest(out, "dataset")["pixels_sha256"] == TINY_SHA256
    assert os.listdir(tmp_path) == ["data"]


def test_what_is_there_is_replaced_by_force_alone_and_only_if_generated(tmp_path: Path) -> None:
    out = tmp_path / "data"
    generate_dataset(out, GenerateSpec.tiny())
    with pytest.raises(ArtifactError, match="--force"):
        generate_dataset(out, GenerateSpec.tiny(1))
    generate_dataset(out, GenerateSpec.tiny(1), force=True)
    assert read_manifest(out, "dataset")["spec"]["seed"] == 1
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(ArtifactError, match="not ours"):
        generate_dataset(tmp_path / "mine", GenerateSpec.tiny(), force=True)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"


@pytest.mark.parametrize(("name", "value"), [("train_ids", 1), ("cameras", 1), ("images", 1), ("seed", -1)])
def test_a_spec_that_cannot_be_drawn_is_refused(name: str, value: int) -> None:
    with pytest.raises(UsageError, match=name):
        GenerateSpec(**{name: value})


def test_a_stream_of_draws_is_its_keys_alone_and_covers_its_range() -> None:
    first, second = Draw(7, "a"), Draw(7, "a")
    numbers = [first.between(-2, 2) for _ in range(400)]
    assert numbers == [second.between(-2, 2) for _ in range(400)]
    assert set(numbers) == {-2, -1, 0, 1, 2}
    assert [Draw(7, "b").between(0, 10**9)] != [Draw(7, "a").between(0, 10**9)]
    assert sorted(Draw(1).shuffle(range(20))) == list(range(20))


def test_noise_keeps_to_its_amplitude_around_zero() -> None:
    noise = Draw(3).noise((200, 50), 9)
    assert noise.min() == -9
    assert noise.max() == 9
    assert abs(noise.mean()) < 0.5


def test_shapes_fill_what_they_should_and_nothing_outside_the_canvas() -> None:
    canvas = Canvas(20, 10)
    canvas.box(7, 3, 2, 1, (1, 2, 3))
    assert (canvas.pixels[1:4, 2:8] == (1, 2, 3)).all()
    assert canvas.pixels.any(axis=2).sum() == 18
    canvas.polygon([(-50, 10), (50, 10), (50, 60), (-50, 60)], (9, 9, 9), Stripes("lower half", (5, 5, 5), 0, 15, 2))
    assert (canvas.pixels[10:15] == 9).all()
    assert (canvas.pixels[15:] == 5).all()
    canvas.ellipse(5, 5, 2, 3, (200, 0, 0), below=5)
    assert canvas.pixels[2, 5, 0] == 200
    assert canvas.pixels[6, 5, 0] == 0
    before = canvas.pixels.copy()
    canvas.limb((100, 100), (120, 130), 8, 4, (7, 7, 7))
    assert np.array_equal(canvas.pixels, before)


def test_clockwise_and_counterclockwise_polygons_are_the_same() -> None:
    points = [(1, 1), (8, 2), (6, 9)]
    one, other = Canvas(12, 12), Canvas(12, 12)
    one.polygon(points, (5, 6, 7))
    other.polygon(points[::-1], (5, 6, 7))
    assert one.pixels.any()
    assert np.array_equal(one.pixels, other.pixels)


def test_halving_and_blurring_keep_a_flat_picture_flat() -> None:
    flat = np.full((8, 6, 3), 77, dtype=np.uint8)
    assert (halve(flat) == 77).all()
    assert (blur(halve(flat), 3) == 77).all()


def test_readers_and_the_generator_load_no_torch() -> None:
    code = (
        "import sys, json; import nformer_edge.data.generate, nformer_edge.data.readers, nformer_edge.data.summary,"
        " nformer_edge.data.sampler, nformer_edge.data.batches;"
        " print(json.dumps([m for m in ('torch', 'onnx', 'onnxruntime') if m in sys.modules]))"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(ran.stdout) == []
