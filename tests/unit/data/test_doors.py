"""Each kind of data through each command: the same images and labels reach the function behind it."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from nformer_edge import cli
from nformer_edge.data.records import Dataset, identities

#: Command -> arguments, the function that gets the dataset, whether it takes every image where there are no splits.
DOORS = {
    "summary": (["summary", "--data", "DATA"], "nformer_edge.data.summary.summarize", False),
    "train": (["train", "--data", "DATA", "-o", "m.safetensors"], "nformer_edge.training.train.train", False),
    "evaluate": (["evaluate", "m", "--data", "DATA"], "nformer_edge.report.accuracy.evaluate", False),
    "parity": (["parity", "a", "b", "--data", "DATA"], "nformer_edge.report.parity.parity", False),
    "fleet": (["fleet", "a", "b", "--data", "DATA"], "nformer_edge.report.cross_model.cross_model", False),
    "threshold": (["threshold", "m", "--data", "DATA"], "nformer_edge.report.threshold.threshold", False),
    "benchmark": (["benchmark", "m", "--data", "DATA"], "nformer_edge.report.benchmark.benchmark", False),
    "embed": (["embed", "m", "--data", "DATA", "-o", "f.npz"], "nformer_edge.gallery.embed.embed_files", True),
    "search": (["search", "m", "--query", "q.jpg", "--gallery", "DATA"], "nformer_edge.gallery.model.search", True),
    "calibration": (["build-engine", "b", "--calib-data", "DATA"], "nformer_edge.targets.build.build_for_target", True),
}


class Reached(BaseException):  # the command line catches every Exception
    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset


@dataclass
class Kind:
    """Files, flags, what is said on the way, and people and images that reach the command.

    `whole` is what reaches those that take every image; None where the splits are the dataset's own.
    """

    files: list[str]
    flags: list[str]
    says: str
    people: int
    images: int
    whole: int | None = None


SHOTS = [(p, c, n) for p in range(1, 7) for c in (1, 2) for n in (0, 1)]
KINDS = {
    "split folders": Kind(
        [f"{('image_train' if p < 4 else ('image_query', 'image_test')[n])}/{p:04d}_c{c:03d}_{n:08d}_0.jpg"
         for p, c, n in SHOTS], [], "", 6, 24),
    "train and val": Kind([f"{'train' if p < 4 else 'val'}/{p}/c{c}_{n}.jpg" for p, c, n in SHOTS], [], "", 6, 24),
    "folder a person": Kind([f"{p}/c{c}_{n}.jpg" for p, c, n in SHOTS], [], "a folder a person: 6 people", 6, 24, 24),
    "folder a camera": Kind([f"cam_{'ab'[c - 1]}/{p:03d}_{n}.png" for p, c, n in SHOTS], [], "are cameras", 6, 24, 24),
    "any names": Kind([f"x/k{c}-{p}-{n}.png" for p, c, n in SHOTS],
                      ["--pattern", r"k(?P<camid>\d)-(?P<pid>\d)"], "x/k1-1-0.png -> person 1, camera 1", 6, 24, 24),
    "numbered from 0": Kind([f"{p - 1}/c{c}_{n}.jpg" for p, c, n in SHOTS], [], "numbered from 0", 6, 24, 24),
    "left behind": Kind([f"{p}/c{c}_{n}.jpg" for p, c, n in SHOTS] + ["1/._c1_0.jpg", "__MACOSX/1/a.jpg"],
                        [], "", 6, 24, 24),
    "csv": Kind([f"im/{p}_{c}_{n}.jpg" for p, c, n in SHOTS], ["--root", "DATA"], "", 6, 24),
}  # fmt: skip


@pytest.fixture
def reach(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, Path, list[str]], Dataset]:
    """Runs a command until the function behind it is called, and gives the dataset that it got."""

    def run(door: str, data: Path, flags: list[str]) -> Dataset:
        argv, function, _ = DOORS[door]

        module, _, name = function.rpartition(".")
        real = getattr(importlib.import_module(module), name)

        @functools.wraps(real)
        def stop(**named: object) -> None:
            found = [getattr(v, "images", v) for v in named.values()]  # calibration images come with what they are for
            raise Reached(next(v for v in found if isinstance(v, Dataset)))

        monkeypatch.setattr(function, stop)
        with pytest.raises(Reached) as reached:
            cli.main([str(data) if word == "DATA" else word for word in argv] + flags)
        return reached.value.dataset

    return run


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("name", KINDS)
def test_a_kind_of_data_is_read_alike_by_every_command(
    tmp_path: Path, name: str, door: str, reach: Callable, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("torch", reason="the commands' functions need it")
    kind, data = KINDS[name], tmp_path
    for file in kind.files:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text(file)
    if name == "csv":
        data = tmp_path / "labels.csv"
        splits = [("query", "gallery")[n] if p > 3 else "train" for p, _, n in SHOTS]
        rows = [f"{tmp_path}/im/{p}_{c}_{n}.jpg;{p}.0;cam{c};{s}" for (p, c, n), s in zip(SHOTS, splits, strict=True)]
        data.write_text("\n".join(["Path;PID;CamID;Split", *rows]))
    flags = [str(tmp_path) if flag == "DATA" else flag for flag in kind.flags]
    dataset = reach(door, data, flags)
    everything = dataset.train + dataset.query + dataset.gallery
    assert (len(identities(everything)), len(everything)) == (kind.people, kind.images)
    assert {r.camid for r in everything} == {1, 2}
    if DOORS[door][2] and kind.whole is not None:
        assert len(dataset.gallery) == kind.whole
    else:
        assert dataset.train
        assert dataset.gallery
    said = capsys.readouterr().err
    assert kind.says in (said if door != "summary" else " ".join(dataset.notes))
    assert len(dataset.same_camera().train) == len(dataset.train)


@pytest.mark.parametrize("door", [door for door, (_, _, whole) in DOORS.items() if not whole and door != "summary"])
def test_unknown_cameras_are_said_by_every_command_that_scores(
    tmp_path: Path, door: str, reach: Callable, capsys: pytest.CaptureFixture[str]
) -> None:
    for p, c, n in SHOTS:
        (tmp_path / str(p)).mkdir(exist_ok=True)
        (tmp_path / str(p) / f"{c}{n}.jpg").touch()
    reach(door, tmp_path, [])
    assert "the camera of 24 of 24 images is unknown" in capsys.readouterr().err


@pytest.mark.parametrize("door", [door for door, (_, _, whole) in DOORS.items() if whole])
def test_images_of_nobody_known_are_taken_whole_and_counted(
    tmp_path: Path, door: str, reach: Callable, capsys: pytest.CaptureFixture[str]
) -> None:
    for c in (1, 2, 3):
        (tmp_path / f"cam{c}").mkdir()
        for n in range(5):
            (tmp_path / f"cam{c}" / f"{n:06d}.jpg").touch()
    assert len(reach(door, tmp_path, []).gallery) == 15
    assert "15 images, people not known" in capsys.readouterr().err


def test_same_camera_reaches_the_function(tmp_path: Path, reach: Callable) -> None:
    for p in range(1, 5):
        (tmp_path / str(p)).mkdir()
        for n in range(3):
            (tmp_path / str(p) / f"x_c1_{n}.jpg").touch()
    assert {r.camid for r in reach("evaluate", tmp_path, ["--same-camera"]).query} == {-1}


#: Commands that need nobody's name: they compare models, or take images as they are.
UNLABELED = ("parity", "benchmark", "threshold", "embed", "search", "calibration")


@pytest.fixture
def places(tmp_path: Path) -> Path:
    """A folder a camera, called after its place, with images of any name: nothing says who is who."""
    for place in ("Eingang", "hof-nord", "lobby"):
        (tmp_path / place).mkdir()
        for i in range(60):
            (tmp_path / place / f"snap {i:04x}-late.jpg").touch()
    return tmp_path


@pytest.mark.parametrize("door", UNLABELED)
def test_crops_that_nobody_labeled_are_taken_whole_where_nobody_is_asked_for(
    door: str, places: Path, reach: Callable, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("torch", reason="the commands' functions need it")
    dataset = reach(door, places, [])
    assert dataset.unlabeled
    assert len(dataset.gallery) == 180
    said = capsys.readouterr().err
    assert "labels are not read: 3 folders" in said
    assert "180 images, people not known" in said


@pytest.mark.parametrize("door", [door for door in DOORS if door not in UNLABELED])
def test_crops_that_nobody_labeled_are_not_read_as_people_by_the_others(
    door: str, places: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [str(places) if word == "DATA" else word for word in DOORS[door][0]]
    assert cli.main(argv) == 2
    told = capsys.readouterr().err
    assert "they may be places" in told
    assert "--layout folders" in told


def test_a_few_people_with_many_images_are_people_where_names_tell_cameras(tmp_path: Path, reach: Callable) -> None:
    for person in ("anna", "ben", "carla", "dirk"):
        (tmp_path / person).mkdir()
        for i in range(60):
            (tmp_path / person / f"c{i % 3 + 1}_{i}.jpg").touch()
    assert len(identities(reach("evaluate", tmp_path, []).train)) == 2
