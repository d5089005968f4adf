"""A generated re-identification dataset in Market-1501's folders and file names, identical on every machine."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from nformer_edge.core.artifact import atomic_folder, write_manifest
from nformer_edge.core.errors import ArtifactError
from nformer_edge.core.spec import check_at_least, to_dict
from nformer_edge.core.terminal import PROGRESS
from nformer_edge.data.drawing import Draw
from nformer_edge.data.figures import CLOTHES, LOWERS, Person, draw_person, look_alikes
from nformer_edge.data.flat import FOLDERS, read_market1501
from nformer_edge.data.records import DISTRACTOR, JUNK, Dataset
from nformer_edge.data.scenes import Camera, Framing, make_cameras, photograph

#: Changes whenever the same spec would give other pixels.
DRAWING_VERSION = 1


@dataclass(frozen=True)
class GenerateSpec:
    """What to draw. The defaults are the demo's dataset.

    Args:
        seed: decides every pixel.
        train_ids, test_ids: people; the two sets share nobody.
        cameras: at least two, so that a query has a match under another camera.
        seen_by: each person walks past this many cameras (at most `cameras`).
        images: of one person by one camera; in the test split one of them is the query.
        gallery_images: of a test person in the gallery: the first person has the first of these numbers, the next the
            next, over and over, such as 1, 2, 4, 8, 20. All that `images` and `seen_by` leave if empty.
        open_set: people in the gallery whom no query asks for, with as many images as test people have.
        alike: people come in groups of this many in the same main colors.
        distractors: gallery images of people whom no query asks for, or of nobody (identity 0).
        junk: badly framed gallery images of people who are asked for (identity -1).
        height, width: pixels of every image.
    """

    seed: int = 0
    train_ids: int = 120
    test_ids: int = 100
    cameras: int = 4
    seen_by: int = 4
    images: int = 4
    alike: int = 1
    gallery_images: tuple[int, ...] = ()
    open_set: int = 0
    distractors: int = 150
    junk: int = 60
    height: int = 128
    width: int = 64

    def __post_init__(self) -> None:
        for name, least in (
            ("seed", 0),
            ("train_ids", 2),
            ("test_ids", 1),
            ("cameras", 2),
            ("seen_by", 2),
            ("images", 2),
            ("alike", 1),
            ("open_set", 0),
            ("distractors", 0),
            ("junk", 0),
            ("height", 32),
            ("width", 16),
        ):
            check_at_least(name, getattr(self, name), least)
        object.__setattr__(self, "gallery_images", tuple(self.gallery_images))
        for count in self.gallery_images:
            check_at_least("gallery_images", count, 1)

    def in_gallery(self, i: int, cameras: int) -> list[int]:
        """Of each of the cameras that see test person `i`, images in the gallery; dealt out one by one from the second.

        So one image alone has another camera than the first query.
        """
        if not self.gallery_images:
            return [self.images - 1] * cameras
        total = self.gallery_images[i % len(self.gallery_images)]
        return [len(range((place - 1) % cameras, total, cameras)) for place in range(cameras)]

    @classmethod
    def tiny(cls, seed: int = 0) -> GenerateSpec:
        """For tests: 96 small images in about a second."""
        return cls(
            seed,
            train_ids=6,
            test_ids=4,
            cameras=3,
            seen_by=3,
            images=3,
            alike=2,
            distractors=4,
            junk=2,
            height=64,
            width=32,
        )


@dataclass(frozen=True)
class _Shot:
    folder: str
    pid: int
    person: Person | None
    camera: Camera
    number: int  # of this folder's images, from 0: stands in the file's name as the frame
    framing: Framing

    @property
    def name(self) -> str:
        """As Market-1501 names files: person, camera and sequence, frame, box."""
        person = f"{self.pid:04d}" if self.pid >= 0 else "-1"
        return f"{person}_c{self.camera.number}s1_{self.number:06d}_01.png"


def _people(spec: GenerateSpec, count: int, split: str) -> list[Person]:
    groups = range(0, count, spec.alike)
    return [p for g in groups for p in look_alikes(Draw(spec.seed, split, g), spec.alike)][:count]


def _shots(spec: GenerateSpec) -> Iterator[_Shot]:
    """Every image of the dataset, in the order of writing."""
    cameras = make_cameras(spec.seed, spec.cameras)
    numbers = dict.fromkeys(FOLDERS, 0)

    def shot(split: str, pid: int, person: Person | None, camera: Camera, framing: Framing) -> _Shot:
        numbers[split] += 1
        return _Shot(FOLDERS[split], pid, person, camera, numbers[split] - 1, framing)

    pid = 0
    test_people = _people(spec, spec.test_ids, "test")
    splits = {"train": _people(spec, spec.train_ids, "train"), "test": test_people}
    splits["open"] = _people(spec, spec.open_set, "open")
    for split, people in splits.items():
        for i, person in enumerate(people):
            pid += 1
            route = Draw(spec.seed, "route", pid).shuffle(cameras)[: spec.seen_by]
            counts = [spec.images] * len(route) if split == "train" else spec.in_gallery(i, len(route))
            for camera, count in zip(route, counts, strict=True):
                if split == "test" and count < sum(counts):  # a query that no other camera's image answers is not asked
                    yield shot("query", pid, person, camera, Framing())
                for _ in range(count):
                    yield shot("train" if split == "train" else "gallery", pid, person, camera, Framing())
    for i in range(spec.distractors):
        draw = Draw(spec.seed, "distractor", i)
        passer_by = draw_person(draw, draw.pick(CLOTHES), draw.pick(LOWERS)) if draw.chance(80) else None
        yield shot("gallery", DISTRACTOR, passer_by, draw.pick(cameras), Framing(jitter=14))
    for i in range(spec.junk):
        draw = Draw(spec.seed, "junk", i)
        yield shot("gallery", JUNK, draw.pick(test_people), draw.pick(cameras), Framing(cut=True))


def draw_images(spec: GenerateSpec) -> Iterator[tuple[str, np.ndarray]]:
    """Yields every image as its path inside the dataset and its pixels, uint8 [height, width, 3], RGB."""
    for shot in _shots(spec):
        draw = Draw(spec.seed, "image", shot.folder, shot.number)
        pixels = photograph(shot.person, shot.camera, draw, spec.height, spec.width, shot.framing)
        yield f"{shot.folder}/{shot.name}", pixels


def generate_dataset(out: str | os.PathLike[str], spec: GenerateSpec | None = None, force: bool = False) -> Dataset:
    """Draws the dataset into the folder `out`: PNG files, a manifest with the spec and `pixels_sha256`.

    The pixels depend on the spec alone (`DRAWING_VERSION` says which drawing); the PNG files' own bytes may differ
    with the zlib that packs them. An interrupted run leaves what stood at `out` before.

    Args:
        out: becomes the dataset's folder.
        spec: what to draw.
        force: replace an earlier generated dataset at `out`.

    Raises:
        ArtifactError: if something is at `out` already and may not be replaced.
    """
    spec = spec or GenerateSpec()
    out = Path(out)
    if not force and out.is_dir() and any(out.iterdir()):
        hint = "Choose another -o, or say --force to replace an earlier generated dataset."
        raise ArtifactError(str(out), "a folder with files in it", "nothing there yet", hint)
    total = sum(1 for _ in _shots(spec))
    digest = hashlib.sha256()
    with atomic_folder(out, "dataset") as folder:
        for name in FOLDERS.values():
            (folder / name).mkdir()
        for path, pixels in tqdm(draw_images(spec), total=total, desc="draw", unit="image", **PROGRESS):
            digest.update(path.encode() + pixels.tobytes())
            Image.fromarray(pixels).save(folder / path, format="PNG", compress_level=1)
        fields = {"spec": to_dict(spec), "drawing_version": DRAWING_VERSION, "pixels_sha256": digest.hexdigest()}
        write_manifest(folder, "dataset", fields)
    return read_market1501(out)
