"""What a reader hands on: labeled image paths, split as the benchmark splits them."""

from __future__ import annotations

from dataclasses import dataclass

JUNK = -1
DISTRACTOR = 0
UNKNOWN_CAMERA = -1

SPLITS = ("train", "query", "gallery", "junk")


@dataclass(frozen=True)
class ImageRecord:
    """One image file.

    Args:
        path: where it lies, ready to open.
        pid: the person, >= 1; 0 is a distractor (nobody that a query asks for), -1 junk (counts neither way).
        camid: the benchmark's own camera number; -1 where nobody recorded it.
    """

    path: str
    pid: int
    camid: int


@dataclass(frozen=True)
class Dataset:
    """A benchmark on disk. `gallery` holds distractors but no junk; identities of `train` and the rest are disjoint
    people even where a benchmark gives them the same numbers."""

    name: str
    root: str
    train: tuple[ImageRecord, ...] = ()
    query: tuple[ImageRecord, ...] = ()
    gallery: tuple[ImageRecord, ...] = ()
    junk: tuple[ImageRecord, ...] = ()

    def split(self, name: str) -> tuple[ImageRecord, ...]:
        """The records of one of SPLITS."""
        records: tuple[ImageRecord, ...] = getattr(self, name)
        return records


def identities(records: tuple[ImageRecord, ...]) -> tuple[int, ...]:
    """The people in `records`, sorted, without junk and distractors."""
    return tuple(sorted({r.pid for r in records if r.pid > DISTRACTOR}))


def cameras(records: tuple[ImageRecord, ...]) -> tuple[int, ...]:
    """The cameras in `records`, sorted, without the unknown one."""
    return tuple(sorted({r.camid for r in records if r.camid != UNKNOWN_CAMERA}))
