"""The NFormer head (Wang et al., CVPR 2022) under the parameter names of the published code.

Letters: N images seen together, D features, H heads, l landmarks, K neighbors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from nformer_edge.core.errors import UsageError
from nformer_edge.core.spec import HeadSpec
from nformer_edge.ops.operators import operators

#: Rows that inference takes through a block's row-wise parts at once: what lies between them then stays in the CPU's
#: cache (1024 x 1024 floats) instead of going to memory and back.
_ROWS = 1024

#: What queries [H, N, D / H] are multiplied by, and what keys are: [H, D / H, R] each, None for the keys as they are.
Agents = tuple[Tensor, Tensor | None]


def is_captured() -> bool:
    """Whether what runs is being written down, for export or compilation, rather than computed."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()  # type: ignore[attr-defined,no-untyped-call]


def _is_whole() -> bool:
    """Whether all rows go at once: training keeps what lies between for its gradients, and a graph has no loop."""
    return torch.is_grad_enabled() or is_captured()


class Projection(nn.Module):
    """``x w + b`` with `w` as [in, out], the way the published weights are stored."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.empty(inputs, outputs))
        self.b = nn.Parameter(torch.zeros(outputs))
        nn.init.normal_(self.w, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.b, x, self.w)


class LayerNorm(nn.Module):
    """Layer normalization with the published names `g` and `b`, epsilon 1e-5 inside the root."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.g = nn.Parameter(torch.ones(size))
        self.b = nn.Parameter(torch.zeros(size))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.layer_norm(x, self.g.shape, self.g, self.b, 1e-5)  # a constant shape, for export


def _seen_by(agents: Agents, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    of_queries, of_keys = agents
    return q @ of_queries, k if of_keys is None else k @ of_keys


class Attention(nn.Module):
    """Landmark agent attention with the reciprocal neighbor softmax (sections 3.2 and 3.3).

    The affinity of all pairs is ``(q k_l^T)(k q_l^T)^T`` and never stored: the operators take its two factors. With no
    more landmarks than D / H these are ``a = q k_l^T`` and ``b = k q_l^T``, of length R = l. With more they are
    ``a = q (k_l^T q_l)`` and ``b = k``, of length R = D / H: the same affinity, so that many landmarks cost no more
    than D / H of them, in time or memory.
    """

    def __init__(self, spec: HeadSpec) -> None:
        super().__init__()
        self.heads, self.k, self.rule = spec.heads, spec.k, spec.rule
        self._landmarks_first = spec.landmarks > spec.features // spec.heads
        self.c_attn = Projection(spec.features, 3 * spec.features)
        self.c_proj = Projection(spec.features, spec.features)

    def factors(
        self,
        x: Tensor,  # [N, D]
        landmarks: Tensor,  # int [l]
    ) -> tuple[Tensor, Tensor, Tensor]:  # a [H, N, R], b [H, N, R], v [H, N, D / H]
        """The affinity's two factors, and the values."""
        if _is_whole():
            q, k, v = self._queries_keys_values(x)
            agents = self._agents(q.index_select(1, landmarks), k.index_select(1, landmarks))
            return *_seen_by(agents, q, k), v
        agents = self.agents(x.index_select(0, landmarks))
        parts = [self.factors_by(agents, part) for part in torch.split(x, _ROWS)]
        a, b, v = (torch.cat(columns, dim=1) for columns in zip(*parts, strict=True))
        return a, b, v

    def agents(
        self,
        x: Tensor,  # [l, D]
    ) -> Agents:
        """What landmarks, as the layer sees them, make of queries and keys."""
        q, k, _ = self._queries_keys_values(x)
        return self._agents(q, k)

    def factors_by(
        self,
        agents: Agents,
        x: Tensor,  # [N, D]
    ) -> tuple[Tensor, Tensor, Tensor]:  # a [H, N, R], b [H, N, R], v [H, N, D / H]
        """`factors` of rows whose landmarks are known."""
        q, k, v = self._queries_keys_values(x)
        return *_seen_by(agents, q, k), v

    def _agents(self, q: Tensor, k: Tensor) -> Agents:  # [H, l, D / H] each
        if self._landmarks_first:
            return k.transpose(1, 2) @ q, None
        return k.transpose(1, 2), q.transpose(1, 2)

    def _queries_keys_values(self, x: Tensor) -> tuple[Tensor, ...]:  # [N, D] -> three of [H, N, D / H]
        return tuple(self._split(t) for t in self.c_attn(x).chunk(3, dim=1))

    def _split(self, x: Tensor) -> Tensor:  # [N, D] -> [H, N, D / H]
        return x.reshape(x.shape[0], self.heads, x.shape[1] // self.heads).transpose(0, 1)

    def forward(
        self,
        x: Tensor,  # [N, D]
        landmarks: Tensor,  # int [l]
        neighbors: Tensor | None,  # int32 [1, N, K], or None under the affinity rule
    ) -> Tensor:  # [N, D], before `c_proj`
        a, b, v = self.factors(x, landmarks)
        if neighbors is None:
            neighbors = operators().row_top_k(a, b, self.k)
        y = operators().reciprocal_neighbor_attention(a, b, v, neighbors)
        return y.transpose(0, 1).flatten(1)


def _gelu(x: Tensor) -> Tensor:
    """In its tanh form. In a graph it is written with a power, which onnxruntime and TensorRT know for one operator."""
    if not is_captured():
        return nn.functional.gelu(x, approximate="tanh")
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x.pow(3))))


class Perceptron(nn.Module):
    """Two projections with GELU in its tanh form, as published."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.c_fc = Projection(features, 4 * features)
        self.c_proj = Projection(4 * features, features)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(_gelu(self.c_fc(x)))


class Block(nn.Module):
    """One post-norm layer."""

    def __init__(self, spec: HeadSpec) -> None:
        super().__init__()
        self.attn = Attention(spec)
        self.ln_1 = LayerNorm(spec.features)
        self.mlp = Perceptron(spec.features)
        self.ln_2 = LayerNorm(spec.features)

    def forward(self, x: Tensor, landmarks: Tensor, neighbors: Tensor | None) -> Tensor:
        y = self.attn(x, landmarks, neighbors)
        if _is_whole():
            return self.rows(x, y)
        return torch.cat([self.rows(*part) for part in zip(torch.split(x, _ROWS), torch.split(y, _ROWS), strict=True)])

    def rows(self, x: Tensor, y: Tensor) -> Tensor:
        """What follows attention; each row for itself."""
        x = self.ln_1(x + self.attn.c_proj(y))
        return self.ln_2(x + self.mlp(x))


def unit(x: Tensor) -> Tensor:  # [N, D] -> [N, D]
    return x / x.norm(dim=1, keepdim=True).clamp_min(1e-12)


class NFormer(nn.Module):
    """Features of N images in, features that know their neighbors out.

    The same input and landmarks give the same output: nothing is drawn inside.
    """

    def __init__(self, spec: HeadSpec) -> None:
        super().__init__()
        self.spec = spec
        self.h: Sequence[Block] = nn.ModuleList(Block(spec) for _ in range(spec.layers))  # type: ignore[assignment]
        self.bottleneck = nn.BatchNorm1d(spec.features)
        self.bottleneck.bias.requires_grad_(False)

    def forward(
        self,
        features: Tensor,  # [N, D]
        landmarks: Tensor,  # int32 [layers, l]
    ) -> Tensor:  # [N, D]
        """The inference output, after the BN neck.

        Raises:
            UsageError: if a shape does not fit, or a landmark is out of range.
            DataError: if a feature is not finite.
        """
        return self.bottleneck(self.encode(features, landmarks))

    def encode(self, features: Tensor, landmarks: Tensor) -> Tensor:
        """The output before the BN neck, [N, D]: where triplet and center loss act in training."""
        if not is_captured():
            check_inputs(self.spec, features, landmarks)
            if features.shape[0] == 0:
                return features
        neighbors = None
        if self.spec.rule == "features":
            rows = unit(features)[None]
            neighbors = operators().row_top_k(rows, rows, self.spec.k)
        x = scaled(features, self.spec)
        for layer, block in enumerate(self.h):
            x = block(x, landmarks[layer], neighbors)
        return x


def scaled(features: Tensor, spec: HeadSpec) -> Tensor:  # [N, D] -> [N, D]
    """Features brought to the length that `input_scale` names: what a head works on."""
    if spec.input_scale == "none":
        return features
    return unit(features) if spec.input_scale == "unit" else unit(features) * math.sqrt(spec.features)


def check_inputs(spec: HeadSpec, features: Tensor, landmarks: Tensor) -> None:
    """Raises UsageError unless these are features [N, D] and landmarks int [layers, l] of N images, for this head."""
    if features.dim() != 2 or features.shape[1] != spec.features:
        got, expected = f"shape {tuple(features.shape)}", f"[N, {spec.features}]"
        raise UsageError("features", got, expected, "Embed with this head's own backbone.")
    rows = features.shape[0]
    fits = landmarks.dim() == 2 and landmarks.shape[0] == spec.layers and landmarks.shape[1] >= 1
    if not fits or landmarks.dtype not in (torch.int32, torch.int64):
        got, expected = f"shape {tuple(landmarks.shape)} {landmarks.dtype}", f"int32 [{spec.layers}, l]"
        raise UsageError("landmarks", got, expected, "Call ops.contract.draw_landmarks.")
    if rows and not (int(landmarks.min()) >= 0 and int(landmarks.max()) < rows):
        got = f"{int(landmarks.min())}..{int(landmarks.max())}"
        raise UsageError("landmarks", got, f"0..{rows - 1}", "Draw them for N images.")
