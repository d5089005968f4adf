"""`summary` of the published benchmarks equals their tables, on generated trees with their names and counts."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.published import PUBLISHED, write_published

from nformer_edge.data.readers import read_dataset
from nformer_edge.data.summary import summarize


@pytest.mark.parametrize("scale", [20, pytest.param(1, marks=pytest.mark.optional)])
@pytest.mark.parametrize("name", PUBLISHED)
def test_the_summary_equals_the_published_table(tmp_path: Path, name: str, scale: int) -> None:
    published = PUBLISHED[name].scaled(scale) if scale > 1 else PUBLISHED[name]
    summary = summarize(read_dataset(write_published(tmp_path, published)))
    assert summary.name == name.removesuffix(" V1").removesuffix(" V2")
    rows = {r.split: (r.identities, r.images, r.cameras) for r in summary.rows}
    for split in ("train", "query", "gallery"):
        assert rows[split] == (*getattr(published, split), published.cameras), split
    assert summary.labels.people_in_both == 0
    assert summary.labels.copies == 0


def test_one_image_less_is_noticed(tmp_path: Path) -> None:
    published = PUBLISHED["DukeMTMC-reID"].scaled(20)
    tree = write_published(tmp_path, published)
    next((tree / "query").iterdir()).unlink()
    rows = {r.split: r.images for r in summarize(read_dataset(tree)).rows}
    assert rows["query"] == published.query[1] - 1
