"""The published head (`model.nformer`) over a gallery that changes, without torch. Letters as in `gallery.live`.

Under the features rule lists are chosen once, and a row changes where its mutual neighbors do, layer by layer. Under
the affinity rule every layer and head chooses anew, by what the layer before made of the rows.

R is the length of the affinity's factors, H the heads.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from nformer_edge.gallery.live import BLOCK, STILL, LiveHead, unit
from nformer_edge.metrics.distance import row_blocks
from nformer_edge.ops import native
from nformer_edge.ops.contract import NO_NEIGHBOR


class NFormerLive(LiveHead):
    """See `LiveHead`. This one has the features rule, and the head's numbers for both."""

    def _shapes(self) -> dict[str, tuple[tuple[int, ...], type]]:
        spec = self.spec
        size, factor = spec.features // spec.heads, min(spec.landmarks, spec.features // spec.heads)
        shapes = {**super()._shapes(), "length": ((), np.float32), "mutual": ((spec.k,), np.int32)}
        shapes |= {f"x{layer}": ((spec.features,), np.float32) for layer in range(1, spec.layers)}
        for head in self._heads:
            shapes |= {f"a{head}": ((factor,), np.float32), f"b{head}": ((factor,), np.float32)}
            shapes[f"v{head}"] = (size,), np.float32
        return shapes

    @property
    def _heads(self) -> tuple[str, ...]:
        """Names of all heads of all layers."""
        return tuple(f"{layer}.{h}" for layer in range(self.spec.layers) for h in range(self.spec.heads))

    def _entered(self, features: np.ndarray) -> np.ndarray:
        return features

    def _held(self) -> np.ndarray:
        return self._rows["unit"][:-1] * self._rows["length"][:-1, None]

    def _prepared(self, entered: np.ndarray) -> dict[str, np.ndarray]:
        return {"unit": unit(entered), "length": np.linalg.norm(entered, axis=1)}

    @property
    def _computed(self) -> tuple[str, ...]:
        return (*super()._computed, *(f"{name}{head}" for name in "abv" for head in self._heads))

    @property
    def _given(self) -> tuple[str, ...]:
        both = ("k",) if self.spec.landmarks > self.spec.features // self.spec.heads else ("k", "q")
        return tuple(f"{name}{layer}" for name in both for layer in range(self.spec.layers))

    def _draw_lists(self, drawn: np.ndarray) -> None:
        self._landmarks["drawn_rows"] = drawn  # each layer's agents are of rows as it sees them
        self.settle()
        del self._landmarks["drawn_rows"]

    def _unlist(self, place: np.ndarray, head: str = "") -> None:
        super()._unlist(place)
        mutual = self._rows["mutual"]
        mutual[:] = np.where(mutual >= 0, place[mutual], np.int32(NO_NEIGHBOR))

    def _spread(self, size: int, moved: np.ndarray) -> None:
        near = np.ascontiguousarray(self._rows["names"][:size, : self.spec.k])
        met = self._put("mutual", *self._mutual(near, np.flatnonzero(moved | moved[near].any(axis=1))), size) | moved
        mutual = self._rows["mutual"][:size]

        def reached(layer: int, differs: np.ndarray) -> tuple[list[np.ndarray], np.ndarray]:
            return [near] * self.spec.heads, met | differs | (differs[mutual] & (mutual >= 0)).any(axis=1)

        self._relate(size, moved, reached)

    def _relate(
        self, size: int, moved: np.ndarray, reached: Callable[[int, np.ndarray], tuple[list[np.ndarray], np.ndarray]]
    ) -> None:
        """The layers of rows 0..size - 1, where something changes.

        Args:
            moved: bool [size], rows that are new, or one of whose lists changed.
            reached: of a layer and the rows whose factors or values differ from before, bool [size]: each head's lists
                [size, k], and the rows that attend otherwise now, bool [size].
        """
        spec, differs = self.spec, moved
        for layer in range(spec.layers):
            if f"k{layer}" not in self._landmarks:
                self._take_agents(layer, self._x(layer, self._landmarks["drawn_rows"][layer]))
            rows = np.flatnonzero(differs)
            factors = [self._factors(layer, self._x(layer, rows[part])) for part in row_blocks(len(rows), BLOCK)]
            differs = np.zeros(size, bool)
            for name, x in zip("abv", map(np.hstack, zip(*factors, strict=True)), strict=False):
                for h in range(spec.heads):
                    differs |= self._put(f"{name}{layer}.{h}", rows, x[h], size, STILL)
            lists, attends = reached(layer, differs)
            rows, y = np.flatnonzero(attends), []
            for h, near in enumerate(lists):
                a, b, v = (self._read(f"{name}{layer}.{h}", slice(size))[None] for name in "abv")
                y.append(native.reciprocal_neighbor_attention(a, b, v, near[None], rows=rows)[0])
            summed = np.hstack(y)
            blocks = [self._after(layer, self._x(layer, rows[p]), summed[p]) for p in row_blocks(len(rows), BLOCK)]
            x = np.concatenate(blocks) if blocks else summed
            if layer + 1 < spec.layers:
                differs = self._put(f"x{layer + 1}", rows, x, size, STILL)
            else:
                self._leave(rows, self._neck(x), size)

    def _mutual(self, near: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:  # [n, k], [P]
        """`rows`, and of each the neighbors that chose it, in ascending order, -1 for the others."""
        names = np.empty((len(rows), near.shape[1]), np.int32)
        for part in row_blocks(len(rows), BLOCK):
            own = near[rows[part]]
            chose = (near[own] == rows[part, None, None]).any(axis=2) & (own >= 0)
            names[part] = np.sort(np.where(chose, own, np.int32(NO_NEIGHBOR)), axis=1)
        return rows, names

    def _quick(self, asked: dict[str, np.ndarray]) -> np.ndarray:
        unit, rows = asked["unit"], self._rows["unit"]
        met = self._met(unit, unit, rows[: len(self)], rows, "scores")
        return self._alone(asked, lambda layer, h, a, b: met)

    def _alone(
        self,
        asked: dict[str, np.ndarray],
        met: Callable[[int, int, np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]],
    ) -> np.ndarray:  # [B, N]
        """Queries among rows that stay as they are.

        Args:
            met: of a layer, a head and the queries' factors there, `_met`.
        """
        size, x = len(self), self._scaled(asked["unit"], asked["length"])
        for layer in range(self.spec.layers):
            a, b, v = self._factors(layer, x)
            y = []
            for h in range(self.spec.heads):
                near, mutual = met(layer, h, a[h], b[h])
                keys = np.concatenate([self._read(f"b{layer}.{h}", near), b[h][:, None]], axis=1)
                values = np.concatenate([self._read(f"v{layer}.{h}", near), v[h][:, None]], axis=1)
                y.append(_attended(a[h], keys, values, mutual))
            x = self._after(layer, x, np.hstack(y))
        return self._scored(self._neck(x), size)

    def _met(
        self, a: np.ndarray, b: np.ndarray, columns: np.ndarray, rows: np.ndarray, lists: str
    ) -> tuple[np.ndarray, np.ndarray]:
        """Whom queries with factors a, b [B, R] choose among `columns` [N, R], and who of them chooses back.

        Args:
            rows: [N, R], the other factor of the gallery.
            lists: name of the scores in the gallery's lists, whose last one a query must exceed.

        Returns:
            int32 [B, k], and bool [B, k + 1]: the last is the query itself.
        """
        k, kept, products = self.spec.k, self._rows[lists][:, self.spec.k - 1], a @ columns.T
        near, mutual = np.full((len(a), k), NO_NEIGHBOR, np.int32), np.zeros((len(a), k + 1), bool)
        for i, query in enumerate(a):
            names, scores = self._nearest(query, products[i], k, columns)
            own = native.pair_scores(query[None, None], b[i][None, None], np.zeros((1, 1, 1), np.int32))[0, 0, 0]
            itself = len(names) < k or own > scores[-1]
            if itself and len(names) == k:
                names = names[:-1]
            back = native.pair_scores(b[i][None, None], rows[None], names[None, None], threads=1)[0, 0]
            near[i, : len(names)], mutual[i, : len(names)] = names, back > kept[names]
            mutual[i, k] = itself
        return near, mutual

    # The head's numbers.

    def _scaled(self, unit_rows: np.ndarray, length: np.ndarray) -> np.ndarray:
        if self.spec.input_scale == "none":
            return unit_rows * length[:, None]
        return unit_rows if self.spec.input_scale == "unit" else unit_rows * np.float32(math.sqrt(self.spec.features))

    def _x(self, layer: int, rows: np.ndarray) -> np.ndarray:  # [P] -> [P, D]
        """What a layer sees."""
        if layer:
            return self._read(f"x{layer}", rows)
        return self._scaled(self._rows["unit"][rows], self._rows["length"][rows])

    def _projected(self, name: str, x: np.ndarray) -> np.ndarray:
        return x @ self.numbers[f"{name}.w"] + self.numbers[f"{name}.b"]

    def _queries_keys_values(self, layer: int, x: np.ndarray) -> np.ndarray:  # [P, D] -> [3, H, P, D / H]
        heads = self._projected(f"h.{layer}.attn.c_attn", x).reshape(len(x), 3, self.spec.heads, -1)
        return np.ascontiguousarray(heads.transpose(1, 2, 0, 3))

    def _take_agents(self, layer: int, x: np.ndarray) -> None:  # [l, D]
        """As `model.nformer.Attention.agents`: what queries are multiplied by, and keys where they are."""
        q, k, _ = self._queries_keys_values(layer, x)
        if self.spec.landmarks > self.spec.features // self.spec.heads:
            self._landmarks[f"k{layer}"] = k.transpose(0, 2, 1) @ q
        else:
            self._landmarks |= {f"k{layer}": k.transpose(0, 2, 1), f"q{layer}": q.transpose(0, 2, 1)}

    def _factors(self, layer: int, x: np.ndarray) -> tuple[np.ndarray, ...]:  # a, b, v, each [H, P, ...]
        q, k, v = self._queries_keys_values(layer, x)
        of_keys = self._landmarks.get(f"q{layer}")
        return q @ self._landmarks[f"k{layer}"], k if of_keys is None else k @ of_keys, v

    def _after(self, layer: int, x: np.ndarray, y: np.ndarray) -> np.ndarray:  # [P, D] each
        """What follows attention."""
        x = self._norm(f"h.{layer}.ln_1", x + self._projected(f"h.{layer}.attn.c_proj", y))
        hidden = self._projected(f"h.{layer}.mlp.c_fc", x)
        bent = hidden * hidden  # `hidden**3` takes five times as long as the matrix product before it
        bent *= np.float32(0.044715 * math.sqrt(2 / math.pi))
        bent += np.float32(math.sqrt(2 / math.pi))
        bent *= hidden
        np.tanh(bent, out=bent)
        bent += 1
        bent *= np.float32(0.5)
        hidden *= bent
        return self._norm(f"h.{layer}.ln_2", x + self._projected(f"h.{layer}.mlp.c_proj", hidden))

    def _norm(self, name: str, x: np.ndarray) -> np.ndarray:
        x = x - x.mean(axis=1, keepdims=True)
        x /= np.sqrt((x * x).mean(axis=1, keepdims=True) + np.float32(1e-5))
        return x * self.numbers[f"{name}.g"] + self.numbers[f"{name}.b"]

    def _neck(self, x: np.ndarray) -> np.ndarray:
        """After the batch norm, at L2 norm 1."""
        mean, variance, weight, bias = (
            self.numbers[f"bottleneck.{name}"] for name in ("running_mean", "running_var", "weight", "bias")
        )
        return unit((x - mean) / np.sqrt(variance + np.float32(1e-5)) * weight + bias)


def _attended(a: np.ndarray, keys: np.ndarray, values: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Softmax of a [B, R] with keys [B, K, R] where `counts` [B, K], then the sum of values [B, K, D]; else 0."""
    scores = np.where(counts, np.einsum("br,bkr->bk", a, keys) / math.sqrt(values.shape[2]), -np.inf)
    highest = scores.max(axis=1, keepdims=True)
    weights = np.where(counts, np.exp(scores - np.where(np.isfinite(highest), highest, 0)), 0)
    weights /= np.maximum(weights.sum(axis=1, keepdims=True), np.float32(1e-30))
    return np.einsum("bk,bkd->bd", weights.astype(np.float32), values)
