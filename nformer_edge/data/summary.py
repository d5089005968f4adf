"""The table that papers print: identities, images and cameras of each split."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from nformer_edge.core.values import Result
from nformer_edge.data.records import DISTRACTOR, Dataset, cameras, identities


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
    """

    kind: ClassVar[str] = "dataset"

    name: str
    rows: tuple[Row, ...]

    def __str__(self) -> str:
        lines = [f"  {'split':<22}{'identities':>10}{'images':>10}{'cameras':>9}"]
        for row in self.rows:
            people = "-" if row.identities is None else f"{row.identities:,}"
            lines.append(f"  {row.split:<22}{people:>10}{row.images:>10,}{row.cameras:>9}")
        return "\n".join([self.name, *lines])


def summarize(dataset: Dataset) -> Summary:
    """The table of a dataset."""
    splits = {"train": dataset.train, "query": dataset.query, "gallery": dataset.gallery}
    more = {"of these distractors": tuple(r for r in dataset.gallery if r.pid == DISTRACTOR), "junk": dataset.junk}
    rows = tuple(
        Row(name, len(identities(records)) if name in splits else None, len(records), len(cameras(records)))
        for name, records in (splits | more).items()
    )
    return Summary(dataset.name, rows)
