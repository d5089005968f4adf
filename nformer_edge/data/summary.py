"""The table that papers print: identities, images and cameras of each split, and what to know about the labels."""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass
from typing import ClassVar

from nformer_edge.core.errors import GateError
from nformer_edge.core.values import Result
from nformer_edge.data.files import BadImage, bad_images
from nformer_edge.data.labels import LabelReport, judge_labels
from nformer_edge.data.readers import read_dataset
from nformer_edge.data.records import DISTRACTOR, SPLITS, Dataset, cameras, identities


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Args:
        split: of which images.
        identities: people among them; None where it means nothing.
        images: files.
        cameras: known ones.
    """

    split: str
    identities: int | None
    images: int
    cameras: int


@dataclass(frozen=True)
class Summary(Result):
    """What a dataset holds.

    Args:
        name: of the dataset.
        rows: train, query, gallery, its distractors (images but no identity in the gallery's row), and junk.
        passed_over: files in the folder that are no images.
        labels: what is wrong or likely so with the labels.
        notes: what the reader had to say, and the labels' warnings.
        checked: whether every image was decoded.
        bad: images that cannot be read, if checked.
    """

    kind: ClassVar[str] = "dataset"

    name: str
    rows: tuple[Row, ...]
    passed_over: int
    labels: LabelReport
    notes: tuple[str, ...]
    checked: bool = False
    bad: tuple[BadImage, ...] = ()

    def __str__(self) -> str:
        lines = [self.name, f"  {'split':<22}{'identities':>10}{'images':>10}{'cameras':>9}"]
        for row in self.rows:
            people = "-" if row.identities is None else f"{row.identities:,}"
            lines.append(f"  {row.split:<22}{people:>10}{row.images:>10,}{row.cameras:>9}")
        if self.passed_over:
            lines.append(f"  files passed over, no images: {self.passed_over:,}")
        lines += [f"  note: {note}" for note in self.notes]
        if self.checked:
            lines.append(f"  images that cannot be read: {len(self.bad)} of {self.labels.images:,}")
            lines += [f"    {bad.path}: {bad.why}" for bad in self.bad]
        return "\n".join(lines)


def summarize(dataset: Dataset, check: bool = False) -> Summary:
    """The table of a dataset. `check` decodes every image and names those that cannot be read."""
    distractors = tuple(r for r in dataset.gallery if r.pid == DISTRACTOR)
    of = {s: dataset.split(s) for s in SPLITS[:-1]} | {"of these distractors": distractors, "junk": dataset.junk}
    rows = tuple(
        Row(name, len(identities(records)) if name in SPLITS[:-1] else None, len(records), len(cameras(records)))
        for name, records in of.items()
    )
    labels = judge_labels(dataset)
    paths = [r.path for s in SPLITS for r in dataset.split(s)] if check else []
    notes = (*dataset.notes, *labels.warnings)
    return Summary(dataset.name, rows, dataset.passed_over, labels, notes, check, bad_images(paths, decode=True))


def require_readable(summary: Summary) -> None:
    """Raises GateError if a check found images that cannot be read."""
    if summary.bad:
        got, hint = f"{len(summary.bad)} images that cannot be read", "Remove them or put good copies in their place."
        raise GateError(summary.name, got, "none", hint)


def remarks(dataset: Dataset, whole: bool = False) -> tuple[str, ...]:
    """What the user of a dataset should know: how it was read and, where it is scored (not `whole`), its labels."""
    return dataset.notes if whole or dataset.unlabeled else (*dataset.notes, *judge_labels(dataset).warnings)


def dataset_of(
    data: Dataset | str | os.PathLike[str], layout: str = "auto", *, whole: bool = False, labels: bool = True
) -> Dataset:
    """A dataset as it is, or the one at a path, with a Python warning for each of its `remarks`.

    Args:
        layout: this and the others as for `read_dataset`, whose errors are raised.
    """
    if isinstance(data, Dataset):
        return data
    dataset = read_dataset(data, layout, whole=whole, labels=labels)
    for remark in remarks(dataset, whole):
        warnings.warn(f"{dataset.root}: {remark}", stacklevel=1)  # one place, so that the same is said once
    return dataset


def describe_images(dataset: Dataset) -> str:
    """How many images and people each split gave, and how many files were passed over: said before images are used."""
    splits = [(name, dataset.split(name)) for name in SPLITS[:-1] if dataset.split(name)]
    told = []
    for name, records in splits:
        known = len(identities(records))
        people = f"{known:,} people" if known else "people not known"
        told.append(f"{name + ' ' if dataset.explicit else ''}{len(records):,} images, {people}")
    passed = f"; files passed over, no images: {dataset.passed_over:,}" if dataset.passed_over else ""
    return f"{dataset.root}: {'; '.join(told)}{passed}"
