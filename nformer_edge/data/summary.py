"""The table that papers print: identities, images and cameras of each split."""

from __future__ import annotations

from typing import Any

from nformer_edge.data.records import DISTRACTOR, Dataset, cameras, identities


def summarize(dataset: Dataset) -> list[dict[str, Any]]:
    """One row a split, as plain data: ``split``, ``identities`` (None where it means nothing), ``images``, ``cameras``.

    The gallery's row counts its distractors as images but not as an identity; the row below it counts them alone.
    """
    distractors = tuple(r for r in dataset.gallery if r.pid == DISTRACTOR)
    rows = (
        ("train", dataset.train),
        ("query", dataset.query),
        ("gallery", dataset.gallery),
        ("of these distractors", distractors),
        ("junk", dataset.junk),
    )
    return [
        {
            "split": name,
            "identities": len(identities(records)) if name in ("train", "query", "gallery") else None,
            "images": len(records),
            "cameras": len(cameras(records)),
        }
        for name, records in rows
    ]


def format_summary(dataset: Dataset) -> str:
    """`summarize` as text, one line a row, numbers aligned."""
    lines = [dataset.name, f"  {'split':<22}{'identities':>10}{'images':>10}{'cameras':>9}"]
    for row in summarize(dataset):
        people = "-" if row["identities"] is None else f"{row['identities']:,}"
        lines.append(f"  {row['split']:<22}{people:>10}{row['images']:>10,}{row['cameras']:>9}")
    return "\n".join(lines)
