"""What the names of files and folders say: split, camera and person."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from nformer_edge.core.errors import DataError, UsageError

Role = Literal["train", "val", "test", "query", "gallery"]

#: Words that make a name that of a split, the deciding ones first: ``query_test`` holds queries.
_ROLES: tuple[tuple[Role, tuple[str, ...]], ...] = (
    ("query", ("query", "queries", "probe", "probes")),
    ("gallery", ("gallery", "galleries")),
    ("val", ("val", "valid", "validation")),
    ("test", ("test", "testing", "eval", "evaluation")),
    ("train", ("train", "training")),
)
_ROLE_WORDS = {word: role for role, words in _ROLES for word in words}

#: Words that may stand beside these.
_BESIDE = set(
    "image images img imgs bounding box boxes boundingbox bbox mask data set split all crops multi gt".split()  # noqa: SIM905
)

_CAMERA = re.compile(
    r"(?<![A-Za-z0-9])c(\d+)(?=s\d|[^A-Za-z0-9]|$)"
    r"|(?<![A-Za-z])(?:cam(?:era)?|kamera|ch(?:annel)?)[_\- ]?(\d+|[A-Za-z])(?=s\d|[^A-Za-z0-9]|$)"
    r"|(?<=\d)C(\d+)(?=T\d)",  # MARS: 0001C1T0001F001.jpg
    re.IGNORECASE,
)

#: A person's number, then a camera: Market-1501, DukeMTMC-reID, CUHK03-NP, VeRi-776 and many own sets.
PERSON_CAMERA = r"^(?P<pid>-1|\d{1,9})[_-](?:c|cam|camera)[_-]?(?P<camid>\d+)(?=s\d|[^A-Za-z0-9]|$)"

#: Patterns to propose where names follow one of them, the most telling first.
_PROPOSED = (
    r"(?P<pid>\d+)[_-]cam(?:era)?_?(?P<camid>\d+)",
    r"(?P<pid>\d+)[_-]c(?P<camid>\d+)",
    r"c(?:am|amera)?_?(?P<camid>\d+).*(?:id|pid|person)[_-]?(?P<pid>\d+)",
    r"(?:id|pid|person)[_-]?(?P<pid>\d+).*c(?:am|amera)?_?(?P<camid>\d+)",
    r"(?:id|pid|person)[_-]?(?P<pid>\d+)",
    r"^(?P<pid>\d+)_(?P<camid>\d)_",
    r"^(?P<pid>\d+)[_-]",
)


def role(name: str) -> Role | None:
    """The split that a folder of this name is, in any case: ``image_train``, ``bounding_box_test``, ``Probe``."""
    words = [re.sub(r"(?<=[a-z])\d+$|^v\d+$", "", word) for word in re.split(r"[_\-. ]+", name.lower())]
    found = {_ROLE_WORDS[word] for word in words if word in _ROLE_WORDS}
    if not found or any(word and word not in _ROLE_WORDS and word not in _BESIDE for word in words):
        return None
    return next(role for role, _ in _ROLES if role in found)


def is_number(text: str) -> bool:
    """Whether a label is a whole number that an int64 holds."""
    return re.fullmatch(r"[0-9]{1,18}", text) is not None


def camera(name: str) -> str:
    """The camera that a file's or folder's name tells (``c3``, ``camera_03``, ``cam_a``, ``CH01``), "" for none."""
    hit = _CAMERA.search(name)
    return next(filter(None, hit.groups()), "") if hit else ""


def is_camera(folder: str) -> bool:
    """Whether a folder's whole name is a camera's."""
    return _CAMERA.fullmatch(folder) is not None


def propose_pattern(names: Iterable[str]) -> str:
    """A ``--pattern`` that fits all of `names` and finds people who come more than once; "" if none does."""
    names = list(names)
    for text in _PROPOSED:
        hits = [re.search(text, name) for name in names]
        counts = Counter(hit["pid"] for hit in hits if hit)
        if names and all(hits) and len(counts) > 1 and len(names) >= 2 * len(counts):
            return text
    return ""


@dataclass(frozen=True)
class NamePattern:
    """How files are named, as the user says it: a regular expression with the groups ``pid`` and, if any, ``camid``.

    It is searched in a file's name, or, where it contains a slash, in its path below the dataset's folder.

    Raises:
        UsageError: if it does not compile or has no group ``pid``.
    """

    text: str

    def __post_init__(self) -> None:
        example = r"such as '(?P<pid>\d+)_cam(?P<camid>\d+)'"
        try:
            groups = re.compile(self.text).groupindex
        except re.error as e:
            raise UsageError("pattern", f"{self.text!r} ({e})", f"a regular expression {example}", "Correct it.") from e
        if "pid" not in groups:
            raise UsageError(
                "pattern", f"{self.text!r} without a group pid", f"one {example}", "Name the person's part."
            )

    @cached_property
    def _compiled(self) -> re.Pattern[str]:
        return re.compile(self.text)

    def read(self, relative: str) -> tuple[str, str] | None:
        """Person and camera ("" if not told) of a path below the dataset's folder; None if it does not fit."""
        hit = self._compiled.search(relative if "/" in self.text else relative.rpartition("/")[2])
        if hit is None or not hit["pid"]:
            return None
        return hit["pid"], (hit["camid"] or "") if "camid" in self._compiled.groupindex else ""

    def preview(self, relatives: Sequence[str]) -> str:
        """What the pattern reads from the first, middle and last of the files."""
        shown = dict.fromkeys(relatives[i] for i in (0, len(relatives) // 2, -1)) if relatives else {}
        return "; ".join(f"{name} -> {self._told(name)}" for name in shown)

    def _told(self, relative: str) -> str:
        found = self.read(relative)
        return "does not fit" if found is None else f"person {found[0]}, camera {found[1] or 'unknown'}"

    def read_all(self, relatives: Sequence[str], where: str) -> list[tuple[str, str]]:
        """`read` of every file.

        Raises:
            DataError: if one does not fit, with a preview of three.
        """
        found = [self.read(name) for name in relatives]
        bad = [name for name, told in zip(relatives, found, strict=True) if told is None]
        if bad:
            got = f"{len(bad)} of {len(found)} names that do not fit ({self.preview(relatives)}; {bad[0]} does not fit)"
            proposed = propose_pattern(relatives)
            hint = f"Try --pattern '{proposed}'." if proposed else "Correct the pattern, or remove these files."
            raise DataError(f"{where}: pattern {self.text!r}", got, "every image's name to fit", hint)
        return [told for told in found if told is not None]
