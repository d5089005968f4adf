"""Folders of images: a folder a person, a folder a camera, a folder a split, or any names that a pattern reads."""

from __future__ import annotations

import os
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path

from nformer_edge.core.errors import DataError
from nformer_edge.data.files import Found, has_images, subfolders, walk_images
from nformer_edge.data.names import PERSON_CAMERA, NamePattern, Role, camera, is_camera, propose_pattern, role
from nformer_edge.data.people import Sighting, make_dataset
from nformer_edge.data.records import Dataset

#: One person's folder holds fewer images than this; more look like a split, a camera or a day.
MANY_IMAGES = 1000

#: At most so many folders, with so many images each and no camera in their names, look like places rather than people.
FEW_FOLDERS, PLACE_IMAGES = 10, 50

_PERSON = re.compile(r"(?:^|[_\-])(?:person|pid|id|p)[_\-]?(\d+)(?![0-9])|^(\d+)(?=[_\-])", re.IGNORECASE)
_NUMBER = re.compile(r"(\d+)")
#: A date or a time of day: numbers that several images share, and no person's.
_TIME = re.compile(r"(19|20)\d\d-?[01]\d-?[0-3]\d(?!\d)|[0-2]\d[-.h][0-5]\d[-.m][0-5]\d(?!\d)")
#: What to do with images that nobody labeled.
_NOBODY = "--layout unlabeled (parity, benchmark, threshold, embed, search and --calib-data need no labels)"


def looks_like_folders(root: Path) -> bool:
    return any(map(has_images, subfolders(root)))


def read_folders(
    root: Path, *, whole: bool = False, pattern: NamePattern | None = None, sure: bool = False, cameras: bool = False
) -> Dataset:
    """Folders of images at any depth.

    Folders named like splits (`names.role`) are splits, never people. In a split, or where there is none, a folder is
    a person (``train/<person>/*``), or, if images lie flat in a split, their names tell person and camera
    (``0002_c003_00030600_0.jpg``), or a pattern does. Folders named like cameras are cameras: what they hold are
    people's folders, or images whose names tell the person. A person's folder name is a number, or a name that
    becomes one (`people.make_dataset`); the camera is what a file's name, or a folder's below the person, tells.

    Args:
        root: the folder.
        whole: make no split of our own.
        pattern: reads person and camera from file names.
        sure: the user says that these folders are people.
        cameras: the user says that these folders are cameras.

    Raises:
        DataError: where folders do not look like people, with a guess at what they are.
    """
    splits, beside = _splits(root)
    notes: list[str] = []
    if pattern is not None:
        sightings = _by_pattern(root, pattern, splits, notes)
    elif splits:
        _require_splits(root, splits, beside)
        sightings = [s for key, folder in splits.items() for s in _read_split(folder, key, notes)]
    else:
        sightings = _read_unsplit(root, notes, sure, cameras)
    unread = [p.name for p in beside if has_images(p)] if splits else []
    if unread:
        notes.append(f"not read, because they are no splits or second ones: {_some(unread)}")
    passed = walk_images(root).passed_over
    return make_dataset(root.absolute().name, str(root), sightings, whole=whole, notes=notes, passed_over=passed)


def _splits(root: Path) -> tuple[dict[Role, Path], list[Path]]:
    """The folder of each split, and the other folders. Of several the one of all images (``train_all``), then the
    shortest name."""
    named: dict[Role, list[Path]] = defaultdict(list)
    for folder in subfolders(root):
        found = role(folder.name)
        if found is not None and has_images(folder):
            named[found].append(folder)
    chosen = {key: min(ps, key=lambda p: ("all" not in p.name.lower(), len(p.name))) for key, ps in named.items()}
    return chosen, [p for p in subfolders(root) if p not in chosen.values()]


def _require_splits(root: Path, splits: dict[Role, Path], beside: Sequence[Path]) -> None:
    """Raises DataError where most folders are no splits, so that those named like splits may be people."""
    people = [p.name for p in beside if role(p.name) is None and has_images(p)]
    if len(people) > len(splits):
        got = f"{_some([p.name for p in splits.values()])}, named like splits, beside {_some(people)}"
        hint = "Rename the folder if it is a person's, or move the splits into a folder of their own."
        raise DataError(str(root), got, "splits alone, or people alone", hint)


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _by_pattern(root: Path, pattern: NamePattern, splits: dict[Role, Path], notes: list[str]) -> list[Sighting]:
    places: list[tuple[Role | None, Path]] = [*splits.items()] or [(None, root)]
    rows = [(key, path) for key, place in places for path in walk_images(place).images]
    relatives = [Path(os.path.relpath(path, root)).as_posix() for _, path in rows]
    told = pattern.read_all(relatives, str(root))
    notes.append(f"pattern: {pattern.preview(relatives)}")
    return [Sighting(path, pid, cam, key) for (key, path), (pid, cam) in zip(rows, told, strict=True)]


def _read_split(folder: Path, key: Role, notes: list[str]) -> list[Sighting]:
    people = [*filter(has_images, subfolders(folder))]
    loose = [path for path in walk_images(folder).images if os.path.dirname(path) == str(folder)]
    if not people or len(loose) > sum(len(walk_images(p).images) for p in people):
        return _by_names(folder, loose, key)
    if loose:
        notes.append(f"{len(loose)} images in {folder.name} lie in no person's folder and are not read")
    return [s for p in _not_empty(folder, notes) for s in _person(p, p.name, key)]


def _by_names(folder: Path, paths: Sequence[str], key: Role) -> list[Sighting]:
    names = [os.path.basename(path) for path in paths]
    found = [re.match(PERSON_CAMERA, name, re.IGNORECASE) for name in names]
    if not all(found):
        bad = [name for name, hit in zip(names, found, strict=True) if hit is None]
        got = f"{len(bad)} of {len(names)} names that tell no person and camera, such as {bad[0]}"
        around = [os.path.basename(path) for path in walk_images(folder.parent).images]
        guess = propose_pattern(names) or propose_pattern(around)
        hint = f"Try --pattern '{guess}'." if guess else "Say how they are named (--pattern), or list labels in a CSV."
        raise DataError(str(folder), got, "names like 0002_c003_00030600_0.jpg, or a folder a person", hint)
    return [Sighting(p, hit["pid"], hit["camid"], key) for p, hit in zip(paths, found, strict=True) if hit is not None]


def _person(folder: Path, name: str, key: Role | None = None) -> list[Sighting]:
    """A person's images; the camera is in the file's name, or in that of a folder between."""
    sightings = []
    for path in walk_images(folder).images:
        sightings.append(Sighting(path, name, camera_below(folder, path), key))
    return sightings


def camera_below(folder: Path, path: str) -> str:
    """The camera that an image's name tells, or that of a folder between it and `folder`; "" for none."""
    between = Path(path).relative_to(folder).parts[:-1]
    return camera(os.path.splitext(os.path.basename(path))[0]) or next(filter(None, map(camera, between)), "")


def _not_empty(root: Path, notes: list[str]) -> list[Path]:
    folders = {p: has_images(p) for p in subfolders(root)}
    empty = [p.name for p, full in folders.items() if not full]
    if empty:
        notes.append(f"passed over, because they hold no image: {_some(empty)}")
    return [p for p, full in folders.items() if full]


def _read_unsplit(root: Path, notes: list[str], sure: bool, cameras: bool) -> list[Sighting]:
    folders = _not_empty(root, notes)
    if not folders:
        raise DataError(str(root), "no folders", "one folder per person", "Put each person into one, or say --pattern.")
    if not sure and (cameras or all(is_camera(p.name) for p in folders)):
        return _read_cameras(root, folders, cameras, notes)
    if not sure:
        _require_people(root, {p: walk_images(p) for p in folders})
    notes.append(f"a folder a person: {len(folders)} people ({_some([p.name for p in folders])})")
    return [s for p in folders for s in _person(p, p.name)]


def _read_cameras(root: Path, folders: list[Path], sure: bool, notes: list[str]) -> list[Sighting]:
    """``cam_a/<person>/*``, or ``cam_a/0001_45.bmp``; `sure` accepts any first number in a name as the person's, where
    the same stands before it in all names of a folder."""
    sightings: list[Sighting] = []
    before: set[tuple[Path, str]] = set()
    for folder in folders:
        for path in walk_images(folder).images:
            first, *rest = Path(path).relative_to(folder).parts
            hit = None if rest else _PERSON.search(first)
            if sure and not rest and hit is None and (hit := _NUMBER.search(first)):
                before.add((folder, first[: hit.start()]))
            hit = None if hit and _TIME.match(first, hit.start()) else hit
            person = first if rest else next(filter(None, hit.groups()), "") if hit else ""
            sightings.append(Sighting(path, person.lstrip("0") or "0" if person.isdigit() else person, folder.name))
    seen: dict[str, set[str]] = defaultdict(set)
    for s in sightings:
        seen[s.person].add(s.camera)
    shared = sum(len(cams) > 1 for cams in seen.values())
    chance = len(before) > len(folders) or len(seen) == len(sightings)  # any number in a random name, or a counter
    if "" in seen or (chance if sure else shared < 2):
        got = f"a folder a camera ({_some([p.name for p in folders])}), and names that tell no person"
        hint = f"If nobody said who is who: {_NOBODY}. If names tell the person, say how: --pattern '(?P<pid>...)'"
        hint += "." if sure else "; if the first number does, --layout cameras."
        raise DataError(str(root), got, "names like 0001_45.bmp or person_0001.png, or a folder a person", hint)
    names = _some([p.name for p in folders])
    notes.append(f"{names} are cameras; {len(seen)} people, {shared} of them seen by more than one")
    return sightings


def _require_people(root: Path, folders: dict[Path, Found]) -> None:
    """Raises DataError where the folders do not look like one a person."""
    names = {p: [os.path.basename(path) for path in found.images] for p, found in folders.items()}
    most = max(folders, key=lambda p: len(names[p]))
    told = [_other_numbers(p.name, names[p]) for p in folders]
    flat = any(os.path.dirname(path) == str(p) for p, found in folders.items() for path in found.images)
    guess = propose_pattern([name for part in names.values() for name in part])
    hint = f"If each is a person: --layout folders. If nobody said who is who: {_NOBODY}. If each is a camera, and "
    hint += "names begin with the person's number: --layout cameras. "
    hint += f"Names look like --pattern '{guess}'." if guess else "Other names are read by --pattern."
    got = ""
    if len(folders) == 1:
        got, hint = f"one folder only ({most.name})", f"Did you mean {most}?"
    elif inside := next((p for p in folders if any(role(q.name) for q in subfolders(p))), None):
        got, hint = f"{inside.name}, a dataset with splits of its own", f"Did you mean {inside}?"
    elif len(names[most]) > MANY_IMAGES:
        got = f"{len(names[most])} images in {most.name}, more than a person's"
    elif len(folders) <= FEW_FOLDERS and _like_places(names):
        got = f"{len(folders)} folders ({_some([p.name for p in folders])}) of so many images that they may be places"
    elif sum(map(bool, told)) * 2 >= len(folders):
        got = f"names in {most.name} that tell other people ({_some(next(filter(None, told)))})"
    elif not flat and not all(is_camera(q.name) for p in folders for q in subfolders(p)):
        inner = subfolders(most)[0]
        got = f"no images in {most.name} but in folders below it ({inner.name})"
    if got:
        raise DataError(str(root), got, "one folder per person", hint)


def _like_places(names: dict[Path, list[str]]) -> bool:
    """Whether folders hold more images than a person's does as a rule, and these tell no camera."""
    told = sum(bool(camera(os.path.splitext(name)[0])) for part in names.values() for name in part)
    count = sum(map(len, names.values()))
    return count >= PLACE_IMAGES * len(names) and told < count / 2


def _other_numbers(folder: str, names: Sequence[str]) -> list[str]:
    """Leading numbers in a folder's file names that look like people other than the folder's own.

    Numbers that come once each are a count of images, unless a camera follows and they are written with zeros.
    """
    counts = Counter(hit[1] for name in names if (hit := re.match(r"(\d+)[_\-]", name)))
    grammar = [hit["pid"] for name in names if (hit := re.match(PERSON_CAMERA, name, re.IGNORECASE))]
    own = {folder, folder.lstrip("0")}
    others = [number for number in counts if number not in own and number.lstrip("0") not in own]
    repeated = sum(counts.values()) >= 1.5 * len(counts)
    labeled = len(grammar) == len(names) and all(len(pid) >= 3 for pid in grammar)
    return others if len(counts) > 1 and others and (repeated or labeled) else []
