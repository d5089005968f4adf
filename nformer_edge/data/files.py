"""What counts as an image file, at every door, and which image files cannot be read."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from nformer_edge.core.artifact import read_text
from nformer_edge.core.errors import ArtifactError, DataError
from nformer_edge.core.preprocess import SUFFIXES, check_image, load_image

#: Folders that other programs leave between images: macOS archives, Synology, Jupyter, Windows.
_LEFT_BEHIND = ("__macosx", "@eadir", "#recycle", "$recycle.bin", "lost+found", "__pycache__")

#: Bad images that one error names.
_NAMED = 20

#: Characters of a line in a list of images: far below the limit of `csv` for one field.
_MAX_LINE = 65_536


def is_image(name: str) -> bool:
    """Whether a file of this name is an image: by its suffix, and not hidden (macOS leaves ``._1.jpg``)."""
    return name.lower().endswith(SUFFIXES) and not name.startswith(".")


def is_left_behind(folder: str) -> bool:
    """Whether a folder of this name holds no images of the user's."""
    return folder.startswith(".") or folder.lower() in _LEFT_BEHIND


@dataclass(frozen=True)
class Found:
    """What a walk found.

    Args:
        images: paths, sorted by folder and name.
        passed_over: other files.
    """

    images: tuple[str, ...]
    passed_over: int


def _walk(folder: str | os.PathLike[str]) -> Iterator[tuple[list[str], int]]:
    """Of each folder under `folder`, linked ones too, each once: its images' paths, and how many files are none."""
    seen: set[str] = set()
    for place, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(place)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders.sort()
        left = any(map(is_left_behind, Path(place).relative_to(folder).parts))
        images = [] if left else sorted(filter(is_image, files))
        yield [os.path.join(place, name) for name in images], len(files) - len(images)


def walk_images(folder: str | os.PathLike[str]) -> Found:
    """The images under `folder` at any depth, through linked folders too, each folder once."""
    found = [*_walk(folder)]
    return Found(tuple(path for images, _ in found for path in images), sum(others for _, others in found))


def has_images(folder: str | os.PathLike[str]) -> bool:
    """Whether `walk_images` would find one."""
    return any(images for images, _ in _walk(folder))


def subfolders(folder: Path) -> list[Path]:
    """The folders in `folder` that may hold images, sorted."""
    return sorted(p for p in folder.iterdir() if p.is_dir() and not is_left_behind(p.name)) if folder.is_dir() else []


def holds_images(folder: str | os.PathLike[str]) -> bool:
    """Whether image files lie directly in `folder`."""
    return os.path.isdir(folder) and any(is_image(e.name) and e.is_file() for e in os.scandir(folder))


@dataclass(frozen=True)
class BadImage:
    """An image file that cannot be read.

    Args:
        path: where it lies.
        why: what was found.
    """

    path: str
    why: str


def bad_images(paths: Sequence[str], decode: bool = False) -> tuple[BadImage, ...]:
    """The files among `paths` that cannot be read, in their order.

    Args:
        paths: image files.
        decode: decode every image. Otherwise headers and ends are looked at, and only what looks cut is decoded.
    """

    def judge(path: str) -> BadImage | None:
        try:
            load_image(path) if decode else check_image(path)
        except DataError as e:
            return BadImage(path, str(e.got))
        return None

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1), thread_name_prefix="check") as pool:
        return tuple(bad for bad in pool.map(judge, paths) if bad is not None)


def require_images(paths: Sequence[str]) -> None:
    """Raises DataError that names every file among `paths` that cannot be read (`bad_images`), before a long run."""
    bad = bad_images(paths)
    if len(bad) == 1:
        check_image(bad[0].path)
    if bad:
        named = "; ".join(f"{b.path}: {b.why}" for b in bad[:_NAMED])
        more = f"; and {len(bad) - _NAMED} more" if len(bad) > _NAMED else ""
        hint = "Remove these files or put good copies in their place; `summary --check` decodes every image."
        raise DataError("images", f"{len(bad)} of {len(paths)} that cannot be read ({named}{more})", "images", hint)


class Inside:
    """Joins paths from a list that somebody else wrote to `root`, and keeps them in it.

    What each folder really is, is asked once: MSMT17 lists 126,441 images.

    Args:
        root: the folder.
        linked: links that leave it are followed: the user named `root`.
    """

    def __init__(self, root: Path, linked: bool = False) -> None:
        self.root, self.linked = root, linked
        self._root = str(root)
        self._real_root = os.path.realpath(root)
        self._stays: dict[str, bool] = {}

    def __call__(self, name: str, where: str) -> str:
        """`name` joined to the root.

        Raises:
            DataError: if it climbs with ``..``, begins with a drive's letter, or leads out of the root: absolute, or
                through a symbolic link.
        """
        plain = name.replace("\\", "/")
        path = os.path.join(self._root, plain)
        if re.match("[A-Za-z]:", plain):
            hint = "Write paths relative to the folder of images, and name that: --root DIR"
            raise DataError(where, f"{name!r}, a path of Windows", f"a path inside {self.root}", hint)
        if ".." in plain.split("/"):
            stays = False
        elif self.linked:
            stays = not plain.startswith("/") or path.startswith(os.path.join(os.path.abspath(self._root), ""))
        else:
            stays = self._folder_stays(os.path.dirname(path)) and (not os.path.islink(path) or self._real(path))
        if not stays:
            got = f"{name!r}, a way out of {self.root}"
            hint = "If the images lie elsewhere, name the folder that holds them all: --root DIR"
            raise DataError(where, got, "a path inside that folder", hint)
        return path

    def _folder_stays(self, folder: str) -> bool:
        if folder not in self._stays:
            self._stays[folder] = self._real(folder)
        return self._stays[folder]

    def _real(self, path: str) -> bool:
        real = os.path.realpath(path)
        return real == self._real_root or real.startswith(os.path.join(self._real_root, ""))


def require_files(paths: Sequence[str], where: str, hint: str = "Unpack the dataset again.") -> None:
    """Raises DataError if one of `paths`, listed in `where`, is missing."""
    missing = [p for p in paths if not os.path.isfile(p)]
    if missing:
        count = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise DataError(missing[0], f"no such file{count}", f"every image of {where}", hint)


def read_lines(file: Path) -> list[str]:
    """The lines of a UTF-8 text, with or without a byte order mark.

    Raises:
        DataError: if it is missing or no such text.
    """
    try:
        lines = read_text(file, "a list of images", "utf-8-sig").splitlines()
    except ArtifactError as e:
        raise DataError(e.subject, e.got, e.expected, e.hint) from e
    for number, line in enumerate(lines, start=1):
        if "\0" in line or len(line) > _MAX_LINE:
            got = "a zero byte" if "\0" in line else f"{len(line)} characters"
            raise DataError(f"{file}, line {number}", got, f"text of at most {_MAX_LINE}", "Correct the line.")
    return lines
