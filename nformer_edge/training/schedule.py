"""Learning rates over epochs, as plain numbers."""

from __future__ import annotations

import math
from bisect import bisect_right

from nformer_edge.training.config import Schedule

GAMMA = 0.1
COSINE_FLOOR = 0.01


def rate(
    base: float,
    schedule: Schedule,
    progress: float,
    epochs: int,
    warmup: int,
    steps: tuple[int, ...] = (),
    warmup_factor: float = 0.1,
) -> float:
    """The learning rate at `progress` (in epochs, from 0; fractions allowed).

    Linear warm-up from `warmup_factor` of `base` over `warmup` epochs, then either a tenth of it after each epoch of
    `steps`, or half a cosine from the end of the warm-up down to a hundredth.
    """
    if warmup and progress < warmup:
        return base * (warmup_factor + (1 - warmup_factor) * progress / warmup)
    if schedule == "steps":
        return base * GAMMA ** bisect_right(steps, progress)
    share = (progress - warmup) / max(1e-9, epochs - warmup)
    return base * (COSINE_FLOOR + (1 - COSINE_FLOOR) * 0.5 * (1 + math.cos(math.pi * min(1.0, share))))
