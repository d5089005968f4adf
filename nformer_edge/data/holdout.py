"""Training identities kept out of training, to watch and to choose by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from nformer_edge.data.records import ImageRecord


@dataclass(frozen=True)
class Holdout:
    """Training identities kept out of training: of each person and camera the first image asks for the others."""

    query: tuple[ImageRecord, ...]
    gallery: tuple[ImageRecord, ...]


def split_holdout(
    records: tuple[ImageRecord, ...], share: float, seed: int
) -> tuple[tuple[ImageRecord, ...], Holdout | None]:
    """Training records without a share of the identities, and those identities as query and gallery.

    Only people seen by two cameras can ask for anything. None if `share` rounds to nobody, or nobody remains.
    """
    rows = held_out_rows([r.pid for r in records], [r.camid for r in records], share, seed)
    if rows is None:
        return records, None
    rest, query, gallery = (tuple(records[i] for i in part) for part in rows)
    return rest, Holdout(query, gallery)


def held_out_rows(
    pids: Sequence[int] | np.ndarray, camids: Sequence[int] | np.ndarray, share: float, seed: int
) -> tuple[list[int], list[int], list[int]] | None:
    """The rows of `split_holdout`: those that remain, the queries, and the gallery."""
    seen: dict[int, set[int]] = {}
    for pid, camid in zip(pids, camids, strict=True):
        seen.setdefault(int(pid), set()).add(int(camid))
    able = sorted(pid for pid, cameras in seen.items() if len(cameras) > 1)
    count = min(round(share * len(seen)), len(able), len(seen) - 2)
    if count < 1:
        return None
    chosen = set(np.random.default_rng([seed, 1]).permutation(able)[:count].tolist())
    rest: list[int] = []
    query: list[int] = []
    gallery: list[int] = []
    asked: set[tuple[int, int]] = set()
    for row, (pid, camid) in enumerate(zip(pids, camids, strict=True)):
        if int(pid) not in chosen:
            rest.append(row)
            continue
        first = (int(pid), int(camid)) not in asked
        (query if first else gallery).append(row)
        asked.add((int(pid), int(camid)))
    return rest, query, gallery or query
