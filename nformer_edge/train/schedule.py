"""Learning rates over epochs, as plain numbers."""

from __future__ import annotations

import math
from bisect import bisect_right

from nformer_edge.train.config import Schedule

WARMUP_FACTOR = 0.1
GAMMA = 0.1
COSINE_FLOOR = 0.01


def rate(
    base: float, schedule: Schedule, progress: float, epochs: int, warmup: int, steps: tuple[int, ...] = ()
) -> float:
    """The learning rate at `progress` (in epochs, from 0; fractions allowed).

    Linear warm-up from a tenth over `warmup` epochs, then either a tenth of it after each epoch of `steps`, or half a
    cosine from the end of the warm-up down to a hundredth.
    """
    if warmup and progress < warmup:
        return base * (WARMUP_FACTOR + (1 - WARMUP_FACTOR) * progress / warmup)
    if schedule == "steps":
        return base * GAMMA ** bisect_right(steps, progress)
    share = (progress - warmup) / max(1e-9, epochs - warmup)
    return base * (COSINE_FLOOR + (1 - COSINE_FLOOR) * 0.5 * (1 + math.cos(math.pi * min(1.0, share))))
