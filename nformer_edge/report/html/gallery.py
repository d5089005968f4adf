"""The report's rank lists: thumbnails of a query and of what it found, right ones and wrong ones marked."""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from nformer_edge.core.errors import DataError
from nformer_edge.core.preprocess import load_image
from nformer_edge.report.html.sections import section, text

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
        else f'<div class="missing" role="img" aria-label="{text(words)}">image not here</div>'
    )
    name = text(os.path.basename(path))
    return f'<figure class="{kind}" title="{name}">{picture}<figcaption>{caption}</figcaption></figure>'


def _strip(ranked: dict[str, Any]) -> str:
    figures = []
    for place, found in enumerate(ranked["gallery"], 1):
        kind, sign = ("right", "✓") if found["correct"] else ("wrong", "✗")
        words = f"rank {place}, {kind}"
        figures.append(_figure(found["path"], words, f"{sign} {place}", kind))
    query = ranked["query"]
    who = f'<div class="who">{text(ranked["result"])}</div>'
    return (
        f'<div class="list" style="--n:{len(figures) + 1}">{who}'
        f"{_figure(query['path'], 'query', 'query')}{''.join(figures)}</div>"
    )


def rank_lists(results: Sequence[dict[str, Any]], most: int = 6) -> str:
    """For each query of the first evaluation that recorded any, one strip a stage, best match first."""
    for result in results:
        if result["kind"] == "evaluation" and result["rank_lists"]:
            break
    else:
        return ""
    by_query: dict[str, list[dict[str, Any]]] = {}
    for ranked in result["rank_lists"]:
        by_query.setdefault(ranked["query"]["path"], []).append(ranked)
    strips = "".join(
        f'<div class="lists" tabindex="0">{"".join(_strip(r) for r in lists)}</div>'
        for lists in list(by_query.values())[:most]
    )
    label = result["model"]["label"] if result["model"] else result["data"]["name"]
    note = f"{label}: each query and its best gallery images. ✓ in green is the same person, ✗ in red is not."
    return section("Rank lists", f'<div class="queries">{strips}</div>', note)
