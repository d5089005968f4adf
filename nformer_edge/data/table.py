"""Labels from CSV files, as spreadsheets, pandas and other projects write them."""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from nformer_edge.core.errors import DataError
from nformer_edge.data.files import Inside, read_lines, require_files
from nformer_edge.data.names import Role, camera, role
from nformer_edge.data.people import Sighting, make_dataset
from nformer_edge.data.records import Dataset

_SEPARATORS = (",", ";", "\t", "|")

#: A column's name here -> others that it goes by, in lower case.
_COLUMNS = {
    "path": ("path", "file", "filename", "file_name", "image", "image_path", "img_path", "img"),
    "pid": ("pid", "person", "person_id", "id", "identity", "label", "vehicle_id"),
    "camid": ("camid", "cam", "camera", "camera_id", "cam_id"),
    "split": ("split", "subset", "set", "partition"),
}
_NEEDED = ("path", "pid")
_UNKNOWN = ("", "nan", "none", "null", "na", "n/a")

_WHOLE = re.compile(r"(-?\d{1,18})(?:\.0+)?")


def csv_files(root: Path) -> list[Path]:
    """The CSV file at `root`, or those directly in it."""
    if root.is_file():
        return [root] if root.suffix.lower() in (".csv", ".tsv") else []
    inside = sorted(root.iterdir()) if root.is_dir() else []
    return [p for p in inside if p.suffix.lower() in (".csv", ".tsv") and p.is_file() and not p.name.startswith(".")]


def looks_like_csv(root: Path) -> bool:
    return bool(csv_files(root))


def read_csv(root: Path, images: Path | None = None, whole: bool = False) -> Dataset:
    """A CSV file, or the folder of one, or of one a split (``train.csv``, ``query.csv``, ``gallery.csv``).

    The first line names the columns: a path and a person, and as far as they are known camera and split; capitals,
    order and further columns do not matter. The separator is ``,`` ``;`` a tab or ``|``. Paths are relative to the
    file's folder and stay in it, or, with `images`, relative to that folder or absolute below it. A person is a
    number of 1 or more (0 marks a distractor in the gallery, -1 junk) or a name. Without splits, people are split as
    `data.people` says.

    Raises:
        DataError: for a missing column, a row that cannot be used, or several files that are no splits.
    """
    files = csv_files(root)
    roles = {file: role(file.stem) for file in files}
    if len(files) != 1 and (not files or None in roles.values()):
        got = f"{len(files)} CSV files ({', '.join(f.name for f in files)})" if files else "no CSV file"
        hint = f"Name the file: --data {files[0] if files else 'FILE.csv'}; or name another --layout."
        raise DataError(str(root), got, "one, or one a split", hint)
    sightings = [s for f in files for s in _read_file(f, images or f.parent, images is not None, roles[f])]
    if not sightings:
        raise DataError(str(files[0]), "zero images", "one image a line", "Write one line an image.")
    base = images or files[0].parent
    hint = f"Paths are read relative to {base}: if they are to another folder, name that: --root DIR"
    require_files([s.path for s in sightings], files[0].name, hint)
    name = files[0].stem if len(files) == 1 else root.absolute().name
    notes = []
    if not all(s.person.lstrip("-").isdigit() for s in sightings):
        count = len({s.person for s in sightings})
        notes.append(f"people are named, not numbered: {count} are numbered from 1 by their names")
    return make_dataset(name, str(base), sightings, whole=whole, notes=notes)


def _read_file(file: Path, root: Path, linked: bool, of_file: Role | None) -> list[Sighting]:
    lines = read_lines(file)
    first = next((i for i, t in enumerate(lines) if t.strip() and not re.fullmatch(r"sep=.", t.strip())), len(lines))
    columns, separator = _header(file, lines[first] if lines[first:] else "")
    rows = csv.reader(lines[first:], delimiter=separator, skipinitialspace=True)
    next(rows)
    inside = Inside(root, linked)
    kinds: dict[str, bool] = {}
    sightings: list[Sighting] = []
    for row in rows:
        if any(field.strip() for field in row):
            where = f"{file}, line {first + rows.line_num}"
            sightings.append(_sighting(row, columns, where, inside, kinds, of_file))
    return sightings


def _header(file: Path, line: str) -> tuple[dict[str, int], str]:
    """Which column is which, and the separator: the one that finds most columns."""

    def read(separator: str) -> dict[str, int]:
        names = [n.strip().lower() for n in next(csv.reader([line], delimiter=separator, skipinitialspace=True), [])]
        places = {c: next((names.index(o) for o in others if o in names), -1) for c, others in _COLUMNS.items()}
        return {column: place for column, place in places.items() if place >= 0}

    separator = max(_SEPARATORS, key=lambda s: len(read(s)))
    columns = read(separator)
    absent = [c for c in _NEEDED if c not in columns]
    if absent:
        got = f"no column {', '.join(absent)} (the first line is {line[:120]!r})"
        hint = "Write the columns' names as the first line; if this file holds no labels, name another --layout."
        raise DataError(str(file), got, "the header path,pid,camid,split", hint)
    return columns, separator


def _sighting(
    row: Sequence[str],
    columns: dict[str, int],
    where: str,
    inside: Callable[[str, str], str],
    kinds: dict[str, bool],
    of_file: Role | None,
) -> Sighting:
    values = {c: row[place].strip() if place < len(row) else "" for c, place in columns.items()}
    split = role(values["split"]) if "split" in values else of_file
    if split is None and "split" in values:
        expected = "train, query, gallery, test or val"
        raise DataError(where, f"split {values['split']!r}", expected, "Correct the row.")
    pid = _label("pid", values["pid"], where, kinds)
    cam = values.get("camid", "")
    cam = "" if cam.lower() in _UNKNOWN or cam.startswith("-") else _label("camid", camera(cam) or cam, where, kinds)
    unusable = pid == "" or (pid == "-1" and split not in ("gallery", "test")) or (pid == "0" and split == "val")
    if not values["path"] or unusable or (re.fullmatch(r"-\d+", pid) and pid != "-1"):
        got = f"path {values['path']!r} with pid {values['pid'] or repr('')} in {values.get('split') or 'no split'}"
        expected = "a path, and a person of 1 or more (in the gallery also 0 or -1)"
        raise DataError(where, got, expected, "Correct the row.")
    return Sighting(inside(values["path"], where), pid, cam, split)


def _label(column: str, text: str, where: str, kinds: dict[str, bool]) -> str:
    """A label as text; whole numbers without ``.0`` and zeros in front. All of a column are numbers, or none is."""
    whole = _WHOLE.fullmatch(text)
    if text and kinds.setdefault(column, whole is not None) != (whole is not None):
        got = f"{column} {text!r} among {'numbers' if whole is None else 'names'}"
        raise DataError(where, got, "whole numbers in all rows, or names in all", "Correct the row.")
    return str(int(whole[1])) if whole else text
