"""Few that stand for many: images spread over people and cameras, and numbers spread evenly."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from nformer_edge.data.records import ImageRecord


def over_people(records: Sequence[ImageRecord], count: int, seed: int) -> tuple[ImageRecord, ...]:
    """At most `count` of them: every person once before any twice, and of each the camera that was seen least.

    The person's own images count first, then all of them. The same seed gives the same images.
    """
    rng = np.random.default_rng(seed)
    left: dict[int, list[ImageRecord]] = defaultdict(list)
    for i in rng.permutation(len(records)):
        left[records[i].pid].append(records[i])
    people = [sorted(left)[i] for i in rng.permutation(len(left))]
    own: dict[tuple[int, int], int] = defaultdict(int)
    seen: dict[int, int] = defaultdict(int)
    chosen: list[ImageRecord] = []
    while people and len(chosen) < count:
        for pid in people[: count - len(chosen)]:
            record = min(left[pid], key=lambda r: (own[r.pid, r.camid], seen[r.camid]))
            left[pid].remove(record)
            own[pid, record.camid] += 1
            seen[record.camid] += 1
            chosen.append(record)
        people = [pid for pid in people if left[pid]]
    return tuple(chosen)


def evenly(count: int, of: int) -> list[int]:
    """At most `count` of the numbers 0..`of` - 1, evenly spaced, the first among them."""
    return [i * of // count for i in range(count)] if count < of else list(range(of))
