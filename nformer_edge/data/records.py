"""What a reader hands on: labeled image paths, split as the benchmark splits them."""

from __future__ import annotations

from dataclasses import dataclass, replace

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
    """Labeled images of a benchmark or of one's own, in splits.

    Args:
        name: what tables call it.
        root: the folder.
        train: images to train on.
        query: images that ask.
        gallery: images that are searched; distractors among them, no junk.
        junk: gallery images that count neither way.
        explicit: whether the splits are the dataset's own. Without any, readers split people themselves.
        apart: people of train and of the rest are others even where they have the same number (MSMT17).
        notes: what its user should know about how it was read.
        passed_over: files in it that are no images.
    """

    name: str
    root: str
    train: tuple[ImageRecord, ...] = ()
    query: tuple[ImageRecord, ...] = ()
    gallery: tuple[ImageRecord, ...] = ()
    junk: tuple[ImageRecord, ...] = ()
    explicit: bool = True
    apart: bool = False
    notes: tuple[str, ...] = ()
    passed_over: int = 0

    def as_training(self) -> Dataset:
        """With every image in training where there are no splits at all: for calibration and for holding people out."""
        return self if self.explicit or self.train else replace(self, train=self.gallery, gallery=())

    def same_camera(self) -> Dataset:
        """The same without cameras, so that matches of the query's own camera count."""
        train, query, gallery, junk = (
            tuple(replace(r, camid=UNKNOWN_CAMERA) for r in self.split(name)) for name in SPLITS
        )
        return replace(self, train=train, query=query, gallery=gallery, junk=junk)

    @property
    def unlabeled(self) -> bool:
        """Whether nobody said who any image of query or gallery shows."""
        return not any(r.pid > DISTRACTOR for r in (*self.query, *self.gallery))

    def asking(self) -> Dataset:
        """With every fifth gallery image as a query where there is none: to compare models, no labels are needed."""
        if self.query or len(self.gallery) < 2:
            return self
        rest = tuple(r for i, r in enumerate(self.gallery) if i % 5)
        return replace(self, query=self.gallery[::5], gallery=rest)

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
