"""Images with the labels that names and lists give, as text, to a numbered and split dataset."""

from __future__ import annotations

import hashlib
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from nformer_edge.data.names import Role, is_number
from nformer_edge.data.names import camera as camera_of
from nformer_edge.data.records import DISTRACTOR, JUNK, UNKNOWN_CAMERA, Dataset, ImageRecord


@dataclass(frozen=True)
class Sighting:
    """One image with its labels as they were written.

    Args:
        path: where it lies.
        person: a name or number; "" where nobody said.
        camera: likewise.
        role: the split that it stands in; None where the dataset has no splits.
    """

    path: str
    person: str = ""
    camera: str = ""
    role: Role | None = None


def make_dataset(
    name: str,
    root: str,
    sightings: Sequence[Sighting],
    *,
    whole: bool = False,
    notes: Sequence[str] = (),
    passed_over: int = 0,
) -> Dataset:
    """Numbers people and cameras, and gives every image its split.

    Where the dataset has splits: training is its train; query and gallery are its own, where it has queries but no
    gallery that is its test; without queries, the people of test (or else val) are split by `split_people`. Where it
    has none, half of the people train and the others are split, or, if `whole`, all images are the gallery.

    Args:
        name, root: of the dataset.
        sightings: its images.
        whole: make no split of our own.
        notes: what the reader has to say.
        passed_over: files that are no images.
    """
    said = list(notes)
    records = _number(sightings, said)
    roles: dict[Role | None, list[int]] = defaultdict(list)
    for row, sighting in enumerate(sightings):
        roles[sighting.role].append(row)
    of = {key: tuple(records[row] for row in rows) for key, rows in roles.items()}
    explicit = None not in roles
    train: tuple[ImageRecord, ...] = ()
    query: tuple[ImageRecord, ...] = ()
    gallery: tuple[ImageRecord, ...] = ()
    if not explicit:
        if whole:
            gallery = tuple(records)
        else:
            train, query, gallery = _split_all(sightings, records)
            said.append(f"no splits found: half of the people train, of the others {len(query)} images are queries")
    else:
        train, query, gallery = of.get("train", ()), of.get("query", ()), of.get("gallery", ())
        if not query and not gallery:
            source: Role = "test" if "test" in of else "val"
            found = of.pop(source, ())
            query, gallery = ((), found) if whole else split_people(found)
            if query:
                said.append(f"the people of {source} are split: {len(query)} images are queries, the rest gallery")
        elif not gallery and "test" in of:
            gallery = of.pop("test")
        unused = [f"{key} ({len(of[key])} images)" for key in ("val", "test") if key in of]  # type: ignore[index]
        if unused:
            said.append(f"not used: {', '.join(unused)}")
    return Dataset(
        name,
        root,
        train,
        query,
        tuple(r for r in gallery if r.pid != JUNK or (whole and not explicit)),
        () if whole and not explicit else tuple(r for r in gallery if r.pid == JUNK),
        explicit=explicit,
        notes=tuple(said),
        passed_over=passed_over,
    )


def _number(sightings: Sequence[Sighting], said: list[str]) -> list[ImageRecord]:
    people = _number_people(sightings, said)
    cameras = _number_cameras({s.camera for s in sightings if s.camera}, said)
    return [ImageRecord(s.path, people[s.person], cameras.get(s.camera, UNKNOWN_CAMERA)) for s in sightings]


def _number_people(sightings: Iterable[Sighting], said: list[str]) -> dict[str, int]:
    """A number of 1 or more keeps its value if all are such; otherwise people are numbered by name from 1."""
    names = {s.person for s in sightings}
    numbers: dict[str, int] = {"": JUNK} if "" in names else {}
    zeros = {name for name in names if re.fullmatch(r"0+", name)}
    shift = 0
    if any(s.person in zeros and s.role in (None, "train", "query") for s in sightings):
        shift = 1
        said.append("people are numbered from 0, and 0 marks a distractor here: every number is taken one up")
    marks = {name: JUNK for name in names if name == "-1"} | ({} if shift else dict.fromkeys(zeros, DISTRACTOR))
    rest = sorted(names - marks.keys() - {""})
    if all(map(is_number, rest)) and len({int(name) for name in rest}) == len(rest):
        return numbers | marks | {name: int(name) + shift for name in rest}
    return numbers | marks | {name: i for i, name in enumerate(rest, start=1)}


def _number_cameras(names: set[str], said: list[str]) -> dict[str, int]:
    """Camera numbers keep their value, a letter is its place in the alphabet; other names are numbered from 1."""
    told = {name: name if is_number(name) else camera_of(name) or name for name in names}
    if all(is_number(text) or re.fullmatch(r"[A-Za-z]", text) for text in told.values()):
        return {n: int(text) if is_number(text) else ord(text.lower()) - ord("a") + 1 for n, text in told.items()}
    said.append(f"cameras are named, not numbered: {len(names)} are numbered from 1 by their names")
    return {name: i for i, name in enumerate(sorted(names), start=1)}


def _split_all(
    sightings: Sequence[Sighting], records: Sequence[ImageRecord]
) -> tuple[tuple[ImageRecord, ...], tuple[ImageRecord, ...], tuple[ImageRecord, ...]]:
    """People in the order of the sha256 of their names: the first half (rounded up) trains, the others are split.

    The rule needs no seed and is the same everywhere.
    """
    rows: dict[str, list[ImageRecord]] = defaultdict(list)
    for sighting, record in zip(sightings, records, strict=True):
        rows[sighting.person].append(record)
    junk = rows.pop("-1", [])
    names = sorted(rows, key=lambda name: hashlib.sha256(name.encode()).digest())
    half = (len(names) + 1) // 2
    query, gallery = split_people([r for name in names[half:] for r in rows[name]])
    return tuple(r for name in names[:half] for r in rows[name]), query, gallery + tuple(junk)


def split_people(records: Iterable[ImageRecord]) -> tuple[tuple[ImageRecord, ...], tuple[ImageRecord, ...]]:
    """Queries and gallery: the first image, by order, of each camera that saw a person more than once is a query.

    A person whom no camera saw twice has one query, the first image; whoever has one image only is in the gallery.
    The gallery is never empty.
    """
    people: dict[int, dict[int, list[ImageRecord]]] = defaultdict(lambda: defaultdict(list))
    for record in records:
        people[record.pid][record.camid].append(record)
    query: list[ImageRecord] = []
    gallery: list[ImageRecord] = []
    for pid, cameras in people.items():
        images = [record for seen in cameras.values() for record in seen]
        first = [seen[0] for seen in cameras.values() if len(seen) > 1] or images[:1]
        asks = first if pid > DISTRACTOR and len(images) > 1 else []
        query += asks
        gallery += [record for record in images if record not in asks]
    return tuple(query), tuple(gallery)
