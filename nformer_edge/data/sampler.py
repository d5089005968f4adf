"""PK sampling: P identities with K images each, for batch-hard losses (Hermans et al. 2017)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from nformer_edge.core.errors import DataError
from nformer_edge.core.spec import check_at_least


class PKSampler:
    """Yields batches of P x K image indices, P different identities in each; every identity comes in every epoch.

    An identity's images are shuffled and cut into groups of K; a last group that is too small is filled up from the
    identity's other images, with replacement where it has fewer than K. Batches take groups of P identities, those
    with most groups left first, until fewer than P identities have any: the epoch ends there.

    Args:
        pids: [N], the identity of each image; any integers.
        p: identities in a batch; at most as many as there are.
        k: images of each.
        seed: with `set_epoch`, decides everything.
    """

    def __init__(self, pids: Sequence[int] | np.ndarray, p: int = 16, k: int = 4, seed: int = 0) -> None:
        check_at_least("p", p, 1)
        check_at_least("k", k, 1)
        check_at_least("seed", seed, 0)
        self.pids = np.asarray(pids, dtype=np.int64)
        self.rows = [np.flatnonzero(self.pids == pid) for pid in np.unique(self.pids)]
        if len(self.rows) < 2:
            raise DataError(
                "training images", f"{len(self.rows)} identities", "at least two", "Add images of other people."
            )
        self.p, self.k, self.seed, self.epoch = min(p, len(self.rows)), k, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """The next iteration draws what belongs to `epoch`."""
        self.epoch = epoch

    def __len__(self) -> int:
        """Batches in this epoch."""
        return len(self._batches())

    def __iter__(self) -> Iterator[np.ndarray]:
        """Batches, int64 [P * K]; the K images of one identity stand together."""
        yield from self._batches()

    def _groups(self, rng: np.random.Generator, rows: np.ndarray) -> list[np.ndarray]:
        rows = rng.permutation(rows)
        left = len(rows) % self.k
        if left:
            # fill up with images that the last group lacks; an identity with fewer than K repeats its own
            pool = rows[:-left] if len(rows) > left else rows
            filler = rng.choice(pool, self.k - left, replace=len(pool) < self.k - left)
            rows = np.concatenate([rows, filler])
        return list(rows.reshape(-1, self.k))

    def _batches(self) -> list[np.ndarray]:
        rng = np.random.default_rng([self.seed, self.epoch])
        waiting = [self._groups(rng, rows) for rows in self.rows]
        untouched = set(range(len(waiting)))
        batches = []
        while True:
            left = [i for i, groups in enumerate(waiting) if groups]
            if len(left) < self.p:
                break
            # identities with most groups left go first, ties at random: leaves the fewest images over
            order = sorted(left, key=lambda i: (-len(waiting[i]), rng.random()))[: self.p]
            batches.append(np.concatenate([waiting[i].pop() for i in order]))
            untouched -= set(order)
        if untouched:
            chosen = sorted(untouched)
            others = rng.permutation([i for i in range(len(waiting)) if i not in untouched])[: self.p - len(chosen)]
            drawn = [
                waiting[i].pop() if waiting[i] else rng.choice(self.rows[i], self.k, replace=len(self.rows[i]) < self.k)
                for i in [*chosen, *(int(o) for o in others)]
            ]
            batches.append(np.concatenate(drawn))
        order_of = rng.permutation(len(batches))
        return [batches[i] for i in order_of]
