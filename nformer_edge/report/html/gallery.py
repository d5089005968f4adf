"""The report's rank lists: thumbnails of a query and of what it found, right ones and wrong ones marked."""

from __future__ import annotations

import base64
import io
import os
from functools import lru_cache

from nformer_edge.core.errors import DataError
from nformer_edge.core.preprocess import load_image
from nformer_edge.report.accuracy import Evaluation, RankList
from nformer_edge.report.html.sections import Results, picked, section, text

#: Twice the size that the page shows them at, for dense screens.
_WIDTH, _HEIGHT = 116, 232


@lru_cache(maxsize=1024)
def thumbnail(path: str) -> str | None:
    """The image as a JPEG data URI of at most 116 x 232 pixels, or None where it cannot be read here."""
    try:
        image = load_image(path)
    except DataError:
        return None
    image.thumbnail((_WIDTH, _HEIGHT))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=82)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _figure(path: str, words: str, caption: str, kind: str = "") -> str:
    uri = thumbnail(path)
    picture = (
        f'<img src="{uri}" alt="{text(words)}" width="58" height="116">'
        if uri
        else f'<div class="missing" role="img" aria-label="{text(words)}">image not available</div>'
    )
    name = text(os.path.basename(path))
    return f'<figure class="{kind}" title="{name}">{picture}<figcaption>{caption}</figcaption></figure>'


def _strip(ranked: RankList) -> str:
    figures = []
    for place, found in enumerate(ranked.gallery, 1):
        kind, sign = ("right", "✓") if found.correct else ("wrong", "✗")
        figures.append(_figure(found.path, f"rank {place}, {kind}", f"{sign} {place}", kind))
    who = f'<div class="who">{text(ranked.ranking)}</div>'
    query = _figure(ranked.query, "query", "query")
    return f'<div class="list" style="--n:{len(figures) + 1}">{who}{query}{"".join(figures)}</div>'


def rank_lists(results: Results, most: int = 6) -> str:
    """For each query of the first evaluation that recorded any, one strip a ranking, best match first."""
    result = next((r for r in picked(results, Evaluation) if r.rank_lists), None)
    if result is None:
        return ""
    by_query: dict[str, list[RankList]] = {}
    for ranked in result.rank_lists:
        by_query.setdefault(ranked.query, []).append(ranked)
    strips = "".join(
        f'<div class="lists" tabindex="0">{"".join(map(_strip, lists))}</div>'
        for lists in list(by_query.values())[:most]
    )
    note = f"{result.label}: each query and its best gallery images. ✓ in green: the same person. ✗ in red: another."
    return section("Rank lists", f'<div class="queries">{strips}</div>', note)
